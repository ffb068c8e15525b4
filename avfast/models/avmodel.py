"""The paper's model, MME followed by CAR: motion first, then appearance (section 3), and its two training stages.

Indices are the paper's, from 1; `mme` and `car` say what a step reads. Frames are not clamped in training; predicted
frames are."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from avfast.data.store import Batch
from avfast.errors import InputError
from avfast.files.settings import Count, NotNegative, Positive, Range, Share
from avfast.kernels import backward_warp, flow_loss
from avfast.models.base import ModelSettings, Rollout, Stage, TrainingSettings, VideoModel, WindowKeys, repeated
from avfast.models.car import CAR
from avfast.models.checkpoint import load_pretrained
from avfast.models.composition import extend_path, warp_once
from avfast.models.losses import frame_loss, path_loss, ssim_loss
from avfast.models.mme import MME, Motion, RecallMotion, VisualMotion
from avfast.models.networks import batch_norms


@dataclass(frozen=True)
class ModelConfig(ModelSettings):
    """Settings of the paper's model."""

    name: ClassVar[str] = "mme-car"

    motion: Literal["v", "v+recall", "mme"] = "mme"
    """Motion stage (Table 4): `v` without sound, `v+recall` attends over all audio vectors, `mme` condenses first."""
    refinement: Literal["none", "unet", "unet+context", "car"] = "car"
    """Appearance stage (Table 5); `none` predicts the warped frame."""
    rendering: Literal["chained", "composed"] = "chained"
    """`chained` warps the frame before, again and again; `composed` warps the last given frame once, by all flows so
    far, and refines all frames in one batch."""
    convlstm_layers: Count = 4
    """Stacked ConvLSTM cells."""
    unet_width: Count = 64
    """Channels of the U-Net's first level; the others are 2, 4, 8, 16 times as wide."""


@dataclass(frozen=True)
class PaperTraining(TrainingSettings):
    """How the two stages of the paper's model are trained."""

    name: ClassVar[str] = ModelConfig.name
    fixed: ClassVar[tuple[str, ...]] = ("car_batch_size", "teacher_forcing", "forced_frames")
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # docs/experiments.md has what each difference brings
        "best": {
            "rendering": "composed",
            "teacher_forcing": 0.75,
            "forced_frames": 8,
            "mme_lr": 1e-3,
            "car_lr": 1e-3,
            "path_weight": 0.4,
            "ssim_weight": 1.0,
            "schedule": "cosine",
            "curriculum": 0.5,
            "clip_grad": 20.0,
            "bn_freeze": 0.9,
            "ema": 0.0,
        },
        # as published
        "paper": {
            "rendering": "chained",
            "teacher_forcing": 0.0,
            "forced_frames": None,
            "mme_lr": 1e-4,
            "car_lr": 1e-3,
            "path_weight": 0.0,
            "ssim_weight": 0.0,
            "schedule": "constant",
            "curriculum": 0.0,
            "clip_grad": None,
            "bn_freeze": 0.0,
            "ema": 0.0,
        },
    }

    mme: str | None = None
    """Run or checkpoint whose MME the appearance stage uses (with --stage car, and only there)."""
    car_batch_size: Count | None = None
    """Clips per step and process in the appearance stage, where it is not batch-size."""
    mme_steps: Count = 100_000
    """Optimiser steps of the motion stage."""
    car_steps: Count = 50_000
    """Optimiser steps of the appearance stage."""
    mme_lr: Positive = 1e-4
    """Adam's learning rate in the motion stage (the paper's)."""
    car_lr: Positive = 1e-3
    """Adam's learning rate in the appearance stage (the paper's)."""
    smooth_weight: NotNegative = 0.01
    """Lambda of Eq. 8."""
    path_weight: NotNegative = 0.0
    """Weight of the squared error of the composed flows back to frame K, beside Eq. 8, where the motion stage runs on
    its own predictions: errors of flow that add up to a wrong place cost more than those that cancel."""
    ssim_weight: NotNegative = 0.0
    """Weight of 1 - SSIM beside the squared error of Eq. 11 in the appearance stage."""
    teacher_forcing: Share = 0.0
    """Share of the motion stage's steps, the first ones, in which every step reads the true frames and flow."""
    forced_frames: Annotated[int, Range(2)] | None = None
    """Frames of a window that such a step takes, where that is not all of them. On one core, 530 s of training on 8
    frames gave SSIM 0.770 (AEPE 1.07 px), on 20 frames 0.746 (1.15): more steps in the same time."""
    flow_cache_gb: NotNegative = 2.0
    """Memory for MME's flows in the appearance stage, which never change there; 0: computed anew at every step."""

    def check(self, stage: str) -> None:
        if self.forced_frames is not None and self.teacher_forcing == 0:
            raise InputError("forced-frames is for teacher forcing, and teacher-forcing is 0")
        if (stage == "car") != (self.mme is not None):
            raise InputError("--mme PATH names the motion model of --stage car, and only of that stage")

    def earlier_checkpoints(self) -> dict[str, str]:
        return {} if self.mme is None else {"mme": self.mme}


