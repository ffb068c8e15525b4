"""The context's affine, written behind the two features the decoder joins it with, against addcmul and cat, eager and
compiled. The limit is memory: all of the output is written and as much is read (kernels/modulate.py)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from avfast.kernels import modulate, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(16, 16, 48, 48), (16, 128, 6, 6), (16, 64, 64, 64), (128, 16, 48, 48), (4, 64, 256, 256)]
SHAPES += [(8, 16, 1080, 1920)] if DEVICE == "cuda" else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_modulate(shape: tuple[int, int, int, int], contest: Callable[..., None]) -> None:
    b, c, _, _ = shape
    torch.manual_seed(0)
    up, skip, context = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    gamma, beta = (torch.randn(b, c, device=DEVICE, requires_grad=True) for _ in range(2))
    contest(
        f"modulate: {shape}",
        {
            "ours": lambda z, gamma, beta, *before: modulate(z, gamma, beta, before=before),
            "eager": lambda z, gamma, beta, *before: reference.modulate(z, gamma, beta, before),
            "compiled": torch.compile(lambda z, gamma, beta, *before: reference.modulate(z, gamma, beta, before)),
        },
        [context, gamma, beta, up, skip],
        forward=6 * context.numel(),
        backward=3 * context.numel(),
    )
