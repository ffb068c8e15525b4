"""What avfast.patch keeps of a model: everything but how recognised modules compute."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import avfast
from avfast.patching import PatchReport


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


class Tied(Model):
    """A module under two names, a convolution in two cells, and a parameter in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.tied, self.head2 = self.cell, Cell(), Cell()
        self.tied.conv = self.cell.conv
        self.head2.conv.weight = self.cell.conv.weight

    def step(self, x: Tensor, state: Any) -> Any:
        return self.head2(x, self.tied(x, self.same(x, self.cell(x, state))))


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


def trained(model: nn.Module) -> list[Tensor]:
    """Parameters after three steps."""
    torch.manual_seed(1)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimiser.zero_grad()
        model(frames()).square().mean().backward()
        optimiser.step()
    return [p.detach() for p in model.parameters()]


def spectral() -> Model:
    model = Model()
    parametrizations.spectral_norm(model.cell.conv)
    return model


def weight() -> Model:
    model = Model()
    parametrizations.weight_norm(model.cell.conv)
    return model


def old_weight() -> Model:
    model = Model()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.cell.conv)
    return model


def partly_frozen() -> Model:
    model = Model()
    model.cell.conv.weight.requires_grad_(False)
    return model


def with_buffer() -> Model:
    model = Model()
    model.cell.register_buffer("steps", torch.arange(3.0))
    return model


MODELS: list[Callable[[], Model]] = [
    Model, Keyword, Tied, spectral, weight, old_weight, partly_frozen, with_buffer, lambda: Model().eval(),
]  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_keeps_every_object_and_name_and_trains_alike(make: Callable[[], Model]) -> None:
    torch.manual_seed(0)
    model = make()
    model(frames()).sum().backward()
    before, other = contents(model), copy.deepcopy(model) if make is not old_weight else None
    cells = [module for module in model.modules() if isinstance(module, Cell)]
    report = patch(model)
    assert report.left == {} and {model.get_submodule(name) for name in report.swapped} == set(cells)
    after = contents(model)
    assert [part for part in after if not isinstance(part, type)] == [p for p in before if not isinstance(p, type)]
    assert all(isinstance(cell, Cell) and type(cell).__name__ == "FusedCell" for cell in cells)
    if other is not None:
        torch.testing.assert_close(trained(model), trained(other), rtol=1e-3, atol=1e-4)
