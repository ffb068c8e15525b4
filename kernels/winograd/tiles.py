"""Convolutions by Winograd's minimal filtering on the CPU, for several calls with the same weights.

Along an axis the pixels lie in as many phases as the stride, and each phase meets r = kernel / stride taps at stride 1:
m outputs take m + r - 1 products where the sum takes m r (`toom_cook`). Over both axes, in tiles of m x m outputs, that
is N = (m + r - 1)^2 matrix products between all M tiles and S = stride^2 phases of all channels: 25 products for a 3x3
map and a 3x3 kernel where the sum has 81, 40 % of them with padding; 2.25 to 2.8 times fewer than the sum's for a 4x4
kernel of stride 2. The transposed convolution and all gradients are the same linear maps backwards. C++ cuts maps into
tiles and puts them together (csrc/fused.h), a stretch of the batch at a time, so that the products stay in the caches;
the products are PyTorch's bmm. The limit is their arithmetic, 2 N M S C O.

Exact in exact arithmetic; in fp32 the relative error is 0.4 to 2.8e-6 where the direct sum has 0.2 to 0.8e-6 (64 to 512
channels).

Shape legend: x B C H W on the side of the convolution's inputs, O channels and h w on that of its outputs; N products,
M tiles, S phases as above.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import native
from ..registry import once_differentiable, ordinary
from .transforms import Filtering, cheapest_size, minimal_filtering

# of products at a time, if the weights are not more: what the caches hold
_BYTES = 1 << 22


class Geometry(NamedTuple):
    """Of a convolution, also where it runs backwards: its inputs' height and width, and what is the same for both axes;
    the kernel is a multiple of the stride."""

    height: int
    width: int
    kernel: int
    stride: int
    padding: int

    @property
    def taps(self) -> int:
        """Per phase and axis."""
        return self.kernel // self.stride

    def out(self, size: int) -> int:
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def filterings(self) -> list[tuple[Filtering, int, int]]:
        """Of the rows and of the columns: (maps, outputs per tile, tiles)."""
        sizes = [cheapest_size(self.out(n), self.taps) for n in (self.height, self.width)]
        return [(minimal_filtering(size, self.taps), size, tiles) for size, tiles in sizes]


class Side(NamedTuple):
    """How a convolution's inputs or its outputs are cut into tiles: the arguments of csrc/fused.h."""

    size: tuple[int, int]
    phases: int
    products: int
    """N"""
    tiles: int
    """Per image."""
    matrices: tuple[Tensor, Tensor]
    numbers: tuple[Any, ...]
    """Stride, padding; size, tiles, pixels taken, products and step, of the rows and of the columns."""

    def gather(self, *maps: Tensor) -> Tensor:
        """Channels-last batches (B,C,*size), one after the other -> products (N,M,S*C)."""
        values = self.phases * maps[0].shape[1]
        tiles = self.tiles * sum(map(len, maps))
        # those of one tile lie anything but a power of two apart, which would crowd them into one set of a cache
        apart = -(-tiles * values // 1024) * 1024 + 64
        room = maps[0].new_empty((self.products, apart))
        products = room.as_strided((self.products, tiles, values), (apart, values, 1))
        first = 0
        for x in maps:
            last = first + len(x) * self.tiles
            rows, columns = self.matrices
            given = {"map": x, "rows": rows, "columns": columns}
            sizes = self.sizes(x, apart)
            native.call("gather_tiles", x.dtype, given, {"products": products[:, first:last]}, **sizes)
            first = last
        return products

    def scatter(self, products: Tensor, out: Tensor) -> None:
        """Products (N,B*tiles,S*C) -> channels-last (B,C,*size): the adjoint."""
        rows, columns = self.matrices
        given = {"products": products, "rows": rows, "columns": columns}
        native.call("scatter_tiles", out.dtype, given, {"map": out}, **self.sizes(out, products.stride(0)))

    def sizes(self, x: Tensor, apart: int) -> dict[str, Any]:
        stride, padding, row_sizes, column_sizes = self.numbers
        return {
            "batch": x.shape[0], "channels": x.shape[1], "apart": apart, "stride": stride, "padding": padding,
            "row_sizes": row_sizes, "column_sizes": column_sizes,
        }  # fmt: skip


# kept tensors have to serve training too, whoever asks for them first
@cache
@torch.inference_mode(False)
def sides(geometry: Geometry, dtype: torch.dtype) -> tuple[Side, Side]:
    """Of the inputs and of the outputs."""
    axes: tuple[list[Any], list[Any]] = [], []
    matrices: tuple[list[Tensor], list[Tensor]] = [], []
    for length, (maps, step, tiles) in zip(geometry[:2], geometry.filterings(), strict=True):
        for i, (size, matrix) in enumerate(((length, maps.inputs), (geometry.out(length), maps.outputs.T))):
            axes[i].append((size, tiles, matrix.shape[1], matrix.shape[0], step))
            matrices[i].append(matrix.to(dtype).contiguous())

    def side(i: int, stride: int, padding: int) -> Side:
        (height, rows, _, per_row, _), (width, columns, _, per_column, _) = axes[i]
        numbers = (stride, padding, *axes[i])
        first, second = matrices[i]
        return Side((height, width), stride**2, per_row * per_column, rows * columns, (first, second), numbers)

    return side(0, geometry.stride, geometry.padding), side(1, 1, 0)


@cache
@torch.inference_mode(False)
def _of_taps(geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """(N*S, kernel^2): from the taps, row by row, to what every product and phase weighs."""
    rows, columns = (maps.taps for maps, _, _ in geometry.filterings())
    phases = torch.eye(geometry.stride, dtype=torch.float64)
    # tap stride i + p belongs to phase p
    weights = torch.einsum("ai,bj,px,qy->abpqixjy", rows, columns, phases, phases)
    return weights.reshape(-1, geometry.kernel**2).to(dtype)


def _transformed(weight: Tensor, geometry: Geometry) -> Tensor:
    """(O,C,kernel,kernel) -> (N,S*C,O)."""
    by_tap = weight.permute(2, 3, 1, 0).reshape(geometry.kernel**2, -1)
    values = geometry.stride**2 * weight.shape[1]
    return (_of_taps(geometry, weight.dtype) @ by_tap).view(-1, values, weight.shape[0])


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    """Why `RepeatedConv` cannot be had for x and weight; None if it can."""
    if not ordinary(x, weight):
        return "it takes plain tensors, and compiled or exported programs have PyTorch's convolution"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} and weight is {weight.dtype}"
    return native.unsupported(x)


class RepeatedConv:
    """Convolution by weight (O,C,kernel,kernel), without bias, of fp32 or fp64 maps, for the calls of one forward pass:
    the weight is transformed once, and its gradient taken in few products when the backward pass ends. Transposed calls
    go from the outputs' side to the inputs'. Returned maps are channels-last; no second derivatives.
    """

    def __init__(self, weight: Tensor, geometry: Geometry) -> None:
        self.inputs, self.outputs = sides(geometry, weight.dtype)
        self.calls: list[_Call] = []
        self.weights: Tensor = _Gather.apply(_transformed(weight, geometry), self)
        image = self.inputs.tiles * self.weights[:, :, 0].numel() * self.weights.element_size()
        self.most = max(1, max(_BYTES, self.weights.nbytes) // image)
        """Images at a time."""

    def __call__(self, x: Tensor, *, transposed: bool = False) -> Tensor:
        return _Convolve.apply(x.contiguous(memory_format=torch.channels_last), self.weights, self, transposed)

    def parts(self, count: int) -> Iterator[slice]:
        """Stretches of a batch, as even as can be."""
        step = -(-count // -(-count // self.most))
        return (slice(first, min(first + step, count)) for first in range(0, count, step))


class _Call(NamedTuple):
    backward_pass: int
    inputs: Tensor
    outputs: Tensor
    """These or those are gradients."""


class _Gather(torch.autograd.Function):
    """The transformed weights as they are; backward, their gradient from what the calls have left."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, conv: RepeatedConv) -> Tensor:
        ctx.conv = conv
        # nothing comes from the calls: not even zeros of the weights' size
        ctx.set_materialize_grads(False)
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        conv: RepeatedConv = ctx.conv
        # of this backward pass: another one may have stopped before it came here
        now = torch._C._current_graph_task_id()
        calls = [call for call in conv.calls if call.backward_pass == now]
        conv.calls.clear()
        groups: list[list[tuple[Tensor, Tensor]]] = []
        images = conv.most
        for call in calls:
            for part in conv.parts(len(call.inputs)):
                inputs, outputs = call.inputs[part], call.outputs[part]
                if images + len(inputs) > conv.most:
                    groups.append([])
                    images = 0
                groups[-1].append((inputs, outputs))
                images += len(inputs)
        total: Tensor | None = None
        for group in groups:
            left, right = (
                side.gather(*maps)
                for side, maps in zip((conv.inputs, conv.outputs), zip(*group, strict=True), strict=True)
            )
            total = left.mT @ right if total is None else total.baddbmm_(left.mT, right)
        return total, None


class _Convolve(torch.autograd.Function):
    """The weights' gradient is left to `_Gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, conv: RepeatedConv, transposed: bool) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.conv, ctx.transposed = conv, transposed
        return _convolve(x, weights, conv, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        x, weights = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[1]:
            pair = (grad, x) if ctx.transposed else (x, grad)
            ctx.conv.calls.append(_Call(torch._C._current_graph_task_id(), *pair))
        by_x = _convolve(grad, weights, ctx.conv, not ctx.transposed) if ctx.needs_input_grad[0] else None
        return by_x, None, None, None


def _convolve(x: Tensor, weights: Tensor, conv: RepeatedConv, transposed: bool) -> Tensor:
    near, far = (conv.outputs, conv.inputs) if transposed else (conv.inputs, conv.outputs)
    weights = weights.mT if transposed else weights
    shape = (len(x), weights.shape[2] // far.phases, *far.size)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for part in conv.parts(len(x)):
        far.scatter(near.gather(x[part]) @ weights, out[part])
    return out
