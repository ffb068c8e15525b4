"""What the tests of several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from avfast.files.settings import to_dict
from avfast.models.base import VideoModel
from avfast.models.registry import build_model
from avfast.training.config import TrainConfig


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """make_run(folder, config, model=None, links=("best",)): a run folder whose checkpoints hold this model, or an
    untrained one that the config describes."""

    def make(
        folder: Path, config: TrainConfig, *, model: VideoModel | None = None, links: tuple[str, ...] = ("best",)
    ) -> Path:
        torch.manual_seed(config.seed)
        model = build_model(config.model) if model is None else model
        for link in links:
            model.save_pretrained(folder / "checkpoints" / link)
        (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
        return folder

    return make
