"""The training loop on a tiny data set: what lies in the run folder, resume, variants, failures."""

from __future__ import annotations

import csv
import errno
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.errors import InputError
from avfast.files.settings import load_config
from avfast.models.avmodel import AppearanceStage, AVModel, MotionStage, PaperTraining
from avfast.models.registry import read_model
from avfast.train import train
from avfast.training.config import TrainConfig
from avfast.training.runs import load_run_config, resolve_checkpoint


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_times(folder):
    return [{k: v for k, v in r.items() if k != "clips_per_s"} for r in records(folder)]


def test_both_stages_leave_a_complete_run_folder(config):
    folder = train(config)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.yaml",
        "env.json",
        "data.json",
        "command.txt",
        "metrics.jsonl",
        "results.csv",
        "curves.png",
        "samples",
        "checkpoints",
        "report.html",
    }
    assert json.loads((folder / "data.json").read_text())["split"] == "train"
    assert load_config(folder / "config.yaml", TrainConfig()) == config
    log = records(folder)
    assert [r["step"] for r in log if "lr" in r] == list(range(1, 10))
    assert [r["stage"] for r in log if "lr" in r] == ["mme"] * 5 + ["car"] * 4
    with open(folder / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(r["stage"], r["step"]) for r in rows] == [
        ("mme", "0"),
        ("mme", "4"),
        ("mme", "5"),
        ("car", "5"),
        ("car", "9"),
    ]
    assert {p.name for p in (folder / "samples").iterdir()} == {
        f"{s}_{n:08d}.{e}"
        for s, n in [("mme", 0), ("mme", 4), ("mme", 5), ("car", 5), ("car", 9)]
        for e in ("png", "gif")
    }
    steps = sorted(p.name for p in (folder / "checkpoints").glob("step_*"))
    assert steps == ["step_00000007", "step_00000009"] and os.readlink(folder / "checkpoints" / "last") == steps[-1]
    assert not list((folder / "checkpoints").glob(".*"))

    motion = AVModel.from_pretrained(folder / "checkpoints" / "best-mme")
    assert motion.settings.refinement == "none"
    both = AVModel.from_pretrained(resolve_checkpoint(folder))
    assert both.settings == config.model
    # stage car left MME as stage mme's best had it
    for name, tensor in motion.mme.state_dict().items():
        assert torch.equal(tensor, both.mme.state_dict()[name]), name
    best = min((r for r in log if r["stage"] == "car" and "val_loss" in r), key=lambda r: r["val_loss"])
    assert json.loads((resolve_checkpoint(folder) / "metrics.json").read_text())["val_loss"] == best["val_loss"]
    assert load_run_config(resolve_checkpoint(folder)) == config

    # never overwritten
    again = train(replace(config, stage="mme", max_steps=1))
    assert again.name == folder.name + "-2"


@pytest.mark.parametrize(
    "stage,crash",
    [(MotionStage, 4), (AppearanceStage, 1), (AppearanceStage, 4)],
    # the second: stage car is evaluated, but the last checkpoint is still stage mme's
    ids=["in-mme", "before-car's-first-checkpoint", "in-car"],
)
def test_resume_is_bit_for_bit(config, monkeypatch, stage, crash):
    whole = train(config)

    original, calls = stage.loss, []

    def crashing(self, *args):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == crash:
                raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(stage, "loss", crashing)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, name="cut"))
    monkeypatch.undo()
    resumed = train(replace(config, name="cut", resume="auto"))
    assert resumed.name == "mmnist-cut"

    for name in ("last", "best", "best-mme"):
        a, b = (read_model(f / "checkpoints" / name)[1] for f in (whole, resumed))
        for key, tensor in a.items():
            assert torch.equal(tensor, b[key]), (name, key)
    states = [torch.load(f / "checkpoints" / "last" / "training_state.pt", weights_only=True) for f in (whole, resumed)]
    for i, moments in states[0]["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1]["optimizer"]["state"][i][key]))
    assert without_times(whole) == without_times(resumed)
    assert (whole / "results.csv").read_text() == (resumed / "results.csv").read_text()


@pytest.mark.parametrize("method,crash", [("forced_loss", 3), ("loss", 2)], ids=["within", "behind the switch"])
def test_resume_with_teacher_forcing_is_bit_for_bit(config, monkeypatch, method, crash):
    config = replace(
        config, stage="mme", curriculum=1.0, training=replace(config.training, teacher_forcing=0.6, forced_frames=3)
    )
    whole = train(config)
    assert [r["horizon"] for r in records(whole) if "lr" in r] == [2, 2, 2, 1, 1]

    original, calls = getattr(MotionStage, method), []

    def crashing(self, *args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == crash:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(MotionStage, method, crashing)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, name="cut"))
    monkeypatch.undo()
    resumed = train(replace(config, name="cut", resume="auto"))
    a, b = (read_model(f / "checkpoints" / "last")[1] for f in (whole, resumed))
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())
    assert without_times(whole) == without_times(resumed)


