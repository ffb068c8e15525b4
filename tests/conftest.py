"""Kernels of Triton run under its interpreter where there is no GPU, chosen before anything imports them; made films
with sound; and the one exported model that several files test."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if TYPE_CHECKING:
    from avfast.models.avmodel import AVModel


def _make_film(
    path: Path,
    images: np.ndarray,
    sound: np.ndarray | None,
    *,
    fps: Fraction | int = 30,
    rate: int = 22_050,
    layout: str = "mono",
    codecs: tuple[str, str] = ("ffv1", "pcm_s16le"),
    first_sample: int = 0,
) -> Path:
    """A film of frames (T,H,W,3) RGB and samples (N,) or (N,channels) int16, the first of which is number
    `first_sample` on the film's clock; the codecs must suit the file's suffix."""
    # here, because `make gpu` runs where there is no PyAV
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream(codecs[0], rate=fps)
        video.height, video.width = images.shape[1:3]
        video.pix_fmt = "bgr0" if codecs[0] == "ffv1" else "yuv420p"
        track = None if sound is None else container.add_stream(codecs[1], rate=rate, layout=layout)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / Fraction(fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None and track is not None:
            samples = sound.reshape(len(sound), -1)
            for first in range(0, len(samples), 1000):
                block = np.ascontiguousarray(samples[first : first + 1000]).reshape(1, -1)
                piece = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
                piece.rate, piece.pts, piece.time_base = rate, first_sample + first, Fraction(1, rate)
                container.mux(track.encode(piece))
            container.mux(track.encode())
    return path


@pytest.fixture(scope="session")
def make_film() -> Callable[..., Path]:
    """`_make_film`, which see."""
    return _make_film


@pytest.fixture(scope="session")
def random_model() -> Callable[..., AVModel]:
    """random_model(**config): a model at its default start, but with running statistics that BatchNorm folding must get
    right, and a refinement that is not zero."""

    # here: a machine that tests the kernels alone has no safetensors
    from avfast.models.avmodel import AVModel, ModelConfig
    from avfast.models.networks import BatchNorm

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
    from avfast.export import ExportConfig, export_model
    from avfast.training.config import TrainConfig
    from avfast.training.runs import input_spec

    folder, model = tmp_path_factory.mktemp("exported"), random_model()
    run = TrainConfig(data_cache=str(folder / "no data"))
    spec = input_spec(folder, run)
    export_model(model, folder / "model", config=ExportConfig(rollout=False), run=run, spec=spec)
    return folder / "model", model