class AVModel(VideoModel):
    """MME followed by CAR, or by nothing where refinement is `none`: the prediction is the warped frame then."""

    settings: ModelConfig
    settings_class, training_class = ModelConfig, PaperTraining

    def __init__(self, settings: ModelConfig) -> None:
        super().__init__(settings)
        motion_kind = {"v": VisualMotion, "v+recall": RecallMotion, "mme": MME}[settings.motion]
        self.mme: VisualMotion = motion_kind(settings.image_channels, settings.audio_shape, settings.convlstm_layers)
        self.composed = settings.rendering == "composed"
        self.car: CAR | None = None
        if settings.refinement != "none":
            self.car = CAR(
                settings.image_channels,
                settings.unet_width,
                context=settings.refinement != "unet",
                affine=settings.refinement == "car",
                uses_sound=self.mme.uses_sound,
                composed=self.composed,
            )

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor) -> Rollout:
        """frames (B,K,C,H,W) in [0,1], flow (B,K,2,H,W), audio (B,T,1,F,S) -> the T-K frames and flows that follow; H
        and W multiples of 16. The frames are not clamped. Raises ValueError on inputs that do not fit."""
        self.check_inputs(frames, flow, audio)
        motion = self.mme(frames, flow, audio)
        if self.car is None:
            return Rollout(warp_once(frames[:, -1], motion.flow) if self.composed else motion.frames, motion.flow)
        return Rollout(self.car(frames[:, -1], motion.flow, car_audio(motion), self.mme.encoder), motion.flow)

    # exported graphs render frame by frame; what a step needs of those before is a tuple of tensors

    @property
    def render_names(self) -> tuple[str, ...]:
        """Names of what one step of rendering leaves for the next."""
        if self.composed:
            return "source", "path", "age"
        return () if self.car is None else ("previous",)

    def render_start(self, frame: Tensor) -> tuple[Tensor, ...]:
        """What the first step of rendering takes: V_K (B,C,H,W); the flow from it to itself (B,2,H,W), 0 steps (B)."""
        nothing = frame[:, 0].new_zeros(())
        path = nothing.expand(frame.shape[0], 2, *frame.shape[-2:]).contiguous()
        return (frame, path, path[:, 0, 0, 0].clone()) if self.composed else (frame,)[: len(self.render_names)]

    def render_step(
        self, before: tuple[Tensor, ...], motion: tuple[Tensor, Tensor], audio: Tensor | None, contexts: list[Tensor]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step: what the step before left, MME's warp of V_t and F_{t+1}, vector of A_t (B,D) or None, context
        features -> V_{t+1} (B,C,H,W) clamped to [0,1], and what the next step takes."""
        image, flow = motion
        if self.composed:
            source, path, age = before
            frame = backward_warp(source, path)
            path, age = extend_path(path, flow), age + 1
            image = backward_warp(source, path)
            if self.car is not None:
                image = self.car.refine(image, frame, flow, audio, contexts or None, self.mme.encoder, age)
            return image.clamp(0, 1), (source, path, age)
        if self.car is None:
            return image.clamp(0, 1), ()
        image = self.car.step(before[0], flow, audio, contexts or None, self.mme.encoder).clamp(0, 1)
        return image, (image,)

    @torch.no_grad()
    def predict(self, frames: Tensor, flow: Tensor, audio: Tensor, *, samples: int = 1) -> Rollout:
        """`forward` without gradients, frames clamped to [0,1]; see `VideoModel.predict`. Raises ValueError in training
        mode, where the clips of a batch would change each other's prediction."""
        if batch_norms(self):
            raise ValueError("predict needs evaluation mode: call eval() first")
        frames, predicted_flow = self(frames, flow, audio)
        return repeated(Rollout(frames.clamp(0, 1), predicted_flow), samples)

    def motion_only(self) -> AVModel:
        """A model with refinement `none` that shares this one's MME."""
        with torch.device("meta"):
            model = AVModel(dataclasses.replace(self.settings, refinement="none"))
        model.mme = self.mme
        return model

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | torch.device = "cpu") -> AVModel:
        """Load a model in evaluation mode from a folder with config.json and model.safetensors.

        Raises InputError when a file is missing, damaged, or does not belong to the other."""
        return load_pretrained(folder, {ModelConfig.name: cls}, device=device)

    @classmethod
    def stage_names(cls, settings: ModelSettings) -> tuple[str, ...]:
        assert isinstance(settings, ModelConfig)
        return ("mme",) if settings.refinement == "none" else ("mme", "car")

    def stage(self, name: str, training: TrainingSettings, context_frames: int) -> Stage:
        assert isinstance(training, PaperTraining)
        kind = {"mme": MotionStage, "car": AppearanceStage}[name]
        return kind(self, training, context_frames)

    def stage_weights(self, settings: ModelSettings, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        assert isinstance(settings, ModelConfig)
        if settings.motion != self.settings.motion:
            raise InputError(f"motion is {settings.motion!r} in the checkpoint, expected {self.settings.motion!r}")
        # a whole model has the weights of the motion stage too
        return weights if self.car is not None else {k: w for k, w in weights.items() if k.startswith("mme.")}


def car_audio(motion: Motion) -> Tensor | None:
    """The audio vectors of A_K..A_{T-1} (B,P,D), which CAR's steps take."""
    steps = motion.flow.shape[1]
    return None if motion.audio is None else motion.audio[:, -steps - 1 : -1]


class MotionStage(Stage):
    """Stage `mme`: MME learns the true flow (Eq. 8). Its checkpoints hold the model with refinement `none`."""

    name = "mme"

    def __init__(self, model: AVModel, training: PaperTraining, context_frames: int) -> None:
        self.model, self.trained = model.motion_only(), model.mme
        self.steps, self.lr, self.smooth_weight = training.mme_steps, training.mme_lr, training.smooth_weight
        self.forced_share, self.forced_frames = training.teacher_forcing, training.forced_frames
        self.path_weight = training.path_weight
        self.context_frames = context_frames

    def forced_loss(self, batch: Batch) -> Tensor:
        batch = batch if self.forced_frames is None else batch.first_frames(self.forced_frames)
        motion = self.trained(batch.frames[:, :-1], batch.flow[:, :-1], batch.audio, every_step=True)
        return self._flow_loss(motion.flow, batch.flow[:, 1:], batch.frames[:, 1:])

    def loss(self, batch: Batch, keys: WindowKeys, horizon: int) -> Tensor:
        k, end = self.context_frames, self.context_frames + horizon
        motion = self.trained(batch.frames[:, :k], batch.flow[:, :k], batch.audio[:, :end])
        loss = self._flow_loss(motion.flow, batch.flow[:, k:end], batch.frames[:, k:end])
        if self.path_weight:
            loss = loss + self.path_weight * path_loss(motion.flow, batch.flow[:, k:end])
        return loss

    def validation_loss(self, rollout: Rollout, batch: Batch) -> Tensor:
        assert rollout.flow is not None
        steps = rollout.flow.shape[1]
        return self._flow_loss(rollout.flow, batch.flow[:, -steps:], batch.frames[:, -steps:])

    def _flow_loss(self, prediction: Tensor, target: Tensor, frames: Tensor) -> Tensor:
        return flow_loss(prediction, target, frames, smooth_weight=self.smooth_weight)


class AppearanceStage(Stage):
    """Stage `car`: CAR learns the true frames (Eq. 11) on the flow of a frozen MME in evaluation mode.

    MME's recurrence never sees CAR's output, so its flow of a window is kept for the next time that window comes, as
    fp32 and exact, until `flow_cache_gb` is full."""

    name = "car"

    def __init__(self, model: AVModel, training: PaperTraining, context_frames: int) -> None:
        assert model.car is not None
        self.model, self.trained, self.mme = model, model.car, model.mme
        self.mme.requires_grad_(False).eval()
        self.steps, self.lr, self.batch_size = training.car_steps, training.car_lr, training.car_batch_size
        self.context_frames, self.ssim_weight = context_frames, training.ssim_weight
        # composed rendering has no recurrence that could be too long at first
        self.grows = not model.composed
        self._cache: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._free_bytes = int(training.flow_cache_gb * 2**30)

    def loss(self, batch: Batch, keys: WindowKeys, horizon: int) -> Tensor:
        k = self.context_frames
        flow, audio = self._motion(batch, keys)
        audio = None if audio is None else audio[:, :horizon]
        frames = self.trained(batch.frames[:, k - 1], flow[:, :horizon], audio, self.mme.encoder)
        return self._loss(frames, batch.frames[:, k : k + horizon])

    def validation_loss(self, rollout: Rollout, batch: Batch) -> Tensor:
        return self._loss(rollout.frames, batch.frames[:, -rollout.frames.shape[1] :])

    def _loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = frame_loss(prediction, target)
        if self.ssim_weight:
            loss = loss + self.ssim_weight * ssim_loss(prediction, target)
        return loss

    @torch.no_grad()
    def _motion(self, batch: Batch, keys: WindowKeys) -> tuple[Tensor, Tensor | None]:
        """MME's flow (B,P,2,H,W) and the audio vectors of A_K..A_{T-1} (B,P,D), from the cache or computed."""
        windows = list(zip(*(part.tolist() for part in keys), strict=True))
        if all(w in self._cache for w in windows):
            flow, *rest = (torch.stack(parts) for parts in zip(*(self._cache[w] for w in windows), strict=True))
            return flow, (rest[0] if rest else None)
        # a batch with any unknown window is computed whole: the batch size, and with it the rounding, stays the same
        k = self.context_frames
        motion = self.mme(batch.frames[:, :k], batch.flow[:, :k], batch.audio)
        audio = car_audio(motion)
        for i, window in enumerate(windows):
            parts = tuple(x[i].clone() for x in (motion.flow, audio) if x is not None)
            size = sum(x.nbytes for x in parts)
            if window not in self._cache and size <= self._free_bytes:
                self._cache[window] = parts
                self._free_bytes -= size
        return motion.flow, audio
