"""Models from disk: folders that `VideoModel.save_pretrained` has written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avfast.errors import InputError
from avfast.files.settings import from_dict
from avfast.models.base import FORMAT, ModelSettings, VideoModel

_MODEL_OF_FORMAT_2 = "mme-car"
"""Format 2 did not name the model, which was always the paper's; its files are still read."""


def read_pretrained(
    folder: str | Path, models: Mapping[str, type[VideoModel]]
) -> tuple[ModelSettings, dict[str, Tensor]]:
    """Settings and weights of a saved model, which is one of `models`, by name. A setting that the file does not have,
    because it was added later, has its default. Raises InputError when the files cannot be read, and for a model that
    `models` does not have."""
    folder = Path(folder)
    try:
        fields = json.loads((folder / "config.json").read_text())
        if fields.pop("format") not in (2, FORMAT):
            raise ValueError("its format is not known here")
        name = fields.pop("model", _MODEL_OF_FORMAT_2)
        if name not in models:
            raise InputError(f"{folder} holds a model {name!r}, expected {' or '.join(map(repr, models))}")
        settings = from_dict(models[name].settings_class(), fields, f"{folder / 'config.json'}")
        return settings, load_file(folder / "model.safetensors")
    except InputError:
        raise
    except FileNotFoundError as error:
        missing = Path(error.filename or "model.safetensors").name
        raise InputError(f"{folder} holds no model, {missing} is missing: name a checkpoint folder") from None
    except Exception as error:
        # json, key and safetensors errors all mean the same to the user: this is not a model of ours, or it is damaged
        raise InputError(f"the model in {folder} cannot be read: {error}") from None


def load_pretrained(
    folder: str | Path, models: Mapping[str, type[VideoModel]], *, device: str | torch.device = "cpu"
) -> Any:
    """A saved model in evaluation mode, one of `models`, by name. Raises InputError as `read_pretrained` and
    `load_weights` do."""
    settings, weights = read_pretrained(folder, models)
    model = models[settings.name](settings)
    load_weights(model, weights, str(folder))
    return model.to(device).eval()


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load weights strictly. Raises InputError that names what does not fit, and changes nothing then."""
    own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    theirs = {name: tuple(t.shape) for name, t in weights.items()}
    missing, foreign = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"has {foreign[0]}, which this model does not"
        counts = f"{len(missing)} missing, {len(foreign)} foreign"
        raise InputError(f"{source} is of another variant or stage: it {what} ({counts})")
    for name, shape in own.items():
        if theirs[name] != shape:
            raise InputError(f"{source} is of another model: {name} has shape {theirs[name]}, expected {shape}")
    module.load_state_dict(weights)
