"""Strided convolutions by minimal filtering: against PyTorch's, over all geometries, and when they are chosen."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from tensors import normal
from torch import Tensor

from avfast.kernels import native, shared_weights, strided_conv, strided_conv_transpose
from avfast.kernels.winograd import conv as winograd

pytestmark = pytest.mark.skipif(native.NOT_BUILT is not None, reason=str(native.NOT_BUILT))


def both(transposed: bool, x: Tensor, weight: Tensor, padding: int, **options) -> tuple[list[Tensor], list[Tensor]]:
    """Result and gradients: ours and PyTorch's."""
    ours, theirs = (strided_conv_transpose, F.conv_transpose2d) if transposed else (strided_conv, F.conv2d)
    found = []
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for out in (ours(x, weight, padding=padding, **options), theirs(x, weight, stride=2, padding=padding)):
        seed = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        found.append([out.detach(), *torch.autograd.grad(out, (x, weight), seed)])
    return found[0], found[1]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_every_size(padding: int, transposed: bool) -> None:
    """All remainders of all tile sizes, also where the last row or column of x meets no output."""
    for height in range(1, 24):
        width = 25 - height
        if (min(height, width) + 2 * padding < 4) if not transposed else (min(height, width) * 2 + 2 <= 2 * padding):
            continue
        shape = (3, 2, 4, 4) if transposed else (2, 3, 4, 4)
        found, expected = both(transposed, normal(2, 3, height, width), normal(*shape, seed=1), padding, backend="cpp")
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_weights_are_transformed_once_for_calls_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = (t.requires_grad_() for t in (normal(2, 32, 24, 24), normal(32, 32, 4, 4, seed=1)))
    transformed = []
    transform = winograd.transform_weight
    monkeypatch.setattr(winograd, "transform_weight", lambda *a: transformed.append(1) or transform(*a))

    def run() -> tuple[Tensor, ...]:
        first = strided_conv(x, weight, backend="cpp")
        second = strided_conv(x * x, weight, backend="cpp")
        back = strided_conv_transpose(second, weight, backend="cpp")
        return torch.autograd.grad(first.square().sum() + back.square().sum(), (x, weight))

    alone = run()
    assert len(transformed) == 3
    transformed.clear()
    with shared_weights():
        shared = run()
        # forwards and backwards through the same maps
        assert len(transformed) == 1
        # another size of map has other tiles
        strided_conv(x[:, :, :12], weight, backend="cpp")
        assert len(transformed) == 2
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    strided_conv(x, weight, backend="cpp")
    assert len(transformed) == 3


def test_choice() -> None:
    def chosen(x: Tensor, weight: Tensor, **options) -> bool:
        with torch.no_grad():
            out = strided_conv(x, weight, **options)
        found = out.is_contiguous(memory_format=torch.channels_last)
        assert found is not out.is_contiguous()
        return found

    image, weight = torch.rand(16, 32, 24, 24), torch.rand(32, 32, 4, 4)
    assert chosen(image, weight)
    with shared_weights():
        assert chosen(image[:2], weight)
    # too few tiles to transform the weights for, or to multiply by them; too few channels; another type
    assert not chosen(image[:2], weight)
    with shared_weights():
        assert not chosen(image[:1], weight)
    assert not chosen(image[:, :31].contiguous(), weight[:, :31])
    assert not chosen(image.double(), weight.double())
    with torch.autocast("cpu"):
        assert strided_conv(image, weight).dtype == torch.bfloat16


def test_compiled_and_exported_programs_have_pytorchs_convolution() -> None:
    image, weight = torch.rand(16, 32, 24, 24), torch.rand(32, 32, 4, 4)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with shared_weights():
                return strided_conv_transpose(strided_conv(x, weight), weight)

    expected = F.conv_transpose2d(F.conv2d(image, weight, stride=2, padding=1), weight, stride=2, padding=1)
    with torch.no_grad():
        compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)(image)
        program = torch.export.export(Module(), (image,))
    torch.testing.assert_close(compiled, expected)
    assert not [n for n in program.graph.nodes if "avfast" in str(n.target)]
    with warnings.catch_warnings(), pytest.raises(Exception, match="compiled or exported programs have PyTorch's"):
        warnings.simplefilter("ignore")
        torch.compile(lambda x: strided_conv(x, weight, backend="cpp"), backend="eager", fullgraph=True)(image)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((1, 3, 8, 8), (2, 3, 3, 3), r"weight has shape \(2, 3, 3, 3\), expected \(O, 3, 4, 4\)"),
        ((1, 3, 8, 8), (2, 4, 4, 4), r"weight has shape \(2, 4, 4, 4\), expected \(O, 3, 4, 4\)"),
        ((3, 8, 8), (2, 3, 4, 4), r"x has shape \(3, 8, 8\), expected \(B, C, H, W\)"),
        ((1, 3, 1, 8), (2, 3, 4, 4), r"x has shape \(1, 3, 1, 8\), expected at least 2 rows and columns"),
    ],
)
def test_bad_input(x: tuple[int, ...], weight: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strided_conv(torch.rand(x), torch.rand(weight))
    with pytest.raises(
        ValueError, match=r"padding is 3, expected 0 or more, and rows and columns left of \(1, 3, 2, 8\)"
    ):
        strided_conv_transpose(torch.rand(1, 3, 2, 8), torch.rand(3, 2, 4, 4), padding=3)
    with pytest.raises(ValueError, match="padding is -1, expected 0 or more"):
        strided_conv(torch.rand(1, 3, 8, 8), torch.rand(2, 3, 4, 4), padding=-1)
    with pytest.raises(ValueError, match=r"x is torch.float32 and weight is torch.float64"):
        strided_conv(torch.rand(1, 3, 8, 8), torch.rand(2, 3, 4, 4).double(), backend="cpp")


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [(2, 1), (3, 1), (12, 1), (2, 2)])
def test_narrow_maps_in_bfloat16(size: tuple[int, int], transposed: bool, autocast: bool) -> None:
    """Where the smaller map is one column wide, PyTorch's own convolution is wrong on some CPUs."""
    height, width = size
    x = normal(6, 128, height, width) if transposed else normal(6, 128, 2 * height, 2 * width)
    x, weight = x.bfloat16().double(), (0.05 * normal(128, 128, 4, 4, seed=1)).bfloat16().double()
    _, expected = both(transposed, x, weight, 1)
    dtype = torch.float32 if autocast else torch.bfloat16
    for _ in range(10):
        # freed at once: memory that the convolution may get
        _ = torch.full((6 * 128 * 4 * height * width,), float("nan"), dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, _ = both(transposed, x.detach().to(dtype), weight.detach().to(dtype), 1)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.double() - theirs).abs().max() < 0.02 * theirs.abs().max()
