"""Settings of a training run, and the named presets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from avfast.data.mmnist import MMNISTConfig
from avfast.data.prepared import ClipsConfig
from avfast.errors import InputError
from avfast.models.settings import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, model, and how both stages are trained."""

    dataset: Literal["mmnist", "clips"] = "mmnist"
    """Multimodal MovingMNIST, generated as needed, or a prepared folder of clips (wants --data)."""
    data: MMNISTConfig = MMNISTConfig()
    clips: ClipsConfig = ClipsConfig()
    model: ModelConfig = ModelConfig()

    stage: Literal["mme", "car", "both"] = "both"
    """Train the motion stage, the appearance stage (wants --mme), or one after the other."""
    mme: str | None = None
    """Run or checkpoint whose MME the appearance stage uses (stage `car` only)."""
    context_frames: int = 5
    """K, the given frames."""
    pred_frames: int = 15
    """Frames predicted in training."""
    eval_frames: int = 20
    """Frames predicted in evaluation."""

    batch_size: int = 32
    """Clips per step and process. In the motion stage BatchNorm takes the batch's mean motion away: with TV-L1 flow
    that fills the background, 8 clips hardly learn (see the preset mmnist-small)."""
    car_batch_size: int | None = None
    """The same for the appearance stage, where it is not batch-size."""
    mme_steps: int = 100_000
    """Optimiser steps of the motion stage."""
    car_steps: int = 50_000
    """Optimiser steps of the appearance stage."""
    max_steps: int | None = None
    """Upper limit for the steps of each stage."""
    mme_lr: float = 1e-4
    """Adam's learning rate in the motion stage (the paper's)."""
    car_lr: float = 1e-3
    """Adam's learning rate in the appearance stage (the paper's)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over a stage: constant, or after 2 % of linear warm-up half a cosine down to zero."""
    clip_grad: float | None = None
    """Largest norm of the whole gradient."""
    curriculum: float = 0.0
    """Share of each stage's steps over which the frames predicted in training grow from 1 to pred-frames."""
    smooth_weight: float = 0.01
    """Lambda of Eq. 8."""
    flow_preset: str = "chambolle-pock"
    """TV-L1 preset of the true flow."""
    bn_recalibrate: int = 20
    """Training batches over which BatchNorm's running statistics are re-estimated before an evaluation; 0 = off."""
    flow_cache_gb: float = 2.0
    """Memory for MME's flows in the appearance stage, which never change there; 0 = computed anew at every step."""

    seed: int = 0
    """Seed of the weights and of the data order."""
    deterministic: bool = False
    """Refuse operations whose result may differ from run to run."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast; flow, coordinates and the ConvLSTM's cell state stay fp32."""

    output_dir: str = "runs"
    """Where run folders are made."""
    name: str = "run"
    """The run folder is <output-dir>/<dataset>-<name>, with -2, -3 ... where it exists already."""
    resume: str | None = None
    """`auto`: continue the newest run of this name that has a checkpoint, or begin one; else a run folder."""
    cache: Literal["none", "ram", "device"] = "none"
    """Read training clips from their files, from a copy in memory, or from one on the device."""
    data_cache: str = "data"
    """Where generated data sets are kept."""
    log_every: int = 10
    """Steps between records in metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations on the validation split, each with a sample strip and a GIF."""
    eval_clips: int = 200
    """Validation clips per evaluation."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints kept beside the best ones."""

    def check(self) -> None:
        """Raise InputError for values that cannot work together."""
        if self.context_frames < 1 or self.pred_frames < 1 or self.eval_frames < 1:
            raise InputError(
                f"context-frames, pred-frames and eval-frames are {self.context_frames}, {self.pred_frames} and "
                f"{self.eval_frames}, expected at least 1 each"
            )
        if (self.dataset == "clips") != (self.clips.data is not None):
            raise InputError("--dataset clips and --data FOLDER go together: one is given and the other is not")
        generated = self.dataset == "mmnist"
        for flag, predicted in (("pred-frames", self.pred_frames), ("eval-frames", self.eval_frames)):
            if generated and self.context_frames + predicted > self.data.clip_frames:
                raise InputError(
                    f"context-frames + {flag} is {self.context_frames} + {predicted}, more than the clip's "
                    f"{self.data.clip_frames} frames (clip-frames)"
                )
        for flag in (
            "batch_size",
            "mme_steps",
            "car_steps",
            "log_every",
            "eval_every",
            "eval_clips",
            "save_every",
            "keep_last",
        ):
            if getattr(self, flag) < 1:
                raise InputError(f"{flag.replace('_', '-')} is {getattr(self, flag)}, expected at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise InputError(f"max-steps is {self.max_steps}, expected at least 1")
        if self.car_batch_size is not None and self.car_batch_size < 1:
            raise InputError(f"car-batch-size is {self.car_batch_size}, expected at least 1")
        if not 0 <= self.curriculum <= 1:
            raise InputError(f"curriculum is {self.curriculum}, expected a share between 0 and 1")
        largest = max(self.batch_size, self.car_batch_size or 1)
        if generated and largest > self.data.train_clips:
            raise InputError(f"batch-size is {largest}, more than the {self.data.train_clips} training clips")
        if self.stage == "car" and self.model.refinement == "none":
            raise InputError("refinement is none, which has nothing to train in stage car")
        if (self.stage == "car") != (self.mme is not None) and self.resume is None:
            raise InputError("--mme PATH names the motion model of --stage car, and only of that stage")


_MMNIST = TrainConfig()
_CLIPS = TrainConfig(
    dataset="clips",
    name="painting",
    model=ModelConfig(image_channels=3, audio_shape=(45, 17)),
    context_frames=15,
    pred_frames=15,
    eval_frames=30,
)
PRESETS: dict[str, TrainConfig] = {
    "mmnist": _MMNIST,
    # two hours on 2 cores with AVX2. Small batches fail in the motion stage: on two predicted frames, after 60 s of
    # training, the squared flow error per step was 14.7 with batch 8 and 9.1 with 64 (no sound, 1e-3), 6.2 with 32
    # (sound, 5e-4); 18 is no motion at all. One seed each; batch, rate and sound were not separated
    "mmnist-small": replace(
        _MMNIST,
        name="small",
        model=ModelConfig(unet_width=16),
        data=MMNISTConfig(train_clips=4000),
        car_batch_size=8,
        mme_steps=1300,
        car_steps=1000,
        mme_lr=5e-4,
        schedule="cosine",
        curriculum=0.7,
        eval_every=200,
        eval_clips=64,
        save_every=100,
        bn_recalibrate=10,
    ),
    # minutes on 2 cores: shorter clips, a narrow U-Net
    "demo": replace(
        _MMNIST,
        name="demo",
        model=ModelConfig(unet_width=8),
        data=MMNISTConfig(clip_frames=20, train_clips=1000, val_clips=64, test_clips=128),
        pred_frames=10,
        eval_frames=15,
        car_batch_size=8,
        mme_steps=250,
        car_steps=200,
        mme_lr=5e-4,
        schedule="cosine",
        curriculum=0.7,
        eval_every=50,
        eval_clips=32,
        save_every=50,
        bn_recalibrate=5,
    ),
    # the paper's sets of short videos with sound, prepared by `avfast prepare`; steps as for mmnist
    "painting": _CLIPS,
    "drums": replace(_CLIPS, name="drums"),
    "painting96": replace(_CLIPS, name="painting96"),
}
