"""Argument checks of the public functions: one line that names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor


def tensors(**given: tuple[Tensor | None, str]) -> None:
    """Raise ValueError unless all are floating-point tensors with the named dimensions, such as "B 2 H W", on one
    device. A name stands for the size that the first tensor with it has, "4C" for four times C. An argument may be None
    where its dimensions end in " ?"."""
    sizes: dict[str, int] = {}
    devices = {}
    for name, (tensor, dims) in given.items():
        if tensor is None and dims.endswith(" ?"):
            continue
        names = dims.removesuffix(" ?").split()
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {found}, expected a floating-point tensor ({', '.join(names)})")
        shape = tensor.shape
        # a function and a generator in place of the comprehensions: 7.3 instead of 5.7 us for two tensors
        want = [int(n[0]) * sizes.get(n[1:], 1) if n[0].isdecimal() else sizes.get(n) for n in names]
        if len(shape) != len(names) or [w for w, s in zip(want, shape, strict=True) if w is not None and w != s]:
            expected = ", ".join(n if w is None else str(w) for n, w in zip(names, want, strict=True))
            raise ValueError(f"{name} has shape {tuple(shape)}, expected ({expected})")
        sizes.update(zip(names, shape, strict=True))
        devices[name] = tensor.device
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors lie on different devices: {places}")


def no_gradient(name: str, tensor: Tensor) -> None:
    """Raise ValueError when a gradient is asked of an argument that has none."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, but the op has none for it: detach it")
