"""The training program on a tiny data set: order, resume, failures, what lies in the run folder."""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.data.mmnist import MMNISTConfig
from avfast.errors import InputError
from avfast.files.settings import load_config
from avfast.models.avmodel import AppearanceStage, AVModel, ModelConfig, MotionStage, PaperTraining
from avfast.models.registry import read_model
from avfast.train import train
from avfast.training.config import TrainConfig
from avfast.training.order import DataOrder
from avfast.training.runs import Run, load_run_config, resolve_checkpoint

FLAGS = {
    "clip_frames": 6,
    "train_clips": 8,
    "val_clips": 4,
    "test_clips": 2,
    "unet_width": 2,
    "convlstm_layers": 1,
    "context_frames": 2,
    "pred_frames": 2,
    "eval_frames": 3,
    "batch_size": 3,
    "mme_steps": 5,
    "car_steps": 4,
    "log_every": 1,
    "eval_every": 4,
    "save_every": 2,
    "bn_recalibrate": 1,
    "device": "cpu",
}


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


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def without_times(folder):
    return [{k: v for k, v in r.items() if k != "clips_per_s"} for r in records(folder)]


def test_order_is_a_permutation_per_epoch_cut_by_rank():
    whole = DataOrder(10, 4, 4, seed=3)
    halves = [DataOrder(10, 4, 2, seed=3, rank=r, world=2) for r in range(2)]
    assert whole.steps_per_epoch == 2
    seen = []
    for step in range(6):
        clips, starts = whole[step]
        parts = [h[step] for h in halves]
        assert np.array_equal(clips, np.concatenate([p[0] for p in parts]))
        assert np.array_equal(starts, np.concatenate([p[1] for p in parts]))
        assert len(set(clips)) == 4 and set(starts) <= set(range(4))
        seen.append(tuple(clips))
    assert not set(seen[0]) & set(seen[1]) and seen[:2] != seen[2:4]
    # any step can be asked for at any time
    assert tuple(DataOrder(10, 4, 4, seed=3)[5][0]) == seen[5]
    assert tuple(DataOrder(10, 4, 4, seed=4)[5][0]) != seen[5]


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


