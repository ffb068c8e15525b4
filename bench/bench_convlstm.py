"""ConvLSTM gates against their definition, eager and compiled. The limit is memory: kernels/convlstm.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from avfast.kernels import convlstm_gates, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the paper's model at 48, 64 and 96 pixels, and a large map
SHAPES = [(b, 128, s, s) for b in (16, 128) for s in (3, 4, 6)] + [(8, 128, 64, 64)]
SHAPES += [(64, 128, 64, 64)] if DEVICE == "cuda" else []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_gates(shape: tuple[int, int, int, int], contest: Callable[..., None]) -> None:
    b, c, h, w = shape
    torch.manual_seed(0)
    gates = torch.randn(b, 4 * c, h, w, device=DEVICE, requires_grad=True)
    cell = torch.randn(shape, device=DEVICE, requires_grad=True)
    contest(
        f"gates: {shape}",
        {
            "ours": convlstm_gates,
            "eager": reference.convlstm_gates,
            "compiled": torch.compile(reference.convlstm_gates),
        },
        [gates, cell],
        forward=7 * cell.numel(),
        backward=12 * cell.numel(),
    )
