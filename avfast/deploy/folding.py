"""A copy of the model for export: BatchNorm folded into the convolutions, and half precision where it does no harm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from avfast.models.avmodel import AVModel
from avfast.models.networks import ConvBlock


class _FoldedBlock(nn.Module):
    """A ConvBlock whose BatchNorm has become part of the convolution."""

    def __init__(self, block: ConvBlock) -> None:
        super().__init__()
        self.activation, norm = block.activation, block.norm
        self.conv = copy.deepcopy(block.conv)
        assert isinstance(self.conv, nn.Conv2d | nn.ConvTranspose2d) and self.conv.bias is None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        # a transposed convolution has its output channels second
        along = (1, -1, 1, 1) if isinstance(self.conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
        weight = self.conv.weight.double() * scale.view(along)
        self.conv.weight = nn.Parameter(weight.float())
        self.conv.bias = nn.Parameter((norm.bias.double() - norm.running_mean.double() * scale).float())

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        return self.activation(self.conv(x))


def fold_batch_norms(model: AVModel) -> AVModel:
    """A copy of a model, in evaluation mode and without gradients, whose convolutions do what BatchNorm did."""
    model = copy.deepcopy(model).eval().cpu()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ConvBlock):
                setattr(module, name, _FoldedBlock(child))
    return model.requires_grad_(False)


class _Cast(nn.Module):
    """A module that runs in one type and answers in another, whatever type its inputs have."""

    def __init__(self, module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
        super().__init__()
        self.module, self.inside, self.outside = module.to(inside), inside, outside

    def forward(self, *arguments: Any) -> Any:
        return _cast(self.module(*_cast(list(arguments), self.inside)), self.outside)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """The same with every tensor of a type, also those in lists."""
    if isinstance(value, list):
        return [_cast(part, dtype) for part in value]
    return value.to(dtype) if isinstance(value, Tensor) else value


def half_precision(model: AVModel) -> AVModel:
    """The same model with float16 convolutions and hidden state. Images, flow, warp, the ConvLSTM's cell, attention and
    D_m's last layer stay float32."""
    half, single = torch.float16, torch.float32
    mme, car = model.mme, model.car
    mme.encoder = _Cast(mme.encoder, half, half)  # type: ignore[assignment]
    mme.lstm.to(half)
    mme.decoder.blocks.to(half)
    if mme.uses_sound:
        mme.audio_encoder = _Cast(mme.audio_encoder, half, single)  # type: ignore[arg-type]
    if car is not None:
        if car.has_affine:
            car.affine.to(half)
        if car.has_context:
            car.context_encoder = _Cast(car.context_encoder, half, half)  # type: ignore[assignment]
        car.unet = _Cast(car.unet, half, single)  # type: ignore[assignment]
    return model
