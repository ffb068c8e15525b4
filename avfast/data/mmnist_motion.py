"""How the digits of Multimodal MovingMNIST move: the directions they are drawn from, and the walls of the canvas."""

from __future__ import annotations

import numpy as np

from avfast.data.mmnist_rendering import sine_table

DIRECTIONS = 1 << 14
"""Directions that a digit can start in, 0.02 degrees apart."""
SPEEDS = (2, 3, 4, 5, 6)
"""Pixels per frame, equally likely."""
MARGIN = 2
"""Pixels by which a digit's top-left corner may leave [0, canvas - 28] before it is turned back."""


def direction(angle: np.ndarray) -> np.ndarray:
    """(...,) integers of 0 .. DIRECTIONS - 1 -> (..., 2) float64 unit vectors, x then y."""
    sine = sine_table(DIRECTIONS)
    return np.stack([sine[(angle + DIRECTIONS // 4) % DIRECTIONS], sine[angle]], -1) * 2.0**-30


def walls_ahead(position: np.ndarray, velocity: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Which coordinates the next step would take beyond the low and the high wall, bool arrays of the same shape;
    `limit` is canvas - 28, in pixels. A step that would leave turns that velocity component first (`mirror`)."""
    next_position = position + velocity
    return next_position < -MARGIN, next_position > limit + MARGIN


def mirrored(position: np.ndarray, velocity: np.ndarray, limit: float) -> np.ndarray:
    """The velocity of the next step: components that lead through a wall are turned."""
    low, high = walls_ahead(position, velocity, limit)
    return np.where(low | high, -velocity, velocity)