def test_averaged_weights_are_scored_and_survive_a_crash(config, monkeypatch):
    config = replace(config, stage="mme", ema=0.6, save_every=1, keep_last=9, eval_every=5)
    whole = train(config)
    steps = [read_model(whole / "checkpoints" / f"step_{step:08d}")[1] for step in range(1, 6)]
    states = [torch.load(whole / "checkpoints" / f"step_{step:08d}" / "training_state.pt") for step in range(1, 6)]
    names = [name for name, _ in AVModel(replace(config.model, refinement="none")).named_parameters()]
    # the average before the first step is what training starts from
    first = read_model(train(replace(config, ema=0.0, name="raw", max_steps=1)) / "checkpoints" / "step_00000001")[1]
    assert all(torch.equal(first[name], steps[0][name]) for name in names)
    for i in range(1, 5):
        decay = min(0.6, (1 + i) / (10 + i))
        for name, before, after in zip(names, states[i - 1]["average"], states[i]["average"], strict=True):
            torch.testing.assert_close(after, decay * before + (1 - decay) * steps[i][name])
    _, best = read_model(whole / "checkpoints" / "best-mme")
    assert all(torch.equal(best[name], average) for name, average in zip(names, states[-1]["average"], strict=True))
    assert not all(torch.equal(best[name], steps[-1][name]) for name in names)

    original, calls = MotionStage.loss, []

    def crashing(self, *args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(MotionStage, "loss", crashing)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, name="cut"))
    monkeypatch.undo()
    folder = train(replace(config, name="cut", resume="auto")) / "checkpoints"
    assert all(torch.equal(tensor, read_model(folder / "best-mme")[1][key]) for key, tensor in best.items())


def test_frozen_statistics_are_those_of_evaluation_and_survive_a_crash(config, monkeypatch):
    config = replace(config, stage="mme", bn_freeze=0.4, save_every=1, keep_last=9)
    whole = train(config)
    steps = [read_model(whole / "checkpoints" / f"step_{step:08d}")[1] for step in range(1, 6)]
    names = [name for name in steps[0] if "running" in name]
    changed = [any(not torch.equal(a[name], b[name]) for name in names) for a, b in pairwise(steps)]
    assert changed == [True, True, True, False]
    # nothing is re-estimated before the evaluation at the end
    _, best = read_model(whole / "checkpoints" / "best-mme")
    assert all(torch.equal(best[name], steps[-1][name]) for name in names)

    original, calls = MotionStage.loss, []

    def crashing(self, *args):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 5:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(MotionStage, "loss", crashing)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, name="cut"))
    monkeypatch.undo()
    resumed = read_model(train(replace(config, name="cut", resume="auto")) / "checkpoints" / "last")[1]
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in steps[-1].items())


