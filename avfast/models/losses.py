"""Losses of the appearance stage (paper section 3.3); the motion stage's is the op `avfast.kernels.flow_loss`."""

from __future__ import annotations

from torch import Tensor


def frame_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 11 on frames (B,P,C,H,W) -> a scalar: the mean of the squared error over batch, channels and pixels, summed
    over the P steps. The prediction is the unclamped one.

    Raises ValueError when the shapes differ."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected {tuple(target.shape)} like target")
    return (prediction - target).square().mean() * prediction.shape[1]
