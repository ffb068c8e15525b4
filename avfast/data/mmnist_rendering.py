"""Frames and sound of Multimodal MovingMNIST from the digits' positions, to the bit the same on any machine."""

from __future__ import annotations

from functools import cache

import numpy as np

from avfast.data.digits import DIGIT_SIDE

FRAME_SIDE = 48
SAMPLES_PER_FRAME = 440
BLOCK_SIDE = DIGIT_SIDE + 4
WALL_SYMBOL, BLOCK_SYMBOL = 11, 12


def render_frames(positions: np.ndarray, images: np.ndarray, block: np.ndarray, canvas: int) -> np.ndarray:
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
    below 2**53, so double-precision matrix products give them exactly, in whatever order they add."""
    weights = _lanczos_weights()

    def resample(lines: np.ndarray) -> np.ndarray:
        return np.clip(np.floor((lines.astype(np.float64) @ weights + 2.0**21) * 2.0**-22), 0, 255).astype(np.uint8)

    rows = resample(frames)
    return np.ascontiguousarray(resample(rows.swapaxes(-1, -2)).swapaxes(-1, -2))


@cache
def _lanczos_weights() -> np.ndarray:
    """(64, 48) float64 integers: weight of input i for output o, in units of 2**-22.

    Input i lies at m / 8 output pixels from output o, m = 6 i - 8 o - 1, so the kernel sinc(x) sinc(x / 3) at x = m /
    8 is sin(pi m / 8) sin(pi m / 24) / m**2 times a constant, which the normalisation removes."""
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


def render_sound(
    positions: np.ndarray, labels: np.ndarray, walls: np.ndarray, blocks: np.ndarray, canvas: int, *, wrapped: bool
) -> np.ndarray:
    """(N, T * 440) int16 from the positions the sound belongs to (N, T, D, 2), labels (N, D) and bounces (N, T, D)."""
    limit = float(canvas - DIGIT_SIDE)
    x, y = positions[..., 0], positions[..., 1]
    distance = np.sqrt(x * x + y * y) / np.sqrt(2 * limit * limit)
    wall, block = walls.any(-1, keepdims=True), blocks.any(-1, keepdims=True)
    event = np.where(wall, WALL_SYMBOL, BLOCK_SYMBOL)
    symbols = np.where(wall != block, event, labels[:, None])
    tones = _tones()[symbols]
    if wrapped:
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
    above Nyquist's 220 and so aliased. All are whole, hence continuous across frames."""
    sine, sample = sine_table(SAMPLES_PER_FRAME), np.arange(SAMPLES_PER_FRAME)
    pairs = [(16 << s // 4, 256 << s % 4) for s in range(BLOCK_SYMBOL + 1)]
    return np.stack([sine[f1 * sample % len(sine)] + sine[f2 * sample % len(sine)] for f1, f2 in pairs]) * 2.0**-31


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
