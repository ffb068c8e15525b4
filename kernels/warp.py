"""Backward warp (Eq. 4): out(p) = image(p + flow(p)), bilinear, in pixels.

Shapes: image B C H W, flow B 2 H W (x then y). Coordinates are pixel centres: flow 0 is the identity, an integer flow a
shift. Values moved per pixel: forward 2 C + 2 (image, output; flow), backward 3 C + 4 (image, gradient of the output;
gradient of the image; flow and its gradient). Contiguous and channels-last images are taken as they lie by Triton.

The image's gradient is summed by atomics on CUDA; where torch.use_deterministic_algorithms(True) is on, in fixed point
(int64, the largest value scaled to 2^62 over the number of pixels): integer sums do not depend on their order. On the
CPU its order is always the same."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, reference, registry, triton_utils
from .triton_utils import jit, tile, tl


@jit
def _taps(coordinate, size, ZEROS: tl.constexpr, OFFSET: tl.constexpr):
    """Along one axis: (first and second tap, clamped into the image; their weights; whether each lies inside, as 0 or
    1; whether the flow moves the coordinate)."""
    margin: tl.constexpr = 1 if ZEROS else 0
    low = -margin
    high = size - 1 + margin
    moving = (coordinate > low) & (coordinate < high)
    nan = coordinate != coordinate
    clamped = tl.where(nan, 0.0, tl.minimum(tl.maximum(coordinate, low), high))
    # clamped before the conversion: a float beyond the integers' range converts to any value
    first = tl.minimum(tl.floor(clamped), tl.maximum(high - 1, low).to(clamped.dtype)).to(OFFSET)
    second = first + 1
    weight = tl.where(nan, coordinate, clamped - first.to(clamped.dtype))
    valid0 = ((first >= 0) | (not ZEROS)).to(clamped.dtype)
    valid1 = ((second < size) | (not ZEROS)).to(clamped.dtype)
    return (
        tl.maximum(first, 0),
        tl.minimum(second, size - 1),
        (1 - weight) * valid0,
        weight * valid1,
        valid0,
        valid1,
        moving,
    )


@jit
def _coordinates(flow, flow_c, flow_h, flow_w, y, x, inside, COMPUTE: tl.constexpr):
    """Where the flow of one image leads: (x, y)."""
    at = flow + (y * flow_h + x * flow_w)
    px = x.to(COMPUTE) + tl.load(at, inside, 0).to(COMPUTE)
    return px, y.to(COMPUTE) + tl.load(at + flow_c, inside, 0).to(COMPUTE)


@jit
def _corners(channel, top, bottom, left, right, COMPUTE: tl.constexpr):
    """The values of one channel at the four corners, from the offsets of two rows and two columns. The loads need no
    mask, which would cost an instruction each: all taps are clamped into the image, those of pixels outside the tile
    too."""
    v00 = tl.load(channel + (top + left)).to(COMPUTE)
    v01 = tl.load(channel + (top + right)).to(COMPUTE)
    v10 = tl.load(channel + (bottom + left)).to(COMPUTE)
    v11 = tl.load(channel + (bottom + right)).to(COMPUTE)
    return v00, v01, v10, v11


@jit
def _warp_fwd_kernel(
    image_ptr, flow_ptr, out_ptr,
    image_b, image_c, image_h, image_w, flow_b, flow_c, flow_h, flow_w, out_b, out_c, out_h, out_w,
    height, width,
    C: tl.constexpr, AT_ONCE: tl.constexpr, ZEROS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    IMAGES: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    b, y, x, inside = tile(height, width, COLUMNS, ROWS, IMAGES, OFFSET)
    px, py = _coordinates(flow_ptr + b * flow_b, flow_c, flow_h, flow_w, y, x, inside, COMPUTE)
    x0, x1, wx0, wx1, _, _, _ = _taps(px, width, ZEROS, OFFSET)
    y0, y1, wy0, wy1, _, _, _ = _taps(py, height, ZEROS, OFFSET)
    channel, to = image_ptr + b * image_b, out_ptr + b * out_b
    top, bottom, left, right = y0 * image_h, y1 * image_h, x0 * image_w, x1 * image_w
    pixel = y * out_h + x * out_w
    for _ in range(C // AT_ONCE):
        # all loads stand before the first store: the compiler moves no load over a store, and a thread would wait for
        # each channel in turn
        outs = ()
        for _ in tl.static_range(AT_ONCE):
            v00, v01, v10, v11 = _corners(channel, top, bottom, left, right, COMPUTE)
            outs += (wy0 * (wx0 * v00 + wx1 * v01) + wy1 * (wx0 * v10 + wx1 * v11),)  # type: ignore[assignment]
            channel += image_c
        for i in tl.static_range(AT_ONCE):
            tl.store(to + pixel, outs[i], inside)
            to += out_c


@jit
def _add(at, value, scale, inside, FIXED: tl.constexpr):
    # relaxed: no program waits for another's sum, and the default order costs barriers
    if FIXED:
        # a conversion truncates, so round first
        tl.atomic_add(at, tl.floor(value * scale + 0.5).to(tl.int64), inside, sem="relaxed")
    else:
        tl.atomic_add(at, value, inside, sem="relaxed")


@jit
def _warp_bwd_kernel(
    image_ptr, flow_ptr, grad_ptr, grad_image_ptr, grad_flow_ptr, scale_ptr,
    image_b, image_c, image_h, image_w, flow_b, flow_c, flow_h, flow_w, grad_b, grad_c, grad_h, grad_w,
    height, width,
    C: tl.constexpr, AT_ONCE: tl.constexpr, ZEROS: tl.constexpr, WANT_IMAGE: tl.constexpr, WANT_FLOW: tl.constexpr,
    FIXED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, IMAGES: tl.constexpr, OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    b, y, x, inside = tile(height, width, COLUMNS, ROWS, IMAGES, OFFSET)
    px, py = _coordinates(flow_ptr + b * flow_b, flow_c, flow_h, flow_w, y, x, inside, COMPUTE)
    x0, x1, wx0, wx1, valid_x0, valid_x1, moving_x = _taps(px, width, ZEROS, OFFSET)
    y0, y1, wy0, wy1, valid_y0, valid_y1, moving_y = _taps(py, height, ZEROS, OFFSET)
    # tl.cast: a size of 1 is no tensor but a constant of the program
    plane = tl.cast(height, tl.int64) * width
    scale = tl.load(scale_ptr) if FIXED else 1.0
    grad_x = tl.zeros([COLUMNS * ROWS], COMPUTE)
    grad_y = tl.zeros([COLUMNS * ROWS], COMPUTE)
    channel, grad, to = image_ptr + b * image_b, grad_ptr + b * grad_b, grad_image_ptr + b * C * plane
    top, bottom, left, right = y0 * image_h, y1 * image_h, x0 * image_w, x1 * image_w
    pixel = y * grad_h + x * grad_w
    for _ in range(C // AT_ONCE):
        gs = ()
        for _ in tl.static_range(AT_ONCE):
            g = tl.load(grad + pixel, inside, 0).to(COMPUTE)
            gs += (g,)  # type: ignore[assignment]
            if WANT_FLOW:
                v00, v01, v10, v11 = _corners(channel, top, bottom, left, right, COMPUTE)
                slope_top, slope_bottom = valid_x1 * v01 - valid_x0 * v00, valid_x1 * v11 - valid_x0 * v10
                slope_left, slope_right = valid_y1 * v10 - valid_y0 * v00, valid_y1 * v11 - valid_y0 * v01
                grad_x += g * (wy0 * slope_top + wy1 * slope_bottom)
                grad_y += g * (wx0 * slope_left + wx1 * slope_right)
            channel += image_c
            grad += grad_c
        if WANT_IMAGE:
            for i in tl.static_range(AT_ONCE):
                _add(to + (y0 * width + x0), gs[i] * wy0 * wx0, scale, inside, FIXED)
                _add(to + (y0 * width + x1), gs[i] * wy0 * wx1, scale, inside, FIXED)
                _add(to + (y1 * width + x0), gs[i] * wy1 * wx0, scale, inside, FIXED)
                _add(to + (y1 * width + x1), gs[i] * wy1 * wx1, scale, inside, FIXED)
                to += plane
    if WANT_FLOW:
        at = grad_flow_ptr + b * 2 * plane + (y * width + x)
        tl.store(at, tl.where(moving_x, grad_x, 0.0), inside)
        tl.store(at + plane, tl.where(moving_y, grad_y, 0.0), inside)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...], **constants: Any) -> None:
    """Run a kernel over all pixels of the first tensor (B,C,H,W). It takes the strides of the tensors in `strided`."""
    batch, channels, h, w = tensors[0].shape
    grid, shape = triton_utils.tiles(batch, h, w)
    spans = [triton_utils.extent((h, w), t.stride()[2:]) for t in strided]
    # the loads of so many channels are under way together; three spill the registers of the fixed-point sums
    at_once = 1 if constants.get("FIXED") else next(n for n in (4, 3, 2, 1) if channels % n == 0)
    constants |= {"C": channels, "AT_ONCE": at_once, "OFFSET": triton_utils.offsets(h * w, *spans), **shape}
    strides = (step for t in strided for step in t.stride())
    triton_utils.launch(kernel, grid, *tensors, *strides, h, w, **constants)


def _forward(image: Tensor, flow: Tensor, padding: str, backend: str) -> Tensor:
    out = _forward_fake(image)
    if image.numel() == 0:
        return out
    b, c, h, w = image.shape
    compute, zeros = native.compute_type(image, flow), padding == "zeros"
    if backend == "cpp":
        dense = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        inputs = {"image": image.contiguous(), "flow": flow.contiguous()}
        sizes = {"batch": b, "channels": c, "height": h, "width": w, "zeros": zeros}
        native.call("warp_forward", compute, inputs, {"out": dense}, **sizes)
        return out if dense is out else out.copy_(dense)
    tensors = image, flow, out
    _launch(_warp_fwd_kernel, tensors, tensors, ZEROS=zeros, COMPUTE=triton_utils.TYPES[compute])
    return out


def _forward_fake(image: Tensor, *_: Any) -> Tensor:
    return registry.empty_as(image, image)


def _backward(
    image: Tensor, flow: Tensor, grad: Tensor, padding: str, want_image: bool, want_flow: bool, backend: str
) -> tuple[Tensor, Tensor]:
    compute, zeros = native.compute_type(image, flow), padding == "zeros"
    grad_flow = torch.empty(flow.shape if want_flow else (0,), dtype=compute, device=image.device)
    # C++ zeroes each image's sums just before it adds to them
    make = torch.empty if backend == "cpp" else torch.zeros
    grad_image = make(image.shape if want_image else (0,), dtype=compute, device=image.device)
    if image.numel() == 0:
        grad_flow.zero_()
    elif backend == "cpp":
        b, c, h, w = image.shape
        inputs = {"image": image.contiguous(), "flow": flow.contiguous(), "grad_out": grad.contiguous()}
        outputs = {"grad_image": grad_image if want_image else None, "grad_flow": grad_flow if want_flow else None}
        sizes = {"batch": b, "channels": c, "height": h, "width": w, "zeros": zeros}
        native.call("warp_backward", compute, inputs, outputs, **sizes)
    else:
        constants = {"ZEROS": zeros, "WANT_IMAGE": want_image, "WANT_FLOW": want_flow}
        constants |= {"COMPUTE": triton_utils.TYPES[compute]}
        if want_image and torch.are_deterministic_algorithms_enabled():
            grad_image = _fixed_point_backward(image, flow, grad, grad_flow, compute, constants)
        else:
            # without fixed point the kernel does not read the scale
            tensors = image, flow, grad, grad_image, grad_flow, grad_flow
            _launch(_warp_bwd_kernel, tensors, (image, flow, grad), FIXED=False, **constants)
    return grad_image.to(image.dtype), grad_flow.to(flow.dtype)


def _fixed_point_backward(
    image: Tensor, flow: Tensor, grad: Tensor, grad_flow: Tensor, compute: torch.dtype, constants: dict[str, Any]
) -> Tensor:
    """The image's gradient by integer atomics, whose sums do not depend on their order; fills grad_flow too."""
    sums = torch.zeros(image.shape, dtype=torch.int64, device=image.device)
    # the sum of one pixel is at most the largest gradient times the number of pixels
    peak = grad.detach().abs().amax().to(compute)
    exponent = torch.frexp(peak * (image.shape[2] * image.shape[3])).exponent
    scale = torch.ldexp(torch.ones_like(peak), (62 - exponent).clamp(-120, 120))
    tensors = image, flow, grad, sums, grad_flow, scale
    _launch(_warp_bwd_kernel, tensors, (image, flow, grad), FIXED=True, **constants)
    # peak - peak is 0, or NaN where a gradient was not finite, which integers cannot hold
    return sums.to(compute) / scale + (peak - peak)


