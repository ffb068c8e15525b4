"""Argument checks of the public functions: one line that names the argument, its value and what was expected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def shape(name: str, tensor: Tensor, dims: str, sizes: Mapping[str, int] | None = None) -> None:
    """Raise ValueError unless `tensor` is a floating-point tensor with the named dimensions, such as "B 2 H W". A
    dimension whose name is a number, or is in `sizes`, has that size."""
    names = dims.split()
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {found}, expected a floating-point tensor ({', '.join(names)})")
    known = sizes or {}
    wanted = [int(n) if n.isdecimal() else known.get(n) for n in names]
    if tensor.dim() != len(names) or any(w is not None and w != s for w, s in zip(wanted, tensor.shape, strict=True)):
        expected = ", ".join(n if w is None else str(w) for n, w in zip(names, wanted, strict=True))
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected ({expected})")


def same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all tensors (None is left out) lie on one device."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise ValueError(f"tensors lie on different devices: {places}")


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, allowed))}")


def no_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError when a gradient is asked of an argument that has none."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the op has none for it: detach it")
