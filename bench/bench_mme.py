"""A training step of the motion stage against the same model written step by step in plain PyTorch.

The rival is the paper's equations in their order: at every step E_m on that step's frame and flow, E_c's attention over
the sounds so far, ConvLSTM cells of one convolution and unfused gates, grid_sample; all convolutions are PyTorch's. It
has the same weights, and the losses and gradients of both are compared first. Both encode all sounds in one call, as
the equations' inputs do not depend on the step. The limit is the convolutions' arithmetic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.kernels import flow_loss, reference
from avfast.models.avmodel import AVModel, ModelConfig
from avfast.models.mme import MME, Motion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def with_pytorch_convolutions(mme: MME) -> MME:
    """A copy whose convolutions are PyTorch's own."""
    mme = copy.deepcopy(mme)
    for module in mme.modules():
        for kind in (nn.Conv2d, nn.ConvTranspose2d):
            if isinstance(module, kind):
                module.forward = partial(kind.forward, module)
    return mme


class StepByStep:
    """The rival, over the weights of an MME."""

    def __init__(self, mme: MME, size: int) -> None:
        self.mme = mme
        axis = torch.linspace(-1, 1, size, device=DEVICE, dtype=mme.recall.value.weight.dtype)
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        self.base, self.scale = torch.stack((x, y), -1)[None], 2 / (size - 1)

    def warp(self, image: Tensor, flow: Tensor) -> Tensor:
        grid = self.base + flow.permute(0, 2, 3, 1) * self.scale
        return F.grid_sample(image, grid, padding_mode="border", align_corners=True)

    def condense(self, memory: Tensor) -> Tensor:
        qkv = self.mme.condense.qkv
        q, k, v = F.linear(memory, qkv.weight, qkv.bias).chunk(3, -1)
        return memory[:, -1] + ((q @ k.mT).softmax(-1) @ v)[:, -1]

    def __call__(self, frames: Tensor, flow: Tensor, audio: Tensor) -> Motion:
        mme, given = self.mme, frames.shape[1]
        vectors = mme.audio_encoder(audio)
        image, motion, flows = frames[:, 0], flow[:, 0], []
        states: list[tuple[Tensor, Tensor]] = []
        for t in range(1, audio.shape[1]):
            if t <= given:
                image, motion = frames[:, t - 1], flow[:, t - 1]
            x = torch.cat((motion, image), dim=1)
            for block in mme.encoder.blocks:
                x = block(x)
            # attention over one token: its value, at every position
            value = mme.recall.value
            read = F.linear(self.condense(vectors[:, : t + 1]), value.weight.flatten(1), value.bias)
            x = x + read[:, :, None, None]
            if not states:
                shape = (x.shape[0], mme.lstm.cells[0].hidden_channels, *x.shape[2:])
                states = [(x.new_zeros(shape), x.new_zeros(shape)) for _ in mme.lstm.cells]
            for i, cell in enumerate(mme.lstm.cells):
                hidden, memory = states[i]
                gates = F.conv2d(torch.cat((x, hidden), 1), cell.weight, cell.bias, padding=1)
                states[i] = reference.convlstm_gates(gates, memory)
                x = states[i][0]
            if t >= given:
                motion = mme.decoder(x)
                image = self.warp(image, motion)
                flows.append(motion)
        predicted = torch.stack(flows, 1)
        return Motion(predicted, predicted, vectors)


def motion_step(mme: MME, literal: bool, batch: int, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """A step at the preset mmnist's sizes, 48x48 and 5 given of 20 frames: () -> [loss, gradients of all weights]."""
    size, given, steps = 48, 5, 20
    generator = torch.Generator().manual_seed(0)
    mme = with_pytorch_convolutions(mme) if literal else mme

    def random(*shape: int) -> Tensor:
        return torch.rand(batch, steps, *shape, generator=generator).to(DEVICE, dtype)

    frames, flow, audio = random(1, size, size), 4 * random(2, size, size) - 2, random(1, 23, 21)
    predict, loss = (StepByStep(mme, size), reference.flow_loss) if literal else (mme, flow_loss)
    weights = list(mme.parameters())

    def step() -> list[Tensor]:
        predicted = predict(frames[:, :given], flow[:, :given], audio)
        value = loss(predicted.flow, flow[:, given:], frames[:, given:], smooth_weight=0.01)
        return [value, *torch.autograd.grad(value, weights)]

    return step


@pytest.fixture(params=["fp32", "tf32"] if DEVICE == "cuda" else ["fp32"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    """How CUDA takes products of fp32 numbers: exactly, or rounded to tf32 first."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = request.param == "tf32"
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("batch", [16, 128] if DEVICE == "cuda" else [16])
def bench_motion_step(batch: int, products: str, compare: Callable, captured: Callable) -> None:
    torch.manual_seed(0)
    mme = AVModel(ModelConfig(refinement="none")).mme.to(DEVICE).train()
    # in double: in float, rounding alone changes gradients by 3e-3 where the warp crosses from pixel to pixel
    exact = copy.deepcopy(mme).double()
    pairs = zip(*(motion_step(exact, literal, 4, torch.float64)() for literal in (False, True)), strict=True)
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= 1e-8 * theirs.norm()
    ours, theirs = (motion_step(mme, literal, batch, torch.float32) for literal in (False, True))
    row = compare(f"motion step: batch {batch}, {products}", ours, {"literal": theirs}, rounds=9)
    row["clips_per_s"] = batch / row["ours_s"]
    if DEVICE == "cuda":
        ours, theirs = captured(ours), captured(theirs)
        row = compare(f"motion step: batch {batch}, {products}, in a graph", ours, {"literal": theirs}, rounds=9)
        row["clips_per_s"] = batch / row["ours_s"]
