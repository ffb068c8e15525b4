"""Models as people write them, for the tests of avfast.patch, and what they are made of."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import avfast
from avfast.patching import PatchReport

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("drop_in", ROOT / "examples" / "drop_in.py")
assert spec is not None and spec.loader is not None
drop_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(drop_in)
TheirWarp = drop_in.TheirWarp


class Cell(nn.Module):
    """A ConvLSTM cell as many write it: called by keyword, and asked for its first state."""

    def __init__(self, channels: int = 3, hidden: int = 4) -> None:
        super().__init__()
        self.hidden = hidden
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        hidden, cell = self.first(x) if state is None else state
        i, f, o, g = self.gates(torch.cat((x, hidden), dim=1)).chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell

    def gates(self, stacked: Tensor) -> Tensor:
        return self.conv(stacked)

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero = x.new_zeros(len(x), self.hidden, *x.shape[2:])
        return zero, zero.clone()


class Model(nn.Module):
    """Two steps of a cell, and a layer after it that has buffers."""

    def __init__(self, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.cell = Cell() if cell is None else cell
        self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = self.first(x)
        for _ in range(2):
            state = self.step(x, state)
        return self.head(self.norm(state[0]))

    def first(self, x: Tensor) -> Any:
        return self.cell.first(x)

    def step(self, x: Tensor, state: Any) -> Any:
        return self.cell(x, state)


class Keyword(Model):
    def step(self, x: Tensor, state: Any) -> Any:
        return self.cell(state=list(state), x=x)


def frames(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, 8, 9, dtype=dtype)


def patch(model: nn.Module, *inputs: Tensor) -> PatchReport:
    with torch.random.fork_rng():
        inputs = inputs or (frames(),)
    return avfast.patch(model, *inputs, rounds=0, verbose=False)


def contents(model: nn.Module) -> list[Any]:
    """All that a model is made of: two equal lists are the same objects with the same bits."""
    parts: list[Any] = [torch.random.get_rng_state().tolist()]
    for name, module in model.named_modules(remove_duplicate=False):
        parts += [name, id(module), type(module), module.training]
        parts += [(key, id(value)) for key, value in vars(module).items()]
        parts += [list(value) for value in vars(module).values() if isinstance(value, (dict, list))]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.tolist()
        parts += [name, id(tensor), tensor.tolist(), tensor.requires_grad, grad]
    return [*parts, list(model.state_dict())]
