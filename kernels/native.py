"""The C++ side of the fused ops: whether it can run, and how its functions are called (csrc/fused/ops.def)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def backend(function: Callable[..., Any], **options: Any) -> Backend:
    """`function`, which calls the extension, as a backend of an op. options: other fields of `Backend`."""
    return Backend(function, unavailable, **options)


def engine() -> Any:
    """The extension module. Raises ImportError where it was not built."""
    if _ENGINE is None:
        raise ImportError(NOT_BUILT)
    return _ENGINE


def compute_type(*tensors: Tensor) -> torch.dtype:
    """The type that C++ computes in: float64 where a tensor has it, else float32 (half types are converted)."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def call(
    name: str,
    compute: torch.dtype,
    inputs: Mapping[str, Tensor | Sequence[Tensor]],
    outputs: Mapping[str, Tensor | None],
    **sizes: Any,
) -> None:
    """Run the C++ function `name` on CPU tensors, which it gets by the names of its arguments.

    inputs: tensors, or sequences of tensors; those of another type than `compute` (float32 or float64) are converted.
    outputs: tensors that the function writes; those of another type are computed in a buffer and copied from there.
    None stands for an output that is not wanted. All lie in memory as csrc/fused/ops.def says. sizes: the other
    arguments; `fp64` and `threads` (torch.get_num_threads()) are added."""
    # also keeps what is converted alive during the call
    tensors: dict[str, Any] = {}
    for key, given in inputs.items():
        tensors[key] = given.to(compute) if isinstance(given, Tensor) else [tensor.to(compute) for tensor in given]
    for key, output in outputs.items():
        tensors[key] = output if output is None or output.dtype == compute else torch.empty_like(output, dtype=compute)
    addresses = {key: _addresses(value) for key, value in tensors.items()}
    function = getattr(engine(), name)
    function(**addresses, **sizes, fp64=compute == torch.float64, threads=torch.get_num_threads())
    for key, output in outputs.items():
        if output is not None and output is not tensors[key]:
            output.copy_(tensors[key])


def _addresses(value: Tensor | list[Tensor] | None) -> int | list[int]:
    """Of a tensor, or of each in a list; 0, a null pointer, for None."""
    if value is None:
        return 0
    return value.data_ptr() if isinstance(value, Tensor) else [tensor.data_ptr() for tensor in value]
