"""Sound out of films and sound files: the first track, mixed to mono, at one rate, placed on the file's clock.

Sample n of a track at `rate` samples a second belongs to the time n / rate on the file's own clock, which is also the
clock of the frames of `avfast.media.video`; it need not begin at 0. Timestamps decide where sound lies: a gap becomes
silence, of an overlap only the first copy is used, an encoder's priming samples are dropped."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from avfast.errors import InputError
from avfast.media.container import decode_frames, has_timestamps, open_stream

Samples = NDArray[np.int16]

# seconds between a timestamp and the end of the samples before it from which on it is a gap or an overlap; less is
# rounding (Matroska counts in milliseconds) or a muxer's jitter
_JITTER = 0.02


class Sound(NamedTuple):
    """A piece of a mono track: samples (N,) int16, `rate` of them a second; the first at the time `start` on the file's
    clock, in seconds."""

    samples: Samples
    rate: int
    start: float


def read_sound(path: str | Path, rate: int, *, start: float | None = None, seconds: float | None = None) -> Sound:
    """The first sound track of a film or sound file: all of it, or `seconds` of it from `start`, a time on the file's
    clock (by default the track's first). Times outside the track are silence. Mono (FFmpeg's mix, normalised so that it
    cannot clip), int16, resampled to `rate` by FFmpeg. Raises InputError for a file that cannot be opened, has no sound
    track, or is damaged."""
    with SoundTrack(path, rate) as track:
        first = track.start if start is None else round(start * rate)
        if seconds is None:
            track.finish()
        count = max(0, track.end - first) if seconds is None else round(seconds * rate)
        return Sound(track.window(first, count), rate, first / rate)


class SoundTrack:
    """Reads a track once from its start to its end, window after window, and holds no more than one window needs.
    Raises InputError, here and while it is read, as `read_sound` does. A `with` block closes the file."""

    def __init__(self, path: str | Path, rate: int) -> None:
        if rate < 1:
            raise ValueError(f"rate is {rate}, expected at least 1 sample per second")
        self._blocks = _read_blocks(path, rate)
        self._buffer: deque[tuple[int, Samples]] = deque()
        self._last_window = -math.inf
        self.end = 0
        """Number after the last sample read so far; the track's end once a window has gone past it."""
        self._read_block()
        self.start = self._buffer[0][0]
        """Number of the track's first sample."""

    def __enter__(self) -> SoundTrack:
        return self

    def __exit__(self, *_error: object) -> None:
        self._blocks.close()

    def window(self, first: int, count: int) -> Samples:
        """(count,) int16: the samples numbered first .. first + count, silence where there are none. Windows may
        overlap, but none may begin before the one before it (ValueError)."""
        if first < self._last_window:
            raise ValueError(f"first is {first}, the window before began at {self._last_window}: expected none earlier")
        self._last_window = first
        while self.end < first + count and self._read_block():
            pass
        window = np.zeros(count, np.int16)
        for number, samples in self._buffer:
            low, high = max(first, number), min(first + count, number + len(samples))
            if low < high:
                window[low - first : high - first] = samples[low - number : high - number]
        return window

    def finish(self) -> None:
        """Read and keep everything up to the track's end, so that `end` is the track's."""
        while self._read_block():
            pass

    def _read_block(self) -> bool:
        """Read the next block and forget those before the last window; False at the end of the track."""
        block = next(self._blocks, None)
        if block is not None:
            self._buffer.append(block)
            self.end = block[0] + len(block[1])
            while self._buffer and self._buffer[0][0] + len(self._buffer[0][1]) <= self._last_window:
                self._buffer.popleft()
        return block is not None


def _read_blocks(path: str | Path, rate: int) -> Generator[tuple[int, Samples], None, None]:
    """Non-empty blocks (number of the first sample, samples) in increasing order, without overlaps."""
    end: int | None = None
    with open_stream(path, "audio") as (container, stream):
        frames = decode_frames(path, container, stream)
        for first, samples in _resample(frames, has_timestamps(container), rate):
            skipped = 0 if end is None else max(0, end - first)
            if skipped < len(samples):
                end = first + len(samples)
                yield first + skipped, samples[skipped:]
    if end is None:
        raise InputError(f"{path}: no sample in its sound track")


def _resample(frames: Iterator[Any], use_timestamps: bool, rate: int) -> Iterator[tuple[int, Samples]]:
    """Blocks (number of the first sample, samples) at the new rate. A new resampler begins where the track jumps or
    changes its format."""
    resampler: AudioResampler | None = None
    resampled_format: tuple[Any, ...] = ()
    # where the decoded samples so far end, in seconds, and the resampled ones, in samples
    end_time, number = 0.0, 0

    def resample(frame: Any) -> Iterator[tuple[int, Samples]]:
        """The blocks that a frame gives; None: those that the resampler still holds."""
        nonlocal number
        assert resampler is not None
        for part in resampler.resample(frame):
            samples = part.to_ndarray()[0]
            yield number, samples
            number += len(samples)

    for frame in frames:
        time = float(frame.pts * frame.time_base) if use_timestamps and frame.pts is not None else end_time
        frame_format = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or frame_format != resampled_format or abs(time - end_time) > _JITTER:
            if resampler is not None:
                yield from resample(None)
            resampler, resampled_format = AudioResampler("s16", "mono", rate), frame_format
            end_time, number = time, round(time * rate)
        end_time += frame.samples / frame.sample_rate
        # samples are counted here; the resampler would adjust them to timestamps that jitter
        frame.pts = None
        yield from resample(frame)
    if resampler is not None:
        yield from resample(None)
