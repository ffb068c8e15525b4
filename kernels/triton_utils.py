"""What the Triton kernels share: whether they can run, how they are launched, tiles of images.

Kernels run on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1 was set before this package was imported: then
NumPy executes them, for tests. Three rules that the interpreter does not enforce: every load has a mask, `other` and a
cast to the compute type at once (bf16 arithmetic is integer arithmetic there); addresses are int64; atomics are fp32 or
integer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

from .registry import Backend

try:
    import triton
    import triton.language as tl

    MISSING = None
except ImportError as error:  # not on Linux, or left out
    triton = tl = None
    MISSING = f"Triton cannot be imported ({error})"

TYPES: dict[torch.dtype, Any] = {} if tl is None else {torch.float32: tl.float32, torch.float64: tl.float64}
"""Triton's names of the compute types."""
MAX_GRID_YZ = 65535
"""Most programs along the second and the third axis of a grid."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Any) -> Any:
    """`triton.jit`, or the function as it is where there is no Triton: nothing calls it then."""
    return function if triton is None else triton.jit(function)


def unavailable(device: str) -> str | None:
    """The reason why Triton kernels cannot run on this kind of device; None if they can."""
    if MISSING is not None or device == "cuda" or (device == "cpu" and INTERPRETED):
        return MISSING
    return "Triton runs on CUDA tensors; on CPU tensors only with TRITON_INTERPRET=1"


def backend(function: Callable[..., Any], **options: Any) -> Backend:
    """`function`, which launches Triton kernels, as a backend of an op. options: other fields of `Backend`."""
    opt_in = "Triton's interpreter is for tests" if INTERPRETED else None
    return Backend(function, unavailable, opt_in=opt_in, **options)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel[grid](*arguments, **constants)` on the device of the first argument, a tensor. Triton itself compiles
    for the current device and launches there. An empty grid runs nothing."""
    if 0 in grid:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


def block(size: int, usual: int) -> int:
    """Elements per program: `usual`; in the interpreter, where a program costs 0.1 ms per operation whatever its size,
    as many as make a handful of programs."""
    return max(usual, triton.next_power_of_2(triton.cdiv(size, 8))) if INTERPRETED else usual


def offsets(*extents: int) -> Any:
    """Type of the offsets inside memory of so many elements: half as many instructions where 32 bits hold them."""
    return tl.int32 if max(extents) < 2**31 else tl.int64


def extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor, or of a part of its dimensions."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


@lru_cache(1024)
def tiles(images: int, height: int, width: int) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Cover images by tiles of 256 pixels, one per thread: (grid, constants of `tile` and number of warps).

    A tile is 16 to 128 columns wide. Of these widths the one with the fewest pixels outside the image is taken, and of
    equals the widest: 48x48 pixels are three by three tiles of 16x16. Only the first axis of a grid may have more than
    65535 programs: it counts the columns of tiles, or the images where there are more than 65535."""
    pixels = 256
    if INTERPRETED:
        columns = triton.next_power_of_2(width)
        rows = triton.next_power_of_2(triton.cdiv(height, 8))
    else:
        narrowest = min(16, triton.next_power_of_2(width))
        while triton.cdiv(height, pixels // narrowest) > MAX_GRID_YZ:
            narrowest //= 2
        wider = [narrowest << i for i in range(4) if narrowest << i <= min(pixels, triton.next_power_of_2(width))]

        def covered(columns: int) -> int:
            return triton.cdiv(width, columns) * triton.cdiv(height, pixels // columns)

        allowed = (c for c in wider if triton.cdiv(height, pixels // c) <= MAX_GRID_YZ)
        columns = min(allowed, key=lambda c: (covered(c), -c))
        rows = pixels // columns
    across, down = triton.cdiv(width, columns), triton.cdiv(height, rows)
    many = images > MAX_GRID_YZ
    constants = {"COLUMNS": columns, "ROWS": rows, "IMAGES": 0 if many else 2, "num_warps": pixels // 32}
    return (images, down, across) if many else (across, down, images), constants


@jit
def tile(height, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr, IMAGES: tl.constexpr, OFFSET: tl.constexpr):
    """This program's tile of pixels, flat: (image, y, x, whether inside it). No division: the tile is the grid's, its
    sides are powers of two."""
    pixel = tl.arange(0, COLUMNS * ROWS)
    x = tl.program_id(2 - IMAGES) * COLUMNS + pixel % COLUMNS
    y = tl.program_id(1) * ROWS + pixel // COLUMNS
    return tl.program_id(IMAGES).to(tl.int64), y.to(OFFSET), x.to(OFFSET), (y < height) & (x < width)
