"""Multimodal MovingMNIST, regenerated: digits bounce about a black canvas, tones tell the digit, its place and its
bounces.

The set is Sound2Sight's M3SO (Chatterjee and Cherian, ECCV 2020), from its published description, with named
variants. Ten frames a second, 440 samples of sound each:

- A digit starts uniformly on the canvas with a uniform direction and a speed of 2, 3, 4, 5 or 6 px a frame. A
  coordinate of its top-left corner that would leave [-2, canvas - 28 + 2] flips that velocity component (`mirror`),
  or draws the direction anew among those that lead back inside (`random`). It is drawn at its position truncated to
  integers.
- The sound of frame t belongs to the position of frame t + 1: it leads the picture by one frame. Two sines name the
  digit's class; in a step where any digit meets a wall, every digit sounds symbol 11 instead, and symbol 12 where any
  meets the block (both at once: the digits' own).
- `wrapped` is the sound as published: the amplitude grows with the distance from the canvas's top-left corner, about an
  offset of 32767, and overflows int16. `clean` is what the papers say: it falls with the distance, with no offset.
- With `block` (canvas 64) a white square of side 32 appears at the first frame after frame 10 (counted from 0) that has
  room for it. It keeps out the digits' top-left corners, so a digit can pass behind it; where it can, it appears
  clear of all four corners of every digit. Its corner is at least 12 px from the canvas's, which leaves room to
  bounce.

The same seed gives the same bytes on any machine: random bits are raw Philox words, sines come from integer tables, and
floating point is confined to IEEE-exact operations.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from avfast.audio import SpectrogramConfig
from avfast.config import InputError, MMNISTConfig
from avfast.data.digits import DIGIT_SIDE, SPLITS, Split, draw_digits, load_digits, philox_words, uniform

FRAME_SIDE = 48
SAMPLES_PER_FRAME = 440
BLOCK_SIDE = DIGIT_SIDE + 4
WALL_SYMBOL, BLOCK_SYMBOL = 11, 12
GENERATOR_VERSION = 1
"""Raised whenever the same settings would give other bytes."""

# above the loudest bin of 8000 training clips, so that nothing is clamped: 14.7 and 18.4 (wrapped, one and two digits),
# 9.7 and 9.2 (clean); canvas 48 and 64 differ by less than 0.2
_SPECTROGRAM_SCALE = {"wrapped": 19.0, "clean": 10.0}

_START, _TURN, _BLOCK, _DRAWING = range(4)
_START_WORDS = 8
_FIRST_BLOCK_FRAME = 11
_BLOCK_CORNERS = np.arange(12, 64 - BLOCK_SIDE + 1)
_DIRECTIONS = 1 << 14
_CHUNK = 64


def mmnist_spectrogram(tone: str) -> SpectrogramConfig:
    """23 x 21 per frame: n_fft 44, hop 22, 440 samples at 4400 Hz, with the tone variant's own scale."""
    return SpectrogramConfig(10 * SAMPLES_PER_FRAME, SAMPLES_PER_FRAME, 44, 22, _SPECTROGRAM_SCALE[tone])


class Clips(NamedTuple):
    """N clips of T frames with D digits. Positions are of top-left corners, x then y, in pixels of the canvas."""

    frames: np.ndarray
    """(N, T, 1, 48, 48) uint8, each frame divided by its own maximum."""
    waveform: np.ndarray
    """(N, T * 440) int16."""
    labels: np.ndarray
    """(N, D) uint8."""
    positions: np.ndarray
    """(N, T, D, 2) float64; drawn truncated towards zero."""
    wall_bounces: np.ndarray
    """(N, T, D) bool: the velocity changes between frames t and t + 1, and sounds in frame t."""
    block_bounces: np.ndarray
    """(N, T, D) bool, likewise."""
    block: np.ndarray
    """(N, 3) int64: the block's x, y and first frame, T where it never appears."""


