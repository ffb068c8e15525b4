"""Argument checks shared by the public functions: one line that names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def shape(name: str, tensor: Tensor, dims: str, **sizes: int) -> None:
    """Raise ValueError unless `tensor` is a floating-point tensor with the named dimensions, e.g. dims "B C H W";
    sizes given by keyword must match."""
    names = dims.split()
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {found}, expected a floating-point tensor ({', '.join(names)})")
    size = tensor.shape
    fits = len(size) == len(names)
    if fits:
        for dim, extent in sizes.items():
            fits = fits and size[names.index(dim)] == extent
    if not fits:
        expected = ", ".join(str(sizes.get(n, n)) for n in names)
        raise ValueError(f"{name} has shape {tuple(size)}, expected ({expected})")


def exactly(name: str, tensor: Tensor, dims: str, size: tuple[int, ...]) -> None:
    """`shape` where every dimension is known: one comparison instead of one each, 1 us of every call."""
    if not (isinstance(tensor, Tensor) and tensor.shape == size and tensor.is_floating_point()):
        shape(name, tensor, dims, **dict(zip(dims.split(), size, strict=True)))


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors (None is left out) lie on one device."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            places = ", ".join(f"{name} on {t.device}" for name, t in tensors.items() if t is not None)
            raise ValueError(f"tensors lie on different devices: {places}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")


def no_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError when a gradient is asked of an argument that has none."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the op has none for it: detach it")