def _backward_fake(
    image: Tensor, flow: Tensor, grad: Tensor, padding: str, want_image: bool, want_flow: bool, backend: str
) -> tuple[Tensor, Tensor]:
    return image.new_empty(image.shape if want_image else (0,)), flow.new_empty(flow.shape if want_flow else (0,))


_FORWARD = registry.torch_op("_backward_warp", _forward, _forward_fake, reference=reference.backward_warp)
_BACKWARD = registry.torch_op("_backward_warp_backward", _backward, _backward_fake)


class _BackwardWarp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, flow: Tensor, padding: str, backend: str) -> Tensor:
        ctx.save_for_backward(image, flow)
        ctx.padding, ctx.backend = padding, backend
        return _FORWARD(image, flow, padding, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        image, flow = ctx.saved_tensors
        want_image, want_flow = ctx.needs_input_grad[:2]
        grad_image, grad_flow = _BACKWARD(image, flow, grad, ctx.padding, want_image, want_flow, ctx.backend)
        return grad_image if want_image else None, grad_flow if want_flow else None, None, None


def _fused(backend: str, image: Tensor, flow: Tensor, padding: str) -> Tensor:
    run = _BackwardWarp.apply if registry.needs_gradient(image, flow) else _FORWARD
    return run(image, flow, padding, backend)


_OP = registry.define(
    "backward_warp",
    reference.backward_warp,
    cpp=native.backend(partial(_fused, "cpp")),
    triton=triton_utils.backend(partial(_fused, "triton")),
)


def backward_warp(image: Tensor, flow: Tensor, *, padding: str = "border", backend: str | None = None) -> Tensor:
    """Warp an image (B,C,H,W) by a backward flow (B,2,H,W) in pixels, x then y: out(p) = image(p + flow(p)).

    padding: "border" repeats the edge pixel, "zeros" surrounds the image with zeros. Returns (B,C,H,W) in image's
    dtype; differentiable in both arguments (the flow's gradient at kinks: `reference.backward_warp`). A NaN flow gives
    NaN at its pixel. Raises ValueError on a wrong shape, dtype or padding, or a backend that cannot run it.
    Source: paper, Eq. 4."""
    checks.tensors(image=(image, "B C H W"), flow=(flow, "B 2 H W"))
    if padding not in ("border", "zeros"):
        raise ValueError(f"padding is {padding!r}, expected 'border' or 'zeros'")
    return _OP(image, flow, padding, backend=backend)
