"""What the harness asks of a model. Training, scoring, prediction and run folders know models through these classes.

A model is one file: its settings, the module, its training stages; and one line in `registry`. Models to compare with
lie in `baselines`. docs/extending.md adds one, step by step.

Shape legend: B batch, K given frames of T in all, P = T - K predicted ones, C channels, H W image, F S spectrogram of
one frame."""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from safetensors.torch import save
from torch import Tensor, nn

from avfast.data.store import Batch
from avfast.files.atomic import replacing

FORMAT = 3
"""Version of config.json."""

WindowKeys = tuple[np.ndarray, np.ndarray]
"""Of a batch's windows: the clips' numbers, and the first frames within them."""


class Rollout(NamedTuple):
    """Predictions for frames K+1..T: frames (B,P,C,H,W), and backward flow (B,P,2,H,W) in pixels or None."""

    frames: Tensor
    flow: Tensor | None

    def first_frames(self, count: int) -> Rollout:
        """The first `count` predicted frames."""
        return Rollout(self.frames[:, :count], None if self.flow is None else self.flow[:, :count])


@dataclass(frozen=True)
class ModelSettings:
    """Everything that decides a model's weights and what they mean. A field added later needs a default with which
    older checkpoints stay what they were."""

    name: ClassVar[str]
    """What `--model` and checkpoints call the model."""
    image_channels: Literal[1, 3] = 1
    """Channels of the frames."""
    audio_shape: tuple[int, int] = (23, 21)
    """Frequencies and columns of one frame's spectrogram."""


@dataclass(frozen=True)
class TrainingSettings:
    """How a model's stages are trained, beyond what `TrainConfig` says for every model."""

    name: ClassVar[str]
    """That of the model."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Fields that cannot change in a resumed run, because the order of the data depends on them."""
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Ways of training by name: values of fields of the run's settings, these and those of the model among them."""

    def check(self, stage: str) -> None:
        """Raise InputError for values that cannot work together in a run of that stage ("all": every stage)."""

    def earlier_checkpoints(self) -> dict[str, str]:
        """Stage -> run or checkpoint whose weights stand for that stage, where it is not trained in this run."""
        return {}


class Stage(ABC):
    """One stage of a model's training."""

    name: str
    """In logs, checkpoints and on the command line."""
    model: VideoModel
    """The model as it is scored and saved after this stage."""
    trained: nn.Module
    """Its forward pass takes part in `loss`, and its parameters are trained."""
    steps: int
    """Optimiser steps."""
    lr: float
    """Adam's learning rate."""
    batch_size: int | None = None
    """Clips per step and process; None: the run's."""
    grows: bool = True
    """Whether the frames predicted in training may be few at first."""
    forced_share: float = 0.0
    """Share of the steps, the first ones, that learn by `forced_loss`."""

    @abstractmethod
    def loss(self, batch: Batch, keys: WindowKeys, horizon: int) -> Tensor:
        """The loss of a batch of T frames, of which `horizon` are predicted: a scalar."""

    def forced_loss(self, batch: Batch) -> Tensor:
        """The loss with teacher forcing: every step of the batch reads true frames and flow. A scalar."""
        raise NotImplementedError(f"stage {self.name} has no teacher forcing")

    @abstractmethod
    def validation_loss(self, rollout: Rollout, batch: Batch) -> Tensor:
        """The loss of a prediction whose true frames and flow are the last P of the batch: a scalar."""


class VideoModel(nn.Module, ABC):
    """A model that predicts frames K+1..T from K frames, their flow and the sound of T frames."""

    settings: ModelSettings
    settings_class: ClassVar[type[ModelSettings]]
    training_class: ClassVar[type[TrainingSettings]]
    wants_waveform: ClassVar[bool] = False
    """Batches for this model hold the waveform."""

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    @abstractmethod
    def stage_names(cls, settings: ModelSettings) -> tuple[str, ...]:
        """The training stages of a model with these settings, in their order."""

    @abstractmethod
    def stage(self, name: str, training: TrainingSettings, context_frames: int) -> Stage:
        """One of them, made when the stages before it have ended; it may freeze what they trained."""

    def stage_weights(self, settings: ModelSettings, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a checkpoint with these settings, the weights of this model. Raises InputError where it has none."""
        return weights

    def sound(self, batch: Batch) -> Tensor:
        """What of a batch's sound the model takes: its spectrograms (B,T,1,F,S), or `batch.waveform`."""
        return batch.audio

    def check_inputs(self, frames: Tensor, flow: Tensor, audio: Tensor) -> None:
        """Raise ValueError, naming argument and value, unless the three fit each other and the model."""
        channels, audio_shape = self.settings.image_channels, self.settings.audio_shape
        given = f"frames has shape {tuple(frames.shape)}"
        if frames.dim() != 5 or frames.shape[2] != channels:
            raise ValueError(f"{given}, expected (B, K, {channels}, H, W)")
        b, k, _, h, w = frames.shape
        if h % 16 or w % 16 or 0 in (b, k, h, w):
            raise ValueError(f"{given}, expected H and W to be multiples of 16, none empty")
        if flow.shape != (b, k, 2, h, w):
            raise ValueError(f"flow has shape {tuple(flow.shape)}, expected {(b, k, 2, h, w)}")
        if audio.dim() != 5 or audio.shape[0] != b or tuple(audio.shape[2:]) != (1, *audio_shape):
            raise ValueError(f"audio has shape {tuple(audio.shape)}, expected {(b, 'T', 1, *audio_shape)}")
        if audio.shape[1] <= k:
            raise ValueError(f"audio covers T = {audio.shape[1]} frames, expected more than the K = {k} given frames")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, which names the model and its settings, and model.safetensors into a folder, each under a
        temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "model": self.settings.name, **dataclasses.asdict(self.settings)}
        config = json.dumps(about, indent=2) + "\n"
        # serialised in memory: safetensors reports a full disk as an error of its own, without the file's name
        for name, content in (("model.safetensors", save(self.state_dict())), ("config.json", config.encode())):
            with replacing(folder / name) as temporary:
                temporary.write_bytes(content)

    @abstractmethod
    def predict(self, frames: Tensor, flow: Tensor, audio: Tensor, *, samples: int = 1) -> Rollout:
        """Predict without gradients: frames (B,K,C,H,W) in [0,1], flow (B,K,2,H,W) backward in pixels, audio what
        `sound` gives -> frames in [0,1]. With samples > 1 the rollout has a leading axis of so many futures; those of a
        deterministic model are equal. Raises ValueError on inputs that do not fit."""


def repeated(rollout: Rollout, samples: int) -> Rollout:
    """The rollout of a deterministic model as `predict` gives it for so many samples."""
    if samples == 1:
        return rollout
    frames, flow = rollout
    return Rollout(frames.expand(samples, *frames.shape), None if flow is None else flow.expand(samples, *flow.shape))
