"""What an exporter that knows only PyTorch's own ops puts in the place of avfast's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from avfast.kernels import load_all, registry


def border_warp(image: Tensor, flow: Tensor) -> Tensor:
    """`kernels.reference.backward_warp` with padding "border" in values, without a gradient, image and flow in float32:
    74 ONNX nodes where the definition, much of which is about gradients, becomes 109. A gather of four pixels, not
    ONNX's GridSample (29 nodes): in onnxruntime on one CPU thread the gather takes 0.35 to 0.61 times as long (1 and 16
    images of 48, 64 and 96 pixels, 1 of 256) and equals the definition bit for bit, while GridSample, whose coordinates
    are a share of the image, is off by 4e-6 at 48 and 3e-5 at 256 pixels."""
    c, h, w = image.shape[1:]
    x = (flow[:, 0] + torch.arange(w, dtype=flow.dtype, device=flow.device)).clamp(0, w - 1)
    y = (flow[:, 1] + torch.arange(h, dtype=flow.dtype, device=flow.device)[:, None]).clamp(0, h - 1)
    left, top = x.floor().clamp(max=w - 2), y.floor().clamp(max=h - 2)
    right_share, lower_share = (x - left)[:, None], (y - top)[:, None]
    # clamped again because NaN, which the shares keep, becomes any integer
    corner = (top * w + left).long().clamp(0, (h - 1) * w - 2).flatten(1)[:, None].expand(-1, c, -1)
    pixels = image.flatten(2)
    upper_left, upper_right, lower_left, lower_right = (
        pixels.gather(2, corner + step).view(image.shape) for step in (0, 1, w, w + 1)
    )
    upper = (1 - lower_share) * (1 - right_share) * upper_left + (1 - lower_share) * right_share * upper_right
    return upper + lower_share * (1 - right_share) * lower_left + lower_share * right_share * lower_right


load_all()
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **registry.DECOMPOSITIONS,
    torch.ops.avfast._backward_warp.default: lambda image, flow, *_: border_warp(image, flow),
}
"""Torch op -> function, for `ExportedProgram.run_decompositions`."""
