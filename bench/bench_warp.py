"""Backward warp against its definition, eager and compiled, and against grid_sample with a base grid kept from before.

The limit is memory: the values of kernels/warp.py's docstring. Flows are up to 2 pixels long and off integers: random
from pixel to pixel, the worst there is, or a shift with waves of 0.3 pixels, whose pixels mostly come from neighbours.
(In TV-L1's flows of five films the pixels of 44 to 93 % of all stretches of 8 do.)
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avfast.kernels import backward_warp, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(b, c, s, s) for b in (16, 128) for c, s in ((1, 48), (3, 64), (3, 96))] + [(1, 3, 1080, 1920)]
SHAPES += [(8, 3, 1080, 1920)] if DEVICE == "cuda" else []


def grid_sample(height: int, width: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The usual way: pixels to [-1, 1], then grid_sample."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height, device=DEVICE), torch.linspace(-1, 1, width, device=DEVICE), indexing="ij"
    )
    base = torch.stack((x, y), -1)[None]
    scale = torch.tensor([2 / (width - 1), 2 / (height - 1)], device=DEVICE)

    def warp(image: Tensor, flow: Tensor) -> Tensor:
        grid = base + flow.permute(0, 2, 3, 1) * scale
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)

    return warp


@pytest.mark.parametrize("kind", ["random", "smooth"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_warp(shape: tuple[int, int, int, int], kind: str, contest: Callable[..., None]) -> None:
    b, c, h, w = shape
    torch.manual_seed(0)
    image = torch.rand(shape, device=DEVICE, requires_grad=True)
    if kind == "random":
        flow = 4 * torch.rand(b, 2, h, w, device=DEVICE) - 2
    else:
        y, x = torch.meshgrid(
            torch.linspace(0, 6, h, device=DEVICE), torch.linspace(0, 6, w, device=DEVICE), indexing="ij"
        )
        flow = (
            3.4 * torch.rand(b, 2, 1, 1, device=DEVICE) - 1.7 + 0.3 * torch.stack((torch.sin(x + y), torch.cos(x - y)))
        )
    # away from integers, where grid_sample's rounding may choose the other pixel, and from the border's kinks
    flow = (flow.floor() + 0.1 + 0.8 * (flow - flow.floor())).requires_grad_()
    contest(
        f"warp: {shape} {kind}",
        {
            "ours": backward_warp,
            "eager": reference.backward_warp,
            "compiled": torch.compile(reference.backward_warp),
            "grid_sample": grid_sample(h, w),
        },
        [image, flow],
        forward=b * h * w * (2 * c + 2),
        backward=b * h * w * (3 * c + 4),
        # grid_sample's coordinates are a share of the image: with fp32's 24 bits they are off by 1e-4 px at 1920 pixels
        tolerance=max(1e-4, 2**-22 * max(h, w)),
    )
