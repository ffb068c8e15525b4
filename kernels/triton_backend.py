"""The Triton side of the fused ops: whether it can run, and what the launchers share.

Kernels run on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before this package was imported: then
NumPy executes them, for tests. Rules that the interpreter does not enforce: every load has a mask, `other` and a cast
to the compute type at once (bf16 arithmetic is integer arithmetic there), addresses are int64, atomics are fp32 or
integer.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    MISSING = None
except ImportError as error:  # not on Linux, or left out
    triton = tl = None
    MISSING = f"Triton cannot be imported ({error})"

TYPES: dict[torch.dtype, Any] = {} if tl is None else {torch.float32: tl.float32, torch.float64: tl.float64}
"""Triton's names of the compute types."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Any) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton: nothing calls it then."""
    return function if triton is None else triton.jit(function)


def unavailable(device: str) -> str | None:
    """Why the Triton kernels cannot run on this kind of device; None if they can."""
    if MISSING is not None or device == "cuda" or (device == "cpu" and INTERPRETED):
        return MISSING
    return "Triton runs on CUDA tensors; on CPU tensors only with TRITON_INTERPRET=1"


def unsupported(first: Tensor, *_others: Any) -> str | None:
    """The same for a call whose first argument is `first`; public functions see to one device for all."""
    return unavailable(first.device.type)


def block(size: int, usual: int) -> int:
    """Elements per program: `usual`, or, since an interpreted program costs 0.1 ms an operation whatever its size, as
    many as make a handful of programs."""
    return max(usual, triton.next_power_of_2(triton.cdiv(size, 8))) if INTERPRETED else usual


def grid(size: int, block_size: int) -> tuple[int]:
    """One-dimensional grid over `size` elements."""
    return (triton.cdiv(size, block_size),)


__all__ = ["INTERPRETED", "TYPES", "block", "grid", "jit", "tl", "triton", "unavailable", "unsupported"]
