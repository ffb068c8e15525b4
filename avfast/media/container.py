"""One stream of a media file, opened and decoded by FFmpeg, which never touches the network; errors are one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import av
import av.error
from av.format import Flags
from av.stream import Disposition

from avfast.errors import InputError


@contextmanager
def open_stream(path: str | Path, kind: Literal["video", "audio"]) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of that kind; cover pictures do not count. Raises InputError."""
    with _one_line_errors(path):
        # `file:` and the whitelist: a name with a colon is still a file, and a playlist opens nothing on the network
        container: Any = av.open(f"file:{path}", container_options={"protocol_whitelist": "file"})
    with container:
        for stream in getattr(container.streams, kind):
            if not stream.disposition & Disposition.attached_pic:
                yield container, stream
                return
        raise InputError(f"{path}: no {'video stream' if kind == 'video' else 'sound track'} in it")


@contextmanager
def _one_line_errors(path: str | Path, after: str = "") -> Iterator[None]:
    """Turn FFmpeg's errors into InputErrors that hold the file and the reason only."""
    try:
        yield
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: {error.strerror}{after}") from None


def decode_frames(path: str | Path, container: Any, stream: Any) -> Iterator[Any]:
    """Every frame in the order of display. Raises InputError for a damaged stream and for one without a frame."""
    count = 0
    first_error: av.error.FFmpegError | None = None
    packets = container.demux(stream)
    what = "" if stream.type == "video" else " of the sound"
    while True:
        frames: list[Any] = []
        with _one_line_errors(path, f", after frame {count}{what}"):
            try:
                packet = next(packets, None)
                if packet is None:
                    break
                frames = packet.decode()
            except av.error.InvalidDataError as error:
                # a recording that begins between two key frames starts with packets that cannot be decoded
                if count:
                    raise
                first_error = first_error or error
        count += len(frames)
        yield from frames
    if not count:
        reason = f" that can be decoded: {first_error.strerror}" if first_error else ""
        raise InputError(f"{path}: no frame{what} in it{reason}")


def has_timestamps(container: Any) -> bool:
    """Whether the file's format has timestamps."""
    # raw H.264, MJPEG ...: FFmpeg makes up 25 frames per second for them, and timestamps to match
    return not container.format.flags & Flags.no_timestamps.value
