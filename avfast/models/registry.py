"""Every model that the harness knows, by the name that `--model` and checkpoints use. A new model is one line here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avfast.models.avmodel import AVModel
from avfast.models.base import ModelSettings, VideoModel
from avfast.models.checkpoint import load_pretrained, read_pretrained

MODELS: dict[str, type[VideoModel]] = {model.settings_class.name: model for model in (AVModel,)}


def build_model(settings: ModelSettings) -> VideoModel:
    """A model with new weights."""
    return MODELS[settings.name](settings)


def load_model(folder: str | Path, *, device: str | torch.device = "cpu") -> VideoModel:
    """The model of a checkpoint, in evaluation mode, whichever it is. Raises InputError when it cannot be loaded."""
    return load_pretrained(folder, MODELS, device=device)


def read_model(folder: str | Path) -> tuple[ModelSettings, dict[str, Tensor]]:
    """The settings and the weights of a checkpoint. Raises InputError when they cannot be read."""
    return read_pretrained(folder, MODELS)
