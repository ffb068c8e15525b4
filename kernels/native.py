"""The C++ side of the fused ops: whether it can run, and how its functions are called (csrc/fused.h)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import registry


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return import_module("avfast._C"), None
    except ImportError as error:
        return None, f"avfast._C was not built ({error}): pip install -e ."


_ENGINE, NOT_BUILT = _load()
"""The extension or None, and None or the reason why there is none."""


def unavailable(device: str) -> str | None:
    """Why the C++ ops cannot run on this kind of device; None if they can."""
    return NOT_BUILT or (None if device == "cpu" else "the C++ ops run on CPU tensors only")


def unsupported(first: Tensor, *_others: Any) -> str | None:
    """The same for a call whose first argument is `first`; public functions see to one device for all."""
    return NOT_BUILT if first.is_cpu else unavailable("another")


def engine() -> Any:
    """The extension module. Raises ImportError where it was not built."""
    if _ENGINE is None:
        raise ImportError(NOT_BUILT)
    return _ENGINE


def compute_type(*tensors: Tensor) -> torch.dtype:
    """float64 where a tensor has it, else float32: half types are converted."""
    # a loop: any() of a generator takes twice as long, 0.4 us, in every call
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def plain(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether there is nothing to choose and nothing to convert: contiguous tensors of `dtype` on the CPU, nobody who
    watches, no backend asked for. Such a call goes straight to C++: once the data of an op of 30 us have taken the
    cache, its way through all layers takes as long again, the straight one 10 us."""
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_cpu or tensor.dtype is not dtype:
            return False
    # before tensors are asked what a tracer would take down
    if _ENGINE is None or not registry.unwatched(*tensors):
        return False
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.numel() == 0:
            return False
    return not registry.has_environment("AVFAST_BACKEND")


def run(name: str, tensors: Sequence[Tensor], *rest: Any) -> None:
    """`call` for tensors that are `plain`, outputs included."""
    getattr(_ENGINE, name)(*map(Tensor.data_ptr, tensors), *rest, False, torch.get_num_threads())


def call(
    name: str, compute: torch.dtype, inputs: Sequence[Tensor], outputs: Sequence[Tensor | None], *rest: Any
) -> None:
    """Run one of the C++ functions: the addresses of the inputs, then of the outputs (None: a null pointer), then
    the rest. Tensors lie as the function expects; those of another type than `compute` are converted, there and back.
    """
    given = [t if t.dtype == compute else t.to(compute) for t in inputs]
    taken = [t if t is None or t.dtype == compute else torch.empty_like(t, dtype=compute) for t in outputs]
    addresses = [0 if t is None else t.data_ptr() for t in (*given, *taken)]
    getattr(engine(), name)(*addresses, *rest, compute == torch.float64, torch.get_num_threads())
    for output, buffer in zip(outputs, taken, strict=True):
        if output is not None and buffer is not None and output is not buffer:
            output.copy_(buffer)
