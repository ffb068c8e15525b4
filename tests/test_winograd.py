"""Minimal filtering against PyTorch's convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avfast import modules
from avfast.modules import ConvLSTM
from avfast.networks import PatchConv
from avfast.winograd import RepeatedConv, transforms

SIZES = [(3, 3), (4, 4), (6, 6), (5, 7), (3, 4), (8, 2), (1, 1)]


def by_pixel(x: Tensor) -> Tensor:
    return x.permute(2, 3, 0, 1).flatten(0, 1)


def by_map(x: Tensor, height: int, width: int) -> Tensor:
    return x.unflatten(0, (height, width)).permute(2, 3, 0, 1)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_repeated_convolution_equals_the_direct_one(height: int, width: int) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(2, 5, height, width, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(6, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    conv = RepeatedConv(weight, bias, height, width)
    outs = [by_map(conv(by_pixel(x)), height, width) for x in xs]
    expected = [F.conv2d(x, weight, bias, padding=1) for x in xs]
    torch.testing.assert_close(outs, expected, rtol=1e-10, atol=1e-10)

    # of different weight in the loss: a call's gradient must meet its own input
    loss, wanted = (sum((i + 1) * o.sin().sum() for i, o in enumerate(os)) for os in (outs, expected))
    arguments = [*xs, weight, bias]
    # a backward pass that ends before the weights must leave nothing behind for the next one
    torch.autograd.grad(loss, xs, retain_graph=True)
    for ours, theirs in zip(
        torch.autograd.grad(loss, arguments, retain_graph=True), torch.autograd.grad(wanted, arguments), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    again = torch.autograd.grad(outs[1].sum(), weight)[0]
    direct = torch.autograd.grad(F.conv2d(xs[1], weight, bias, padding=1).sum(), weight)[0]
    torch.testing.assert_close(again, direct, rtol=1e-10, atol=1e-10)


def test_one_tile_takes_the_fewest_products() -> None:
    assert [len(transforms(s, s).inputs) for s in (2, 3, 4, 6)] == [16, 25, 36, 100]


@pytest.mark.parametrize("side", [3, 4, 6])
def test_rounding_in_single_precision(side: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 256, side, side), 0.02 * torch.randn(512, 256, 3, 3)
    found = by_map(RepeatedConv(weight, None, side, side)(by_pixel(x)), side, side)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    assert (found - exact).norm() <= 1e-5 * exact.norm()


def test_no_second_derivatives() -> None:
    x, weight = torch.randn(9, 2, 3, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    out = RepeatedConv(weight, None, 3, 3)(x).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("filtering", [True, False])
def test_recurrence_equals_the_cells(bias: bool, filtering: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lstm = ConvLSTM(3, [4, 2]).double()
    if not bias:
        for cell in lstm.cells:
            cell.bias = None
    x = torch.randn(5, 2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(modules, "_LEAST_PIXELS", 0 if filtering else 10**9)
    step = lstm.recurrence(x[0])
    assert isinstance(step, modules._SmallMapRecurrence) == filtering
    states, expected = None, []
    for t in range(5):
        top, states = lstm(x[t], states)
        expected.append(top)
    found = torch.stack([step(x[t]) for t in range(5)])
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-10, atol=1e-10)
    parameters = [x, *lstm.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(torch.stack(expected).square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_recurrence_takes_the_cells_under_autocast() -> None:
    lstm, x = ConvLSTM(3, [4]), torch.randn(32, 3, 3, 3)
    assert isinstance(lstm.recurrence(x), modules._SmallMapRecurrence)
    with torch.autocast("cpu", torch.bfloat16):
        assert not isinstance(lstm.recurrence(x), modules._SmallMapRecurrence)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(4, 2, 1), (2, 1, 0), (3, 1, 1)])
def test_patch_convolution_equals_the_direct_one(kernel: int, stride: int, padding: int, bias: bool) -> None:
    torch.manual_seed(0)
    conv = PatchConv(3, 5, kernel, stride, padding, bias=bias).double()
    x = torch.randn(4, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    found, expected = conv(x), F.conv2d(x, conv.weight, conv.bias, stride=stride, padding=padding)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), (x, conv.weight)),
        torch.autograd.grad(expected.sin().sum(), (x, conv.weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
