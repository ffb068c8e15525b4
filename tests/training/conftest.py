"""A tiny data set and the settings of a training run on it."""

from __future__ import annotations

import pytest
import torch

from avfast.data.mmnist import MMNISTConfig
from avfast.models.avmodel import ModelConfig, PaperTraining
from avfast.training.config import TrainConfig


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def config(cache, tmp_path):
    return TrainConfig(
        data=MMNISTConfig(clip_frames=6, train_clips=8, val_clips=4, test_clips=2),
        model=ModelConfig(unet_width=2, convlstm_layers=1),
        context_frames=2,
        pred_frames=2,
        eval_frames=3,
        batch_size=3,
        training=PaperTraining(mme_steps=5, car_steps=4),
        log_every=1,
        eval_every=4,
        save_every=2,
        bn_recalibrate=1,
        device="cpu",
        data_cache=str(cache),
        output_dir=str(tmp_path / "runs"),
    )


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
