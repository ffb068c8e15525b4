"""`avfast train` as a process of its own: mistakes, config files, kills, several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avfast.errors import InputError
from avfast.files.settings import load_config, with_values
from avfast.models.avmodel import AVModel
from avfast.training.config import PRESETS, TrainConfig
from avfast.training.runs import Run, resolve_checkpoint

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


def command(**changes):
    """The command line that trains with FLAGS and these changes."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (FLAGS | changes).items()]
    return ["-m", "avfast.train", *flags]


def test_kill_9_and_resume_auto(tmp_path):
    runs = tmp_path / "runs"
    flags = {"data_cache": tmp_path / "data", "output_dir": runs, "mme_steps": 400, "car_steps": 1, "eval_every": 1000}
    root = Path(__file__).parents[2]
    last = runs / "mmnist-run" / "checkpoints" / "last"
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
    log = Run(runs / "mmnist-run").records()
    assert [r["step"] for r in log if "lr" in r] == list(range(1, kept + 4))
    assert [p.name for p in runs.iterdir()] == ["mmnist-run"]

    other = [sys.executable, *command(**flags, resume="auto", motion="v")]
    changed = subprocess.run(other, cwd=root, capture_output=True, text=True)
    assert changed.returncode == 2 and "model cannot change in a resumed run" in changed.stderr


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
    assert printed == with_values(PRESETS["mmnist"], {"batch_size": 4, "seed": 7, "unet_width": 8})
    for text, message in [
        ("batch_sise: 4", "unknown key 'batch_sise' (did you mean 'batch_size'?)"),
        ("batch_size: x", "batch_size is 'x'"),
        ("[", "is not YAML"),
    ]:
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError) as error:
            load_config(tmp_path / "bad.yaml", TrainConfig())
        assert message in str(error.value)


@pytest.mark.slow
def test_two_processes(tmp_path):
    program = command(data_cache=tmp_path / "data", output_dir=tmp_path / "runs", max_steps=2, batch_size=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*torchrun, *program], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    AVModel.from_pretrained(resolve_checkpoint(tmp_path / "runs" / "mmnist-run"))
