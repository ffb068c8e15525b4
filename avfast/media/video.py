"""Frames out of videos and image folders, one after the other with their timestamps, and frames into an mp4 file.

Shapes: H, W the height and width of a frame in its stored pixels (non-square ones are not stretched). Colour frames are
(H,W,3) RGB, grey ones (H,W), both uint8. Times are seconds on the file's own clock, which need not start at 0, and
always increase. Reading holds a handful of frames, whatever the length of the film, and never touches the network.
"""

from __future__ import annotations

import heapq
import importlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from avfast.errors import InputError
from avfast.files.atomic import replacing
from avfast.media.container import decoded, has_timestamps, opened

Pixels = NDArray[np.uint8]
FitMode = Literal["stretch", "crop", "letterbox"]

# a timestamp is sorted in among those of the next frames: some AVI files give frames of type B their neighbour's
_REORDER = 4
# mp4's usual clock: 24, 25, 30 and 30000/1001 frames per second are whole numbers of its ticks
_TICK = Fraction(1, 90_000)
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)


class Frame(NamedTuple):
    """One frame of a film or of an image folder."""

    image: Pixels
    """(H,W,3) RGB, or (H,W) where grey was asked for."""
    number: int
    """Place in the file, from 0; it repeats or leaves out where frames were chosen at another rate."""
    time: float | None
    """Seconds: the frame's timestamp, or where frames were chosen at a rate the time it stands for. None: the file has
    neither timestamps nor a frame rate, or is an image."""


class VideoInfo(NamedTuple):
    """What a file says about itself; None is what it does not say."""

    fps: float | None
    """Mean frame rate."""
    seconds: float | None
    """Duration of the video, or of the whole file where it is all that is stated."""


class _Timed(NamedTuple):
    # av.VideoFrame, whose stubs know neither display matrix nor absent timestamps
    frame: Any
    number: int
    time: float | None


