"""Drawn tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal values, the same for the same seed."""
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
