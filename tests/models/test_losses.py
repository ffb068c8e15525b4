"""The losses against scikit-image and sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from tensors import normal

from avfast.models.composition import composed_flow, warp_once
from avfast.models.losses import frame_loss, path_loss, ssim_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ssim_loss_equals_scikit_image(dtype: torch.dtype) -> None:
    prediction, target = (0.5 + 0.4 * normal(2, 3, 2, 16, 20, seed=i) for i in range(2))
    target = target.clamp(0, 1).to(dtype)
    prediction = prediction.to(dtype)
    pairs = zip(prediction.double().clamp(0, 1).flatten(0, 2), target.double().flatten(0, 2), strict=True)
    ssim = [structural_similarity(a.numpy(), b.numpy(), win_size=7, data_range=2) for a, b in pairs]
    np.testing.assert_allclose(ssim_loss(prediction, target).item(), 3 * (1 - np.mean(ssim)), rtol=1e-5)


def test_ssim_loss_has_the_gradient_of_what_the_clamp_leaves() -> None:
    prediction = (0.5 + 0.2 * normal(1, 1, 1, 8, 9)).clamp(0.05, 0.95).requires_grad_()
    target = (0.5 + 0.3 * normal(1, 1, 1, 8, 9, seed=1)).clamp(0, 1)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ssim_loss(x, target)

    # it computes in fp32
    (grad,) = torch.autograd.grad(loss(prediction), prediction)
    step = 1e-2 * normal(1, 1, 1, 8, 9, seed=2)
    with torch.no_grad():
        change = (loss(prediction + step) - loss(prediction - step)) / 2
    assert change.item() == pytest.approx((grad * step).sum().item(), rel=5e-3)
    outside = torch.full((1, 1, 1, 8, 9), 1.5, requires_grad=True)
    assert torch.autograd.grad(loss(outside), outside)[0].eq(0).all()


def test_path_loss_of_constant_flow_is_that_of_the_sums() -> None:
    flow, target = normal(2, 4, 2, 1, 1), normal(2, 4, 2, 1, 1, seed=1)
    whole = [x.expand(2, 4, 2, 5, 6) for x in (flow, target)]
    expected = (flow.cumsum(1) - target.cumsum(1)).square().sum(2).mean((0, 2, 3)).sum()
    torch.testing.assert_close(path_loss(*whole), expected)


def test_a_path_is_followed_step_by_step() -> None:
    """One pixel, from frame to frame: where it comes from in frame K."""
    # whole pixels: nothing is interpolated
    flow = (1.5 * normal(1, 4, 2, 12, 12, seed=3)).round()
    paths = composed_flow(flow)
    for y, x in ((5, 6), (2, 9), (11, 0)):
        for steps in range(1, 5):
            px, py, total = x, y, torch.zeros(2, dtype=torch.float64)
            for t in reversed(range(steps)):
                step = flow[0, t, :, py, px]
                total += step
                px, py = (int(min(max(v + s, 0), 11)) for v, s in zip((px, py), step.tolist(), strict=True))
            torch.testing.assert_close(paths[0, steps - 1, :, y, x], total)
    frame = normal(1, 1, 12, 12, seed=4)
    torch.testing.assert_close(warp_once(frame, 0 * flow), frame[:, None].expand(1, 4, 1, 12, 12))


@pytest.mark.parametrize("loss", [frame_loss, path_loss, ssim_loss])
def test_shapes_that_differ(loss) -> None:
    with pytest.raises(ValueError, match=r"prediction has shape \(1, 3, 2, 8, 8\), expected \(1, 2, 2, 8, 8\)"):
        loss(torch.zeros(1, 3, 2, 8, 8), torch.zeros(1, 2, 2, 8, 8))
