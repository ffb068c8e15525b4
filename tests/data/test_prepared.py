"""Training and scoring on a prepared data set: the same from every cache, resumable, refused where it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from avfast.cli.parser import parse
from avfast.data.film_clips import ClipSettings
from avfast.data.mmnist import MMNISTConfig
from avfast.data.prepared import ClipsConfig
from avfast.data.store import training_mean_image
from avfast.errors import InputError
from avfast.evaluate import EvaluateConfig, evaluate
from avfast.files.settings import to_dict
from avfast.models.avmodel import ModelConfig, PaperTraining
from avfast.prepare import PrepareConfig, prepare
from avfast.train import train
from avfast.training.config import PRESETS, TrainConfig, flag_choices
from avfast.training.order import DataOrder
from avfast.training.runs import load_run_config

FRAMES = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_film) -> Path:
    """Six films of two clips each: 8 clips to train on, 2 and 2 for the rest."""
    root = tmp_path_factory.mktemp("films")
    y, x = np.mgrid[:16, :16]
    t = np.arange(2 * FRAMES)[:, None, None]
    for number in range(6):
        planes = [np.sin(0.4 * (x + (number - 2) * t) + p) * np.sin(0.3 * y + number) for p in range(3)]
        samples = np.random.default_rng(number).integers(-9000, 9000, 22_050).astype(np.int16)
        make_film(root / f"{number}.mkv", np.rint(127 + 120 * np.stack(planes, -1)).astype(np.uint8), samples)
    prepare(
        PrepareConfig(
            inputs=(str(root),),
            out=str(root / "set"),
            clip_frames=FRAMES,
            clips=ClipSettings(size=(16, 16)),
            flow_preset="fast",
        )
    )
    return root / "set"


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=ClipsConfig(data=str(folder)),
        model=ModelConfig(image_channels=3, audio_shape=(45, 17), unet_width=2, convlstm_layers=1),
        context_frames=2,
        pred_frames=2,
        eval_frames=4,
        batch_size=3,
        training=PaperTraining(mme_steps=2, car_steps=1),
        log_every=1,
        bn_recalibrate=1,
        flow_preset="fast",
        output_dir=str(tmp_path),
        device="cpu",
    )


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def test_train_and_score(config: TrainConfig, folder: Path) -> None:
    run = train(config)
    assert run.name == "clips-run" and len(losses(run)) == 3
    # every cache gives the same numbers, bit for bit
    again = train(replace(config, cache="device", stage="mme", max_steps=1))
    assert losses(again) == losses(run)[:1]
    result = evaluate(EvaluateConfig(checkpoint=(str(run),), samples=1, device="cpu"))
    assert result["source"] == "set, test split" and result["data_seed"] is None and not result["regenerated"]
    assert "regenerated" not in result["markdown"] and result["clips"] == 2
    for head in ("Fr 3", "Fr 4", "Fr 6", "Mean", "AEPE"):
        assert head in result["markdown"]
    # the reference rows are about these clips: a constant prediction's error has a closed form
    truth = config.load_split("test").frames[:, 2:6].astype(np.float64) / 255
    mean = training_mean_image(config.load_split("train")).numpy()
    error = ((truth - mean) ** 2).mean((3, 4))
    want = (-10 * np.log10(error)).mean((0, 2))
    np.testing.assert_allclose(result["references"]["training-set mean image"]["psnr"], want, rtol=1e-4)


def test_the_data_may_have_moved(config: TrainConfig, folder: Path, tmp_path: Path) -> None:
    run = train(replace(config, stage="mme", max_steps=1))
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    result = evaluate(EvaluateConfig(checkpoint=(str(run),), data=str(moved), samples=0, split="val", device="cpu"))
    assert result["source"] == "moved, val split"
    with pytest.raises(InputError, match="elsewhere: not a data set"):
        evaluate(EvaluateConfig(checkpoint=(str(run),), data=str(tmp_path / "elsewhere"), device="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": ClipsConfig()}, "--data is missing, expected the folder of a data set with --dataset clips"),
        ({"flow_preset": "quality"}, "flow-preset is quality, but the clips in .*train have fast"),
        ({"eval_frames": 7}, "or eval-frames is 9 frames, more than the 8 frames of the clips in .*train"),
        ({"batch_size": 9}, "batch-size is 9 on 1 processes, more than the 8 training clips"),
        ({"model": ModelConfig(audio_shape=(45, 17))}, "image-channels is 1, but the clips in .*train have 3"),
        (
            {"model": ModelConfig(image_channels=3)},
            r"audio-shape is \(23, 21\), but the clips in .*train have \(45, 17\)",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict, message: str, config: TrainConfig) -> None:
    with pytest.raises(InputError, match=message):
        train(replace(config, **change))


def test_presets_and_flags(folder: Path) -> None:
    for name, argv in (("painting", []), ("drums", ["--cache", "ram"]), ("painting96", [])):
        argv = ["--preset", name, "--data", str(folder), *argv]
        given = parse(TrainConfig, prog="t", argv=argv, presets=PRESETS, choices=flag_choices())
        assert (given.context_frames, given.pred_frames, given.eval_frames) == (15, 15, 30)
        assert given.model.image_channels == 3 and given.model.audio_shape == ClipSettings().spectrogram.shape
        assert given.data == ClipsConfig(data=str(folder)) and given.cache == ("ram" if "ram" in argv else "none")
        given.check()


def test_a_config_from_before_is_read(tmp_path: Path) -> None:
    """With the settings of both data sets, and those of the stages among the run's own."""
    old = {
        "dataset": "mmnist",
        "data": {"clip_frames": 20},
        "clips": {"data": None},
        "model": {"motion": "v", "audio_shape": [23, 21]},
        "stage": "both",
        "mme": None,
        "mme_steps": 7,
        "smooth_weight": 0.5,
        "pred_frames": 3,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    read = load_run_config(tmp_path / "checkpoints")
    assert read.data == MMNISTConfig(clip_frames=20) and read.model == ModelConfig(motion="v")
    assert (read.stage, read.pred_frames) == ("all", 3)
    assert read.training == PaperTraining(mme_steps=7, smooth_weight=0.5)
    old |= {"dataset": "clips", "clips": {"data": "somewhere"}, "stage": "mme"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    read = load_run_config(tmp_path / "checkpoints")
    assert read.data == ClipsConfig("somewhere") and read.stage == "mme"
    # what is written now is read as it is
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(read)))
    assert load_run_config(tmp_path / "checkpoints") == read


def test_the_order_does_not_depend_on_who_asks() -> None:
    """A thread that loads ahead and the training loop ask the same object, each at its own place."""
    one, other = DataOrder(10, 5, 3, seed=7), DataOrder(10, 5, 3, seed=7)
    straight = [one[step] for step in range(9)]
    for step in (0, 5, 1, 8, 2, 5):
        for a, b in zip(other[step], straight[step], strict=True):
            np.testing.assert_array_equal(a, b)
    assert torch.tensor([len(clips) for clips, _ in straight]).eq(3).all()
