"""The C++ side of the fused ops: whether it can run, and how its functions are called (csrc/fused.h)."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .registry import Backend


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


def backend(function, *, suits=None, condition=None):
    """`function`, which calls the extension, as a backend of an op."""
    return Backend(function, unsupported, unavailable, None, suits, condition)


def call(name, compute, inputs, outputs, **sizes):
    if name == "modulate_forward":
        before = [t.to(compute) for t in inputs.pop("before")]
        channels = sizes.pop("before_channels")
        out = outputs["out"]
        sizes["out_stride"] = out.shape[1] * sizes["area"]
        sizes["before"] = list(zip([t.data_ptr() for t in before], channels, strict=True))
    given = [t if t.dtype == compute else t.to(compute) for t in inputs.values()]
    taken = [t if t is None or t.dtype == compute else torch.empty_like(t, dtype=compute) for t in outputs.values()]
    addresses = [0 if t is None else t.data_ptr() for t in (*given, *taken)]
    getattr(engine(), name)(*addresses, *sizes.values(), compute == torch.float64, torch.get_num_threads())
    for output, buffer in zip(outputs.values(), taken, strict=True):
        if output is not None and buffer is not None and output is not buffer:
            output.copy_(buffer)
