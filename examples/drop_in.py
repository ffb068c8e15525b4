"""A model that was written without avfast becomes faster in two ways: with avfast's layers, and with avfast.patch.

    python examples/drop_in.py

It prints the largest difference of the outputs, and the ratio of the times (median of paired runs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import avfast
from avfast.modules import BackwardWarp, ConvLSTMCell


class TheirCell(nn.Module):
    """A ConvLSTM cell as it is written everywhere."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, cell = state
        i, f, o, g = self.conv(torch.cat((x, hidden), dim=1)).chunk(4, dim=1)
        cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(cell), cell


class TheirWarp(nn.Module):
    """A flow warp as it is written everywhere: pixels to [-1, 1] at every call, then grid_sample."""

    def forward(self, image: Tensor, flow: Tensor) -> Tensor:
        _, _, h, w = image.shape
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        x, y = x.to(flow) + flow[:, 0], y.to(flow) + flow[:, 1]
        grid = torch.stack((2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1), dim=-1)
        return F.grid_sample(image, grid, padding_mode="border", align_corners=True)


class Predictor(nn.Module):
    """Frames (B,T,C,H,W) -> the frame after them: a ConvLSTM says how the last one moves."""

    def __init__(self, cell: nn.Module, warp: nn.Module) -> None:
        super().__init__()
        self.cell, self.warp = cell, warp
        self.flow = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, frames: Tensor) -> Tensor:
        b, _, _, h, w = frames.shape
        state = (frames.new_zeros(b, 16, h, w), frames.new_zeros(b, 16, h, w))
        for t in range(frames.shape[1]):
            state = self.cell(frames[:, t], state)
        return self.warp(frames[:, -1], 5 * self.flow(state[0]))


def main() -> None:
    torch.manual_seed(0)
    frames = torch.rand(8, 10, 3, 64, 64)

    theirs = Predictor(TheirCell(3, 16), TheirWarp())
    ours = Predictor(ConvLSTMCell.from_reference(theirs.cell.conv), BackwardWarp())
    ours.flow = theirs.flow
    with torch.no_grad():
        difference = (ours(frames) - theirs(frames)).abs().max().item()
    print(f"the same weights in avfast.modules: largest difference {difference:.1e}")

    print("avfast.patch:")
    avfast.patch(theirs, frames, rounds=9)


if __name__ == "__main__":
    main()
