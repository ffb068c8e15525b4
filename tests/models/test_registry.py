"""Any model of the registry can be trained, scored, predicted with and loaded: a model of one stage that is defined
here, is random, takes the waveform and gives no flow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from avfast.cli.parser import parse
from avfast.data.mmnist import MMNISTConfig
from avfast.data.store import Batch
from avfast.errors import InputError
from avfast.evaluate import EvaluateConfig, evaluate
from avfast.export import ExportConfig, export
from avfast.files.settings import to_dict
from avfast.models.avmodel import AVModel, ModelConfig
from avfast.models.base import ModelSettings, Rollout, Stage, TrainingSettings, VideoModel, WindowKeys
from avfast.models.registry import MODELS, build_model, load_model, read_model
from avfast.predict import PredictConfig, predict
from avfast.train import train
from avfast.training.config import PRESETS, TrainConfig, flag_choices
from avfast.training.runs import load_run_config, resolve_checkpoint
from avfast.training.trainer import Trainer

K, P, SAMPLES = 2, 3, 440


@dataclass(frozen=True)
class FlickerSettings(ModelSettings):
    """Settings of a still picture that flickers as loudly as the sound is."""

    name: ClassVar[str] = "flicker"

    strength: float = 0.2
    """Imagine that checkpoints were written before this setting was added."""


@dataclass(frozen=True)
class FlickerTraining(TrainingSettings):
    name: ClassVar[str] = "flicker"

    flicker_steps: int = 4


class Flicker(VideoModel):
    """Frame K times a gain that is trained, plus noise whose size is `strength` times the loudness of each frame."""

    settings_class, training_class = FlickerSettings, FlickerTraining
    wants_waveform = True

    def __init__(self, settings: FlickerSettings) -> None:
        super().__init__(settings)
        self.strength = settings.strength
        self.gain = nn.Parameter(torch.ones(()))

    @classmethod
    def stage_names(cls, settings: ModelSettings) -> tuple[str, ...]:
        return ("only",)

    def stage(self, name: str, training: TrainingSettings, context_frames: int) -> Stage:
        assert name == "only" and isinstance(training, FlickerTraining)
        return OnlyStage(self, training, context_frames)

    def sound(self, batch: Batch) -> Tensor:
        assert batch.waveform is not None
        return batch.waveform

    def forward(self, frames: Tensor, waveform: Tensor) -> Tensor:
        """frames (B,K,C,H,W), waveform (B, T * SAMPLES) int16 -> (B,T-K,C,H,W)."""
        loudness = waveform.unflatten(1, (-1, SAMPLES)).float().abs().mean(2)[:, frames.shape[1] :] / 32_768
        last = frames[:, -1:].expand(-1, loudness.shape[1], -1, -1, -1)
        return self.gain * last + self.strength * loudness[..., None, None, None] * torch.randn_like(last)

    @torch.no_grad()
    def predict(self, frames: Tensor, flow: Tensor, audio: Tensor, *, samples: int = 1) -> Rollout:
        futures = [self(frames, audio).clamp(0, 1) for _ in range(samples)]
        return Rollout(futures[0] if samples == 1 else torch.stack(futures), None)


class OnlyStage(Stage):
    name, lr = "only", 1e-2

    def __init__(self, model: Flicker, training: FlickerTraining, context_frames: int) -> None:
        self.model = self.trained = model
        self.steps, self.context_frames = training.flicker_steps, context_frames

    def loss(self, batch: Batch, keys: WindowKeys, horizon: int) -> Tensor:
        assert batch.waveform is not None
        k = self.context_frames
        found = self.trained(batch.frames[:, :k], batch.waveform)[:, :horizon]
        return (found - batch.frames[:, k : k + horizon]).square().mean()

    def validation_loss(self, rollout: Rollout, batch: Batch) -> Tensor:
        assert rollout.flow is None
        return (rollout.frames - batch.frames[:, -rollout.frames.shape[1] :]).square().mean()


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one more line in the registry would do."""
    monkeypatch.setitem(MODELS, "flicker", Flicker)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=MMNISTConfig(clip_frames=K + P, train_clips=4, val_clips=2, test_clips=3),
        model=FlickerSettings(),
        training=FlickerTraining(),
        context_frames=K,
        pred_frames=P,
        eval_frames=P,
        batch_size=2,
        log_every=1,
        eval_every=2,
        save_every=2,
        device="cpu",
        data_cache=str(tmp_path / "data"),
        output_dir=str(tmp_path / "runs"),
    )


def test_the_command_line_has_its_settings() -> None:
    line = ["--model", "flicker", "--strength", "0.5", "--flicker-steps", "7"]
    config = parse(TrainConfig, prog="avfast train", argv=line, presets=PRESETS, choices=flag_choices())
    assert config.model == FlickerSettings(strength=0.5) and config.training == FlickerTraining(flicker_steps=7)
    assert config.stage_names == ("only",)
    with pytest.raises(InputError, match="unknown argument '--unet-width'"):
        parse(TrainConfig, prog="", argv=[*line, "--unet-width", "4"], presets=PRESETS, choices=flag_choices())


def test_training_leaves_a_complete_run_folder(config: TrainConfig) -> None:
    folder = Trainer(config, None).fit()
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in log if "lr" in r] == [("only", step) for step in range(1, 5)]
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [(r["step"], r["aepe"]) for r in rows] == [("0", ""), ("2", ""), ("4", "")]
    assert {p.name for p in (folder / "samples").iterdir()} == {
        f"only_{step:08d}.{ending}" for step in (0, 2, 4) for ending in ("png", "gif")
    }
    assert {p.name for p in (folder / "checkpoints").iterdir() if p.is_symlink()} == {"best", "last"}
    assert load_run_config(resolve_checkpoint(folder)) == config
    last = load_model(folder / "checkpoints" / "last")
    assert type(last) is Flicker and last.settings == config.model and not last.training
    # four steps of Adam are about 0.04
    assert 0.02 < abs(last.gain.item() - 1) < 0.06


