"""A 3x3 convolution over a small map, used at every step of a recurrence: Winograd's minimal filtering, with the
weights transformed once and their gradient taken in one product at the end.

On a map of 3x3 pixels 40 % of a 3x3 convolution's taps fall on padding. Winograd (1980; for convolutions Lavin and
Gray, CVPR 2016) computes m outputs of a filter of 3 taps from m + 2 products: with one tile of m = 3 a 3x3 map takes 25
products per pair of channels instead of 81, a 4x4 map with m = 4 36 instead of 144, and padding costs nothing because
the transforms of this map leave it out. Exact in exact arithmetic; in fp32 the relative error is 1.6e-6 at 3x3 and
2.8e-6 at 4x4 where the direct sum has 0.7e-6 (256 to 512 channels).

Shape legend: P = h*w pixels of the map, in rows; N products (over all tiles); B batch; C, O channels in and out. Maps
are held pixel by pixel, (P,B,C).
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_POINTS = [Fraction(p) for p in (0, 1, -1, 2, -2)]
_TAPS = 3


class Transforms(NamedTuple):
    """The three linear maps for one size of map, in double."""

    taps: Tensor
    """(n*n, 9): of the filter's taps."""
    inputs: Tensor
    """(N, P): of the pixels, N = n*n*tiles with the tiles innermost."""
    outputs: Tensor
    """(P, N): from products to pixels."""


@cache
def transforms(height: int, width: int) -> Transforms:
    """The maps for (h,w), in tiles of the size that takes the fewest products."""
    rows, columns = _axis(height), _axis(width)
    taps = torch.einsum("ai,bj->abij", rows.taps, columns.taps).reshape(-1, _TAPS * _TAPS)
    inputs = torch.einsum("kap,lbq->abklpq", rows.inputs, columns.inputs)
    outputs = torch.einsum("pka,qlb->pqabkl", rows.outputs, columns.outputs)
    pixels = height * width
    return Transforms(taps, inputs.reshape(-1, pixels), outputs.reshape(pixels, -1))


class _Axis(NamedTuple):
    taps: Tensor  # (n, 3)
    inputs: Tensor  # (tiles, n, side)
    outputs: Tensor  # (side, tiles, n)


def _axis(side: int) -> _Axis:
    def products(size: int) -> int:
        return -(-side // size) * (size + _TAPS - 1)

    size = min((2, 3, 4), key=products)
    tiles = -(-side // size)
    taps, inputs, outputs = _toom_cook(size)
    n = size + _TAPS - 1
    of_inputs = torch.zeros(tiles, n, side + n + size, dtype=torch.float64)
    of_outputs = torch.zeros(side + n + size, tiles, n, dtype=torch.float64)
    for tile in range(tiles):
        # a tile reads from one pixel before its first output; one more in front stands for that padding
        of_inputs[tile, :, tile * size : tile * size + n] = inputs
        of_outputs[tile * size : (tile + 1) * size, tile] = outputs
    return _Axis(taps, of_inputs[..., 1 : side + 1], of_outputs[:side])


def _toom_cook(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """F(size, 3): taps (n,3), inputs (n,n), outputs (size,n), evaluated at the first points and at infinity."""
    points = _POINTS[: size + _TAPS - 2]
    taps, inputs = [], []
    for point in points:
        others = [p for p in points if p != point]
        weight = Fraction(1)
        for other in others:
            weight *= point - other
        taps.append([point**i / weight for i in range(_TAPS)])
        inputs.append([*_with_roots(others), Fraction(0)])
    taps.append([Fraction(0)] * (_TAPS - 1) + [Fraction(1)])
    inputs.append(_with_roots(points))
    outputs = [[point**i for point in points] + [Fraction(i == size - 1)] for i in range(size)]
    return _double(taps), _double(inputs), _double(outputs)


def _double(rows: list[list[Fraction]]) -> Tensor:
    return torch.tensor([[float(x) for x in row] for row in rows], dtype=torch.float64)


def _with_roots(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, constant first, of the polynomial with these roots and leading coefficient 1."""
    polynomial = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *polynomial]
        polynomial = [a - root * b for a, b in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
    return polynomial


class RepeatedConv:
    """Convolution by weight (O,C,3,3) and bias (O), padding 1, over maps (P,B,C) of one size, for one sequence.

    Calls return (P,B,O). The weight's gradient is one product over all calls when the backward pass ends; no second
    derivatives.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, height: int, width: int) -> None:
        self.transforms = Transforms(*(m.to(weight) for m in transforms(height, width)))
        taps = self.transforms.taps
        by_tap = weight.permute(2, 3, 1, 0).reshape(_TAPS * _TAPS, -1)
        transformed = (taps @ by_tap).view(len(taps), weight.shape[1], weight.shape[0])
        self.calls: list[_Call] = []
        self.weight = _Gather.apply(transformed, self)
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out = _Convolve.apply(x, self.weight, self)
        return out if self.bias is None else out + self.bias

    def of_pixels(self, x: Tensor) -> Tensor:
        """(P,B,C) -> (n,M,C), M = tiles*B."""
        return torch.mm(self.transforms.inputs, x.reshape(len(x), -1)).view(len(self.weight), -1, x.shape[2])

    def of_gradients(self, grad: Tensor) -> Tensor:
        """(P,B,O) -> (n,M,O)."""
        return torch.mm(self.transforms.outputs.T, grad.reshape(len(grad), -1)).view(
            len(self.weight), -1, grad.shape[2]
        )


class _Call(NamedTuple):
    backward_pass: int
    x: Tensor
    grad: Tensor


class _Gather(torch.autograd.Function):
    """The weights (n,C,O) as they are; backward, their gradient from what the calls have left."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, conv: RepeatedConv) -> Tensor:
        ctx.conv = conv
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        # of this backward pass: another one may have stopped before it came here
        now = torch._C._current_graph_task_id()
        calls = [call for call in ctx.conv.calls if call.backward_pass == now]
        ctx.conv.calls.clear()
        x, grad = (torch.cat([call[i] for call in calls], dim=1) for i in (1, 2))
        return torch.bmm(ctx.conv.of_pixels(x).mT, ctx.conv.of_gradients(grad)), None


class _Convolve(torch.autograd.Function):
    """x (P,B,C) by weights (n,C,O) -> (P,B,O). The weights' gradient is left to `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, conv: RepeatedConv) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.conv = conv
        products = torch.bmm(conv.of_pixels(x), weight)
        pixels = torch.mm(conv.transforms.outputs, products.view(-1, x.shape[1] * weight.shape[2]))
        return pixels.view(len(x), x.shape[1], weight.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        if ctx.needs_input_grad[1]:
            ctx.conv.calls.append(_Call(torch._C._current_graph_task_id(), x, grad))
        if not ctx.needs_input_grad[0]:
            return None, None, None
        products = torch.bmm(ctx.conv.of_gradients(grad), weight.mT)
        pixels = torch.mm(ctx.conv.transforms.inputs.T, products.view(-1, x.shape[1] * x.shape[2]))
        return pixels.view_as(x), None, None