class MovingMNIST:
    """One split of Multimodal MovingMNIST; clip i is a function of the settings, the split and i alone.

    Raises InputError for settings that contradict each other and for missing or damaged digit files.
    """

    def __init__(self, config: MMNISTConfig, split: Split) -> None:
        if split not in SPLITS:
            raise InputError(f"split={split!r}: expected one of {', '.join(SPLITS)}")
        for name, choices in (
            ("canvas", (48, 64)),
            ("num_digits", (1, 2)),
            ("bounce", ("mirror", "random")),
            ("tone", ("wrapped", "clean")),
        ):
            if getattr(config, name) not in choices:
                raise InputError(f"{name}={getattr(config, name)!r}: expected {choices[0]} or {choices[1]}")
        if config.block and config.canvas != 64:
            raise InputError(f"block=True with canvas={config.canvas}: the block of side 32 wants canvas=64")
        if config.clip_frames < 2:
            raise InputError(f"clip_frames={config.clip_frames}: expected at least 2")
        if not 0 <= config.data_seed < 2**63:
            raise InputError(f"data_seed={config.data_seed}: expected 0 <= data_seed < 2**63")
        self.config, self.split = config, split
        self._digits = load_digits(config.digits, split) if config.digits is not None else None
        self._length = {"train": config.train_clips, "val": config.val_clips, "test": config.test_clips}[split]
        if self._length < 1:
            raise InputError(f"{split}_clips={self._length}: expected at least 1")

    def __len__(self) -> int:
        return self._length

    def parameters(self) -> dict[str, Any]:
        """Everything that decides this split's bytes, as JSON values; digit files by the SHA-256 of their content."""
        names = ("canvas", "num_digits", "bounce", "tone", "block", "clip_frames", "data_seed")
        digits = "drawn"
        if self._digits is not None:
            content = hashlib.sha256(self._digits.images.tobytes())
            content.update(self._digits.labels.tobytes())
            digits = content.hexdigest()
        return {
            "dataset": "mmnist",
            "generator_version": GENERATOR_VERSION,
            "split": self.split,
            "clips": len(self),
            "digits": digits,
            **{name: getattr(self.config, name) for name in names},
            "spectrogram": dataclasses.asdict(mmnist_spectrogram(self.config.tone)),
        }

    def clips(self, first: int, count: int) -> Clips:
        """Clips `first` .. `first + count`. Raises ValueError for an empty range or one outside the split."""
        if first < 0 or count < 1 or first + count > len(self):
            raise ValueError(f"first={first}, count={count}: expected a range inside the split's {len(self)} clips")
        chunks = [self._chunk(i, min(_CHUNK, first + count - i)) for i in range(first, first + count, _CHUNK)]
        return Clips(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))

    def _chunk(self, first: int, count: int) -> Clips:
        config, digits = self.config, self.config.num_digits
        start = self._words(_START, first, count, _START_WORDS * digits).reshape(count, digits, _START_WORDS)
        if self._digits is None:
            drawn = draw_digits(config.data_seed, self._stream(_DRAWING), first * digits, count * digits)
            images, labels = (array.reshape(count, digits, *array.shape[1:]) for array in drawn)
        else:
            chosen = (uniform(start[..., 0]) * len(self._digits.labels)).astype(np.intp)
            images, labels = self._digits.images[chosen], self._digits.labels[chosen]
        positions, walls, blocks, block = self._move(start, first)
        # sound t belongs to the position of frame t + 1, so one position more is simulated than drawn
        waveform = _sound(positions[:, 1:], labels, walls, blocks, config)
        frames = _render(positions[:, :-1], images, block, config.canvas)
        return Clips(frames, waveform, labels, positions[:, :-1], walls, blocks, block)

    def _stream(self, purpose: int) -> int:
        return 4 * SPLITS.index(self.split) + purpose

    def _words(self, purpose: int, first: int, count: int, width: int) -> np.ndarray:
        return philox_words(self.config.data_seed, self._stream(purpose), first, count, width)

    def _move(self, start: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Positions (N, T + 1, D, 2), bounces off walls and off the block (N, T, D), the block (N, 3)."""
        config, (count, digits, _) = self.config, start.shape
        frames, limit = config.clip_frames, config.canvas - DIGIT_SIDE
        position = uniform(start[..., 1:3]) * limit
        speed = np.floor(uniform(start[..., 3]) * 5) + 2
        velocity = speed[..., None] * _direction(start[..., 4])
        if config.bounce == "random":
            turns = self._words(_TURN, first, count, 4 * frames).reshape(count, frames, 4)
        block = np.full((count, 3), frames)
        choice = uniform(self._words(_BLOCK, first, count, 4)[:, 0]) if config.block else None

        positions = np.empty((count, frames + 1, digits, 2))
        walls, blocks = np.zeros((2, count, frames, digits), bool)
        positions[:, 0] = position
        for t in range(frames):
            if choice is not None and t >= _FIRST_BLOCK_FRAME:
                _place_block(block, position, choice, t)
            ahead = position + velocity
            low, high = ahead < -2, ahead > limit + 2
            walls[:, t] = hit = (low | high).any(-1)
            if config.bounce == "random":
                turned = speed[..., None] * _direction(turns[:, t, :digits])
                # of all directions those that lead away from the wall that was hit
                turned = np.where(low, abs(turned), np.where(high, -abs(turned), turned))
                velocity = np.where(hit[..., None], turned, velocity)
                ahead = position + velocity
                low, high = ahead < -2, ahead > limit + 2
            velocity = np.where(low | high, -velocity, velocity)
            if choice is not None:
                corner = block[:, None, :2]
                present = (block[:, 2] <= t)[:, None]
                ahead = position + velocity
                blocks[:, t] = inside = present & ((ahead >= corner) & (ahead < corner + BLOCK_SIDE)).all(-1)
                entered = (position < corner) | (position >= corner + BLOCK_SIDE)
                velocity = np.where(inside[..., None] & entered, -velocity, velocity)
            position = position + velocity
            positions[:, t + 1] = position
        return positions, walls, blocks, block


def _place_block(block: np.ndarray, position: np.ndarray, choice: np.ndarray, t: int) -> None:
    """Give every clip without a block one that covers no digit's top-left corner, where there is room; in place."""
    waiting = np.flatnonzero(block[:, 2] > t)
    if not len(waiting):
        return

    def covered(corners: np.ndarray) -> np.ndarray:
        """(N, D, 2) points -> (N, y, x) bool: a block there covers at least one."""
        inside = (corners[..., None] >= _BLOCK_CORNERS) & (corners[..., None] < _BLOCK_CORNERS + BLOCK_SIDE)
        return np.any(inside[:, :, 1, :, None] & inside[:, :, 0, None, :], axis=1)

    corner = position[waiting]
    room = ~covered(corner)
    clear = room.copy()
    for offset in ((DIGIT_SIDE, 0), (0, DIGIT_SIDE), (DIGIT_SIDE, DIGIT_SIDE)):
        clear &= ~covered(corner + np.array(offset))
    places = np.where(clear.any((1, 2), keepdims=True), clear, room).reshape(len(waiting), -1)
    number = places.sum(1)
    # the index of the k-th free place, k uniform in 0 .. number - 1
    wanted = (choice[waiting] * number).astype(np.int64) + 1
    place = (places.cumsum(1) >= wanted[:, None]).argmax(1)
    y, x = np.divmod(place, len(_BLOCK_CORNERS))
    found = np.stack([_BLOCK_CORNERS[x], _BLOCK_CORNERS[y], np.full_like(x, t)], 1)
    block[waiting[number > 0]] = found[number > 0]


def _render(positions: np.ndarray, images: np.ndarray, block: np.ndarray, canvas: int) -> np.ndarray:
    """Frames (N, T, 1, 48, 48) uint8 from positions (N, T, D, 2) and digit images (N, D, 28, 28)."""
    count, _, digits, _ = positions.shape
    origin = canvas - DIGIT_SIDE + 2
    # a frame is a window on the digit in the middle of black: one gather instead of a paste per frame
    padded = np.zeros((count, digits, *2 * (origin + 2 + canvas,)), np.uint8)
    padded[..., origin : origin + DIGIT_SIDE, origin : origin + DIGIT_SIDE] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (canvas, canvas), axis=(2, 3))
    offset = origin - positions.astype(np.int64)
    clip = np.arange(count)[:, None]
    frames = windows[clip, 0, offset[:, :, 0, 1], offset[:, :, 0, 0]]
    for digit in range(1, digits):
        other = windows[clip, digit, offset[:, :, digit, 1], offset[:, :, digit, 0]]
        frames += np.minimum(other, 255 - frames)
    for clip_frames, (x, y, since) in zip(frames, block, strict=True):
        clip_frames[since:, y : y + BLOCK_SIDE, x : x + BLOCK_SIDE] = 255
    if canvas != FRAME_SIDE:
        frames = shrink(frames)
    peak = frames.max((2, 3), keepdims=True).astype(np.uint16)
    dim = ((peak > 0) & (peak < 255))[..., 0, 0]
    frames[dim] = (frames[dim] * np.uint16(255) + peak[dim] // 2) // peak[dim]
    return frames[:, :, None]


def shrink(frames: np.ndarray) -> np.ndarray:
    """(..., 64, 64) uint8 -> (..., 48, 48) uint8 by Pillow's antialiasing Lanczos filter, bit for bit.

    Pillow resamples rows, rounds to bytes, then columns, with weights in units of 2**-22. The products are integers
    below 2**53, so double-precision matrix products give them exactly, in whatever order they add.
    """
    weights = _lanczos_weights()

    def resample(lines: np.ndarray) -> np.ndarray:
        return np.clip(np.floor((lines.astype(np.float64) @ weights + 2.0**21) * 2.0**-22), 0, 255).astype(np.uint8)

    rows = resample(frames)
    return np.ascontiguousarray(resample(rows.swapaxes(-1, -2)).swapaxes(-1, -2))


@cache
def _lanczos_weights() -> np.ndarray:
    """(64, 48) float64 integers: weight of input i for output o, in units of 2**-22.

    Input i lies at m / 8 output pixels from output o, m = 6 i - 8 o - 1, so the kernel sinc(x) sinc(x / 3) at x = m /
    8 is sin(pi m / 8) sin(pi m / 24) / m**2 times a constant, which the normalisation removes.
    """
    sine = [int(value) for value in sine_table(48)]
    weights = np.zeros((64, FRAME_SIDE))
    for o in range(FRAME_SIDE):
        distances = {i: 6 * i - 8 * o - 1 for i in range(64) if abs(6 * i - 8 * o - 1) < 24}
        kernel = {i: (sine[3 * m % 48] * sine[m % 48] << 32) // m**2 for i, m in distances.items()}
        total = sum(kernel.values())
        for i, value in kernel.items():
            magnitude = ((abs(value) << 23) + total) // (2 * total)
            weights[i, o] = magnitude if value >= 0 else -magnitude
    return weights


def _sound(
    positions: np.ndarray, labels: np.ndarray, walls: np.ndarray, blocks: np.ndarray, config: MMNISTConfig
) -> np.ndarray:
    """(N, T * 440) int16 from the positions the sound belongs to (N, T, D, 2), labels (N, D) and bounces (N, T, D)."""
    limit = float(config.canvas - DIGIT_SIDE)
    x, y = positions[..., 0], positions[..., 1]
    distance = np.sqrt(x * x + y * y) / np.sqrt(2 * limit * limit)
    wall, block = walls.any(-1, keepdims=True), blocks.any(-1, keepdims=True)
    event = np.where(wall, WALL_SYMBOL, BLOCK_SYMBOL)
    symbols = np.where(wall != block, event, labels[:, None])
    tones = _tones()[symbols]
    if config.tone == "wrapped":
        samples = 32767 + (distance * 32767)[..., None] * tones
        # truncated per digit, then averaged, then stored in 16 bits, where values above 32767 wrap
        return (samples.astype(np.int64).sum(2) // samples.shape[2]).astype(np.int16).reshape(len(samples), -1)
    samples = (np.maximum(1 - distance, 0) * 32767)[..., None] * tones
    # with two digits a + b has one order only
    return np.rint(samples.sum(2) / samples.shape[2]).astype(np.int16).reshape(len(samples), -1)


@cache
def _tones() -> np.ndarray:
    """(13, 440) float64 in [-1, 1]: the mean of symbol s's two sines over one frame.

    Rows and columns of a telephone keypad: 16, 32, 64 or 128 and 256, 512, 1024 or 2048 cycles a frame, the latter
    above Nyquist's 220 and so aliased. All are whole, hence continuous across frames.
    """
    sine, sample = sine_table(SAMPLES_PER_FRAME), np.arange(SAMPLES_PER_FRAME)
    pairs = [(16 << s // 4, 256 << s % 4) for s in range(BLOCK_SYMBOL + 1)]
    return np.stack([sine[f1 * sample % len(sine)] + sine[f2 * sample % len(sine)] for f1, f2 in pairs]) * 2.0**-31


def _direction(words: np.ndarray) -> np.ndarray:
    """(...,) words -> (..., 2) float64 unit vectors, uniform over 16384 directions (0.02 degrees apart)."""
    sine = sine_table(_DIRECTIONS)
    angle = (words >> np.uint64(50)).astype(np.int64)
    return np.stack([sine[(angle + _DIRECTIONS // 4) % _DIRECTIONS], sine[angle]], -1) * 2.0**-30


@cache
def sine_table(n: int) -> np.ndarray:
    """round(2**30 sin(2 pi k / n)) for k = 0 .. n - 1, int64, n a multiple of 4; by integer arithmetic alone."""
    bits = 108
    pi = 0x3243F6A8885A308D313198A2E037
    quarter = []
    for k in range(n // 4 + 1):
        x = 2 * pi * k // n
        term = total = x
        # 20 terms of the Taylor series: at pi / 2 the next one is below 2**-130
        for i in range(2, 42, 2):
            term = -(term * x >> bits) * x // (i * (i + 1)) >> bits
            total += term
        quarter.append((total + (1 << (bits - 31))) >> (bits - 30))
    half = np.array(quarter[:-1] + quarter[:0:-1], np.int64)
    return np.concatenate([half, -half])