def command(**changes):
    """The command line that trains with FLAGS and these changes."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | changes).items()]
    return ["-m", "avfast.train", *flags]


def test_kill_9_and_resume_auto(cache, tmp_path):
    flags = {"data_cache": cache, "output_dir": tmp_path, "mme_steps": 400, "car_steps": 1, "eval_every": 1000}
    root = Path(__file__).parents[2]
    last = tmp_path / "mmnist-run" / "checkpoints" / "last"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, *command(**flags)], cwd=root, stdout=log, stderr=log)
        deadline = time.monotonic() + 240
        while not last.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert last.exists(), (tmp_path / "log").read_text()
    kept = int(os.readlink(last)[5:])
    assert kept < 400
    again = [sys.executable, *command(**flags, resume="auto", max_steps=kept + 2)]
    done = subprocess.run(again, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {kept} (stage mme)" in done.stdout
    log = records(tmp_path / "mmnist-run")
    assert [r["step"] for r in log if "lr" in r] == list(range(1, kept + 4))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["mmnist-run"]

    other = [sys.executable, *command(**flags, resume="auto", motion="v")]
    changed = subprocess.run(other, cwd=root, capture_output=True, text=True)
    assert changed.returncode == 2 and "model cannot change in a resumed run" in changed.stderr


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


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"pred_frames": 5}, r"context-frames with pred-frames or eval-frames is 7 frames, more than the clip's 6"),
        ({"context_frames": 6}, r"context-frames with pred-frames or eval-frames is 9 frames"),
        ({"context_frames": 0}, "expected at least 1"),
        ({"batch_size": 9}, "batch-size is 9, more than the 8 training clips"),
        ({"batch_size": 0}, "batch-size is 0"),
        ({"stage": "car"}, "--mme PATH names the motion model"),
        ({"training": PaperTraining(mme="x")}, "--mme PATH names the motion model"),
        ({"training": PaperTraining(car_steps=0)}, "car-steps is 0, expected at least 1"),
        ({"stage": "cars"}, "stage is 'cars', expected all or a stage of this model: mme, car"),
        ({"device": "tpu"}, "device is 'tpu', expected auto, cpu or cuda"),
        ({"resume": "nowhere"}, "resume is nowhere, which is not a run folder"),
        ({"output_dir": __file__}, "is not a folder"),
    ],
)
def test_bad_settings(config, changes, message):
    with pytest.raises(InputError, match=message):
        train(replace(config, **changes))
    assert not Path(config.output_dir).exists() or changes.keys() & {"device"}


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--batchsize", "4"], "unknown argument '--batchsize' (did you mean '--batch-size'?)"),
        (["--preset", "mnist"], "preset is 'mnist' (did you mean 'mmnist'?)"),
        (["--batch-size", "many"], "--batch-size"),
        (["--digits", "nowhere"], "nowhere"),
        (["--config", "nowhere.yaml"], "config file nowhere.yaml does not exist"),
    ],
)
def test_command_line_errors_are_one_line(flags, message, tmp_path):
    code = ["--output-dir", str(tmp_path / "r"), "--data-cache", str(tmp_path / "d"), "--device", "cpu"]
    result = subprocess.run(
        [sys.executable, "-m", "avfast.train", *code, *flags],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("avfast: error: ") and result.stderr.count("\n") == 1 and message in result.stderr


def test_config_file_and_print_config(tmp_path):
    (tmp_path / "c.yaml").write_text("batch_size: 4\nmodel:\n  unet_width: 8\n")
    result = subprocess.run(
        [sys.executable, "-m", "avfast.train", "--config", str(tmp_path / "c.yaml"), "--seed", "7", "--print-config"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    (tmp_path / "printed.yaml").write_text(result.stdout)
    printed = load_config(tmp_path / "printed.yaml", TrainConfig())
    assert printed == TrainConfig(batch_size=4, seed=7, model=ModelConfig(unet_width=8))
    for text, message in [
        ("batch_sise: 4", "unknown key 'batch_sise' (did you mean 'batch_size'?)"),
        ("batch_size: x", "batch_size is 'x'"),
        ("[", "is not YAML"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            load_config(tmp_path / "bad.yaml", TrainConfig())
        assert message in str(error.value)


def test_a_half_written_last_record_is_dropped(tmp_path):
    run = Run(tmp_path)
    first = {"stage": "mme", "step": 1, "loss": 2.0}
    run.log(first)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "mme", "step": 2, "lo')
    run.rewind("mme", 5)
    assert run.records() == [first]


def test_rewind_goes_by_stage_and_step(tmp_path):
    run = Run(tmp_path)
    motion = [{"stage": "mme", "step": step, "loss": 1.0} for step in (4, 5)]
    appearance = [{"stage": "car", "step": 5, "val_loss": 2.0}, {"stage": "car", "step": 6, "loss": 2.0}]
    for record in motion + appearance:
        run.log(record)
    run.rewind("car", 6)
    assert run.records() == motion + appearance
    run.rewind("car", 5)
    assert run.records() == [*motion, appearance[0]]
    run.rewind("mme", 5)
    assert run.records() == motion
    assert "car" not in (tmp_path / "results.csv").read_text()


def test_a_damaged_record_is_named(tmp_path):
    run = Run(tmp_path)
    run.log({"stage": "mme", "step": 1, "loss": 2.0})
    for damage in (b'{"stage": "mme", "st\n', b"3\n", b'{"stage": "\xff"}\n', b"\x1c\n"):
        (tmp_path / "metrics.jsonl").write_bytes(b'{"stage": "mme", "step": 1, "loss": 2.0}\n' + damage)
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
            run.rewind("mme", 1)
        run.log({"stage": "mme", "step": 3, "loss": 1.0})
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
            run.records()


class Weights:
    """Stands in for a model: its weights are one number."""

    def __init__(self, value):
        self.value = value

    def save_pretrained(self, folder):
        (folder / "config.json").write_text(str(self.value))
        (folder / "model.safetensors").write_text(str(self.value))


def weights(checkpoint):
    config, model = ((checkpoint / name).read_text() for name in ("config.json", "model.safetensors"))
    assert config == model == json.loads((checkpoint / "metrics.json").read_text())["value"]
    return int(model)


def save(run, link, step, value, keep=1):
    return run.save(link, step, Weights(value), {"value": str(value)}, keep=keep)


class Kill(BaseException):
    pass


def die_at(monkeypatch, number):
    """From here on the process dies at its call of that number that makes, renames or removes something."""
    left = number

    def mortal(call):
        def counted(*args, **kwargs):
            nonlocal left
            left -= 1
            if left:
                return call(*args, **kwargs)
            if counted is shutil.rmtree:
                # a part of the folder is gone already
                for path in sorted(Path(args[0]).glob("*"))[:1]:
                    path.unlink()
            raise Kill

        return counted

    for module, names in ((os, ("mkdir", "rename", "replace", "symlink")), (shutil, ("rmtree",))):
        for name in names:
            monkeypatch.setattr(module, name, mortal(getattr(module, name)))


def test_a_kill_during_a_save_costs_no_checkpoint(tmp_path, monkeypatch):
    """What is best already is saved again, as after a resume, and the process dies at one call after another."""
    for number in itertools.count(1):
        run = Run(tmp_path / str(number))
        run.checkpoints.mkdir(parents=True)
        save(run, "best", 4, value=4)
        save(run, "last", 4, value=4)
        die_at(monkeypatch, number)
        try:
            save(run, "best", 4, value=5)
            killed = False
        except Kill:
            killed = True
        monkeypatch.undo()

        assert weights(resolve_checkpoint(run.folder)) in ((4, 5) if killed else (5,)), number
        assert weights(run.checkpoints / "last") == 4
        for path in run.checkpoints.iterdir():
            assert path.name.startswith(".") or weights(path) in (4, 5), (number, path)
        # the next save, though of another link, clears away what was left
        best = weights(run.checkpoints / "best")
        save(run, "last", 6, value=6)
        assert not list(run.checkpoints.glob(".*")), number
        assert weights(run.checkpoints / "best") == best and weights(run.checkpoints / "last") == 6
        save(run, "best", 8, value=8)
        assert sorted(p.name for p in run.checkpoints.glob("best*")) == ["best", "best_00000008"], number
        if not killed:
            break
    assert number > 5


def test_checkpoints_of_dropped_steps_never_cost_a_new_one(tmp_path):
    """A run killed at step 8 goes on from step 4, with other intervals than before."""
    run = Run(tmp_path)
    run.checkpoints.mkdir()
    for link, step in (("last", 4), ("last", 8), ("best", 8)):
        save(run, link, step, value=step, keep=2)
    save(run, "best", 7, value=7)
    save(run, "last", 6, value=6, keep=2)
    assert weights(run.checkpoints / "best") == 7 and weights(run.checkpoints / "last") == 6
    names = ["best", "best_00000007", "last", "step_00000004", "step_00000006"]
    assert sorted(p.name for p in run.checkpoints.iterdir()) == names


@pytest.mark.slow
def test_two_processes(cache, tmp_path):
    program = command(data_cache=cache, output_dir=tmp_path, max_steps=2, batch_size=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*torchrun, *program], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    AVModel.from_pretrained(resolve_checkpoint(tmp_path / "mmnist-run"))