def test_stage_car_on_another_runs_mme(config):
    first = train(replace(config, stage="mme", max_steps=2))

    def on(path, **changes):
        training = replace(config.training, mme=str(path))
        return train(replace(config, stage="car", training=training, **changes))

    second = on(first, name="second", max_steps=2)
    motion = read_model(first / "checkpoints" / "best-mme")[1]
    weights = read_model(second / "checkpoints" / "best")[1]
    assert all(torch.equal(t, weights[name]) for name, t in motion.items())
    with pytest.raises(InputError, match="motion is 'mme' in the checkpoint, expected 'v'"):
        on(first, model=replace(config.model, motion="v"))
    with pytest.raises(InputError, match="neither a checkpoint"):
        on(first / "samples")


def test_a_resumed_run_keeps_the_steps_of_the_stages_before(config, capsys):
    folder = train(config)
    for steps in (3, 7, 30):
        longer = replace(config, resume=str(folder), training=replace(config.training, mme_steps=steps))
        with pytest.raises(InputError, match="steps of a stage before car cannot change in a resumed run"):
            train(longer)
    (folder / "checkpoints" / "last" / "training_state.pt").write_bytes(b"of another program")
    with pytest.raises(InputError, match="training_state.pt cannot be read: it is damaged, or of another program"):
        train(replace(config, resume=str(folder)))


@pytest.mark.parametrize(
    "motion,refinement", [("v", "car"), ("v+recall", "unet"), ("mme", "unet+context"), ("mme", "none")]
)
def test_every_variant_trains(config, motion, refinement):
    folder = train(replace(config, model=replace(config.model, motion=motion, refinement=refinement), max_steps=1))
    model = AVModel.from_pretrained(resolve_checkpoint(folder))
    assert (model.settings.motion, model.settings.refinement) == (motion, refinement)


def test_training_lowers_the_loss(config):
    training = PaperTraining(mme_lr=1e-3, mme_steps=30, car_steps=60)
    config = replace(config, training=training, log_every=10, eval_every=100, save_every=100)
    log = [r for r in records(train(config)) if "lr" in r]
    for stage in ("mme", "car"):
        losses = [r["loss"] for r in log if r["stage"] == stage]
        assert losses[-1] < 0.9 * losses[0], losses


def test_flow_cache_changes_nothing(config):
    config = replace(config, training=replace(config.training, car_steps=8))
    no_cache = replace(config.training, flow_cache_gb=0.0)
    with_cache, without = train(config), train(replace(config, name="without", training=no_cache))
    a, b = (read_model(f / "checkpoints" / "last")[1] for f in (with_cache, without))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_mixed_precision(config):
    log = records(train(replace(config, mixed_precision="bf16", max_steps=2)))
    assert all(np.isfinite(r["loss"]) for r in log if "lr" in r)


def test_non_finite_loss_stops_and_keeps_the_last_checkpoint(config, monkeypatch):
    original, calls = MotionStage.loss, []

    def loss(self, *args):
        value = original(self, *args)
        if torch.is_grad_enabled():
            calls.append(1)
        return value * float("nan") if len(calls) == 4 else value

    monkeypatch.setattr(MotionStage, "loss", loss)
    with pytest.raises(
        InputError, match="loss of stage mme is not finite at step 4; the last good checkpoint is step_00000002"
    ):
        train(config)
    (folder,) = Path(config.output_dir).iterdir()
    for tensor in read_model(folder / "checkpoints" / "last")[1].values():
        assert tensor.isfinite().all()


def test_full_disk_keeps_what_is_there(config, monkeypatch):
    real, calls = Path.write_bytes, []

    def write_bytes(self, content):
        if self.name == "training_state.pt":
            calls.append(self)
            if len(calls) == 2:
                real(self, b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(InputError, match="step_00000004 cannot be written: No space left on device"):
        train(config)
    (folder,) = Path(config.output_dir).iterdir()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir() if not p.name.startswith("best")) == [
        "last",
        "step_00000002",
    ]
    read_model(folder / "checkpoints" / "last")
    monkeypatch.undo()
    train(replace(config, resume=str(folder)))
