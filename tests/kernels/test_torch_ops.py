"""PyTorch's own checks of the ops that avfast registers: schemas, shapes of the fake versions, compiled use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from avfast.kernels import (
    registry,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def samples() -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of the registered torch ops, without the backend where they take one."""
    image, flow = normal(2, 3, 5, 6).float(), normal(2, 2, 5, 6, seed=1).float()
    gates, cell = normal(2, 12, 5, 6).float(), normal(2, 3, 5, 6, seed=1).float()
    clip = normal(1, 2, 2, 5, 6).float()
    row = normal(2, 3, seed=2).float()
    memory = normal(2, 5, 3).float()
    geometry, weights = (5, 6, 4, 2, 1), normal(12, 12, 5, seed=1).float()
    maps = [t.contiguous(memory_format=torch.channels_last) for t in (image, normal(2, 5, 2, 3).float())]
    ops = torch.ops.avfast
    calls = [
        (ops._backward_warp.default, (image, flow, "border")),
        (ops._backward_warp.default, (image.contiguous(memory_format=torch.channels_last), flow, "zeros")),
        (ops._backward_warp_backward.default, (image, flow, image, "border", True, True)),
        (ops._backward_warp_backward.default, (image, flow, image.mT.contiguous().mT, "zeros", False, True)),
        (ops._convlstm_gates.default, (gates, cell)),
        (ops._convlstm_gates.default, (gates.contiguous(memory_format=torch.channels_last), cell)),
        (ops._convlstm_gates_backward.default, (gates, cell, cell, cell)),
        (ops._flow_loss.default, (clip, clip + 1, clip.sigmoid(), 0.1, True)),
        (ops._flow_loss.default, (clip, clip + 1, clip.sigmoid(), 0.1, False)),
        (ops._modulate.default, ([image, flow], image, row, row)),
        (ops._modulate_backward.default, (image, row, image)),
        (ops._recall.default, (image.contiguous(memory_format=torch.channels_last), image, memory, memory + 1)),
        (ops._winograd_conv.default, (maps[0], weights, geometry, False)),
        (ops._winograd_conv.default, (maps[1], weights, geometry, True)),
        (ops._winograd_weight_gradient.default, (maps[:1], maps[1:], weights, geometry)),
    ]
    return [(op, tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)) for op, args in calls]


@pytest.mark.parametrize("index", range(len(samples())), ids=[str(op) for op, _ in samples()])
def test_opcheck(index: int) -> None:
    """Schema, fake and compiled use. Gradients are the autograd.Functions', which the contract tests."""
    op, args = samples()[index]
    args = tuple([t.to(DEVICE) for t in a] if isinstance(a, list) else a for a in args)
    for backend in ("triton", "cpp"):
        module = registry.OPS["backward_warp"].backends[backend]
        given = (*args, backend) if op._schema.arguments[-1].name == "backend" else args
        # an op that takes none is the one's or the other's
        own = "cpp" if "winograd" in str(op) else "triton"
        if module.unavailable(DEVICE) is None and (given is not args or backend == own):
            torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
            torch.library.opcheck(op, given, test_utils="test_aot_dispatch_dynamic")
