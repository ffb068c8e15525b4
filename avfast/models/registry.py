"""Every model that the harness knows, by the name that `--model` and checkpoints use. A new model is one line here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from avfast.errors import InputError
from avfast.models.avmodel import AVModel
from avfast.models.base import ModelSettings, VideoModel
from avfast.models.checkpoint import load_pretrained, read_pretrained

MODELS: dict[str, type[VideoModel]] = {model.settings_class.name: model for model in (AVModel,)}
WEIGHTS = Path(__file__).parent.parent / "weights"
"""Trained models that come with the package, a run folder each."""


def build_model(settings: ModelSettings) -> VideoModel:
    """A model with new weights."""
    return MODELS[settings.name](settings)


def load_model(folder: str | Path, *, device: str | torch.device = "cpu") -> VideoModel:
    """The model of a checkpoint, in evaluation mode, whichever it is. Raises InputError when it cannot be loaded."""
    return load_pretrained(folder, MODELS, device=device)


def from_pretrained(name: str | Path, *, device: str | torch.device = "cpu") -> VideoModel:
    """A trained model in evaluation mode: one that comes with avfast, such as "mmnist", or that of a checkpoint folder.
    Raises InputError when there is none of that name, or it cannot be loaded."""
    shipped = shipped_run(name)
    if shipped is None and not Path(name).exists():
        names = ", ".join(sorted(path.name for path in WEIGHTS.glob("*/")))
        raise InputError(f"name is {str(name)!r}, expected a checkpoint folder or one of {names}")
    return load_model(Path(name) if shipped is None else shipped / "checkpoints" / "best", device=device)


def shipped_run(name: str | Path) -> Path | None:
    """The run folder of a model that comes with avfast; None where no model has that name, or a folder here has it."""
    folder = WEIGHTS / name
    return folder if folder.parent == WEIGHTS and folder.is_dir() and not Path(name).exists() else None


def read_model(folder: str | Path) -> tuple[ModelSettings, dict[str, Tensor]]:
    """The settings and the weights of a checkpoint. Raises InputError when they cannot be read."""
    return read_pretrained(folder, MODELS)