def probe_video(path: str | Path) -> VideoInfo:
    """Frame rate and duration as the file states them. Raises InputError where it cannot be opened as a video."""
    with opened(path, "video") as (container, stream):
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

    fps: choose for each of the times first + start + j / fps the frame nearest to it, by timestamps; frames repeat
    where the film is slower and are left out where it is faster; start, in seconds after the first frame, wants fps.
    short_side or size (width, height): resize as `resize` does. fit: what happens to a film of other proportions than
    size: it is stretched, or loses its edges evenly (`crop`), or is put between black bars (`letterbox`). grey: BT.601
    luma of the RGB frame. 10-bit films become 8-bit, alpha is dropped.

    Where timestamps are missing or run backwards, the rate that the file states goes on from the last good one.
    Raises InputError, while it is iterated, for a file that cannot be opened, has no video stream or no frame, is
    damaged, ends well before the duration it states, changes its frame size (without `size`), or whose frames have no
    time while fps asks for one.
    """
    with opened(path, "video") as (container, stream):
        # a decoder's threads change nothing but the speed
        stream.thread_type = "AUTO"
        frames = _complete(path, _timed(decoded(path, container, stream), container, stream), container, stream)
        if fps is not None:
            frames = _at_rate(path, frames, fps, start)
        previous = image = matrix = None
        fitted = _Fit(short_side, size, fit)
        for timed in frames:
            # asking every frame would keep them all until Python's collector runs: their side data refer to them
            matrix = _display_matrix(timed.frame) if matrix is None else matrix
            # repeated frames share their pixels
            if timed.frame is not previous:
                # one thread: beside busy cores swscale's own pool took 17 ms for a 480x360 frame, one thread 3
                pixels = timed.frame.to_ndarray(format="rgb24", threads=1)
                image = fitted(f"{path}: frame {timed.number}", _upright(pixels, *matrix), grey)
                previous = timed.frame
            assert image is not None
            yield Frame(image, timed.number, timed.time)


def read_images(
    paths: Sequence[str | Path],
    *,
    short_side: int | None = None,
    size: tuple[int, int] | None = None,
    grey: bool = False,
) -> Iterator[Frame]:
    """Image files in the given order as the frames of one film without times; short_side, size and grey as in
    `read_video`, upright as their EXIF orientation says, alpha dropped, 16-bit images as their upper 8 bits.

    Raises InputError, while it is iterated, for a file that is no image or truncated, or an image of another size.
    """
    fit = _Fit(short_side, size)
    for number, path in enumerate(paths):
        yield Frame(fit(str(path), _read_image(path), grey), number, None)


def target_size(
    height: int, width: int, short_side: int | None = None, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) after resizing to size (width, height), or to a short side with the proportions kept."""
    if size is not None:
        return size[1], size[0]
    if short_side is None:
        return height, width
    scale = short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H,W) or (H,W,C), uint8 or float32: area averages where it shrinks, linear where it grows. Where OpenCV is
    not installed (avfast.runtime does without), FFmpeg's area filter, uint8 only."""
    h, w = image.shape[:2]
    # an axis at a time: OpenCV's area filter becomes nearest-like for both as soon as one of them grows
    smaller = min(h, height), min(w, width)
    if (h, w) == (height, width):
        return image
    cv2 = _opencv()
    if cv2 is None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24" if image.ndim == 3 else "gray")
        return frame.reformat(width=width, height=height, interpolation="AREA", threads=1).to_ndarray()
    if smaller != (h, w):
        image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    if smaller != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def _opencv() -> Any:
    """OpenCV's module, None where it is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError:
        return None


@contextmanager
def video_writer(
    path: str | Path, fps: float = 25.0, sound: tuple[NDArray[np.int16], int] | None = None
) -> Iterator[Callable[[Pixels, float], None]]:
    """Write an mp4 file (H.264): the block gets a function `write(image, time)` and calls it once per frame.

    image: (H,W,3) RGB uint8, all of one size; an odd side gets its last row or column twice, because players want even
    ones. time: seconds, increasing. fps: what the file says of itself and how long the last frame stays; the times
    decide the rest. sound: mono samples (N,) int16 and their rate, the first at time 0, whole as an AAC track. The file
    appears under its name when the block ends well. Raises InputError when no frame was written, OSError when the file
    cannot be.
    """
    with replacing(path) as temporary, av.open(f"file:{temporary}", "w", format="mp4") as container:
        stream: Any = None
        track: _SoundTrack | None = None

        def write(image: Pixels, time: float) -> None:
            nonlocal stream, track
            h, w = image.shape[:2]
            if h % 2 or w % 2:
                image = np.pad(image, ((0, h % 2), (0, w % 2), (0, 0)), mode="edge")
            if stream is None:
                # without B-frames the file's stated duration is right for uneven times too
                options = {"crf": "16", "preset": "veryfast", "bf": "0"}
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10**6), options=options)
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
                context = stream.codec_context
                context.time_base = _TICK
                # BT.709, limited range, written into the file: players guess otherwise, by the size
                context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
                track = None if sound is None else _SoundTrack(container, *sound)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", threads=1)
            frame.pts, frame.time_base = round(time / _TICK), _TICK
            frame.duration = round(1 / (fps * _TICK))
            container.mux(stream.encode(frame))
            if track is not None:
                track.write(time + 1 / fps)

        yield write
        if stream is None:
            raise InputError(f"{path}: no frame was written")
        if track is not None:
            track.write(math.inf)
        container.mux(stream.encode())


class _SoundTrack:
    """A mono AAC track, written up to one time after another, so that sound and frames lie side by side in the file."""

    def __init__(self, container: Any, waveform: NDArray[np.int16], rate: int) -> None:
        self._container, self._waveform, self._rate, self._done = container, waveform, rate, 0
        # AAC knows some rates only; the next one above loses nothing
        coded = next((r for r in _AAC_RATES if r >= rate), _AAC_RATES[-1])
        self._stream = container.add_stream("aac", rate=coded, layout="mono", options={"b": "128k"})
        self._resampler = av.AudioResampler(format="fltp", layout="mono", rate=coded)

    def write(self, until: float) -> None:
        """The samples before that time, in seconds; infinity: the rest, and the end."""
        end = len(self._waveform) if math.isinf(until) else min(len(self._waveform), math.ceil(until * self._rate))
        if end > self._done:
            part = av.AudioFrame.from_ndarray(self._waveform[None, self._done : end], format="s16", layout="mono")
            part.rate, part.pts, part.time_base = self._rate, self._done, Fraction(1, self._rate)
            self._encode(self._resampler.resample(part))
            self._done = end
        if math.isinf(until):
            self._encode(self._resampler.resample(None))
            self._container.mux(self._stream.encode())

    def _encode(self, frames: Iterable[Any]) -> None:
        for frame in frames:
            self._container.mux(self._stream.encode(frame))


class _Fit:
    """Turns decoded images into frames of one size: grey first, which is a third of the work, then resized."""

    def __init__(self, short_side: int | None, size: tuple[int, int] | None, mode: FitMode = "stretch") -> None:
        self._short_side, self._size, self._mode = short_side, size, mode
        self._first: tuple[int, int] | None = None

    def __call__(self, where: str, image: Pixels, grey: bool) -> Pixels:
        h, w = image.shape[:2]
        first_h, first_w = self._first = self._first or (h, w)
        if (h, w) != self._first and self._size is None:
            raise InputError(f"{where} is {w}x{h} pixels, the first one {first_w}x{first_h}: give a size for all")
        if grey:
            cv2 = _opencv()
            if cv2 is None:
                image = np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
            else:
                image = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)
        height, width = target_size(h, w, self._short_side, self._size)
        if self._mode == "letterbox":
            scale = min(height / h, width / w)
            inner = max(1, round(h * scale)), max(1, round(w * scale))
            canvas = np.zeros((height, width, *image.shape[2:]), np.uint8)
            top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
            canvas[top : top + inner[0], left : left + inner[1]] = resize(image, *inner)
            return canvas
        if self._mode == "crop":
            scale = max(height / h, width / w)
            kept = min(h, max(1, round(height / scale))), min(w, max(1, round(width / scale)))
            top, left = (h - kept[0]) // 2, (w - kept[1]) // 2
            image = image[top : top + kept[0], left : left + kept[1]]
        return resize(image, height, width)


def _timed(frames: Iterable[Any], container: Any, stream: Any) -> Iterator[_Timed]:
    """Number the frames and give them increasing times, or None where the file tells nothing.

    The k-th frame shown has the k-th smallest timestamp, whatever order the file gives them in.
    """
    stamped = has_timestamps(container)
    rate = _stated_rate(container, stream)
    waiting: deque[tuple[Any, bool]] = deque()
    stamps: list[float] = []
    number, last = 0, -math.inf

    def oldest() -> _Timed:
        nonlocal number, last
        frame, has_stamp = waiting.popleft()
        time = heapq.heappop(stamps) if has_stamp else None
        if time is None or time <= last:
            # go on at the stated rate, but stay before the next stamp: one bad stamp must not shift all that follow
            guesses = [] if rate is None else [last + float(1 / rate) if number else 0.0]
            guesses += [(last + stamps[0]) / 2] if number and stamps and stamps[0] > last > -math.inf else []
            time = min(guesses, default=None)
        last = -math.inf if time is None else time
        number += 1
        return _Timed(frame, number - 1, time)

    for frame in frames:
        stamp = frame.pts if frame.pts is not None else frame.dts
        has_stamp = stamped and stamp is not None
        if has_stamp:
            heapq.heappush(stamps, float(stamp * (frame.time_base or stream.time_base)))
        waiting.append((frame, has_stamp))
        if len(waiting) > _REORDER:
            yield oldest()
    while waiting:
        yield oldest()


def _complete(path: str | Path, frames: Iterable[_Timed], container: Any, stream: Any) -> Iterator[_Timed]:
    """Pass the frames on; raise at the end when it came long before the file's stated one."""
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