def test_a_cut_run_goes_on_to_the_same_weights(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(config)
    original, calls = OnlyStage.loss, []

    def crashing(self: OnlyStage, *args) -> Tensor:
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(OnlyStage, "loss", crashing)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(**vars(config) | {"name": "cut"}))
    resumed = train(TrainConfig(**vars(config) | {"name": "cut", "resume": "auto"}))
    gains = [read_model(folder / "checkpoints" / "last")[1]["gain"] for folder in (whole, resumed)]
    assert torch.equal(*gains)


@pytest.fixture
def run(config: TrainConfig, tmp_path: Path) -> Path:
    """A run folder with an untrained model."""
    folder = tmp_path / "runs" / "flicker"
    build_model(config.model).save_pretrained(folder / "checkpoints" / "best")
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return folder


def test_scores_have_no_end_point_error_and_know_the_sound(run: Path) -> None:
    document = evaluate(EvaluateConfig(checkpoint=(str(run),), audio=("own", "silent"), samples=1, device="cpu"))
    own, silent = document["models"]["flicker/best"], document["models"]["flicker/best, silent sound"]
    assert own["aepe"] is silent["aepe"] is None and own["clips"] == 3
    # it flickers as the sound says: without any it repeats frame K
    still = document["references"]["repeat last frame"]
    assert silent["psnr"] == still["psnr"] and all(a < b for a, b in zip(own["psnr"], still["psnr"], strict=True))
    assert "flicker/best" not in document["markdown"].partition("AEPE")[2]


def test_a_film_is_predicted_without_flow(run: Path, make_film: Callable[..., Path], tmp_path: Path) -> None:
    images = np.stack([np.full((48, 48, 3), 40 + 4 * i, np.uint8) for i in range(3 * (K + P))])
    sound = np.random.default_rng(0).integers(-9000, 9000, 2 * 22_050).astype(np.int16)
    film = make_film(tmp_path / "film.mkv", images, sound)
    out = str(tmp_path / "out")
    about = predict(PredictConfig((str(film),), checkpoint=str(run), out=out, device="cpu"))["predictions"][0]
    assert about["scores"]["predicted"]["aepe"] is None
    names = {p.name for p in Path(about["folder"]).iterdir()}
    assert {"film.mp4", "strip.png", "frames.npy"} <= names and not names & {"flow.mp4", "flow.npy"}
    frames = np.load(Path(about["folder"]) / "frames.npy")
    assert frames.shape == (P, 1, 48, 48) and frames.std((2, 3)).min() > 0.005


def test_several_samples_have_a_leading_axis() -> None:
    torch.manual_seed(0)
    waveform = torch.randint(-9000, 9000, (2, (K + P) * SAMPLES)).short()
    frames, flow = torch.rand(2, K, 1, 16, 16), torch.zeros(2, K, 2, 16, 16)
    model = build_model(FlickerSettings()).eval()
    three = model.predict(frames, flow, waveform, samples=3)
    assert three.frames.shape == (3, 2, P, 1, 16, 16) and three.flow is None
    assert not torch.equal(three.frames[0], three.frames[1]) and not torch.equal(three.frames[1], three.frames[2])
    assert model.predict(frames, flow, waveform).frames.shape == (2, P, 1, 16, 16)


def test_it_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^model 'flicker' cannot be exported, only 'mme-car' can$"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "model")))
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob(".*"))


def test_a_setting_that_a_checkpoint_lacks_has_its_default(tmp_path: Path) -> None:
    build_model(FlickerSettings(strength=0.7)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert written["model"] == "flicker" and load_model(tmp_path).settings == FlickerSettings(strength=0.7)
    del written["strength"]
    path.write_text(json.dumps(written))
    assert load_model(tmp_path).settings == FlickerSettings()
    path.write_text(json.dumps(written | {"strenght": 0.7}))
    with pytest.raises(InputError, match=r"unknown key 'strenght' \(did you mean 'strength'\?\)"):
        load_model(tmp_path)


def test_a_model_that_is_not_registered_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model(FlickerSettings()).save_pretrained(tmp_path)
    monkeypatch.delitem(MODELS, "flicker")
    with pytest.raises(InputError, match="holds a model 'flicker', expected 'mme-car'$"):
        load_model(tmp_path)
    with pytest.raises(InputError, match="holds a model 'flicker', expected 'mme-car'$"):
        AVModel.from_pretrained(tmp_path)


def test_a_checkpoint_of_format_2_is_the_papers_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = ModelConfig(refinement="none", convlstm_layers=1, unet_width=4)
    model = AVModel(settings)
    model.save_pretrained(tmp_path)
    older = {
        "format": 2,
        "motion": "mme",
        "refinement": "none",
        "image_channels": 1,
        "audio_shape": [23, 21],
        "convlstm_layers": 1,
        "unet_width": 4,
    }
    (tmp_path / "config.json").write_text(json.dumps(older))
    loaded = load_model(tmp_path)
    assert type(loaded) is AVModel and loaded.settings == settings
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps(older | {"format": 1}))
    with pytest.raises(InputError, match="cannot be read: its format is not known here"):
        load_model(tmp_path)
