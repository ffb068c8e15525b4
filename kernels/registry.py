"""Which implementation of an op runs, and why.

An `Op` holds its backends in order of preference, `reference` (plain PyTorch) last. Each backend answers for the given
arguments with None ("I can") or the reason why it cannot. The choice per call: the explicit `backend=` argument, else
the environment variable AVFAST_BACKEND, else the first backend that supports the arguments and suits them. A requested
backend runs or raises with its reason; only the automatic choice falls back. AVFAST_BACKEND speaks to all ops at once,
so an op that has no such backend chooses as if it were not set. `explain` tells what would run here, for `avfast.env`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, autograd

NAMES = ("triton", "cpp", "torch", "sdpa", "reference")
OPS: dict[str, Op] = {}


def has_environment(name: str) -> bool:
    """Whether a variable of the environment has a value."""
    return bool(os.environ.get(name))


class Backend(NamedTuple):
    """One implementation: its function and `unsupported(*args, **kwargs)`, which returns None or a reason."""

    function: Callable[..., Any]
    unsupported: Callable[..., str | None]
    unavailable: Callable[[str], str | None]
    """`unavailable(device_type)`: None, or why this backend cannot run on that kind of device on this machine."""
    opt_in: str | None = None
    """Why it runs on request only; None: it may be chosen by itself."""
    where: tuple[str, Callable[..., bool]] | None = None
    """The arguments for which it is the choice, in words and as a test of them; None: all that it supports."""

    def chosen(self, *args: Any, **kwargs: Any) -> bool:
        """Whether it may run without a request."""
        # where it cannot run its condition is not asked: a size it compares would be fixed in an exported program
        able = self.opt_in is None and self.unsupported(*args, **kwargs) is None
        return able and (self.where is None or self.where[1](*args, **kwargs))


def _mistake(message: str) -> ValueError:
    """An InputError: a command prints it as one line."""
    from avfast.errors import InputError

    return InputError(message)


def never(*_args: Any, **_kwargs: Any) -> None:
    return None


@dataclass
class Op:
    """An op by name; calling it chooses a backend and runs it."""

    name: str
    backends: dict[str, Backend] = field(default_factory=dict)

    def __call__(self, *args: Any, backend: str | None = None, **kwargs: Any) -> Any:
        requested = backend
        # a compiled program is traced through os.environ alone
        if backend is None and (torch.compiler.is_compiling() or has_environment("AVFAST_BACKEND")):
            requested = os.environ.get("AVFAST_BACKEND")
        if requested and (chosen := self._requested(requested, backend is None)) is not None:
            reason = chosen.unsupported(*args, **kwargs)
            if reason is not None:
                source = "AVFAST_BACKEND" if backend is None else "backend"
                raise _mistake(f"{source} is {requested!r}, which cannot run this {self.name}: {reason}")
            return chosen.function(*args, **kwargs)
        for candidate in self.backends.values():
            if candidate.chosen(*args, **kwargs):
                return candidate.function(*args, **kwargs)
        raise AssertionError(f"{self.name}: the reference supports everything")

    def _requested(self, name: str, by_environment: bool) -> Backend | None:
        """The backend of that name; None where the environment asks for one that other ops have and this has not."""
        if name not in NAMES:
            source = "AVFAST_BACKEND" if by_environment else "backend"
            raise _mistake(f"{source} is {name!r}, expected one of {', '.join(NAMES)}")
        if not by_environment and name not in self.backends:
            raise _mistake(f"backend is {name!r}: {self.name} has only {', '.join(self.backends)}")
        return self.backends.get(name)


def define(name: str, reference: Callable[..., Any], **faster: Backend) -> Op:
    """Register an op: its reference and, in order of preference, faster backends by name."""
    op = Op(name, {**faster, "reference": Backend(reference, never, never)})
    OPS[name] = op
    return op


def define_fused(
    name: str,
    reference: Callable[..., Any],
    fused: Callable[..., Any],
    *,
    cpp_where: tuple[str, Callable[..., bool]] | None = None,
    triton_where: tuple[str, Callable[..., bool]] | None = None,
) -> Op:
    """Register an op whose `fused(backend, *args)` runs in C++ on CPU tensors ("cpp") and in Triton on CUDA tensors
    ("triton"), each only where it suits (`Backend.where`)."""
    # here, not above: TV-L1 uses this file too, and importing Triton takes a while
    from . import native, triton_utils

    cpp = Backend(partial(fused, "cpp"), native.unsupported, native.unavailable, where=cpp_where)
    interpreted = "Triton's interpreter is for tests" if triton_utils.INTERPRETED else None
    able = triton_utils.unsupported, triton_utils.unavailable
    triton = Backend(partial(fused, "triton"), *able, interpreted, triton_where)
    return define(name, reference, cpp=cpp, triton=triton)


_LIBRARY = torch.library.Library("avfast", "FRAGMENT")


def _dispatch_keys() -> tuple[set[int], set[int]]:
    """The dispatch keys that a thread adds where nothing is going on, and those of ordinary tensors; both also in
    inference mode. Empty where PyTorch, whose private names these are, has other ones."""
    try:
        _ = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_keys, torch._C._autograd._profiler_enabled
        keys, one = torch._C.DispatchKey, torch._C.DispatchKeySet
        thread = one(keys.BackendSelect)
        dense = {"CPU": one(keys.CPU) | one(keys.AutocastCPU), "CUDA": one(keys.CUDA) | one(keys.AutocastCUDA)}
        in_place = one(keys.ADInplaceOrView)
        normal = [dense[name] | in_place | one(getattr(keys, f"Autograd{name}")) for name in dense]
        return {s.raw_repr() for s in (thread, thread | in_place)}, {s.raw_repr() for s in (*dense.values(), *normal)}
    except AttributeError:
        return set(), set()


_UNWATCHED, _DENSE = _dispatch_keys()

DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}
"""Torch op -> the same in PyTorch's own ops, for exporters that know no others: `program.run_decompositions`."""


