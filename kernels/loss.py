"""Training loss of the motion stage (Eq. 8 to 10): squared flow error plus edge-aware smoothness.

Shapes: flows B P 2 H W in pixels, true frames B P C H W, P predicted steps. Values moved per pixel: 6 + C with the
gradient (both flows, the frames; the gradient), 4 + C without. The gradient by the prediction is written in the same
pass as the loss; the backward pass scales it. Sums have one order: partial sums per image (C++) or block (Triton)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, reference, registry, triton_utils
from .triton_utils import jit, tile, tl


@jit
def _sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@jit
def _flow_loss_kernel(
    prediction_ptr, target_ptr, frames_ptr, grad_ptr, partial_ptr, height, width,
    data_weight: tl.float64, smooth_weight: tl.float64,
    C: tl.constexpr, WANT_GRAD: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, IMAGES: tl.constexpr,
    OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    # passed as fp64, which they are rounded from once: an fp32 argument made an fp64 loss wrong by 4e-7
    data_weight, smooth_weight = tl.full([], data_weight, COMPUTE), tl.full([], smooth_weight, COMPUTE)
    image, y, x, inside = tile(height, width, COLUMNS, ROWS, IMAGES, OFFSET)
    # tl.cast: a size of 1 is no tensor but a constant of the program
    plane = tl.cast(height, tl.int64) * width
    pixel = y * width + x
    # the four differences a pixel takes part in: to its right and lower neighbour, from its left and upper one
    has_right = inside & (x + 1 < width)
    has_below = inside & (y + 1 < height)
    has_left = inside & (x > 0)
    has_above = inside & (y > 0)
    # sum over the channels of |the frame's difference| to each neighbour
    right = tl.zeros([COLUMNS * ROWS], COMPUTE)
    below, left, above = right, right, right
    frame = frames_ptr + image * C * plane + pixel
    for _ in range(C):
        own = tl.load(frame, inside, 0).to(COMPUTE)
        right += tl.abs(tl.load(frame + 1, has_right, 0).to(COMPUTE) - own)
        below += tl.abs(tl.load(frame + width, has_below, 0).to(COMPUTE) - own)
        if WANT_GRAD:
            left += tl.abs(tl.load(frame - 1, has_left, 0).to(COMPUTE) - own)
            above += tl.abs(tl.load(frame - width, has_above, 0).to(COMPUTE) - own)
        frame += plane
    right = tl.where(has_right, tl.exp(-right / C), 0.0)
    below = tl.where(has_below, tl.exp(-below / C), 0.0)
    left = tl.where(has_left, tl.exp(-left / C), 0.0)
    above = tl.where(has_above, tl.exp(-above / C), 0.0)
    loss = tl.zeros([COLUMNS * ROWS], COMPUTE)
    grads = ()
    for component in tl.static_range(2):
        at = (2 * image + component) * plane
        here = prediction_ptr + at + pixel
        u = tl.load(here, inside, 0).to(COMPUTE)
        error = u - tl.load(target_ptr + at + pixel, inside, 0).to(COMPUTE)
        dx = tl.load(here + 1, has_right, 0).to(COMPUTE) - u
        dy = tl.load(here + width, has_below, 0).to(COMPUTE) - u
        # a missing neighbour has weight 0, and a difference of its own that must not turn it into NaN
        dx = tl.where(has_right, dx, 0.0)
        dy = tl.where(has_below, dy, 0.0)
        loss += data_weight * error * error + smooth_weight * (tl.abs(dx) * right + tl.abs(dy) * below)
        if WANT_GRAD:
            from_left = u - tl.load(here - 1, has_left, 0).to(COMPUTE)
            from_above = u - tl.load(here - width, has_above, 0).to(COMPUTE)
            flat = _sign(from_left) * left - _sign(dx) * right + _sign(from_above) * above - _sign(dy) * below
            grads += (2 * data_weight * error + smooth_weight * flat,)  # type: ignore[assignment]
    if WANT_GRAD:
        # behind all loads, none of which may be moved over a store
        for component in tl.static_range(2):
            tl.store(grad_ptr + (2 * image + component) * plane + pixel, grads[component], inside)
    # programs in the order of the grid, whichever axis the images are
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    program += tl.program_id(2) * (tl.num_programs(0) * tl.num_programs(1))
    tl.store(partial_ptr + program, tl.sum(loss, 0))


def _run(
    prediction: Tensor, target: Tensor, frames: Tensor, smooth_weight: float, want_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    b, steps, c, h, w = frames.shape
    compute = native.compute_type(prediction, target, frames)
    inputs = {"prediction": prediction.contiguous(), "target": target.contiguous(), "frames": frames.contiguous()}
    grad = torch.empty(prediction.shape if want_grad else (0,), dtype=prediction.dtype, device=prediction.device)
    if prediction.numel() == 0:
        # the mean over nothing; no steps at all are a sum of nothing
        loss = prediction.new_full((), 0.0 if steps == 0 else float("nan"))
        return loss, grad
    weights = 1 / (b * h * w), smooth_weight / (2 * b * h * w)
    if backend == "cpp":
        loss = torch.empty((), dtype=compute)
        outputs = {"grad": grad if want_grad else None, "loss": loss}
        sizes = {"images": b * steps, "channels": c, "height": h, "width": w}
        native.call("flow_loss", compute, inputs, outputs, **sizes, data_weight=weights[0], smooth_weight=weights[1])
    else:
        grid, shape = triton_utils.tiles(b * steps, h, w)
        partial_sums = torch.empty(math.prod(grid), dtype=compute, device=prediction.device)
        arguments = *inputs.values(), grad, partial_sums, h, w, *weights
        types = {"OFFSET": triton_utils.offsets(h * w), "COMPUTE": triton_utils.TYPES[compute]}
        triton_utils.launch(_flow_loss_kernel, grid, *arguments, C=c, WANT_GRAD=want_grad, **types, **shape)
        loss = partial_sums.sum()
    return loss.to(prediction.dtype), grad


def _fake(
    prediction: Tensor, target: Tensor, frames: Tensor, smooth_weight: float, want_grad: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return prediction.new_empty(()), prediction.new_empty(prediction.shape if want_grad else (0,))


_LOSS = registry.torch_op("_flow_loss", _run, _fake)


class _FlowLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prediction: Tensor, target: Tensor, frames: Tensor, smooth_weight: float, backend: str
    ) -> Tensor:
        loss, grad = _LOSS(prediction, target, frames, smooth_weight, ctx.needs_input_grad[0], backend)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad_loss * grad, None, None, None, None


def _fused(backend: str, prediction: Tensor, target: Tensor, frames: Tensor, smooth_weight: float) -> Tensor:
    if not registry.needs_gradient(prediction):
        return _LOSS(prediction, target, frames, smooth_weight, False, backend)[0]
    return _FlowLoss.apply(prediction, target, frames, smooth_weight, backend)


_OP = registry.define(
    "flow_loss",
    reference.flow_loss,
    cpp=native.backend(partial(_fused, "cpp")),
    triton=triton_utils.backend(partial(_fused, "triton")),
)


def flow_loss(
    prediction: Tensor, target: Tensor, frames: Tensor, *, smooth_weight: float = 0.01, backend: str | None = None
) -> Tensor:
    """Loss of the predicted flow: L_flow + smooth_weight * L_smooth, a scalar summed over the predicted steps.

    prediction and target (B,P,2,H,W) in pixels; frames (B,P,C,H,W) the true frames at the same steps. Differentiable in
    the prediction. Raises ValueError on a wrong shape or dtype, or when target or frames require a gradient.
    Source: paper, Eq. 8 to 10 (reductions: `reference.flow_loss`)."""
    flows = {"prediction": (prediction, "B P 2 H W"), "target": (target, "B P 2 H W")}
    checks.tensors(**flows, frames=(frames, "B P C H W"))
    checks.no_gradient("target", target)
    checks.no_gradient("frames", frames)
    return _OP(prediction, target, frames, smooth_weight, backend=backend)
