"""Kernels of Triton run under its interpreter where there is no GPU, chosen before anything imports them; and the one
exported model that several files test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from avfast.model import AVModel


@pytest.fixture(scope="session")
def random_model() -> Callable[..., AVModel]:
    """random_model(**config): a model at its default start, but with running statistics that BatchNorm folding must get
    right, and a refinement that is not zero."""

    # here: a machine that tests the kernels alone has no safetensors
    from avfast.config import ModelConfig
    from avfast.model import AVModel
    from avfast.networks import BatchNorm

    def make(**config: Any) -> AVModel:
        torch.manual_seed(0)
        model = AVModel(ModelConfig(unet_width=4, **config)).eval()
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        if model.car is not None:
            torch.nn.init.normal_(model.car.unet.last.weight, 0, 0.05)
        return model

    return make


@pytest.fixture(scope="session")
def exported(random_model: Callable[..., AVModel], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AVModel]:
    """The whole model as ONNX, without rollout, and the model it is of. It takes most of a minute: once for all."""
    from avfast.config import TrainConfig
    from avfast.export import ExportConfig, export_model

    folder, model = tmp_path_factory.mktemp("exported"), random_model()
    run = TrainConfig(data_cache=str(folder / "no data"))
    export_model(model, folder / "model", config=ExportConfig(rollout=False), run=run)
    return folder / "model", model