def torch_op(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, reference: Callable[..., Any] | None = None
) -> Any:
    """Register avfast::<schema> for CPU and CUDA tensors, with `fake` giving shapes, dtypes and strides alone; returns
    what calls it. The op has no gradient of its own: an autograd.Function gives it one. It is one opaque node in a
    compiled or exported program; `reference`, which takes its arguments without the last where that is `backend`, is
    what an exporter may put in its place."""
    _LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"avfast::{name}", fake, lib=_LIBRARY)
    overload = getattr(torch.ops.avfast, name).default
    if reference is not None:
        choosing = "str backend)" in schema
        DECOMPOSITIONS[overload] = (lambda *arguments: reference(*arguments[:-1])) if choosing else reference
    if not _UNWATCHED:
        return overload
    types = [str(argument.type) for argument in overload._schema.arguments]
    tensors = [i for i, kind in enumerate(types) if kind == "Tensor"]
    lists = [i for i, kind in enumerate(types) if kind == "List[Tensor]"]

    def call(*arguments: Any, **options: Any) -> Any:
        """The op, or where nobody else would see it what it runs: the dispatcher's way there takes 15 us."""
        given = [arguments[i] for i in tensors]
        for i in lists:
            given += arguments[i]
        return (run if unwatched(*given) and not wants_gradient(*given) else overload)(*arguments, **options)

    return call


def ordinary(*tensors: Tensor) -> bool:
    """Whether no mode, transform or tracer takes part in calls with these tensors, which are no subclass's or views
    whose values are not what their memory says. False wherever that cannot be known."""
    if not _UNWATCHED or torch.compiler.is_compiling():
        return False
    if torch._C._dispatch_tls_local_include_set().raw_repr() not in _UNWATCHED:
        return False
    for tensor in tensors:
        if torch._C._dispatch_keys(tensor).raw_repr() not in _DENSE:
            return False
    return True


def unwatched(*tensors: Tensor) -> bool:
    """Whether nobody but autograd would see a torch op called with these tensors, and what it runs will do instead."""
    return ordinary(*tensors) and not torch._C._autograd._profiler_enabled()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of a backward pass that has no derivative of its own, at no cost where none is asked for: the
    decorator takes 10 us."""
    guarded = autograd.function.once_differentiable(backward)

    def run(ctx: Any, *grads: Tensor) -> Any:
        return guarded(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return run


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd has to know of a call with these tensors; if not, its 15 us on a CPU are saved."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return True
    return False


def empty_as(like: Tensor, shaped: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of the shape (B,C,H,W) and dtype of `shaped`, or of another dtype, that lies as `like` does:
    channels-last where that is not contiguous but channels-last, else contiguous. Real and fake implementations of an
    op share it, so that their strides agree."""
    contiguous = like.is_contiguous() or not like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.contiguous_format if contiguous else torch.channels_last
    return torch.empty_like(shaped, dtype=dtype, memory_format=layout)


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
                    reasons[name] = "none for this op"
                elif forced and name != forced:
                    reasons[name] = f"AVFAST_BACKEND={forced}"
                elif (reason := backend.unavailable(device)) is not None:
                    reasons[name] = reason
                elif backend.opt_in is not None and not forced:
                    reasons[name] = f"on request: {backend.opt_in}"
                elif chosen:
                    words = op.backends[chosen].where
                    reasons[name] = f"{chosen} is preferred" + (f" where {words[0]}" if words and not forced else "")
                else:
                    chosen = name
            rows.append((op.name, device, chosen or "none", reasons))
    return rows
