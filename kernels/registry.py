"""Which implementation of an op runs, and why.

An `Op` holds its backends in order of preference; the last one, `reference`, is plain PyTorch and takes everything. The
choice per call: the argument `backend=`, else the environment variable AVFAST_BACKEND, else the first backend that
supports the arguments and suits them. A requested backend runs, or raises with the reason why it cannot; only the
automatic choice falls back. AVFAST_BACKEND speaks to all ops at once, so an op without such a backend chooses as if it
were not set. `explain` tells what would run on this machine, for `avfast env`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from avfast.errors import InputError

NAMES = ("triton", "cpp", "torch", "sdpa", "reference")
OPS: dict[str, Op] = {}


def _no_reason(*_arguments: Any) -> None:
    return None


def cpu_only(device: str) -> str | None:
    """`Backend.unavailable` of a backend that was made for the CPU."""
    return None if device == "cpu" else "made for the CPU"


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    function: Callable[..., Any]
    unavailable: Callable[[str], str | None] = _no_reason
    """`unavailable(device_type)`: None, or the reason why it cannot run on such a device on this machine."""
    unsupported: Callable[..., str | None] = _no_reason
    """`unsupported(*args)`: None, or the reason why it cannot run with these arguments on a device that it runs on."""
    opt_in: str | None = None
    """The reason why it runs on request only; None: it may be chosen automatically."""
    suits: Callable[..., bool] | None = None
    """`suits(*args)`: whether it is the fastest backend for these arguments; None: it always is."""
    condition: str | None = None
    """`suits` in words."""

    def obstacle(self, first: Tensor, *others: Any) -> str | None:
        """None, or the reason why it cannot run with these arguments, all on the device of the first."""
        return self.unavailable(first.device.type) or self.unsupported(first, *others)

    def chosen(self, *args: Any) -> bool:
        """Whether it may run with these arguments without a request."""
        # `suits` is asked last: a size that it compares would become a constant of an exported program
        able = self.opt_in is None and self.obstacle(*args) is None
        return able and (self.suits is None or self.suits(*args))


@dataclass
class Op:
    """An op by name. A call chooses a backend and runs it."""

    name: str
    backends: dict[str, Backend]

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        requested = os.environ.get("AVFAST_BACKEND") if backend is None else backend
        if requested:
            source = "AVFAST_BACKEND" if backend is None else "backend"
            chosen = self._requested(requested, source)
            if chosen is not None:
                if (reason := chosen.obstacle(*args)) is not None:
                    raise InputError(f"{source} is {requested!r}, which cannot run this {self.name}: {reason}")
                return chosen.function(*args)
        for candidate in self.backends.values():
            if candidate.chosen(*args):
                return candidate.function(*args)
        raise AssertionError(f"{self.name}: the reference supports everything")

    def _requested(self, name: str, source: str) -> Backend | None:
        """The backend of that name; None where the environment asks for one that this op does not have."""
        if name not in NAMES:
            raise InputError(f"{source} is {name!r}, expected one of {', '.join(NAMES)}")
        if source == "backend" and name not in self.backends:
            raise InputError(f"backend is {name!r}: {self.name} has only {', '.join(self.backends)}")
        return self.backends.get(name)


def define(name: str, reference: Callable[..., Any], **backends: Backend) -> Op:
    """Register an op: its reference, and the backends that are faster in order of preference."""
    OPS[name] = Op(name, {**backends, "reference": Backend(reference)})
    return OPS[name]


_LIBRARY = torch.library.Library("avfast", "FRAGMENT")

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Torch op -> the same in PyTorch's own ops, for exporters that know no others: `program.run_decompositions`."""


def torch_op(
    name: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    schema: str | None = None,
    reference: Callable[..., Any] | None = None,
) -> Any:
    """Register avfast::<name> for CPU and CUDA tensors and return it; `fake` gives shapes, dtypes and strides alone.
    Its schema follows from the annotations of `run` unless it is given.

    The op has no gradient: an autograd.Function gives it one. It is one opaque node of a compiled or exported program.
    `reference` is what an exporter may put in its place; it takes the op's arguments, except a last one `backend`."""
    schema = schema or torch.library.infer_schema(run, mutates_args=())
    _LIBRARY.define(name + schema)
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"avfast::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.avfast, name).default
    if reference is not None:
        has_backend = "str backend)" in schema
        DECOMPOSITIONS[overload] = (lambda *args: reference(*args[:-1])) if has_backend else reference
    return overload


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd records a call with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_as(like: Tensor, shaped: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of the shape (B,C,H,W) and dtype of `shaped`, or of another dtype. It is channels-last where
    `like` is channels-last and not contiguous, else contiguous. The real and the fake implementation of an op both call
    it, so that their strides agree."""
    contiguous = like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if contiguous else torch.channels_last
    return torch.empty_like(shaped, dtype=dtype, memory_format=layout)


def explain() -> list[tuple[str, str, str, dict[str, str]]]:
    """For every op and kind of device: (op, device, backend that runs, {each of its others: why it does not})."""
    rows = []
    requested = os.environ.get("AVFAST_BACKEND")
    for op in OPS.values():
        forced = requested if requested and op._requested(requested, "AVFAST_BACKEND") else None
        for device in ("cpu", "cuda"):
            reasons: dict[str, str] = {}
            chosen = ""
            # in the order in which a call looks at them
            for name, backend in op.backends.items():
                if forced and name != forced:
                    reasons[name] = f"AVFAST_BACKEND={forced}"
                elif (reason := backend.unavailable(device)) is not None:
                    reasons[name] = reason
                elif backend.opt_in is not None and not forced:
                    reasons[name] = f"on request: {backend.opt_in}"
                elif chosen:
                    condition = op.backends[chosen].condition
                    where = f" where {condition}" if condition and not forced else ""
                    reasons[name] = f"{chosen} is preferred{where}"
                else:
                    chosen = name
            rows.append((op.name, device, chosen or "none", reasons))
    return rows