def _at_rate(path: str | Path, frames: Iterable[_Timed], fps: float, start: float) -> Iterator[_Timed]:
    """For each time first + start + j / fps the frame nearest to it, the earlier of two equally near ones.

    The last frame stands for half the gap before it too, so that a rate chosen equal to the film's keeps every frame.
    """
    # Matroska counts in milliseconds: what half of one decides counts as equally near
    slack = 5e-4
    previous: _Timed | None = None
    first = end = 0.0
    done = 0
    for timed in frames:
        if timed.time is None:
            raise InputError(f"{path}: it has no timestamps and states no frame rate, so fps cannot choose its frames")
        if previous is None:
            first, end = timed.time + start, timed.time
        else:
            assert previous.time is not None
            middle = (previous.time + timed.time) / 2
            # with three such roundings in it
            end = timed.time + (timed.time - previous.time) / 2 + 2 * slack
            while (time := first + done / fps) <= middle + slack:
                yield previous._replace(time=time)
                done += 1
        previous = timed
    while previous is not None and (time := first + done / fps) <= end + slack:
        yield previous._replace(time=time)
        done += 1


def _stated_rate(container: Any, stream: Any) -> Fraction | None:
    # the rate that the coded pictures themselves give is no invention
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


def _upright(image: Pixels, a: int, b: int, c: int, d: int) -> Pixels:
    """Turned and mirrored by the nearest multiple of a right angle."""
    if abs(b) > abs(a):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _read_image(path: str | Path) -> Pixels:
    """RGB pixels (H,W,3)."""
    from PIL import Image, ImageOps

    # not cv2.imread, which fills the missing half of a truncated JPEG with grey and says nothing
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                # Pillow's conversion would clip 16 bits at 255
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise InputError(f"{path}: {reason.replace(f' {str(path)!r}', '')}") from None
