"""Run folders and checkpoints: where a training run lives, how it is written without ever losing what is there, and how
it is found again.

    runs/<dataset>-<name>[-N]/
        config.yaml env.json command.txt        what was asked, where
        data.json                               every parameter of the training data
        metrics.jsonl results.csv               every logged step; every evaluation
        curves.png samples/                     loss curves; strips and GIFs of validation clips
        checkpoints/step_00000500/              config.json + model.safetensors (loadable by from_pretrained),
                                                training_state.pt, metrics.json
        checkpoints/last, best, best-mme        links to the newest, the best of the final stage, the best of stage mme

A checkpoint appears whole (`files.result_folder`), then its link is replaced atomically, then older ones are removed.
So whenever a run is killed, every link leads to a whole checkpoint, the old one or the new one, and every visible
checkpoint is whole; what is left hidden is removed at the next save. Where a step's checkpoint is there already (after
a resume) the new one is written beside it, with -2, -3 ... appended: were the old one moved away first, its link would
lead nowhere until the new one is in its place."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch

from avfast.data.film_clips import InputSpec
from avfast.errors import InputError
from avfast.files.atomic import numbered, read_records, replacing
from avfast.files.result_folder import ResultFolder, hidden_folder, publish, remove_folder, sweep
from avfast.files.settings import load_config, to_dict
from avfast.models.base import VideoModel
from avfast.models.registry import shipped_run
from avfast.training.config import TrainConfig, flag_choices


class Run:
    """One run folder, written by the main process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"

    @classmethod
    def create(cls, config: TrainConfig) -> Run:
        """Make a new run folder; one that exists is never touched: -2, -3 ... is appended."""
        folder = _base_folder(config)
        sweep([folder])
        try:
            with hidden_folder(folder) as unfinished:
                for name in ("checkpoints", "samples"):
                    (unfinished / name).mkdir()
                cls(unfinished).write_settings(config)
                return cls(publish(unfinished, folder))
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"output-dir is {config.output_dir}, which is not a folder") from None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file under a temporary name, then rename."""
        with replacing(self.folder / name) as temporary:
            temporary.write_bytes(content)

    def write_settings(self, config: TrainConfig) -> None:
        """Write config.yaml. What a resumed run may change is as at its last start."""
        import yaml

        self.write("config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False).encode())

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Every record of metrics.jsonl, none where it is not written yet. Raises InputError for a damaged line."""
        path = self.folder / "metrics.jsonl"
        return read_records(path) if path.exists() else []

    def rewind(self, stage: str, step: int) -> None:
        """Drop the records after a step of a stage: a resumed run writes them again."""
        records = self.records()
        # stages in their order: the first evaluation of one has the step at which the stage before it ended
        order = list(dict.fromkeys([*(r["stage"] for r in records), stage]))
        last = (order.index(stage), step)
        kept = [r for r in records if (order.index(r["stage"]), r["step"]) <= last]
        self.write("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept).encode())
        self.write_results()

    def summary(self) -> list[str]:
        """A line per stage: the validation loss before its first step and the lowest since."""
        losses: dict[str, list[float]] = {}
        for record in self.records():
            if "val_loss" in record:
                losses.setdefault(record["stage"], []).append(record["val_loss"])
        return [f"stage {s}: validation loss {v[0]:.4g} untrained, {min(v):.4g} at best" for s, v in losses.items()]

    def write_results(self) -> None:
        """Write results.csv, one row per evaluation, from metrics.jsonl."""
        rows = [r for r in self.records() if "val_loss" in r]
        names = list(dict.fromkeys(name for r in rows for name in r))
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        self.write("results.csv", text.getvalue().encode())

    def save(
        self,
        link: str,
        step: int,
        model: VideoModel,
        metrics: dict[str, Any],
        state: dict[str, Any] | None = None,
        keep: int = 1,
    ) -> Path:
        """Write a checkpoint, point `link` at it and return its folder.

        Of that link's other checkpoints the newest `keep` - 1 of earlier steps stay. Those of this step or later ones
        were written by a run that was killed and went on from an earlier step: they are removed.

        Raises InputError naming the folder when it cannot be written; what was there stays."""
        prefix = "step" if link == "last" else link
        name = f"{prefix}_{step:08d}"
        final = next(path for path in numbered(self.checkpoints / name) if not path.exists())
        try:
            sweep([final])
            for unfinished in self.checkpoints.glob(".*.tmp"):
                unfinished.unlink()
            result = ResultFolder(final)
            if not result.claim():
                raise InputError(f"the checkpoint {final} is being written by another process")
            with result.writing() as folder:
                model.save_pretrained(folder)
                if state is not None:
                    # through memory: torch.save reports a full disk as an internal error without a file name
                    buffer = io.BytesIO()
                    torch.save(state, buffer)
                    (folder / "training_state.pt").write_bytes(buffer.getbuffer())
                (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
            with replacing(self.checkpoints / link) as pointer:
                pointer.symlink_to(final.name)
        except OSError as error:
            raise InputError(f"the checkpoint {final} cannot be written: {error.strerror or error}") from None
        others = sorted((p for p in self.checkpoints.glob(f"{prefix}_[0-9]*") if p != final), reverse=True)
        earlier = [path for path in others if path.name < name]
        for old in others:
            if old not in earlier[: keep - 1]:
                remove_folder(old)
        return final

    def load_state(self) -> dict[str, Any] | None:
        """The training state of the last checkpoint with its folder under "folder", or None where there is none."""
        last = self.checkpoints / "last"
        if not last.exists():
            return None
        try:
            state = torch.load(last / "training_state.pt", weights_only=True, map_location="cpu")
        except Exception:
            # PyTorch's own words are five sentences, of which one advises to load pickles
            state = None
        if not isinstance(state, dict) or not {"stage", "step", "best", "optimizer", "rng", "scaler"} <= state.keys():
            raise InputError(f"{last / 'training_state.pt'} cannot be read: it is damaged, or of another program")
        return {**state, "folder": last.resolve()}


def _base_folder(config: TrainConfig) -> Path:
    return Path(config.output_dir) / f"{config.data.name}-{config.name}"


def best_link(config: TrainConfig, stage: str) -> str:
    """The link to the best checkpoint of a stage: `best` is that of the model's final one."""
    return "best" if stage == config.stage_names[-1] else f"best-{stage}"


def find_run(config: TrainConfig) -> Run | None:
    """The run that --resume names: with `auto` the newest of this name that has a checkpoint, or None."""
    if config.resume is None:
        return None
    if config.resume != "auto":
        folder = Path(config.resume)
        if not (folder / "config.yaml").is_file():
            raise InputError(f"resume is {config.resume}, which is not a run folder (no config.yaml)")
        if not (folder / "checkpoints" / "last").exists():
            raise InputError(f"resume is {config.resume}, which has no checkpoint to resume from")
        return Run(folder)
    base = _base_folder(config)
    earlier = [p for p in base.parent.glob(f"{base.name}-*") if p.name[len(base.name) + 1 :].isdigit()]
    runs = [p for p in (base, *earlier) if (p / "checkpoints" / "last").exists()]
    return Run(max(runs, key=lambda p: (p / "checkpoints" / "last").stat().st_mtime_ns)) if runs else None


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint folder that a path means: a checkpoint itself, RUN/best or RUN/last in short for that in
    RUN/checkpoints, or of a run folder the best, else the last; one line on stderr says where it is not the best of
    the run's final stage. The name of a model that comes with avfast means its run folder. Raises InputError when there
    is none."""
    path = shipped_run(path) or Path(path)
    for checkpoint in (path, path.parent / "checkpoints" / path.name):
        if (checkpoint / "model.safetensors").is_file():
            return checkpoint
    folder = path / "checkpoints"
    # of a run whose final stage was not trained, the best of the latest stage
    earlier = [p for p in folder.glob("best-*") if not p.name[-8:].isdigit()]
    earlier.sort(key=lambda p: p.resolve().name[-8:], reverse=True)
    for checkpoint in (folder / "best", *earlier, folder / "last"):
        if checkpoint.is_symlink() and not (checkpoint / "model.safetensors").is_file():
            raise InputError(f"{checkpoint} is damaged, it has no model.safetensors: name another checkpoint")
        if (checkpoint / "model.safetensors").is_file():
            if checkpoint.name != "best":
                print(f"{path} has no best of its final stage: {checkpoint.name} is used", file=sys.stderr)
            return checkpoint
    raise InputError(f"{path} is neither a checkpoint (no model.safetensors) nor a run folder with one")


def run_folder(checkpoint: str | Path) -> Path:
    """The run folder that a checkpoint lies in; the folder above it where it lies in none."""
    parent = Path(checkpoint).absolute().parent
    return parent.parent if parent.name == "checkpoints" else parent


def load_run_config(checkpoint: str | Path) -> TrainConfig:
    """The training config of the run that a checkpoint lies in. Raises InputError when there is none."""
    choices = {field: classes for fields in flag_choices().values() for field, classes in fields.items()}
    for folder in Path(checkpoint).absolute().parents:
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml", TrainConfig(), choices)
    raise InputError(f"{checkpoint} lies in no run folder: no config.yaml above it")


def read_data_parameters(checkpoint: str | Path) -> dict[str, Any]:
    """Every parameter of the data that the run of a checkpoint was trained on. Raises InputError without data.json."""
    path = run_folder(checkpoint) / "data.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read, which tells what the run was trained on: {error}") from None


def input_spec(checkpoint: Path, run: TrainConfig) -> InputSpec:
    """How the model of a run's checkpoint is fed: as the run's training data was read. Raises InputError where the run
    does not tell, and where films cannot be read so."""
    clips = run.data.clip_settings(lambda: read_data_parameters(checkpoint), run.model.image_channels)
    return InputSpec(run.context_frames, run.eval_frames, run.flow_preset, clips)
