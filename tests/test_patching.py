"""avfast.patch on small models written without avfast."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from patched_models import drop_in
from torch import Tensor, nn

import avfast


class Peephole(drop_in.TheirCell):
    """No cell of ours: the gates see the cell state."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, cell = state
        i, f, o, g = self.conv(torch.cat((x, hidden), dim=1)).chunk(4, dim=1)
        cell = (f + cell).sigmoid() * cell + (i + cell).sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class SpreadState(drop_in.TheirCell):
    """Another order of gates, and called with three arguments."""

    def forward(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        g, o, f, i = self.conv(torch.cat((x, hidden), dim=1)).chunk(4, dim=1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        return o.sigmoid() * cell.tanh(), cell


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([SpreadState(3, 4), Peephole(4, 4)])
        self.warp = drop_in.TheirWarp()
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, frame: Tensor) -> Tensor:
        zero = frame.new_zeros(len(frame), 4, *frame.shape[2:])
        hidden, _ = self.cells[0](frame, zero, zero)
        hidden, _ = self.cells[1](hidden, (zero, zero))
        warped = self.warp(frame, self.head(hidden))
        grid = F.affine_grid(torch.eye(2, 3).expand(len(frame), 2, 3), list(frame.shape), align_corners=True)
        return F.grid_sample(warped, grid, align_corners=True)


def test_swaps_what_it_recognises_and_lists_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, frame = Model(), torch.rand(2, 3, 8, 9)
    expected = model(frame)
    report = avfast.patch(model, frame, rounds=1)
    assert list(report.swapped) == ["cells.0", "warp"]
    assert "gates g, o, f, i" in report.swapped["cells.0"] and "border" in report.swapped["warp"]
    assert "peepholes" in report.left["cells.1"] and "grid_sample (1 times)" in report.left["the model itself"]
    assert isinstance(model.cells[0], SpreadState) and isinstance(model.warp, drop_in.TheirWarp)
    assert type(model.cells[1]) is Peephole
    torch.testing.assert_close(model(frame), expected, rtol=1e-4, atol=1e-5)
    model(frame).sum().backward()
    assert model.cells[0].conv.weight.grad is not None
    printed = capsys.readouterr().out
    assert "cells.1: left" in printed and "x as fast, largest difference" in printed


def test_puts_everything_back_when_an_output_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, frame = Model(), torch.rand(2, 3, 8, 9)
    modules = {name: (module, type(module)) for name, module in model.named_modules()}

    monkeypatch.setattr("avfast.recognition.backward_warp", lambda image, flow, **_: image + 1)
    with pytest.raises(ValueError, match="output changed by .* after the swap: nothing was swapped"):
        avfast.patch(model, frame)
    assert {name: (module, type(module)) for name, module in model.named_modules()} == modules


def test_a_shared_module_stays_shared() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = SpreadState(3, 3)

        def forward(self, frame: Tensor) -> dict[str, Tensor | list[Tensor]]:
            hidden, cell = self.first(frame, frame, frame)
            # an output may be empty
            return {"states": list(self.second(frame, hidden, cell)), "nothing": frame[:0]}

    model, frame = Shared(), torch.rand(2, 3, 8, 9)
    before = model(frame)
    report = avfast.patch(model, frame, rounds=1, verbose=False)
    assert list(report.swapped) == ["first", "second"] and report.speedup > 0
    assert isinstance(model.first, SpreadState) and model.first is model.second
    torch.testing.assert_close(model(frame), before, rtol=1e-4, atol=1e-5)


def test_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    drop_in.main()
    printed = capsys.readouterr().out
    assert "cell: now a fused ConvLSTM cell" in printed and "warp: now a fused backward warp" in printed
