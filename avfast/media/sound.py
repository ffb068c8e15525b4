"""Sound out of films and sound files: the first track, mixed to mono, at one rate, placed on the file's clock.

Sample n of a track at `rate` samples a second stands for the time n / rate on the file's own clock, the one that
`avfast.media.video` gives frames their times on; it need not begin at 0. Timestamps decide where sound lies: what a
track leaves out is silence, what it says twice is heard once, an encoder's priming samples are not heard at all.
Reading holds a handful of blocks, whatever the length of the track.
"""

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
from avfast.media.container import decoded, has_timestamps, opened

Samples = NDArray[np.int16]

# a timestamp this far from where the samples before it end is a gap or an overlap; less is rounding (Matroska counts in
# milliseconds) and the jitter of a muxer
_JITTER = 0.02


class Sound(NamedTuple):
    """A piece of a mono track."""

    samples: Samples
    """(N,) int16."""
    rate: int
    """Samples per second."""
    start: float
    """Time of the first sample on the file's clock, in seconds."""


def read_sound(path: str | Path, rate: int, *, start: float | None = None, seconds: float | None = None) -> Sound:
    """The whole first sound track of a film or sound file, or the part from `start` (a time on the file's clock, by
    default the track's first) that lasts `seconds`; what the track does not reach is silence.

    Mono (FFmpeg's mix, normalised so that it cannot clip), int16, resampled to `rate` by FFmpeg.
    Raises InputError for a file that cannot be opened, has no sound track, or is damaged.
    """
    with SoundTrack(path, rate) as track:
        first = track.start if start is None else round(start * rate)
        if seconds is None:
            track.finish()
            return Sound(track.window(first, max(0, track.end - first)), rate, first / rate)
        return Sound(track.window(first, round(seconds * rate)), rate, first / rate)


class SoundTrack:
    """Reads a track once from its start to its end, window after window, and holds no more than a window asks for.

    Raises InputError, here and while it is read, as `read_sound` does. Close it, or use it in a `with` block.
    """

    def __init__(self, path: str | Path, rate: int) -> None:
        if rate < 1:
            raise ValueError(f"rate is {rate}, expected at least 1 sample per second")
        self.rate = rate
        self._blocks = _blocks(path, rate)
        self._held: deque[tuple[int, Samples]] = deque()
        self._given = -math.inf
        first, samples = next(self._blocks)
        self._held.append((first, samples))
        self.start = first
        """Number of the track's first sample."""
        self.end = first + len(samples)
        """Number behind the last sample read so far: the track's end once a window has reached behind it."""

    def __enter__(self) -> SoundTrack:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._blocks.close()

    def window(self, first: int, count: int) -> Samples:
        """(count,) int16: the samples numbered first .. first + count, silence where there are none.

        Windows may overlap, but none may begin before the one before it (ValueError).
        """
        if first < self._given:
            raise ValueError(f"first is {first}, after a window that began at {self._given}: expected none earlier")
        self._given = first
        while self.end < first + count and self._read():
            self._drop(first)
        self._drop(first)
        window = np.zeros(count, np.int16)
        for number, samples in self._held:
            low, high = max(first, number), min(first + count, number + len(samples))
            if low < high:
                window[low - first : high - first] = samples[low - number : high - number]
        return window

    def finish(self) -> None:
        """Read on to the end, keeping what is read, so that `end` is the track's."""
        while self._read():
            pass

    def _read(self) -> bool:
        block = next(self._blocks, None)
        if block is not None:
            self._held.append(block)
            self.end = block[0] + len(block[1])
        return block is not None

    def _drop(self, first: int) -> None:
        while self._held and self._held[0][0] + len(self._held[0][1]) <= first:
            self._held.popleft()


def _blocks(path: str | Path, rate: int) -> Generator[tuple[int, Samples], None, None]:
    """Non-empty blocks (number of the first sample, samples) in increasing order, none overlapping another."""
    end: int | None = None
    with opened(path, "audio") as (container, stream):
        for first, samples in _resampled(decoded(path, container, stream), has_timestamps(container), rate):
            skipped = 0 if end is None else max(0, end - first)
            if skipped < len(samples):
                end = first + len(samples)
                yield first + skipped, samples[skipped:]
    if end is None:
        raise InputError(f"{path}: no sample in its sound track")


def _resampled(frames: Iterator[Any], stamped: bool, rate: int) -> Iterator[tuple[int, Samples]]:
    """Blocks at the new rate; a new resampler begins wherever the track jumps or changes its format."""
    resampler: AudioResampler | None = None
    form: tuple[Any, ...] = ()
    # where the next decoded frame belongs, in seconds, and the next block, in samples
    due, number = 0.0, 0

    def taken(frame: Any) -> Iterator[tuple[int, Samples]]:
        nonlocal number
        assert resampler is not None
        for part in resampler.resample(frame):
            samples = part.to_ndarray()[0]
            yield number, samples
            number += len(samples)

    for frame in frames:
        time = float(frame.pts * frame.time_base) if stamped and frame.pts is not None else due
        now = (frame.format.name, frame.layout.name, frame.sample_rate)
        if resampler is None or now != form or abs(time - due) > _JITTER:
            if resampler is not None:
                yield from taken(None)
            resampler, form = AudioResampler("s16", "mono", rate), now
            due, number = time, round(time * rate)
        due += frame.samples / frame.sample_rate
        # the block's place is counted here, and stamps that jitter would only worry the filter
        frame.pts = None
        yield from taken(frame)
    if resampler is not None:
        yield from taken(None)
