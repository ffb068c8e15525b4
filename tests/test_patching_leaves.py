"""What avfast.patch leaves as it is, and why."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from patched_models import Cell, Model, TheirWarp, contents, frames, patch
from torch import Tensor, nn


class Dropout(Cell):
    def gates(self, stacked: Tensor) -> Tensor:
        return nn.functional.dropout(self.conv(stacked), 0.5, self.training)


class Truncated(Cell):
    def gates(self, stacked: Tensor) -> Tensor:
        return self.conv(stacked.detach())


class Peephole(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, 16, 1, 1))

    def gates(self, stacked: Tensor) -> Tensor:
        return self.conv(stacked) + self.weight * stacked.mean()


class Mask(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 16, 1, 1))

    def gates(self, stacked: Tensor) -> Tensor:
        return self.conv(stacked) * self.mask


class Functional(Cell):
    def gates(self, stacked: Tensor) -> Tensor:
        return nn.functional.conv2d(stacked, self.conv.weight, self.conv.bias, padding=1)


class ReturnsList(Cell):
    def forward(self, x: Tensor, state: Any = None) -> Any:
        return list(super().forward(x, state))


class HookedActivation(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.identity = nn.Identity()
        self.identity.register_forward_hook(lambda *_: None)

    def gates(self, stacked: Tensor) -> Tensor:
        return self.identity(self.conv(stacked))


class OwnForward(Cell):
    def __init__(self) -> None:
        super().__init__()
        self.forward = self.forward


class NeverAsked(Cell):
    def forward(self, x: Tensor, state: Any = None, mask: Tensor | None = None) -> Any:
        return super().forward(x, state)

    def __call__(self, x: Tensor, state: Any = None) -> Any:
        return super().__call__(x, state, None)


class KeywordOnly(Cell):
    def forward(self, x: Tensor, *, state: Any = None) -> Any:
        return super().forward(x, state)


class Final(Cell):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Dropout, "computes something else"),
        (Truncated, "computes something else"),
        (Peephole, "computes something else"),
        (Mask, "computes something else"),
        (Functional, "computes something else"),
        (ReturnsList, "does not map x and .hidden, cell. to such a tuple"),
        (Final, "its class refuses a subclass .Final is final."),
        (HookedActivation, "hooks of modules inside it would not be called"),
        (OwnForward, "its forward is set on the object"),
        (NeverAsked, "could compute it, but no call of it in model.*: it takes x and .hidden, cell."),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_leaves_what_it_cannot_keep(cell: type[Cell], reason: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Model(cell()).train(training)
    before = contents(model)
    report = patch(model)
    assert contents(model) == before and report.swapped == {} and report.difference == 0
    assert re.search(reason, report.left["cell"])


def test_the_order_of_gates_does_not_depend_on_the_weights() -> None:
    model, x = Model(), frames()
    for parameter in model.cell.parameters():
        nn.init.zeros_(parameter)
    assert patch(model, x).swapped == {"cell": "a fused ConvLSTM cell (gates i, f, o, g)"}


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
def test_scripted_code_is_left() -> None:
    cell, x = Cell(), frames()
    model = Model(torch.jit.trace(cell, (x, cell.first(x))))
    model.first = cell.first
    assert patch(model, x).left == {"cell": "scripted code cannot be looked into"}


def test_refuses_a_model_without_values() -> None:
    model = Model().to("meta")
    with pytest.raises(ValueError, match="model's cell.conv.weight is Parameter on meta, expected values"):
        patch(model)
    model = Model()
    model.head = nn.LazyConv2d(2, 1)
    with pytest.raises(ValueError, match="model's head.weight is UninitializedParameter on cpu, expected values"):
        patch(model)
    assert isinstance(model.head, nn.LazyConv2d) and type(model.cell) is Cell


class FixedGridWarp(nn.Module):
    """A warp whose grid is a buffer, which a fused one would not read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.stack(torch.meshgrid(torch.arange(9.0), torch.arange(11.0), indexing="xy")))

    def forward(self, image: Tensor, flow: Tensor) -> Tensor:
        _, _, h, w = image.shape
        x, y = (self.grid[:, :h, :w].to(flow) + flow).unbind(1)
        grid = torch.stack((2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1), dim=-1)
        return nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=True)


class Builtin(nn.Module):
    """Has no signature that could be read."""

    forward = staticmethod(torch.relu)


class Warping(nn.Module):
    def __init__(self, warp: nn.Module) -> None:
        super().__init__()
        self.warp, self.head, self.last = warp, nn.Conv2d(3, 2, 1), Builtin()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.warp(flow=self.head(x), image=x))


def test_a_warp_that_reads_a_buffer_is_left() -> None:
    report = patch(Warping(FixedGridWarp()))
    assert report.swapped == {} and "grid_sample (1 times)" in report.left["warp"]


def test_a_warp_of_half_maps_is_left() -> None:
    assert list(patch(Warping(TheirWarp())).swapped) == ["warp"]
    model, x = Warping(TheirWarp()).bfloat16(), frames(torch.bfloat16)
    expected = model(x)
    report = patch(model, x)
    assert report.swapped == {} and "takes an image and a flow of float32 or float64" in report.left["warp"]
    assert torch.equal(model(x), expected)


def test_arguments_by_keyword_only_are_left() -> None:
    class ByKeyword(Model):
        def step(self, x: Tensor, state: Any) -> Any:
            return self.cell(x, state=state)

    report = patch(ByKeyword(KeywordOnly()))
    assert report.swapped == {} and "does not map x and (hidden, cell)" in report.left["cell"]


def test_infinities_and_nan_in_both_outputs_are_no_difference() -> None:
    class Masked(Model):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            output = super().forward(x)
            return output.where(output > 0, -torch.inf), output * torch.nan

    torch.manual_seed(0)
    report = patch(Masked())
    assert list(report.swapped) == ["cell"] and report.difference < 1e-4


@pytest.mark.parametrize(
    "buffer",
    [
        torch.tensor([torch.nan]).expand(3),
        torch.eye(2).to_sparse(),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2).to(torch.float8_e4m3fn),
    ],
)
def test_buffers_of_every_kind(buffer: Tensor) -> None:
    model = Model()
    model.register_buffer("kept", buffer)
    assert list(patch(model).swapped) == ["cell"] and model.kept is buffer
