"""Which implementation of an op runs, and why.

An `Op` holds its backends in order of preference, `reference` (plain PyTorch) last. Each backend answers for the given
arguments with None ("I can") or the reason why it cannot. The choice per call: the explicit `backend=` argument, else
the environment variable AVFAST_BACKEND, else the first backend that supports the arguments. A requested backend runs
or raises with its reason; only the automatic choice falls back. AVFAST_BACKEND speaks to all ops at once, so an op that
has no such backend chooses as if it were not set. `explain` tells what would run here, for `avfast.env`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NAMES = ("triton", "cpp", "reference")
OPS: dict[str, Op] = {}


class Backend(NamedTuple):
    """One implementation: its function and `unsupported(*args, **kwargs)`, which returns None or a reason."""

    function: Callable[..., Any]
    unsupported: Callable[..., str | None]
    unavailable: Callable[[str], str | None]
    """`unavailable(device_type)`: None, or why this backend cannot run on that kind of device on this machine."""


def _never(*_args: Any, **_kwargs: Any) -> None:
    return None


@dataclass
class Op:
    """An op by name; calling it chooses a backend and runs it."""

    name: str
    backends: dict[str, Backend] = field(default_factory=dict)

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        source, requested = "backend", backend
        if requested is None:
            source, requested = "AVFAST_BACKEND", os.environ.get("AVFAST_BACKEND") or None
        if requested is not None and requested not in NAMES:
            raise ValueError(f"{source} is {requested!r}, expected one of {', '.join(NAMES)}")
        if backend is not None and backend not in self.backends:
            raise ValueError(f"backend is {backend!r}: {self.name} has only {', '.join(self.backends)}")
        if requested in self.backends:
            chosen = self.backends[requested]
            reason = chosen.unsupported(*args, **kwargs)
            if reason is not None:
                raise ValueError(f"{source} is {requested!r}, which cannot run this {self.name}: {reason}")
            return chosen.function(*args, **kwargs)
        for candidate in self.backends.values():
            if candidate.unsupported(*args, **kwargs) is None:
                return candidate.function(*args, **kwargs)
        raise AssertionError(f"{self.name}: the reference supports everything")


def define(name: str, reference: Callable[..., Any], **faster: Backend) -> Op:
    """Register an op: its reference and, in order of preference, faster backends by name."""
    op = Op(name, {**faster, "reference": Backend(reference, _never, _never)})
    OPS[name] = op
    return op


def explain() -> list[tuple[str, str, str, dict[str, str]]]:
    """For every op and kind of device: (op, device, backend that runs, {every other backend: why it does not})."""
    rows = []
    for op in OPS.values():
        forced = os.environ.get("AVFAST_BACKEND")
        forced = forced if forced in op.backends else None
        for device in ("cpu", "cuda"):
            reasons: dict[str, str] = {}
            chosen = ""
            for name in NAMES:
                backend = op.backends.get(name)
                if backend is None:
                    reasons[name] = "not written"
                elif forced and name != forced:
                    reasons[name] = f"AVFAST_BACKEND={forced}"
                elif (reason := backend.unavailable(device)) is not None:
                    reasons[name] = reason
                elif chosen:
                    reasons[name] = f"{chosen} is preferred"
                else:
                    chosen = name
            rows.append((op.name, device, chosen or "none", reasons))
    return rows
