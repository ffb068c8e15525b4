"""Motion-conditioned affine of a context feature (Eq. 7): gamma * z + beta per channel, written straight behind the
features that the decoder concatenates it with.

Shapes: context B C H W, gamma and beta B C, the features before it B Ci H W. Values moved per element of the context:
forward 2, backward 3 (its gradient, the context; the context's gradient), and the sums for gamma and beta come from the
same pass. A concatenation of its own would move 2 more each way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, reference, registry, triton_utils
from .triton_utils import jit, tl, triton


@jit
def _modulate_fwd_kernel(
    first_ptr, second_ptr, context_ptr, gamma_ptr, beta_ptr, out_ptr,
    first_b, first_c, second_b, second_c, context_b, context_c, out_b, first, second, start, channels, area,
    IMAGES: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """A block of one channel of the output. Channels below `first` and `second` are copies of the two features; the
    affine is written from channel `start` on."""
    b, k = tl.program_id(IMAGES).to(tl.int64), tl.program_id(1).to(tl.int64)
    offset = tl.program_id(2 - IMAGES).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < area
    out = out_ptr + b * out_b
    if k < first:
        value = tl.load(first_ptr + b * first_b + k * first_c + offset, inside, 0)
        tl.store(out + k * area + offset, value.to(out_ptr.dtype.element_ty), inside)
    elif k < second:
        value = tl.load(second_ptr + b * second_b + (k - first) * second_c + offset, inside, 0)
        tl.store(out + k * area + offset, value.to(out_ptr.dtype.element_ty), inside)
    else:
        c = k - second
        gamma = tl.load(gamma_ptr + b * channels + c).to(COMPUTE)
        beta = tl.load(beta_ptr + b * channels + c).to(COMPUTE)
        context = tl.load(context_ptr + b * context_b + c * context_c + offset, inside, 0).to(COMPUTE)
        tl.store(out + (start + c) * area + offset, gamma * context + beta, inside)


@jit
def _modulate_bwd_kernel(
    context_ptr, gamma_ptr, grad_ptr, grad_context_ptr, grad_gamma_ptr, grad_beta_ptr,
    channels, area, grad_stride, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # one program per channel of an image: the sums need no atomics
    plane = tl.program_id(0).to(tl.int64)
    gamma = tl.load(gamma_ptr + plane).to(COMPUTE)
    grad = grad_ptr + plane // channels * grad_stride + plane % channels * area
    grad_gamma = tl.zeros([BLOCK], COMPUTE)
    grad_beta = tl.zeros([BLOCK], COMPUTE)
    for block in range(BLOCKS):
        offset = block * BLOCK + tl.arange(0, BLOCK)
        inside = offset < area
        g = tl.load(grad + offset, inside, 0).to(COMPUTE)
        grad_gamma += g * tl.load(context_ptr + plane * area + offset, inside, 0).to(COMPUTE)
        grad_beta += g
        tl.store(grad_context_ptr + plane * area + offset, gamma * g, inside)
    tl.store(grad_gamma_ptr + plane, tl.sum(grad_gamma, 0))
    tl.store(grad_beta_ptr + plane, tl.sum(grad_beta, 0))


_BLOCK = 1024
"""The most elements of a channel that a program of the forward pass takes, 8 a thread."""


def _forward(before: Sequence[Tensor], context: Tensor, gamma: Tensor, beta: Tensor, backend: str) -> Tensor:
    out = _forward_fake(before, context)
    if backend == "triton":
        _forward_triton(before, context, gamma, beta, out)
    elif out.numel() > 0:
        b, c, h, w = context.shape
        single = {"context": context.contiguous(), "gamma": gamma.contiguous(), "beta": beta.contiguous()}
        inputs: dict[str, Any] = {"before": [t.contiguous() for t in before], **single}
        compute = native.compute_type(*before, context, gamma, beta)
        sizes = {"before_channels": [t.shape[1] for t in before], "batch": b, "channels": c, "area": h * w}
        native.call("modulate_forward", compute, inputs, {"out": out}, **sizes)
    return out


def _forward_triton(before: Sequence[Tensor], context: Tensor, gamma: Tensor, beta: Tensor, out: Tensor) -> None:
    """One launch for the context and the first two of the features before it; PyTorch copies any others."""
    b, c, h, w = context.shape
    area = h * w
    copied = [_dense_channels(t) for t in before[:2]]
    ends = [0, *accumulate(t.shape[1] for t in before)]
    for begin, part in zip(ends[2:], before[2:], strict=False):
        out[:, begin : begin + part.shape[1]].copy_(part)
    context, compute = _dense_channels(context), native.compute_type(context, gamma, beta)
    first, second = ends[min(1, len(copied))], ends[len(copied)]
    # a feature that is not there is not read: any pointer will do
    one, two = (*copied, context, context)[:2]
    block = triton_utils.block(area, min(_BLOCK, max(64, triton.next_power_of_2(area))))
    across, many = triton.cdiv(area, block), b > triton_utils.MAX_GRID_YZ
    grid = (b, second + c, across) if many else (across, second + c, b)
    tensors = one, two, context, gamma.contiguous(), beta.contiguous(), out
    numbers = (
        *one.stride()[:2],
        *two.stride()[:2],
        *context.stride()[:2],
        out.stride(0),
        first,
        second,
        ends[-1],
        c,
        area,
    )
    types = {"OFFSET": triton_utils.offsets(area + block), "COMPUTE": triton_utils.TYPES[compute]}
    constants = {"IMAGES": 0 if many else 2, "BLOCK": block, "num_warps": min(4, max(1, block // 256)), **types}
    triton_utils.launch(_modulate_fwd_kernel, grid, *tensors, *numbers, **constants)


def _dense_channels(t: Tensor) -> Tensor:
    """(B,C,H,W) in which the pixels of a channel lie one behind the other; a copy where they do not."""
    return t if t.stride()[2:] == (t.shape[3], 1) else t.contiguous()


def _forward_fake(before: Sequence[Tensor], context: Tensor, *_: Any) -> Tensor:
    b, c, h, w = context.shape
    dtype = context.dtype
    for part in before:
        dtype = torch.promote_types(dtype, part.dtype)
    channels = sum((t.shape[1] for t in before), c)
    return context.new_empty((b, channels, h, w), dtype=dtype)


def _backward(context: Tensor, gamma: Tensor, grad: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    b, c, h, w = context.shape
    area = h * w
    grad_context, grad_gamma, grad_beta = _backward_fake(context, gamma)
    if context.numel() == 0:
        return grad_context, grad_gamma.zero_(), grad_beta.zero_()
    compute = native.compute_type(context, gamma)
    # one image may lie `grad.stride(0)` behind another: the gradient is a part of a larger one
    if grad.stride()[1:] != (area, w, 1):
        grad = grad.contiguous()
    context, gamma = context.contiguous(), gamma.contiguous()
    if backend == "cpp":
        grad = grad.to(compute)
        inputs = {"context": context, "gamma": gamma, "grad_out": grad}
        outputs = {"grad_context": grad_context, "grad_gamma": grad_gamma, "grad_beta": grad_beta}
        sizes = {"batch": b, "channels": c, "area": area, "grad_stride": grad.stride(0)}
        native.call("modulate_backward", compute, inputs, outputs, **sizes)
        return grad_context, grad_gamma, grad_beta
    # a channel is one program's: a large one takes more threads. 32 instead of 16 warps on an H200: 0.85 of the time at
    # 1080 x 1920, 1.02 at 256 x 256
    warps = 4 if area <= 1 << 14 else 16 if area <= 1 << 18 else 32
    block = triton_utils.block(area, min(256 * warps, 4096))
    tensors = context, gamma, grad, grad_context, grad_gamma, grad_beta
    constants = {"BLOCKS": triton.cdiv(area, block), "BLOCK": block, "COMPUTE": triton_utils.TYPES[compute]}
    triton_utils.launch(_modulate_bwd_kernel, (b * c,), *tensors, c, area, grad.stride(0), **constants, num_warps=warps)
    return grad_context, grad_gamma, grad_beta


def _backward_fake(context: Tensor, gamma: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return context.new_empty(context.shape), gamma.new_empty(gamma.shape), gamma.new_empty(gamma.shape)


_FORWARD = registry.torch_op(
    "_modulate",
    _forward,
    _forward_fake,
    reference=lambda before, context, gamma, beta: reference.modulate(context, gamma, beta, before),
)
_BACKWARD = registry.torch_op("_modulate_backward", _backward, _backward_fake)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, context: Tensor, gamma: Tensor, beta: Tensor, *before: Tensor) -> Tensor:
        ctx.save_for_backward(context, gamma)
        ctx.backend, ctx.types = backend, [(t.shape[1], t.dtype) for t in before]
        return _FORWARD(before, context, gamma, beta, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        context, gamma = ctx.saved_tensors
        *parts, own = grad.split([*(channels for channels, _ in ctx.types), context.shape[1]], dim=1)
        grads = _BACKWARD(context, gamma, own, ctx.backend)
        return None, *grads, *(part.to(dtype) for part, (_, dtype) in zip(parts, ctx.types, strict=True))


def _fused(backend: str, context: Tensor, gamma: Tensor, beta: Tensor, before: Sequence[Tensor]) -> Tensor:
    if not registry.needs_gradient(context, gamma, beta, *before):
        return _FORWARD(before, context, gamma, beta, backend)
    return _Modulate.apply(backend, context, gamma, beta, *before)


def _suits_cpp(context: Tensor, gamma: Tensor, beta: Tensor, before: Sequence[Tensor]) -> bool:
    # anything else is converted and copied first, and PyTorch's addcmul and cat are faster, up to 3 times on a small
    # map; in a compiled program they are joined with what is around them
    if torch.compiler.is_compiling():
        return False
    return all(t.dtype == torch.float32 and t.is_contiguous() for t in (context, gamma, beta, *before))


def _suits_triton(context: Tensor, gamma: Tensor, beta: Tensor, before: Sequence[Tensor]) -> bool:
    # a program per channel has too little to do on a small map: on an H200, in a CUDA graph, PyTorch's two kernels take
    # 0.7 times as long forward at 6 x 6, twice as long at 48 x 48; with the backward pass 1.7 times as long at 6 x 6
    if torch.compiler.is_compiling() or context.shape[2] * context.shape[3] >= 256:
        return True
    return registry.needs_gradient(context, gamma, beta, *before)


_OP = registry.define(
    "modulate",
    reference.modulate,
    cpp=native.backend(partial(_fused, "cpp"), suits=_suits_cpp, condition="contiguous float32"),
    triton=triton_utils.backend(partial(_fused, "triton"), suits=_suits_triton, condition="256 pixels, or a gradient"),
)


def modulate(
    context: Tensor, gamma: Tensor, beta: Tensor, *, before: Sequence[Tensor] = (), backend: str | None = None
) -> Tensor:
    """Scale and shift each channel: context (B,C,H,W), gamma and beta (B,C) -> gamma * context + beta (B,C,H,W).

    `before`: features (B,Ci,H,W) that the result is concatenated behind, in order, without a pass of its own. Raises
    ValueError on a wrong shape or dtype. Source: paper, Eq. 7."""
    if isinstance(before, Tensor) or not isinstance(before, Sequence):
        raise ValueError(f"before is {type(before).__name__}, expected a list or tuple of tensors")
    features = {f"before[{i}]": (part, f"B C{i} H W") for i, part in enumerate(before)}
    checks.tensors(context=(context, "B C H W"), gamma=(gamma, "B C"), beta=(beta, "B C"), **features)
    return _OP(context, gamma, beta, before, backend=backend)
