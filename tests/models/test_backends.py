"""Convolutions inside a model go through the registry of backends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from avfast.models.avmodel import AVModel, ModelConfig
from avfast.models.networks import PatchConv, StridedConv, StridedConvTranspose
from avfast.modules import ConvLSTMCell

OURS = (ConvLSTMCell, PatchConv, StridedConv, StridedConvTranspose)


def convolved_by_pytorch(model: AVModel, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the convolutions whose weights F.conv2d or F.conv_transpose2d gets during a forward pass."""
    # of 8 clips the maps are large enough for every backend that is chosen by size
    generator = torch.Generator().manual_seed(0)
    frames, flow = torch.rand(8, 2, 1, 48, 48, generator=generator), torch.zeros(8, 2, 2, 48, 48)
    audio = torch.rand(8, 4, 1, 23, 21, generator=generator)
    seen: set[int] = set()

    with monkeypatch.context() as patch:
        for name in ("conv2d", "conv_transpose2d"):
            original = getattr(F, name)

            def watched(x, weight, *args, original=original, **kwargs):
                seen.add(weight.data_ptr())
                return original(x, weight, *args, **kwargs)

            patch.setattr(F, name, watched)
        model.predict(frames, flow, audio)
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.data_ptr() in seen
    }


def test_the_reference_is_obeyed_by_every_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = AVModel(ModelConfig(refinement="none", convlstm_layers=2)).eval()
    ours = {name: type(module) for name, module in model.named_modules() if isinstance(module, OURS)}
    assert set(ours.values()) == set(OURS)

    monkeypatch.delenv("AVFAST_BACKEND", raising=False)
    chosen = ours.keys() - convolved_by_pytorch(model, monkeypatch)
    # without a request each kind of convolution has a backend of its own
    assert {ours[name] for name in chosen} == set(OURS)
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    assert ours.keys() <= convolved_by_pytorch(model, monkeypatch)
