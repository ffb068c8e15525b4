"""The Triton side of the fused ops: whether it can run, and what the launchers share.

Kernels run on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before this package was imported: then
NumPy executes them, for tests. Rules that the interpreter does not enforce: every load has a mask, `other` and a cast
to the compute type at once (bf16 arithmetic is integer arithmetic there), addresses are int64, atomics are fp32 or
integer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
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
MOST = 65535
"""Programs along the second and the third axis of a grid."""
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
    return MISSING if first.is_cuda else unavailable(first.device.type)


def block(size: int, usual: int) -> int:
    """Elements per program: `usual`, or, since an interpreted program costs 0.1 ms an operation whatever its size, as
    many as make a handful of programs."""
    return max(usual, triton.next_power_of_2(triton.cdiv(size, 8))) if INTERPRETED else usual


def grid(size: int, block_size: int) -> tuple[int]:
    """One-dimensional grid over `size` elements."""
    return (triton.cdiv(size, block_size),)


_KNOWN = ((3, 6), (3, 7))
"""Versions of Triton whose way from a compiled kernel to its launch is known here."""
_DIRECT = (
    triton is not None
    and not INTERPRETED
    and tuple(int(n) for n in triton.__version__.split(".")[:2]) in _KNOWN
    and hasattr(torch._C, "_cuda_getCurrentRawStream")
    and hasattr(torch._C, "_cuda_getDevice")
)
_LAUNCHES: dict[Any, tuple[Any, ...]] = {}
"""What launches that came before found out, by all that Triton compiles a kernel for."""
_MOST_LAUNCHES = 1024


def launch(
    kernel: Any,
    plan: Callable[..., tuple[tuple[int, ...], dict[str, Any]]],
    tensors: tuple[Tensor, ...],
    numbers: tuple[Any, ...],
    facts: tuple[Any, ...],
    floats: tuple[float, ...] = (),
) -> None:
    """Run a kernel whose arguments are tensors, numbers (integers, or tuples of them), `floats` of an annotated type,
    and constants. `plan(*numbers, *facts)` gives the grid, and constants and options by name; nothing else may decide
    about them. An empty grid runs nothing.

    Triton takes 17 us to find anew what it compiled for such arguments. So where a call is like one before (the same
    kernel, numbers, facts, types, alignment and device), what that one found is launched, with addresses for tensors,
    which Triton's launcher would look up one by one. Not while a profiler has hooks."""
    device = tensors[0].get_device()
    if device < 0 or not _DIRECT:
        _launch(kernel, plan, tensors, numbers, facts, floats)
        return
    if device != torch._C._cuda_getDevice():
        # Triton compiles for the current device and launches there
        with torch.cuda.device(device):
            launch(kernel, plan, tensors, numbers, facts, floats)
        return
    addresses = [t.data_ptr() for t in tensors]
    low = 0
    for address in addresses:
        low |= address
    aligned = None if low % 16 == 0 else tuple([a % 16 == 0 for a in addresses])
    # by identity: a kernel's own hash is made of its source text
    key = id(kernel), numbers, facts, tuple([t.dtype for t in tensors]), aligned, device
    known = _LAUNCHES.get(key)
    if known is None or _hooked() or kernel.pre_run_hooks:
        known = _launch(kernel, plan, tensors, numbers, facts, floats)
        if known is not None:
            if len(_LAUNCHES) >= _MOST_LAUNCHES:
                _LAUNCHES.clear()
            _LAUNCHES[key] = known
        return
    x, y, z, run, function, metadata, constants = known
    stream = torch._C._cuda_getCurrentRawStream(device)
    run(x, y, z, stream, function, metadata, None, None, None, *addresses, *numbers, *floats, *constants)


def _hooked() -> bool:
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # a chain of hooks may be empty; before there were chains there was one or none
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


def _launch(
    kernel: Any, plan: Callable[..., Any], tensors: Any, numbers: Any, facts: Any, floats: Any
) -> tuple[Any, ...] | None:
    """Triton's own way; what `launch` needs to go its own the next time, or None where that is not there."""
    size, constants = plan(*numbers, *facts)
    if 0 in size:
        return None
    compiled = kernel[size](*tensors, *numbers, *floats, **constants)
    try:
        found = compiled.run, compiled.function, compiled.packed_metadata
        names = kernel.arg_names[len(tensors) + len(numbers) + len(floats) :]
        return *size, *(1,) * (3 - len(size)), *found, tuple([constants[name] for name in names])
    except AttributeError:  # the interpreter, or a Triton with other names
        return None


def offsets(*extents: int) -> Any:
    """Type of the offsets inside memory of so many elements: half as many instructions where 32 bits hold them."""
    return tl.int32 if max(extents) < 2**31 else tl.int64


def extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor, or of a part of its dimensions."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


@lru_cache(1024)
def tiles(images: int, height: int, width: int, pixels: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Cover images by tiles of `pixels`, one pixel a thread: (grid, constants of `tile`).

    A tile is 16 to 128 columns wide, of these the widest with the fewest pixels outside: 48x48 pixels are three by
    three tiles of 16x16. Only the first axis of a grid may have more than 65535 programs: there are the columns of
    tiles, or the images where they are more."""
    if INTERPRETED:
        columns = triton.next_power_of_2(width)
        rows = triton.next_power_of_2(triton.cdiv(height, 8))
    else:
        narrowest = min(16, triton.next_power_of_2(width))
        while triton.cdiv(height, pixels // narrowest) > MOST:
            narrowest //= 2
        wider = [narrowest << i for i in range(4) if narrowest << i <= min(pixels, triton.next_power_of_2(width))]

        def covered(columns: int) -> int:
            rows = pixels // columns
            return triton.cdiv(width, columns) * triton.cdiv(height, rows)

        columns = min((c for c in wider if triton.cdiv(height, pixels // c) <= MOST), key=lambda c: (covered(c), -c))
        rows = pixels // columns
    across, down = triton.cdiv(width, columns), triton.cdiv(height, rows)
    many = images > MOST
    return (images, down, across) if many else (across, down, images), {
        "COLUMNS": columns,
        "ROWS": rows,
        "IMAGES": 0 if many else 2,
    }


@jit
def tile(height, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr, IMAGES: tl.constexpr, OFFSET: tl.constexpr):
    """This program's tile of pixels, flat: (image, y, x, whether inside it). No division: the tile is the grid's, its
    sides are powers of two."""
    pixel = tl.arange(0, COLUMNS * ROWS)
    x = tl.program_id(2 - IMAGES) * COLUMNS + pixel % COLUMNS
    y = tl.program_id(1) * ROWS + pixel // COLUMNS
    return tl.program_id(IMAGES).to(tl.int64), y.to(OFFSET), x.to(OFFSET), (y < height) & (x < width)


__all__ = [
    "INTERPRETED", "MOST", "TYPES", "block", "extent", "grid", "jit", "launch", "offsets", "tile", "tiles", "tl",
    "triton", "unavailable", "unsupported",
]  # fmt: skip
