"""Settings of a training run, and the named presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from avfast.data.base import DataSettings, Split
from avfast.data.mmnist import MMNISTConfig
from avfast.data.prepared import ClipsConfig
from avfast.data.registry import DATASETS
from avfast.data.store import ClipStore
from avfast.errors import InputError
from avfast.files.settings import Choices, Count, Positive, Range, Seed, Share, check_name, check_values, with_values
from avfast.models.avmodel import ModelConfig, PaperTraining
from avfast.models.base import ModelSettings, TrainingSettings
from avfast.models.registry import MODELS
from avfast.opticalflow.tvl1 import PRESETS as FLOW_PRESETS


def flag_choices() -> dict[str, Choices]:
    """What the flags `--dataset` and `--model` choose among the registered ones: {flag: {field: {name: class}}}."""
    return {
        "dataset": {"data": DATASETS},
        "model": {
            "model": {name: model.settings_class for name, model in MODELS.items()},
            "training": {name: model.training_class for name, model in MODELS.items()},
        },
    }


def recipes(config: TrainConfig) -> Mapping[str, Mapping[str, Any]]:
    """What the flag `--recipe` chooses among: the ways of training that the model knows."""
    return config.training.recipes


@dataclass(frozen=True)
class TrainConfig:
    """One training run: data, model, and how its stages are trained."""

    data: DataSettings = MMNISTConfig()
    model: ModelSettings = ModelConfig()
    training: TrainingSettings = PaperTraining()

    stage: str = "all"
    """Train one stage of the model, such as `mme` or `car`, or `all`, one after the other."""
    context_frames: Count = 5
    """K, the given frames."""
    pred_frames: Count = 15
    """Frames predicted in training."""
    eval_frames: Count = 20
    """Frames predicted in evaluation."""

    batch_size: Count = 32
    """Clips per step and process. In the motion stage BatchNorm takes the batch's mean motion away: with TV-L1 flow
    that fills the background, 8 clips hardly learn (see the preset mmnist-small)."""
    max_steps: Count | None = None
    """Upper limit for the steps of each stage."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over a stage: constant, or after 2 % of linear warm-up half a cosine down to zero."""
    clip_grad: Positive | None = None
    """Largest norm of the whole gradient."""
    curriculum: Share = 0.0
    """Share of each stage's steps over which the frames predicted in training grow from 1 to pred-frames."""
    ema: Annotated[float, Range(0, 0.99999)] = 0.0
    """Decay per step of an average of the weights, which is scored and saved as best in their place; 0 = none."""
    flow_preset: str = "training"
    """TV-L1 preset of the true flow."""
    bn_recalibrate: Annotated[int, Range(0)] = 20
    """Training batches over which BatchNorm's running statistics are re-estimated before an evaluation; 0 = off."""
    bn_freeze: Share = 0.0
    """Share of each stage's steps, the last ones, that train with re-estimated running statistics as in evaluation."""
    seed: Seed = 0
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
    log_every: Count = 10
    """Steps between records in metrics.jsonl."""
    eval_every: Count = 1000
    """Steps between evaluations on the validation split, each with a sample strip and a GIF."""
    eval_clips: Count = 200
    """Validation clips per evaluation."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    keep_last: Count = 2
    """Checkpoints kept beside the best ones."""

    def check(self) -> None:
        """Raise InputError for values that cannot work together."""
        check_values(self)
        check_name(self.flow_preset, FLOW_PRESETS, "flow-preset")
        if not self.name or Path(self.name).name != self.name:
            raise InputError(f"name is {self.name!r}, expected a name without slashes")
        if self.training.name != self.model.name:
            raise InputError(f"training is that of {self.training.name}, expected that of the model {self.model.name}")
        if self.stage not in ("all", *self.stage_names):
            found = ", ".join(self.stage_names)
            raise InputError(f"stage is {self.stage!r}, expected all or a stage of this model: {found}")
        if self.resume is None:
            self.training.check(self.stage)
        self.data.check(self.longest_window, self.batch_size)

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a config.yaml, of any version, as the present TrainConfig has it. The first version had the
        settings of both data sets, and those of the paper's stages among its own."""
        values = dict(values)
        if "dataset" in values:
            name, clips = values.pop("dataset"), values.pop("clips", None)
            settings = clips if name == ClipsConfig.name else values.get("data")
            values["data"] = {"name": name, **(settings or {})}
        known = {field.name for field in fields(PaperTraining)} & values.keys()
        if known:
            values["training"] = {name: values.pop(name) for name in known}
        if values.get("stage") == "both":
            values["stage"] = "all"
        return values

    @property
    def stage_names(self) -> tuple[str, ...]:
        """The stages of the model."""
        return MODELS[self.model.name].stage_names(self.model)

    @property
    def longest_window(self) -> int:
        """Frames that training or evaluation takes of a clip at most."""
        return self.context_frames + max(self.pred_frames, self.eval_frames)

    def load_split(self, split: Split, *, quiet: bool = False) -> ClipStore:
        """One split of the run's data set, made where that is possible. Raises InputError where it cannot be had, or
        does not fit the run."""
        store = self.data.load(split, cache=self.data_cache, flow_preset=self.flow_preset, quiet=quiet)
        for flag, wanted, found in (
            ("image-channels", self.model.image_channels, store.frames.shape[2]),
            ("audio-shape", tuple(self.model.audio_shape), tuple(store.audio_shape)),
            ("flow-preset", self.flow_preset, store.parameters["flow"]["preset"]),
        ):
            if wanted != found:
                raise InputError(f"{flag} is {wanted}, but the clips in {store.folder} have {found}")
        if self.longest_window > store.clip_frames:
            raise InputError(
                f"context-frames with pred-frames or eval-frames is {self.longest_window} frames, more than the "
                f"{store.clip_frames} frames of the clips in {store.folder}"
            )
        return store

    def built_split(self, split: Split) -> ClipStore | None:
        """One split where nothing has to be made for it, else None. Raises InputError where it cannot be had."""
        return self.data.built(split, cache=self.data_cache, flow_preset=self.flow_preset)


_MMNIST = with_values(TrainConfig(), PaperTraining.recipes["best"])
_CLIPS = replace(
    with_values(_MMNIST, {"image_channels": 3, "audio_shape": (45, 17)}),
    data=ClipsConfig(),
    name="painting",
    context_frames=15,
    pred_frames=15,
    eval_frames=30,
)
# two hours on 2 cores: docs/results.md
_SMALL = with_values(
    _MMNIST,
    {
        "name": "small",
        "unet_width": 16,
        "train_clips": 8000,
        "car_batch_size": 8,
        "mme_steps": 5000,
        "car_steps": 2000,
        "eval_every": 400,
        "save_every": 200,
    },
)
# minutes on 2 cores: shorter clips, fewer steps
_DEMO = with_values(
    _SMALL,
    {
        "name": "demo",
        "clip_frames": 20,
        "train_clips": 2000,
        "val_clips": 64,
        "test_clips": 128,
        "mme_steps": 300,
        "car_steps": 150,
        "pred_frames": 10,
        "eval_frames": 15,
        "eval_every": 50,
        "eval_clips": 32,
        "save_every": 50,
        "bn_recalibrate": 5,
    },
)
PRESETS: dict[str, TrainConfig] = {
    "mmnist": _MMNIST,
    "mmnist-small": _SMALL,
    "demo": _DEMO,
    # the paper's sets of short videos with sound, prepared by `avfast prepare`; steps as for mmnist
    "painting": _CLIPS,
    "drums": replace(_CLIPS, name="drums"),
    "painting96": replace(_CLIPS, name="painting96"),
}
