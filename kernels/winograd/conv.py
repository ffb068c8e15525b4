"""Convolutions that are faster by Winograd's minimal filtering on the CPU: 4x4 with stride 2, its transpose, and 3x3.

Cutting maps into tiles and transforming the weights is work besides the products (`tiles`), so it pays where there are
many tiles, or where several calls share their weights: a recurrence applies the same weights at every step. Inside
`with shared_weights():` each weight is transformed once, and its gradient is one product over all calls at the end of
the backward pass. The limit is the products' arithmetic, 2 N M S C O flops; they are PyTorch's bmm.

Exact in exact arithmetic. In fp32 the relative error is 0.4 to 2.8e-6 where the direct sum has 0.2 to 0.8e-6 (64 to 512
channels). Results are channels-last; there are first derivatives only.

Shape legend: x B C H W, weight O C k k, of a transposed convolution C O k k; N products, M tiles, S phases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import checks, native, registry
from .tiles import Geometry, tile_grids, transform_weight

# bytes of products at a time, unless the weights are more: what the caches hold
_BYTES = 1 << 22
# 3x3 convolutions of shared weights: from 64 pixels in the batch on, over 20 steps of 4 layers of 128 channels, it was
# 1.35 to 2.1 times as fast with gradients and 1.01 to 1.9 times without, on 2 cores with AVX2; below that it may lose
_LEAST_PIXELS, _LARGEST_MAP = 64, 64


def _images_at_once(weights: Tensor, geometry: Geometry) -> int:
    """How many images' products fit the caches."""
    inputs, _ = tile_grids(geometry, weights.dtype)
    bytes_per_image = inputs.tiles * weights[:, :, 0].numel() * weights.element_size()
    return max(1, max(_BYTES, weights.nbytes) // bytes_per_image)


def _stretches(images: int, most: int) -> Iterator[slice]:
    """Parts of a batch of at most so many images, as even as can be."""
    step = -(-images // -(-images // most))
    return (slice(first, min(first + step, images)) for first in range(0, images, step))


def _convolve(x: Tensor, weights: Tensor, sizes: Sequence[int], transposed: bool) -> Tensor:
    geometry = Geometry(*sizes)
    inputs, outputs = tile_grids(geometry, x.dtype)
    near, far = (outputs, inputs) if transposed else (inputs, outputs)
    out = _convolve_fake(x, weights, sizes, transposed)
    for part in _stretches(len(x), _images_at_once(weights, geometry)):
        products = near.gather(x[part]) @ (weights.mT if transposed else weights)
        far.scatter(products, out[part])
    return out


def _convolve_fake(x: Tensor, weights: Tensor, sizes: Sequence[int], transposed: bool) -> Tensor:
    geometry = Geometry(*sizes)
    if transposed:
        shape = (x.shape[0], weights.shape[1] // geometry.stride**2, geometry.height, geometry.width)
    else:
        size = geometry.output_size(geometry.height), geometry.output_size(geometry.width)
        shape = (x.shape[0], weights.shape[2], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _weight_gradient(inputs: list[Tensor], outputs: list[Tensor], weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """The gradient of the transformed weights, summed over calls: pairs of maps on the convolution's input side and on
    its output side, of which one is the gradient. Maps are joined to stretches that fit the caches."""
    geometry = Geometry(*sizes)
    most = _images_at_once(weights, geometry)
    groups: list[list[tuple[Tensor, Tensor]]] = []
    images = most
    for pair in zip(inputs, outputs, strict=True):
        for part in _stretches(len(pair[0]), most):
            x, y = (maps[part] for maps in pair)
            if images + len(x) > most:
                groups.append([])
                images = 0
            groups[-1].append((x, y))
            images += len(x)
    total: Tensor | None = None
    for group in groups:
        sides = zip(tile_grids(geometry, weights.dtype), zip(*group, strict=True), strict=True)
        left, right = (grid.gather(*maps) for grid, maps in sides)
        total = left.mT @ right if total is None else total.baddbmm_(left.mT, right)
    return torch.zeros_like(weights) if total is None else total


_CONVOLVE = registry.torch_op("_winograd_conv", _convolve, _convolve_fake)
_WEIGHT_GRADIENT = registry.torch_op(
    "_winograd_weight_gradient", _weight_gradient, lambda inputs, outputs, weights, sizes: torch.empty_like(weights)
)


Calls = list[tuple[Tensor, Tensor]]
"""Maps on a convolution's input side and on its output side, of which one is a gradient; one pair per call."""


class _SharedConv:
    """A convolution by one weight (O,C,k,k) for several calls, forwards and transposed."""

    def __init__(self, weight: Tensor, compute: torch.dtype, geometry: Geometry) -> None:
        # the weight is kept so that its id, by which `shared_weights` finds this object, stays its own
        self.weight, self.geometry = weight, geometry
        self.calls: Calls = []
        transformed = transform_weight(weight.to(compute), geometry)
        self.transformed, self.count = _TransformedWeights.apply(transformed, self.calls, geometry)

    def __call__(self, x: Tensor, transposed: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return _Convolution.apply(x, self.transformed, self.count, self.calls, self.geometry, transposed)


class _TransformedWeights(torch.autograd.Function):
    """The transformed weights as they are. Backward, their gradient in few large products over all calls.

    `count` is a scalar that every call takes and whose gradient every call gives as 1: autograd's sum of them is the
    number of calls in this backward pass. An earlier pass that stopped before it came here may have left calls too."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, calls: Calls, geometry: Geometry) -> tuple[Tensor, Tensor]:
        ctx.calls, ctx.geometry = calls, geometry
        ctx.save_for_backward(weights)
        # the calls give no gradient of the weights, not even zeros
        ctx.set_materialize_grads(False)
        return weights.view_as(weights), weights.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, count: Tensor | None) -> tuple[Tensor | None, None, None]:
        calls = [] if count is None else ctx.calls[-int(count) :]
        ctx.calls.clear()
        if not calls:
            return None, None, None
        (weights,) = ctx.saved_tensors
        inputs, outputs = (list(maps) for maps in zip(*calls, strict=True))
        return _WEIGHT_GRADIENT(inputs, outputs, weights, ctx.geometry), None, None


class _Convolution(torch.autograd.Function):
    """One call; the gradient of the weights is left to `_TransformedWeights`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, count: Tensor, calls: Calls, geometry: Geometry, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.calls, ctx.geometry, ctx.transposed = calls, geometry, transposed
        return _CONVOLVE(x, weights, geometry, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        want_x, want_weights = ctx.needs_input_grad[:2]
        grad = grad.contiguous(memory_format=torch.channels_last)
        if want_weights:
            # detached: what waits here must not keep the graph
            ctx.calls.append((grad, x.detach()) if ctx.transposed else (x.detach(), grad))
        grad_x = _CONVOLVE(grad, weights, ctx.geometry, not ctx.transposed) if want_x else None
        return grad_x, None, grad.new_ones(()) if want_weights else None, None, None, None


_convs: ContextVar[dict[tuple[int, Geometry, bool], _SharedConv] | None] = ContextVar(
    "avfast_shared_weights", default=None
)


@contextmanager
def shared_weights() -> Iterator[None]:
    """Within the block, convolutions by the same weight transform it once, and its gradient is one product at the end
    of the backward pass, of which there may be one. For recurrences: weights must not change within it. It changes no
    result but by rounding, and does nothing in compiled or exported programs and on CUDA."""
    if torch.compiler.is_compiling() or _convs.get() is not None:
        yield
        return
    token = _convs.set({})
    try:
        yield
    finally:
        _convs.reset(token)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, transposed: bool) -> Tensor:
    if x.numel() == 0:
        return _reference(x, weight, bias, geometry, transposed)
    compute = native.compute_type(x)
    convs = _convs.get()
    # a call without gradients leaves nothing that a later one with gradients could use
    key = id(weight), geometry, torch.is_grad_enabled() and weight.requires_grad
    conv = None if convs is None else convs.get(key)
    if conv is None:
        conv = _SharedConv(weight, compute, geometry)
        if convs is not None:
            convs[key] = conv
    out = conv(x.to(compute), transposed).to(x.dtype)
    return out if bias is None else out + bias[:, None, None]


def _reference(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, transposed: bool) -> Tensor:
    convolve = F.conv_transpose2d if transposed else F.conv2d
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        type_ = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if type_ == torch.bfloat16 and geometry.stride == 2 and geometry.output_size(geometry.width) == 1:
            # PyTorch 2.13 reads memory that nobody wrote here on CPUs with AMX: NaN, or off by 7 where rounding is 0.02
            with torch.autocast("cpu", enabled=False):
                x, weight = x.float(), weight.float()
                bias = None if bias is None else bias.float()
                out = convolve(x, weight, bias, stride=geometry.stride, padding=geometry.padding)
                return out.to(type_)
    return convolve(x, weight, bias, stride=geometry.stride, padding=geometry.padding)


def _unsupported(x: Tensor, weight: Tensor, *_others: Any) -> str | None:
    if torch.compiler.is_compiling():
        return "compiled or exported programs have PyTorch's convolution"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype} and weight is {weight.dtype}"
    return None


def _suits_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, transposed: bool) -> bool:
    # half types have no digits to spare for the transforms
    if torch.is_autocast_enabled("cpu") or x.dtype not in (torch.float32, torch.float64):
        return False
    b, _, h, w = x.shape
    shared = _convs.get() is not None
    if geometry.stride == 1:
        return shared and b * h * w >= _LEAST_PIXELS and h * w <= _LARGEST_MAP
    if x.dtype != torch.float32 or min(weight.shape[:2]) < 32:
        return False
    inputs, _ = tile_grids(geometry, x.dtype)
    # on 2 cores with AVX2 even from 8 tiles on; where the weights are transformed for one call, from 64 on with
    # gradients, from 128 on without
    return b * inputs.tiles >= (16 if shared else 128)


_WINOGRAD = native.backend(
    _winograd,
    unsupported=_unsupported,
    suits=_suits_winograd,
    condition="float32, 32 channels or more and many tiles (stride 2), or shared weights on small maps (3x3)",
)
_OP = registry.define("conv2d", _reference, cpp=_WINOGRAD)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Convolve x (B,C,H,W) by weight (O,C,3,3) with stride 1 and padding 1: (B,O,H,W). bias: (O).

    What `torch.nn.functional.conv2d` computes. Winograd's filtering runs on the CPU inside `shared_weights`, on small
    maps; PyTorch's convolution runs elsewhere. Raises ValueError on a wrong shape."""
    checks.tensors(x=(x, "B C H W"), weight=(weight, "O C 3 3"), bias=(bias, "O ?"))
    return _OP(x, weight, bias, Geometry(x.shape[2], x.shape[3], 3, 1, 1), False, backend=backend)


def strided_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 1, backend: str | None = None
) -> Tensor:
    """Convolve x (B,C,H,W) by weight (O,C,4,4) with stride 2: (B,O,(H+2p-4)//2+1,(W+2p-4)//2+1), p = padding;
    bias: (O).

    What `torch.nn.functional.conv2d` computes, which is what runs on CUDA, for small sizes and in compiled programs.
    Winograd's filtering gives channels-last maps and first derivatives only, in fp32 with a relative error of 0.4 to
    2.3e-6 where the direct sum has 0.2 to 0.8e-6 (64 to 256 channels). Raises ValueError on a wrong shape or
    padding."""
    checks.tensors(x=(x, "B C H W"), weight=(weight, "O C 4 4"), bias=(bias, "O ?"))
    if padding < 0:
        raise ValueError(f"padding is {padding}, expected 0 or more")
    if min(x.shape[2:]) + 2 * padding < 4:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least {4 - 2 * padding} rows and columns")
    return _OP(x, weight, bias, Geometry(x.shape[2], x.shape[3], 4, 2, padding), False, backend=backend)


def strided_conv_transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: int = 1, backend: str | None = None
) -> Tensor:
    """Convolve x (B,C,H,W) by weight (C,O,4,4) transposed, with stride 2: (B,O,2H+2-2p,2W+2-2p), p = padding; bias:
    (O).

    What `torch.nn.functional.conv_transpose2d` computes; otherwise as `strided_conv`."""
    checks.tensors(x=(x, "B C H W"), weight=(weight, "C O 4 4"), bias=(bias, "O ?"))
    height, width = (2 * (n - 1) - 2 * padding + 4 for n in x.shape[2:])
    if padding < 0 or min(height, width) < 1:
        raise ValueError(f"padding is {padding}, expected 0 or more, and rows and columns left of {tuple(x.shape)}")
    return _OP(x, weight, bias, Geometry(height, width, 4, 2, padding), True, backend=backend)
