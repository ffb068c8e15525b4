"""Inputs of a rollout."""

from __future__ import annotations

import numpy as np


def rollout_inputs(batch: int, size: int, channels: int, total: int = 35) -> list[np.ndarray]:
    """Five frames, their flow, and the sound of `total` frames."""
    generator = np.random.default_rng(1)
    frames = generator.random((batch, 5, channels, size, size), np.float32)
    flow = generator.normal(0, 2, (batch, 5, 2, size, size)).astype(np.float32)
    return [frames, flow, generator.random((batch, total, 1, 23, 21), np.float32)]
