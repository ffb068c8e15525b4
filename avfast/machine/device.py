"""The device that a user's word means."""

from __future__ import annotations

from typing import Literal

from avfast.errors import InputError


def choose_device(wanted: str) -> Literal["cpu", "cuda"]:
    """The kind of device that `auto`, `cpu` or `cuda` means on this machine. Raises InputError for another word, and
    for `cuda` where PyTorch sees no such device."""
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {wanted!r}, expected auto, cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but PyTorch sees no CUDA device here")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"
