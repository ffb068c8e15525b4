"""Condense of every prefix and Recall over many tokens against their definitions, eager and compiled, on CUDA against
either of the two fast backends, and Condense against the loop over prefixes that the equations spell out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from avfast.kernels import condense, recall, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
C = 128
# on CUDA the choice of the backend rests on this: more lengths, batch 1 too, and bfloat16
LENGTHS = (5, 10, 20, 45, 90, 128) if DEVICE == "cuda" else (20, 45, 128)
MEMORIES = [(b, t) for t in LENGTHS for b in (16, 128)] + [(1, 2048)]
MEMORIES += [(1, 20), (1, 128)] if DEVICE == "cuda" else []
DTYPES = [torch.float32, torch.bfloat16] if DEVICE == "cuda" else [torch.float32]
# all contenders are within 1e-4 of each other in float32; bfloat16 has 8 bits
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def prefix_loop(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 1 as it stands: for every t the attention over the first t entries, of which the last row is kept."""
    rows = []
    for t in range(1, memory.shape[1] + 1):
        q, k, v = torch.nn.functional.linear(memory[:, :t], weight, bias).chunk(3, dim=-1)
        rows.append((memory[:, :t] + (q @ k.mT).softmax(-1) @ v)[:, -1])
    return torch.stack(rows, dim=1)


def suffix(dtype: torch.dtype) -> str:
    """What a case's name says of its type: nothing of float32."""
    return "" if dtype == torch.float32 else f" {dtype}".replace("torch.", "")


def rivals(op: Callable[..., Any], definition: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    calls = {"ours": op, "eager": definition, "compiled": torch.compile(definition)}
    if DEVICE == "cuda":
        # ours is one of them: the other shows whether the choice is right
        calls |= {backend: partial(op, backend=backend) for backend in ("triton", "sdpa")}
    return calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MEMORIES, ids=str)
def bench_condense(shape: tuple[int, int], dtype: torch.dtype, contest: Callable[..., None]) -> None:
    b, t = shape
    torch.manual_seed(0)
    memory = torch.randn(b, t, C, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(3 * C, C, device=DEVICE, dtype=dtype)).requires_grad_()
    bias = torch.zeros(3 * C, device=DEVICE, dtype=dtype, requires_grad=True)
    calls = rivals(condense, reference.condense)
    # of 2048 steps its backward pass would keep 23 GB
    if b * t <= 128 * 45 and t <= 128:
        calls["loop"] = prefix_loop
    values = 2 * memory.numel() + weight.numel()
    args, tolerance = [memory, weight, bias], TOLERANCE[dtype]
    contest(f"condense: {shape}{suffix(dtype)}", calls, args, forward=values, backward=2 * values, tolerance=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(16, 3, 3, 20), (128, 3, 3, 20), (16, 6, 6, 30), (4, 64, 64, 512)], ids=str)
def bench_recall(shape: tuple[int, int, int, int], dtype: torch.dtype, contest: Callable[..., None]) -> None:
    b, h, w, m = shape
    torch.manual_seed(0)
    feature, query = (torch.randn(b, C, h, w, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(2))
    key, value = (0.1 * torch.randn(b, m, C, device=DEVICE, dtype=dtype) for _ in range(2))
    args = [feature, query, key.requires_grad_(), value.requires_grad_()]
    calls = rivals(recall, reference.recall)
    values = 3 * feature.numel() + 2 * key.numel()
    contest(
        f"recall: {shape}{suffix(dtype)}",
        calls,
        args,
        forward=values,
        backward=2 * values,
        rounds=9,
        tolerance=TOLERANCE[dtype],
    )
