"""Convolutions by Winograd's minimal filtering against PyTorch's, and where the model takes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avfast.kernels import native, patch_conv, shared_weights
from avfast.kernels.winograd import conv as winograd
from avfast.kernels.winograd.tiles import Geometry
from avfast.kernels.winograd.transforms import best_tile, winograd_transforms
from avfast.modules import ConvLSTM

native = pytest.mark.skipif(native.NOT_BUILT is not None, reason=str(native.NOT_BUILT))
SIZES = [(3, 3), (4, 4), (6, 6), (5, 7), (3, 4), (8, 2), (1, 1)]
# kernel, stride, padding
KINDS = [(3, 1, 1), (3, 1, 0), (2, 1, 0), (4, 2, 1), (6, 2, 2), (6, 3, 2)]


def convolve(x: Tensor, weight: Tensor, geometry: Geometry, transposed: bool = False) -> Tensor:
    """By minimal filtering, whatever the size."""
    return winograd._winograd(x, weight, None, geometry, transposed)


@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_filtering_of_random_signals(size: int, taps: int) -> None:
    torch.manual_seed(0)
    maps = winograd_transforms(size, taps)
    signal, weight = torch.randn(size + taps - 1).double(), torch.randn(taps).double()
    found = maps.output_transform @ ((maps.filter_transform @ weight) * (maps.input_transform @ signal))
    torch.testing.assert_close(found, F.conv1d(signal[None, None], weight[None, None])[0, 0])


def test_the_fewest_products() -> None:
    assert [best_tile(n, 3) for n in (1, 2, 3, 4, 6, 8)] == [(2, 1), (2, 1), (3, 1), (4, 1), (3, 2), (4, 2)]
    assert [best_tile(n, 2) for n in (3, 5, 6, 9, 10, 12)] == [(3, 1), (5, 1), (3, 2), (3, 3), (5, 2), (4, 3)]


@native
def test_a_shared_weight_has_its_gradient_after_a_call_without() -> None:
    """Frames that only warm a recurrence up come first, under no_grad."""
    geometry = Geometry(6, 6, 3, 1, 1)
    x, weight = torch.randn(2, 5, 6, 6).double(), torch.randn(6, 5, 3, 3).double().requires_grad_()
    with shared_weights():
        with torch.no_grad():
            warm = convolve(x, weight, geometry)
        out = convolve(x, weight, geometry)
    assert not warm.requires_grad
    expected = torch.autograd.grad(F.conv2d(x, weight, padding=1).sin().sum(), weight)
    torch.testing.assert_close(torch.autograd.grad(out.sin().sum(), weight), expected)


@native
@pytest.mark.parametrize("part_bytes", [1, 1 << 22])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding"), KINDS)
def test_shared_convolution_equals_the_direct_one(
    kernel: int, stride: int, padding: int, transposed: bool, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of calls with batches of several sizes, in one stretch and in many."""
    torch.manual_seed(0)
    monkeypatch.setattr(winograd, "_BYTES", part_bytes)
    direct = F.conv_transpose2d if transposed else F.conv2d
    for size in SIZES:
        sides = [stride * (n - 1) - 2 * padding + kernel if transposed else n for n in size]
        geometry = Geometry(*sides, kernel, stride, padding)
        if min(sides) < 1 or min(map(geometry.output_size, sides)) < 1:
            continue
        xs = [torch.randn(n, 5, *size, dtype=torch.float64, requires_grad=True) for n in (7, 1, 3)]
        shape = (5, 6) if transposed else (6, 5)
        weight = torch.randn(*shape, kernel, kernel, dtype=torch.float64, requires_grad=True)
        with shared_weights():
            outs = [convolve(x, weight, geometry, transposed) for x in xs]
        expected = [direct(x, weight, stride=stride, padding=padding) for x in xs]
        torch.testing.assert_close(outs, expected, rtol=1e-10, atol=1e-10)

        # of different weight in the loss: a call's gradient must meet its own input
        loss, wanted = (sum((i + 1) * o.sin().sum() for i, o in enumerate(os)) for os in (outs, expected))
        # a backward pass that ends before the weights must leave nothing behind for the next one
        torch.autograd.grad(loss, xs, retain_graph=True)
        for ours, theirs in zip(
            torch.autograd.grad(loss, [*xs, weight], retain_graph=True),
            torch.autograd.grad(wanted, [*xs, weight]),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        again = torch.autograd.grad(outs[1].sum(), weight)[0]
        alone = torch.autograd.grad(direct(xs[1], weight, stride=stride, padding=padding).sum(), weight)[0]
        torch.testing.assert_close(again, alone, rtol=1e-9, atol=1e-9)


@native
@pytest.mark.parametrize("channels", [1, 7, 64, 70, 130])
def test_every_number_of_channels(channels: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, channels, 5, 4).double(), torch.randn(3, channels, 3, 3).double()
    found = convolve(x, weight, Geometry(5, 4, 3, 1, 1))
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1), rtol=1e-10, atol=1e-10)


