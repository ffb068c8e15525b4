"""A 4x4 convolution of stride 2, and its transpose: on the CPU by minimal filtering (`minimal`), else PyTorch's.

Shapes: x B C H W, weight O C 4 4, transposed C O 4 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, native, registry
from .tiles import Geometry, RepeatedConv, sides, unsupported

_KERNEL, _STRIDE = 4, 2

Kept = dict[tuple[int, Geometry], tuple[Tensor, RepeatedConv]]
"""Weights, and the convolutions by them, for the calls of one forward pass."""


def _minimal(x: Tensor, weight: Tensor, geometry: Geometry, transposed: bool, kept: Kept | None) -> Tensor:
    if x.numel() == 0:
        return _reference(x, weight, geometry, transposed, kept)
    kept = {} if kept is None else kept
    key = id(weight), geometry
    compute = native.compute_type(x)
    if key not in kept:
        # the weight itself is kept as well, so that its id stays its own
        kept[key] = weight, RepeatedConv(weight.to(compute), geometry)
    return kept[key][1](x.to(compute), transposed=transposed).to(x.dtype)


def _reference(x: Tensor, weight: Tensor, geometry: Geometry, transposed: bool, kept: Kept | None) -> Tensor:
    convolve = F.conv_transpose2d if transposed else F.conv2d
    return convolve(x, weight, stride=geometry.stride, padding=geometry.padding)


def _worthwhile(x: Tensor, weight: Tensor, geometry: Geometry, transposed: bool, kept: Kept | None) -> bool:
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or min(weight.shape[:2]) < 32:
        return False
    inputs, _ = sides(geometry, x.dtype)
    # on 2 cores with AVX2 even from 8 tiles on; where the weights are transformed for one call, from 64 on with
    # gradients, from 128 on without
    return len(x) * inputs.tiles >= (128 if kept is None else 16)


_OP = registry.define(
    "strided_conv",
    _reference,
    cpp=registry.Backend(
        _minimal,
        lambda x, weight, *_: unsupported(x, weight),
        native.unavailable,
        where=("float32 x has 16 tiles of outputs, without `kept` 128, and 32 channels become 32 or more", _worthwhile),
    ),
)


def strided_conv(
    x: Tensor, weight: Tensor, *, padding: int = 1, kept: Kept | None = None, backend: str | None = None
) -> Tensor:
    """Convolve x (B,C,H,W) by weight (O,C,4,4) with stride 2: (B,O,(H+2p-4)//2+1,(W+2p-4)//2+1), p = padding.

    What `torch.nn.functional.conv2d` computes, which is what runs on CUDA, for small sizes and in compiled programs;
    minimal filtering gives channels-last maps and first derivatives only, in fp32 with a relative error of 0.4 to
    2.3e-6 where the direct sum has 0.2 to 0.8e-6 (64 to 256 channels). kept: a dictionary that the calls of one forward
    pass share; weights are then transformed once. Raises ValueError on a wrong shape or dtype.
    """
    checks.shape("x", x, "B C H W")
    checks.shape("weight", weight, "O C kH kW", C=x.shape[1], kH=_KERNEL, kW=_KERNEL)
    checks.same_device(x=x, weight=weight)
    if min(x.shape[2:]) + 2 * padding < _KERNEL:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least {_KERNEL - 2 * padding} rows and columns")
    geometry = Geometry(x.shape[2], x.shape[3], _KERNEL, _STRIDE, padding)
    return _OP(x, weight, geometry, False, kept, backend=backend)


def strided_conv_transpose(
    x: Tensor, weight: Tensor, *, padding: int = 1, kept: Kept | None = None, backend: str | None = None
) -> Tensor:
    """Convolve x (B,C,H,W) by weight (C,O,4,4) transposed, with stride 2: (B,O,2H+2-2p,2W+2-2p), p = padding.

    What `torch.nn.functional.conv_transpose2d` computes; otherwise as `strided_conv`.
    """
    checks.shape("x", x, "B C H W")
    checks.shape("weight", weight, "C O kH kW", C=x.shape[1], kH=_KERNEL, kW=_KERNEL)
    checks.same_device(x=x, weight=weight)
    height, width = (_STRIDE * (n - 1) - 2 * padding + _KERNEL for n in x.shape[2:])
    if min(height, width) < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, of which padding {padding} leaves no rows or columns")
    return _OP(x, weight, Geometry(height, width, _KERNEL, _STRIDE, padding), True, kept, backend=backend)
