"""Frames, and sound if there is any, into an mp4 file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from avfast.errors import InputError
from avfast.files.atomic import replacing
from avfast.media.images import Pixels

# mp4's usual clock: 24, 25, 30 and 30000/1001 frames per second are whole numbers of its ticks
_TICK = Fraction(1, 90_000)
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


@contextmanager
def video_writer(
    path: str | Path, fps: float = 25.0, sound: tuple[NDArray[np.int16], int] | None = None
) -> Iterator[Callable[[Pixels, float], None]]:
    """Write an mp4 file (H.264): the block gets a function `write(image, time)` and calls it once per frame. image:
    (H,W,3) RGB uint8, all of one size; an odd side gets its last row or column twice, because players want even ones.
    time: seconds, increasing. fps: the rate that the file states, and how long the last frame stays. sound: mono
    samples (N,) int16, which become an AAC track, and their rate; the first is at time 0. The file appears when the
    block ends without an error. Raises InputError if no frame was written, OSError if the file cannot be written."""
    with replacing(path) as temporary, av.open(f"file:{temporary}", "w", format="mp4") as container:
        stream: Any = None
        track: _SoundTrack | None = None

        def write(image: Pixels, time: float) -> None:
            nonlocal stream, track
            h, w = image.shape[:2]
            if h % 2 or w % 2:
                image = np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            if stream is None:
                stream = _add_video_stream(container, fps, *image.shape[:2])
                track = None if sound is None else _SoundTrack(container, *sound)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", threads=1)
            frame.pts, frame.time_base = round(time / _TICK), _TICK
            frame.duration = round(1 / (fps * _TICK))
            container.mux(stream.encode(frame))
            if track is not None:
                track.write_until(time + 1 / fps)

        yield write
        if stream is None:
            raise InputError(f"{path}: no frame was written")
        if track is not None:
            track.finish()
        container.mux(stream.encode())


def _add_video_stream(container: Any, fps: float, height: int, width: int) -> Any:
    # without B-frames the file's stated duration is right for uneven times too
    options = {"crf": "16", "preset": "veryfast", "bf": "0"}
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10**6), options=options)
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuv420p"
    context = stream.codec_context
    context.time_base = _TICK
    # BT.709, limited range, stated in the file: otherwise players guess it from the size
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
    return stream


class _SoundTrack:
    """A mono AAC track, written piece by piece, so that sound and frames of the same time lie side by side in the file.
    waveform: (N,) int16 at `rate` samples per second."""

    def __init__(self, container: Any, waveform: NDArray[np.int16], rate: int) -> None:
        self._container, self._waveform, self._rate, self._written = container, waveform, rate, 0
        # AAC has only these rates; the next higher one loses nothing
        coded_rate = next((r for r in _AAC_RATES if r >= rate), _AAC_RATES[-1])
        self._stream = container.add_stream("aac", rate=coded_rate, layout="mono", options={"b": "128k"})

    def write_until(self, time: float) -> None:
        """Write the samples before a time, in seconds."""
        end = math.ceil(min(time * self._rate, len(self._waveform)))
        if end > self._written:
            part = av.AudioFrame.from_ndarray(self._waveform[None, self._written : end], format="s16", layout="mono")
            part.rate, part.pts, part.time_base = self._rate, self._written, Fraction(1, self._rate)
            self._container.mux(self._stream.encode(part))
            self._written = end

    def finish(self) -> None:
        """Write the rest of the samples and what the encoder still holds."""
        self.write_until(math.inf)
        self._container.mux(self._stream.encode())
