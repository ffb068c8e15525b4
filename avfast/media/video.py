"""Frames out of video files, one after the other with their timestamps.

Shapes: H, W the height and width of a frame in its stored pixels (non-square ones are not stretched). Colour frames are
(H,W,3) RGB, grey ones (H,W), both uint8. Times are seconds on the file's own clock, which need not start at 0, and
always increase. Reading holds a handful of frames, whatever the length of the film, and never touches the network."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from avfast.errors import InputError
from avfast.media.container import decode_frames, has_timestamps, open_stream
from avfast.media.images import FitMode, Frame, FrameResizer, Pixels

# how many later frames are read before a frame gets its time: some AVI files swap the timestamps of neighbours
_REORDER = 4


class VideoInfo(NamedTuple):
    """What a file states about itself, or None: its mean frame rate, and the duration of the video, or of the whole
    file if only that is stated."""

    fps: float | None
    seconds: float | None


class _TimedFrame(NamedTuple):
    # av.VideoFrame, whose stubs know neither display matrix nor absent timestamps
    frame: Any
    number: int
    time: float | None


def probe_video(path: str | Path) -> VideoInfo:
    """Frame rate and duration as the file states them. Raises InputError if it cannot be opened as a video."""
    with open_stream(path, "video") as (container, stream):
        rate = _stated_rate(container, stream)
        seconds = _stated_seconds(container, stream) or (container.duration or 0) / av.time_base or None
        return VideoInfo(None if rate is None else float(rate), seconds)


def read_video(
    path: str | Path,
    *,
    fps: float | None = None,
    start: float = 0.0,
    short_side: int | None = None,
    size: tuple[int, int] | None = None,
    fit: FitMode = "stretch",
    grey: bool = False,
) -> Iterator[Frame]:
    """Decode a file's first video stream (cover pictures do not count), upright as its rotation says.

    fps: choose for each of the times first + start + j / fps the frame nearest to it, by timestamps; frames repeat if
    the film is slower and are left out if it is faster. start: seconds after the first frame, needs fps.
    short_side or size (width, height): resize as `avfast.media.images.resize` does. fit: what happens to a film of
    other proportions than size: it is stretched, loses its edges evenly (`crop`), or is put between black bars
    (`letterbox`). grey: BT.601 luma of the RGB frame. 10-bit films become 8-bit, alpha is dropped.

    If timestamps are missing or run backwards, times continue from the last good one at the rate that the file states.
    Raises InputError, during iteration, for a file that cannot be opened, has no video stream or no frame, is damaged,
    ends well before the duration it states, changes its frame size (without `size`), or whose frames have no time
    although fps is given."""
    with open_stream(path, "video") as (container, stream):
        # more decoder threads give the same frames faster
        stream.thread_type = "AUTO"
        frames = _with_times(decode_frames(path, container, stream), container, stream)
        frames = _check_duration(path, frames, container, stream)
        if fps is not None:
            frames = _at_rate(path, frames, fps, start)
        previous = image = matrix = None
        resizer = FrameResizer(short_side, size, fit, grey)
        for timed in frames:
            # only of the first frame: reading side data makes a cycle of references, so that every frame would stay in
            # memory until Python's collector runs
            matrix = _display_matrix(timed.frame) if matrix is None else matrix
            # repeated frames share their pixels
            if timed.frame is not previous:
                # one thread: beside busy cores swscale's own pool took 17 ms for a 480x360 frame, one thread 3
                pixels = timed.frame.to_ndarray(format="rgb24", threads=1)
                image = resizer(_rotate(pixels, *matrix), f"{path}: frame {timed.number}")
                previous = timed.frame
            assert image is not None
            yield Frame(image, timed.number, timed.time)


def _with_times(frames: Iterable[Any], container: Any, stream: Any) -> Iterator[_TimedFrame]:
    """Number the frames and give them increasing times, or None if the file states nothing. The k-th frame shown gets
    the k-th smallest timestamp, whatever order the file gives them in."""
    file_has_timestamps = has_timestamps(container)
    rate = _stated_rate(container, stream)
    waiting: deque[tuple[Any, bool]] = deque()
    timestamps: list[float] = []
    number, last = 0, -math.inf

    def pop_oldest() -> _TimedFrame:
        nonlocal number, last
        frame, has_timestamp = waiting.popleft()
        time = heapq.heappop(timestamps) if has_timestamp else None
        if time is None or time <= last:
            # continue at the stated rate, but stay below the next timestamp: one bad timestamp must not shift the rest
            guesses = [] if rate is None else [last + float(1 / rate) if number else 0.0]
            if number and timestamps and timestamps[0] > last > -math.inf:
                guesses.append((last + timestamps[0]) / 2)
            time = min(guesses, default=None)
        last = -math.inf if time is None else time
        number += 1
        return _TimedFrame(frame, number - 1, time)

    for frame in frames:
        timestamp = frame.pts if frame.pts is not None else frame.dts
        has_timestamp = file_has_timestamps and timestamp is not None
        if has_timestamp:
            heapq.heappush(timestamps, float(timestamp * (frame.time_base or stream.time_base)))
        waiting.append((frame, has_timestamp))
        if len(waiting) > _REORDER:
            yield pop_oldest()
    while waiting:
        yield pop_oldest()


def _check_duration(
    path: str | Path, frames: Iterable[_TimedFrame], container: Any, stream: Any
) -> Iterator[_TimedFrame]:
    """Pass the frames on. Raises InputError after the last if the film ends long before the stated duration."""
    seconds, rate = _stated_seconds(container, stream), _stated_rate(container, stream)
    first = time = None
    for timed in frames:
        time = timed.time
        first = time if first is None else first
        yield timed
    if seconds is None or first is None or time is None:
        return
    # some files count their duration from 0, others from their first timestamp
    found = max(time, time - first) + (0 if rate is None else float(1 / rate))
    if seconds - found > max(1.0, 0.05 * seconds):
        raise InputError(f"{path}: truncated, it ends after {found:.1f} s of {seconds:.1f} s")


def _at_rate(path: str | Path, frames: Iterable[_TimedFrame], fps: float, start: float) -> Iterator[_TimedFrame]:
    """For each time first + start + j / fps the frame nearest to it, the earlier of two equally near ones. The last
    frame stands for half the gap before it too, so that a rate equal to the film's own keeps every frame."""
    # Matroska rounds times to milliseconds: a difference of half of one counts as equally near
    tolerance = 5e-4
    previous: _TimedFrame | None = None
    first = end = 0.0
    count = 0
    for timed in frames:
        if timed.time is None:
            raise InputError(f"{path}: it has no timestamps and states no frame rate, so fps cannot choose its frames")
        if previous is None:
            first, end = timed.time + start, timed.time
        else:
            assert previous.time is not None
            middle = (previous.time + timed.time) / 2
            # three rounded times make up the end, so it gets two tolerances more
            end = timed.time + (timed.time - previous.time) / 2 + 2 * tolerance
            while (time := first + count / fps) <= middle + tolerance:
                yield previous._replace(time=time)
                count += 1
        previous = timed
    while previous is not None and (time := first + count / fps) <= end + tolerance:
        yield previous._replace(time=time)
        count += 1


def _stated_rate(container: Any, stream: Any) -> Fraction | None:
    # for a format without timestamps FFmpeg makes up an average rate; the one in the coded pictures is real
    return (stream.average_rate if has_timestamps(container) else stream.codec_context.framerate) or None


def _stated_seconds(container: Any, stream: Any) -> float | None:
    if not has_timestamps(container):
        return None
    if stream.duration:
        return float(stream.duration * stream.time_base)
    # Matroska and WebM state one duration for all streams, and the sound may be the longer one
    if container.duration and not container.streams.audio:
        return container.duration / av.time_base
    return None


def _display_matrix(frame: Any) -> tuple[int, int, int, int]:
    """(a, b, c, d), where pixel (x, y) belongs at (a x + c y, b x + d y); by default the identity."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(data, "=i4", 5).tolist()
    return a, b, c, d


def _rotate(image: Pixels, a: int, b: int, c: int, d: int) -> Pixels:
    """Turned and mirrored as the display matrix says, by the nearest multiple of a right angle."""
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
