"""Losses of the two stages (paper section 3.3)."""

from __future__ import annotations

from torch import Tensor

from avfast.kernels import flow_loss


def motion_loss(prediction: Tensor, target: Tensor, frames: Tensor, smooth_weight: float = 0.01) -> Tensor:
    """Eq. 8 on flows (B,P,2,H,W) in pixels and the true frames (B,P,C,H,W) -> a scalar, summed over the P steps."""
    return flow_loss(prediction, target, frames, smooth_weight=smooth_weight)


def frame_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 11 on frames (B,P,C,H,W) -> a scalar: the mean of the squared error over batch, channels and pixels, summed
    over the P steps. The prediction is the unclamped one.

    Raises ValueError when the shapes differ.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected {tuple(target.shape)} like target")
    return (prediction - target).square().mean() * prediction.shape[1]
