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
    fits = len(size) == len(names) and all(sizes.get(n, s) == s for n, s in zip(names, size, strict=True))
    if not fits:
        expected = ", ".join(str(sizes.get(n, n)) for n in names)
        raise ValueError(f"{name} has shape {tuple(size)}, expected ({expected})")


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors (None is left out) lie on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    first = next(iter(devices.values()))
    if any(device != first for device in devices.values()):
        raise ValueError("tensors lie on different devices: " + ", ".join(f"{n} on {d}" for n, d in devices.items()))


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")


def no_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError when a gradient is asked of an argument that has none."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the op has none for it: detach it")
