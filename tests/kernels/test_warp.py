"""The warp beyond what the contract asks of every op: wild and smooth flow, far apart rows, fixed-point gradients."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal
from torch import Tensor

from avfast.kernels import backward_warp, registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = [
    name
    for name, how in registry.OPS["backward_warp"].backends.items()
    if name != "reference" and how.unavailable(DEVICE) is None
]


def arguments(height: int, width: int) -> list[Tensor]:
    """Two images of three channels and flow, in fp32; coordinates 0.05 px away from the kinks of the interpolation."""
    flow = 2 * normal(2, 2, height, width, seed=1)
    flow = flow.floor() + 0.05 + 0.9 * (flow - flow.floor())
    return [t.float().to(DEVICE).requires_grad_() for t in (normal(2, 3, height, width), flow)]


def results(args: list[Tensor], padding: str, backend: str) -> list[Tensor]:
    """The warped images, then the gradients of a weighted sum of them."""
    out = backward_warp(*args, padding=padding, backend=backend)
    total = (out.double() * torch.linspace(1, 2, out.numel(), device=DEVICE).view(out.shape)).sum()
    return [out.detach(), *torch.autograd.grad(total, args)]


@pytest.fixture(params=["border", "zeros"])
def padding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def test_warp_with_nan_and_huge_flow(padding: str, backend: str) -> None:
    """Reads stay inside the image, which lies in a buffer of NaN; NaN comes out where the flow is NaN, only there."""
    buffer = torch.full((1, 3, 20, 20), math.nan, device=DEVICE)
    image = buffer[..., 5:13, 6:15]
    image.copy_(normal(1, 3, 8, 9))
    flow = torch.zeros(1, 2, 8, 9, device=DEVICE)
    values = torch.tensor([1e30, -1e30, math.inf, -math.inf, 2.0**31, -(2.0**63), 1e9, -9.0])
    flow[0, 0, :, 0] = values
    flow[0, 1, :, 1] = values
    flow = flow.requires_grad_()
    image = image.detach().requires_grad_()
    found, expected = (results([image, flow], padding, b) for b in (backend, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        flow[0, 0, 3, 4] = math.nan
        out = backward_warp(image, flow, padding=padding, backend=backend)
    assert out.isnan().sum() == 3 and out[0, :, 3, 4].isnan().all()


@pytest.mark.parametrize("size", [(9, 40), (3, 17), (40, 2)], ids=str)
def test_warp_by_a_smooth_flow(padding: str, backend: str, size: tuple[int, int]) -> None:
    """Neighbours come from neighbours, in whole registers, and beyond every border."""
    for shift in ((0.3, 0.6), (-2.7, 1.2), (12.4, -30.2), (1.0, 0.0)):
        image, flow = arguments(*size)
        with torch.no_grad():
            flow.copy_(0.01 * flow.sin() + torch.tensor(shift, device=DEVICE)[:, None, None] + 0.05)
        found, expected = (results([image, flow], padding, b) for b in (backend, "reference"))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max().item())


@pytest.mark.skipif("triton" not in BACKENDS, reason="no Triton on this device")
def test_warp_of_far_apart_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose second row lies 2^31 elements behind the first: offsets of 64 bits."""
    monkeypatch.undo()  # most of this memory is never touched
    image = torch.empty(2**31 + 8, dtype=torch.float16, device=DEVICE).as_strided((1, 2, 2, 3), (0, 4, 2**31, 1))
    image.copy_(normal(1, 2, 2, 3))
    flow = normal(1, 2, 2, 3).float().to(DEVICE)
    out = backward_warp(image, flow, backend="triton")
    assert torch.equal(out, backward_warp(image.contiguous(), flow, backend="triton"))


def test_warp_gradient_with_deterministic_algorithms(padding: str, backend: str) -> None:
    """Fixed point is exact to fp32's rounding, also where gradients are tiny or not finite."""
    args = arguments(7, 9)
    plain = results(args, padding, backend)
    torch.use_deterministic_algorithms(True)
    try:
        fixed, again = (results(args, padding, backend) for _ in range(2))
        grads = []
        for scale in (1e-30, 1e30, math.inf):
            out = backward_warp(*args, padding=padding, backend=backend)
            grads.append(torch.autograd.grad(out, args[0], torch.full_like(out, scale))[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(fixed, again, strict=True))
    torch.testing.assert_close(fixed, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0] * 1e30, grads[1] / 1e30, rtol=1e-5, atol=1e-5)
    assert not grads[2][plain[1] != 0].isfinite().any()
