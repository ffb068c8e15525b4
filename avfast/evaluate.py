"""Score runs, or anyone's predictions, as the paper's tables do.

python -m avfast.evaluate --checkpoint runs/mmnist-demo
python -m avfast.evaluate --pred p.npy --true t.npy"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor

from avfast.cli.command import run_command
from avfast.cli.parser import parse
from avfast.data.store import Batch, training_mean_image
from avfast.errors import InputError
from avfast.files.result_folder import hidden_folder, publish, sweep
from avfast.files.settings import Count, Range, check_values
from avfast.machine.device import choose_device
from avfast.machine.environment import commit
from avfast.models.base import Rollout
from avfast.models.registry import load_model, shipped_run
from avfast.report import refresh_report
from avfast.scoring.counterfactuals import (
    SoundCondition,
    check_conditions,
    describe_condition,
    other_clip,
    with_sound_of,
)
from avfast.scoring.metrics import MetricResult, ProtocolName, VideoMetrics, get_protocol
from avfast.scoring.predictors import model_predictor, reference_predictors, score
from avfast.scoring.tables import TableInfo, Tables, default_frames, format_tables
from avfast.training.config import TrainConfig
from avfast.training.runs import load_run_config, resolve_checkpoint, run_folder
from avfast.ui import plots
from avfast.ui.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class EvaluateConfig:
    """Score runs on the data they were trained for, or anyone's predictions, as the paper's tables do."""

    checkpoint: tuple[str, ...] = ()
    """Run folders (their best checkpoint) or checkpoint folders: one row each."""
    pred: str | None = None
    """Instead of --checkpoint: predictions to score, .npy (N,P,C,H,W) or (N,P,H,W), float in [0,1] or uint8."""
    true: str | None = None
    """The true frames of --pred, same shape."""
    context_frames: Annotated[int, Range(0)] | None = None
    """With --pred: the frames given before them (K), for the frame numbers only."""
    audio: tuple[SoundCondition, ...] = ("own",)
    """The sound that the models get, one row each: the clip's `own`, `shuffled` another clip's, `silent` none,
    `shifted` its own, later by --shift frames and wrapped around. Equal scores tell that the sound is not used."""
    shift: Annotated[int, Range(-(10**6), 10**6)] = 5
    """Frames by which `shifted` sound comes later; below 0 earlier."""
    split: Literal["train", "val", "test"] = "test"
    """Part of the data set that is scored."""
    clips: Count | None = None
    """Score only the first so many clips."""
    batch_size: Count = 16
    """Clips per batch and process."""
    protocol: ProtocolName = "paper"
    """Definition of SSIM and PSNR; written out under the table."""
    frames: tuple[int, ...] = ()
    """Frame numbers, from 1, that get a column; by default the first, middle and last predicted one."""
    samples: Annotated[int, Range(0)] = 2
    """Clips to draw as strips and in a GIF."""
    out: str | None = None
    """Folder for tables and pictures, by default <run>/eval (eval for a model that comes with avfast); with -2, -3 ...
    where it exists already."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`."""
    data: str | None = None
    """Folder of prepared clips to score on, by default the one the run was trained on."""
    data_cache: str | None = None
    """Where generated data sets are kept; by default the run's."""

    def check(self) -> None:
        """Raise InputError for values that cannot work together."""
        if (self.pred is None) != (self.true is None):
            raise InputError("--pred and --true go together: one is given and the other is not")
        if bool(self.checkpoint) == (self.pred is not None):
            raise InputError("expected either --checkpoint PATH or --pred P.npy --true T.npy")
        if self.checkpoint and self.context_frames is not None:
            raise InputError("context-frames goes with --pred only: a run's own number is used for --checkpoint")
        if not self.audio or len(set(self.audio)) < len(self.audio):
            raise InputError(f"audio is {' '.join(self.audio) or 'empty'}, expected every kind once at most")
        if self.pred is not None and self.audio != ("own",):
            raise InputError("audio goes with --checkpoint only: predictions are scored as they are")
        check_values(self)
        choose_device(self.device)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score, and write table.md, table.csv, results.json, curves.png and sample pictures into a new folder. Returns the
    content of results.json with "out" (the folder) and "markdown" (the tables) added. Under `torchrun` every process
    scores its share and returns the same; the first one writes. Raises InputError for what the user can mend."""
    config.check()
    return _evaluate_runs(config) if config.checkpoint else _evaluate_arrays(config)


def _evaluate_runs(config: EvaluateConfig) -> dict[str, Any]:
    checkpoints, runs = _open_runs(config.checkpoint)
    run = _scored_run(config, next(iter(runs.values())))
    k, length = run.context_frames, run.context_frames + run.eval_frames
    frames = _column_frames(config.frames, k, run.eval_frames)
    accelerator, device = _processes(config)
    main, rank, world = True, 0, 1
    if accelerator is not None:
        main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    models = {name: load_model(checkpoint, device=device) for name, checkpoint in checkpoints.items()}
    waveform = any(model.wants_waveform for model in models.values())
    predictors = {name: model_predictor(model) for name, model in models.items()}
    check_conditions(config.audio, config.shift, length)
    rows = {_row(name, condition, config.shift): name for condition in config.audio for name in models}
    # the run folder of a model that comes with avfast is not the user's
    own = Path() if shipped_run(config.checkpoint[0]) else run_folder(next(iter(checkpoints.values())))
    target = Path(config.out) if config.out else own / "eval"
    sweep([target])
    with hidden_folder(target) if main else nullcontext() as unfinished:
        with accelerator.main_process_first() if accelerator else nullcontext():
            store = run.load_split(config.split, quiet=not main)
            mean = training_mean_image(run.load_split("train", quiet=not main))
        references = reference_predictors(torch.as_tensor(mean), run.data.reference_frames())
        count = _clip_count(config.clips, len(store))
        if "shuffled" in config.audio and count < 2:
            raise InputError(f"clips is {count}, and shuffled sound wants another clip: expected 2 at least")
        firsts = range(config.batch_size * rank, count, config.batch_size * world)

        def load(clips: Sequence[int], condition: SoundCondition) -> Batch:
            starts = [0] * len(clips)
            batch = other = store.batch(clips, starts, length, device, waveform=waveform)
            if condition == "shuffled":
                others = [other_clip(i, count) for i in clips]
                other = store.batch(others, starts, length, device, waveform=waveform)
            return with_sound_of(batch, other, condition, config.shift)

        def batches(condition: SoundCondition) -> Iterator[Batch]:
            with Progress(f"scoring, {condition} sound, batches", total=len(firsts), quiet=not main) as progress:
                for done, first in enumerate(firsts, start=1):
                    yield load(range(first, min(first + config.batch_size, count)), condition)
                    progress.update(done, len(firsts))

        results: dict[str, MetricResult] = {}
        # the references are scored once, with the clips' own sound
        for condition in dict.fromkeys((*config.audio, "own")):
            heard = predictors if condition in config.audio else {}
            scored = {_row(name, condition, config.shift): predict for name, predict in heard.items()}
            scored |= references if condition == "own" else {}
            results |= score(
                batches(condition), scored, k, config.protocol, accelerator, one_object=run.data.one_object
            )
        results = {name: results[name] for name in (*rows, *references)}
        info = TableInfo(
            context_frames=k,
            frames=frames,
            source=f"{run.data.title}, {config.split} split",
            data_seed=run.data.seed,
            training_seeds={row: runs[name].seed for row, name in rows.items()},
            sound={condition: describe_condition(condition, config.shift) for condition in config.audio},
            commit=commit(),
            flow_preset=run.flow_preset,
            regenerated=run.data.regenerated,
        )
        tables = format_tables({n: results[n] for n in rows}, {n: results[n] for n in references}, info)
        if unfinished is not None:
            samples = min(config.samples, count)
            for condition in config.audio if samples else ():
                batch = load(range(samples), condition)
                for name, predict in predictors.items():
                    _save_samples(unfinished, _row(name, condition, config.shift), batch, predict(batch, k), k)
            _write(unfinished, tables, results, references, k)
            target = publish(unfinished, target)
            refresh_report(target)
        return json.loads(tables.json) | {"out": str(target), "markdown": tables.markdown}


def _scored_run(config: EvaluateConfig, run: TrainConfig) -> TrainConfig:
    """The run with the data that it is scored on."""
    if config.data_cache:
        run = replace(run, data_cache=config.data_cache)
    if config.data:
        run = replace(run, data=run.data.in_folder(config.data))
    return run


def _processes(config: EvaluateConfig) -> tuple[Accelerator | None, torch.device]:
    """The accelerator under `torchrun`, else None, and the device."""
    kind = choose_device(config.device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None, torch.device(kind)
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=kind == "cpu")
    return accelerator, accelerator.device


def _open_runs(paths: Sequence[str]) -> tuple[dict[str, Path], dict[str, TrainConfig]]:
    """Checkpoints, and the configs of their runs, by the name of their row; all share data and lengths. A model that
    comes with avfast is scored on the data of the others, and for as many frames."""
    checkpoints = [resolve_checkpoint(path) for path in paths]
    runs = [load_run_config(checkpoint) for checkpoint in checkpoints]
    shared = ("data", "context_frames", "eval_frames", "flow_preset")
    own = [i for i, path in enumerate(paths) if not shipped_run(path)]
    first = own[0] if own else 0
    for i, (path, run) in enumerate(zip(paths, runs, strict=True)):
        for field in shared if i in own or not own else ():
            value, expected = getattr(run, field), getattr(runs[first], field)
            if value != expected:
                raise InputError(
                    f"{path} has {field.replace('_', '-')} {value}, expected that of {paths[first]}, {expected}: one "
                    "table needs one data set"
                )
        if i not in own:
            runs[i] = replace(run, **{field: getattr(runs[first], field) for field in shared})
    names = [f"{run_folder(c).name}/{c.absolute().name}" for c in checkpoints]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path} gives a second row {name}, expected every checkpoint once")
    return dict(zip(names, checkpoints, strict=True)), dict(zip(names, runs, strict=True))


def _row(name: str, condition: SoundCondition, shift: int) -> str:
    ending = {"own": "", "shifted": f", sound shifted by {shift}"}
    return name + ending.get(condition, f", {condition} sound")


def _evaluate_arrays(config: EvaluateConfig) -> dict[str, Any]:
    assert config.pred is not None and config.true is not None
    pred, true = _open_array("pred", config.pred), _open_array("true", config.true)
    if pred.shape != true.shape:
        raise InputError(f"pred has shape {pred.shape}, true {true.shape}, expected the same")
    size = len(get_protocol(config.protocol).window)
    if 0 in pred.shape or min(pred.shape[-2:]) < size:
        raise InputError(f"pred has shape {pred.shape}, expected clips of frames of {size}x{size} pixels or more")
    if pred.ndim == 4:
        pred, true = pred[:, :, None], true[:, :, None]
    k, count = config.context_frames or 0, _clip_count(config.clips, len(pred))
    frames = _column_frames(config.frames, k, pred.shape[1])
    name = Path(config.pred).stem
    metrics = {name: VideoMetrics(pred.shape[1], config.protocol)}
    # a file of that name must not hide the reference
    reference = "black" if name != "black" else "black (reference)"
    metrics[reference] = VideoMetrics(pred.shape[1], config.protocol)
    target = Path(config.out or "eval")
    sweep([target])
    with hidden_folder(target) as unfinished:
        with Progress("scoring, clips", total=count) as progress:
            for start in range(0, count, config.batch_size):
                part = slice(start, min(start + config.batch_size, count))
                guess, truth = _unit_frames("pred", pred, part), _unit_frames("true", true, part)
                metrics[name].update(guess, truth)
                metrics[reference].update(torch.zeros_like(truth), truth)
                progress.update(part.stop, count)
        results = {n: m.compute() for n, m in metrics.items()}
        source = f"{config.true}, predictions {config.pred}"
        info = TableInfo(context_frames=k, frames=frames, source=source, commit=commit())
        tables = format_tables({name: results[name]}, {reference: results[reference]}, info)
        # pictures have one channel or three
        for i in range(min(config.samples, count) if pred.shape[2] in (1, 3) else 0):
            truth, guess = (_unit_frames(n, a, slice(i, i + 1))[0] for n, a in (("true", true), ("pred", pred)))
            plots.save_strip(unfinished / f"sample_{i + 1}.png", truth, guess, context_frames=0, first_frame=k + 1)
        _write(unfinished, tables, results, [reference], k)
        out = publish(unfinished, target)
    return json.loads(tables.json) | {"out": str(out), "markdown": tables.markdown}


def _open_array(flag: str, path: str) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"{flag} is {path}, which cannot be read as a .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{flag} is {path}, which is an archive, expected one .npy array")
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(f"{flag} holds {array.dtype}, expected float in [0, 1] or uint8")
    if array.ndim not in (4, 5):
        raise InputError(f"{flag} has shape {array.shape}, expected (N, P, C, H, W) or (N, P, H, W)")
    return array


def _unit_frames(flag: str, array: np.ndarray, clips: slice) -> Tensor:
    """Clips of an array as floats in [0,1]. Raises InputError for a value that is not."""
    part = array[clips]
    if part.dtype == np.uint8:
        return torch.from_numpy(part.astype(np.float32) / 255)
    # the negation catches NaN too
    wrong = ~((part >= 0) & (part <= 1))
    if wrong.any():
        clip, frame = np.argwhere(wrong)[0][:2]
        raise InputError(
            f"{flag} holds {part[wrong][0]} in clip {clips.start + clip}, frame {frame} (from 0), expected [0, 1]"
        )
    return torch.from_numpy(part.astype(np.float64))


def _column_frames(frames: tuple[int, ...], context_frames: int, pred_frames: int) -> tuple[int, ...]:
    first, last = context_frames + 1, context_frames + pred_frames
    for number in frames:
        if not first <= number <= last:
            raise InputError(f"frames holds {number}, expected numbers of predicted frames, {first} to {last}")
    return frames or default_frames(context_frames, pred_frames)


def _clip_count(wanted: int | None, available: int) -> int:
    if wanted is not None and wanted > available:
        raise InputError(f"clips is {wanted}, more than the {available} there are")
    return wanted or available


def _save_samples(out: Path, name: str, batch: Batch, prediction: Rollout, k: int) -> None:
    frames, flow = prediction.frames.cpu(), None if prediction.flow is None else prediction.flow.cpu()
    true_frames, true_flow = batch.frames.cpu(), batch.flow.cpu()
    stem = re.sub(r"[^\w.-]+", "_", name)
    for i in range(len(frames)):
        guess = None if flow is None else flow[i]
        path = out / f"sample_{stem}_{i + 1}.png"
        plots.save_strip(path, true_frames[i], frames[i], true_flow[i], guess, context_frames=k)
    plots.save_gif(out / f"samples_{stem}.gif", true_frames, frames, context_frames=k)


def _write(
    out: Path, tables: Tables, results: dict[str, MetricResult], references: Collection[str], context_frames: int
) -> None:
    for name, text in (("table.md", tables.markdown), ("table.csv", tables.csv), ("results.json", tables.json)):
        (out / name).write_text(text, encoding="utf-8")
    plots.save_metric_curves(out / "curves.png", results, context_frames=context_frames, references=references)


def main(argv: list[str] | None = None) -> None:
    result = evaluate(parse(EvaluateConfig, prog="avfast evaluate", argv=argv))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{result['markdown']}\ntables and pictures: {result['out']}")


if __name__ == "__main__":
    run_command(main)
