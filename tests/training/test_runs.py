"""Run folders: records are rewound, and no kill during a save costs a checkpoint."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

from avfast.errors import InputError
from avfast.training.runs import Run, resolve_checkpoint


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


def test_a_run_without_a_best_checkpoint_says_what_is_used(tmp_path, capsys):
    run = Run(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    for link in ("last", "best-mme", "best"):
        (run.checkpoints / link).mkdir()
        (run.checkpoints / link / "model.safetensors").touch()
        assert resolve_checkpoint(run.folder) == run.checkpoints / link
        said = f"{run.folder} has no best of its final stage: {link} is used\n"
        assert capsys.readouterr().err == ("" if link == "best" else said)
        # who names a checkpoint knows which one it is
        assert resolve_checkpoint(run.folder / link) == run.checkpoints / link and not capsys.readouterr().err
