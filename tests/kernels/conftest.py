"""What the tests of several ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its kin return NaN."""

    def fill(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            out = function(*args, **kwargs)
            return out.fill_(math.nan) if out.is_floating_point() and not out.is_meta else out

        return filled

    monkeypatch.setattr(torch, "empty", fill(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill(torch.empty_like))
    monkeypatch.setattr(Tensor, "new_empty", fill(Tensor.new_empty))
    yield
