"""The motion stage's loss against its definition, eager and compiled. The limit is memory: kernels/loss.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from avfast.kernels import flow_loss, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(16, 15, 1, 48, 48), (16, 15, 3, 64, 64), (128, 15, 1, 48, 48), (1, 4, 3, 1080, 1920)]
SHAPES += [(4, 8, 3, 1080, 1920)] if DEVICE == "cuda" else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_loss(shape: tuple[int, int, int, int, int], contest: Callable[..., None]) -> None:
    b, p, c, h, w = shape
    torch.manual_seed(0)
    prediction = torch.randn(b, p, 2, h, w, device=DEVICE, requires_grad=True)
    target = torch.randn(b, p, 2, h, w, device=DEVICE)
    frames = torch.rand(shape, device=DEVICE)

    def definition(prediction: torch.Tensor, target: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        return reference.flow_loss(prediction, target, frames, 0.01)

    contest(
        f"flow_loss: {shape}",
        {"ours": flow_loss, "eager": definition, "compiled": torch.compile(definition)},
        [prediction, target, frames],
        forward=b * p * h * w * (4 + c),
        # the gradient comes with the loss, and is scaled once: written, read, written
        backward=b * p * h * w * 6,
    )
