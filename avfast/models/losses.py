"""Losses of the two stages (paper section 3.3); Eq. 8 itself is the op `avfast.kernels.flow_loss`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from avfast.models.composition import composed_flow

_WINDOW, _C1, _C2 = 7, 0.02**2, 0.06**2
"""Of the SSIM of the protocol `paper` (`avfast.scoring.metrics`): pixels; K1 and K2 times the data range 2, squared."""


def frame_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Eq. 11 on frames (B,P,C,H,W) -> a scalar: the mean of the squared error over batch, channels and pixels, summed
    over the P steps. The prediction is the unclamped one.

    Raises ValueError when the shapes differ."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected {tuple(target.shape)} like target")
    return (prediction - target).square().mean() * prediction.shape[1]


def path_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Flows F_{K+1}..F_T (B,P,2,H,W) -> a scalar: the squared error of the composed flows back to frame K, in px^2, its
    mean over batch and pixels, summed over the P steps. Not of the paper.

    Raises ValueError when the shapes differ."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has shape {tuple(prediction.shape)}, expected {tuple(target.shape)} like target")
    error = composed_flow(prediction) - composed_flow(target)
    return error.square().sum(2).mean() * prediction.shape[1]


def ssim_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - SSIM of frames (B,P,C,H,W) in [0,1] -> a scalar: its mean over batch, channels and the area where the 7x7
    window fits whole, summed over the P steps. The SSIM is that of the protocol `paper`, with a gradient and in the
    frames' own type (fp32: 1e-5 from the metric). The prediction is clamped to [0,1], as the metric does it; where
    that removes an error there is no gradient. Source: Wang et al. 2004, Eq. 13.

    Raises ValueError when the shapes differ or frames are smaller than the window."""
    if prediction.shape != target.shape or min(prediction.shape[-2:]) < _WINDOW:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)}, expected {tuple(target.shape)} like target, "
            f"H and W at least {_WINDOW}"
        )
    x, y = (frames.flatten(0, -4).float() for frames in (prediction.clamp(0, 1), target))
    # sample covariances: sums of squares over n - 1
    n = _WINDOW**2
    mean_x, mean_y, xx, yy, xy = (F.avg_pool2d(z, _WINDOW, stride=1) for z in (x, y, x * x, y * y, x * y))
    variances = (xx - mean_x.square() + yy - mean_y.square()) * (n / (n - 1))
    covariance = (xy - mean_x * mean_y) * (n / (n - 1))
    numerator = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
    ssim = numerator / ((mean_x.square() + mean_y.square() + _C1) * (variances + _C2))
    return (1 - ssim.mean()) * prediction.shape[1]