@native
@pytest.mark.parametrize("layout", ["contiguous", "window"])
def test_layouts(layout: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 6).double(), torch.randn(3, 4, 3, 3).double()
    expected = F.conv2d(x, weight, padding=1)
    if layout == "window":
        buffer = torch.full((2, 8, 10, 10), float("nan"), dtype=torch.float64)
        x = buffer[:, 2:6, 1:7, 3:9].copy_(x)
    out = convolve(x, weight, Geometry(6, 6, 3, 1, 1))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@native
# measured with MKL: 1.5e-6, 2.7e-6 and 3.5e-6 on an AMD CPU; the last 4.6e-6 on an Intel one with AVX-512
@pytest.mark.parametrize(("side", "kernel", "stride", "most"), [(3, 3, 1, 3e-6), (4, 3, 1, 5e-6), (10, 4, 2, 6e-6)])
def test_rounding_in_single_precision(side: int, kernel: int, stride: int, most: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(16, 256, side, side), 0.02 * torch.randn(512, 256, kernel, kernel)
    found = convolve(x, weight, Geometry(side, side, kernel, stride, 1))
    exact = F.conv2d(x.double(), weight.double(), stride=stride, padding=1)
    assert (found - exact).norm() <= most * exact.norm()


@native
def test_training_after_inference() -> None:
    """What is kept of a geometry was made in inference mode."""
    x, weight = torch.randn(2, 3, 5, 9), torch.randn(4, 3, 3, 3, requires_grad=True)
    geometry = Geometry(5, 9, 3, 1, 1)
    with torch.inference_mode():
        out = convolve(x, weight, geometry)
    trained = convolve(x, weight, geometry)
    torch.testing.assert_close(trained, out)
    trained.sum().backward()
    assert weight.grad is not None


@native
def test_no_second_derivatives() -> None:
    x, weight = torch.randn(2, 3, 3, 3, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    out = convolve(x, weight, Geometry(3, 3, 3, 1, 1)).square().sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("filtering", [pytest.param(True, marks=native), False])
def test_recurrence_with_shared_weights_equals_the_cells(
    bias: bool, filtering: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    lstm = ConvLSTM(3, [4, 2]).double()
    if not bias:
        for cell in lstm.cells:
            cell.bias = None
    x = torch.randn(5, 2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    calls = []
    run = winograd._SharedConv.__call__
    monkeypatch.setattr(winograd._SharedConv, "__call__", lambda *a: calls.append(1) or run(*a))
    monkeypatch.setattr(winograd, "_LEAST_PIXELS", 0 if filtering else 10**9)

    def recurrence() -> Tensor:
        states, tops = None, []
        for step in x:
            top, states = lstm(step, states)
            tops.append(top)
        return torch.stack(tops)

    expected = recurrence()
    assert not calls
    with shared_weights():
        found = recurrence()
    assert len(calls) == (10 if filtering else 0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = [x, *lstm.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@native
def test_autocast_takes_pytorchs_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half types have no digits to spare for the transforms."""
    calls = []
    monkeypatch.setattr(winograd, "_SharedConv", lambda *_: calls.append(1) or pytest.fail("minimal filtering"))
    lstm, x = ConvLSTM(3, [4]), torch.randn(32, 3, 3, 3)
    with torch.autocast("cpu", torch.bfloat16), shared_weights():
        lstm(x)
    assert not calls


@native
def test_a_graph_is_freed_without_the_garbage_collector() -> None:
    """What is shared between calls makes no cycle of references that would keep the maps."""
    import gc
    import weakref

    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 5, 4)
    gc.disable()
    try:
        with shared_weights():
            out = convolve(x, weight, Geometry(5, 4, 3, 1, 1))
            out = convolve(out[:, :3], weight, Geometry(5, 4, 3, 1, 1))
        kept = weakref.ref(out)
        out.sum().backward()
        node = weakref.ref(out.grad_fn)
        del out
        assert kept() is None and node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((4, 4), (2, 2), (1, 1)),
        ((2, 2), (1, 1), (0, 0)),
        ((3, 3), (1, 1), (1, 1)),
        ((4, 4), (2, 1), (0, 2)),
        ((3, 3), (1, 2), (1, 0)),
    ],
)
def test_patch_convolution_equals_the_direct_one(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, *kernel, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    found = patch_conv(x, weight, offset, stride=stride, padding=padding)
    expected = F.conv2d(x, weight, offset, stride=stride, padding=padding)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(
        torch.autograd.grad(found.sin().sum(), (x, weight)),
        torch.autograd.grad(expected.sin().sum(), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
