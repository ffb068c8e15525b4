"""Scoring as the paper's tables do: reference predictors, the scorer, the tables, and the command.

    python -m avfast.evaluate --checkpoint runs/mmnist-demo
    python -m avfast.evaluate --pred p.npy --true t.npy

A predictor is a function of (batch, K) that sees what it likes of the batch and predicts frames K+1..T. Every table has
the reference predictors beside the models, because absolute numbers depend on the data: a black frame scores an SSIM of
0.77 on 48x48 MovingMNIST.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.files.atomic import new_folder, replacing
from avfast.kernels import backward_warp
from avfast.machine.commit import commit
from avfast.machine.device import choose_device
from avfast.report import refresh_report
from avfast.scoring.counterfactuals import Hearing, check_hearing, describe, heard, other_clip
from avfast.scoring.metrics import MetricResult, ProtocolName, VideoMetrics, get_protocol
from avfast.scoring.tables import TableInfo, Tables, default_frames, format_tables
from avfast.training.config import TrainConfig
from avfast.ui import plots
from avfast.ui.progress import Progress

if TYPE_CHECKING:
    from accelerate import Accelerator

    from avfast.data.store import Batch
    from avfast.models.avmodel import AVModel


class Prediction(NamedTuple):
    """Frames K+1..T: frames (B,P,C,H,W) in [0,1], flow (B,P,2,H,W) in pixels, or None for a predictor without flow."""

    frames: Tensor
    flow: Tensor | None


Predictor = Callable[["Batch", int], Prediction]


def black(batch: Batch, k: int) -> Prediction:
    """Nothing at all."""
    return Prediction(torch.zeros_like(batch.frames[:, k:]), None)


def repeat_last(batch: Batch, k: int) -> Prediction:
    """V_K for ever, which is the warp by a zero flow."""
    return Prediction(batch.frames[:, k - 1 : k].expand_as(batch.frames[:, k:]), torch.zeros_like(batch.flow[:, k:]))


def mean_of_seen(batch: Batch, k: int) -> Prediction:
    """The mean of V_1..V_K."""
    return Prediction(batch.frames[:, :k].mean(1, keepdim=True).expand_as(batch.frames[:, k:]), None)


def mean_image(image: Tensor) -> Predictor:
    """A predictor that always answers with one image (C,H,W), such as the mean of the training set."""

    def predict(batch: Batch, k: int) -> Prediction:
        return Prediction(image.to(batch.frames).expand_as(batch.frames[:, k:]), None)

    return predict


def copy_last_flow(batch: Batch, k: int) -> Prediction:
    """F_K, the last flow that is seen, applied to V_K again and again."""
    flow = batch.flow[:, k - 1 : k].expand_as(batch.flow[:, k:])
    return Prediction(_warp_on(batch.frames[:, k - 1], flow), flow)


def oracle_flow(batch: Batch, k: int) -> Prediction:
    """The true flow warping V_K on and on: what warping alone can reach. Its flow is the truth, so it is not scored."""
    return Prediction(_warp_on(batch.frames[:, k - 1], batch.flow[:, k:]), None)


def model_predictor(model: AVModel) -> Predictor:
    """The model's free-running prediction from K frames, their flow and the whole sound."""

    def predict(batch: Batch, k: int) -> Prediction:
        return Prediction(*model.predict(batch.frames[:, :k], batch.flow[:, :k], batch.audio))

    return predict


def reference_predictors(training_mean: Tensor) -> dict[str, Predictor]:
    """The reference rows of every table, by name. training_mean: (C,H,W), the mean image of the training set."""
    return {
        "black": black,
        "repeat last frame": repeat_last,
        "mean of the seen": mean_of_seen,
        "training-set mean image": mean_image(training_mean),
        "copy-last-flow": copy_last_flow,
        "oracle-flow": oracle_flow,
    }


def _warp_on(image: Tensor, flow: Tensor) -> Tensor:
    """Warp an image (B,C,H,W) by flow (B,P,2,H,W), each result by the next flow (Eq. 4): (B,P,C,H,W)."""
    frames = []
    for step in flow.unbind(1):
        image = backward_warp(image, step, padding="border")
        frames.append(image)
    return torch.stack(frames, 1)


def score(
    batches: Iterable[Batch],
    predictors: Mapping[str, Predictor],
    context_frames: int,
    protocol: ProtocolName = "paper",
    accelerator: Accelerator | None = None,
) -> dict[str, MetricResult]:
    """Score every predictor on frames K+1..T of every batch, in constant memory.

    With an accelerator of several processes each passes its own share of the batches (which may be none) and all get
    the scores over all of them. ValueError: no batch at all, T <= K, predictions of another shape than the truth.
    """
    metrics: dict[str, VideoMetrics] = {}
    pred_frames = 0
    with torch.inference_mode():
        for batch in batches:
            true_frames, true_flow = batch.frames[:, context_frames:], batch.flow[:, context_frames:]
            pred_frames = true_frames.shape[1]
            for name, predict in predictors.items():
                if name not in metrics:
                    metrics[name] = VideoMetrics(pred_frames, protocol)
                frames, flow = predict(batch, context_frames)
                metrics[name].update(frames, true_frames, flow, None if flow is None else true_flow)
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        # a process without a batch does not know P
        pred_frames = max(gather_object([pred_frames]))
        metrics = {n: metrics.get(n, VideoMetrics(pred_frames, protocol)).reduce(accelerator) for n in predictors}
    if not metrics:
        raise ValueError("batches and predictors: at least one of each is needed, nothing was scored")
    return {name: m.compute() for name, m in metrics.items()}


@dataclass(frozen=True)
class EvaluateConfig:
    """Score runs on the data they were trained for, or anyone's predictions, as the paper's tables do."""

    checkpoint: tuple[str, ...] = ()
    """Run folders (their best checkpoint) or checkpoint folders: one row each."""
    pred: str | None = None
    """Instead of --checkpoint: predictions to score, .npy (N,P,C,H,W) or (N,P,H,W), float in [0,1] or uint8."""
    true: str | None = None
    """The true frames of --pred, same shape."""
    context_frames: int | None = None
    """With --pred: the frames given before them (K), for the frame numbers only."""
    audio: tuple[Hearing, ...] = ("own",)
    """What the models hear, one row each: the clip's `own` sound, `shuffled` another clip's, `silent` none, `shifted`
    its own, later by --shift frames and wrapped around. Equal scores tell that the sound is not used."""
    shift: int = 5
    """Frames by which `shifted` sound comes later; below 0 earlier."""
    split: Literal["train", "val", "test"] = "test"
    """Part of the data set that is scored."""
    clips: int | None = None
    """Score only the first so many clips."""
    batch_size: int = 16
    """Clips per batch and process."""
    protocol: ProtocolName = "paper"
    """Definition of SSIM and PSNR; written out under the table."""
    frames: tuple[int, ...] = ()
    """Frame numbers, from 1, that get a column; by default the first, middle and last predicted one."""
    samples: int = 2
    """Clips to draw as strips and in a GIF."""
    out: str | None = None
    """Folder for tables and pictures, by default <run>/eval; with -2, -3 ... where it exists already."""
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
        for name, least in (("clips", 1), ("batch_size", 1), ("samples", 0), ("context_frames", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', '-')} is {value}, expected at least {least}")
        choose_device(self.device)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score, and write table.md, table.csv, results.json, curves.png and sample pictures into a new folder.

    Returns the content of results.json with "out" (the folder) and "markdown" (the tables) added. Under `torchrun`
    every process scores its share and returns the same; the first one writes. Raises InputError for what the user can
    mend.
    """
    config.check()
    return _evaluate_runs(config) if config.checkpoint else _evaluate_arrays(config)


def _evaluate_runs(config: EvaluateConfig) -> dict[str, Any]:
    from avfast.data.prepared import load_split
    from avfast.data.store import training_mean_image
    from avfast.models.avmodel import AVModel
    from avfast.training.runs import run_folder

    checkpoints, runs = _open_runs(config.checkpoint)
    run = next(iter(runs.values()))
    if config.data_cache:
        run = replace(run, data_cache=config.data_cache)
    if config.data:
        if run.dataset != "clips":
            raise InputError(f"data is {config.data}, but {config.checkpoint[0]} was trained on generated clips")
        run = replace(run, clips=replace(run.clips, data=config.data))
    k, length = run.context_frames, run.context_frames + run.eval_frames
    frames = _column_frames(config.frames, k, run.eval_frames)
    accelerator = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=choose_device(config.device) == "cpu")
    main, rank, world = True, 0, 1
    device = torch.device(choose_device(config.device))
    if accelerator is not None:
        main, rank, world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
        device = accelerator.device
    models = {name: model_predictor(AVModel.from_pretrained(c, device=device)) for name, c in checkpoints.items()}
    check_hearing(config.audio, config.shift, length)
    rows = {_row(name, hearing, config.shift): name for hearing in config.audio for name in models}
    target = Path(config.out) if config.out else run_folder(next(iter(checkpoints.values()))) / "eval"
    with _new_folder(target) if main else nullcontext() as out:
        with accelerator.main_process_first() if accelerator else nullcontext():
            store = load_split(run, config.split, quiet=not main)
            mean = training_mean_image(load_split(run, "train", quiet=not main))
        references = reference_predictors(torch.as_tensor(mean))
        count = _clip_count(config.clips, len(store))
        if "shuffled" in config.audio and count < 2:
            raise InputError(f"clips is {count}, and shuffled sound wants another clip: expected 2 at least")
        firsts = range(config.batch_size * rank, count, config.batch_size * world)

        def load(clips: Sequence[int], hearing: Hearing) -> Batch:
            starts = [0] * len(clips)
            batch = store.batch(clips, starts, length, device)
            audio = batch.audio
            if hearing == "shuffled":
                audio = store.batch([other_clip(i, count) for i in clips], starts, length, device).audio
            return batch._replace(audio=heard(audio, hearing, config.shift))

        def batches(hearing: Hearing) -> Iterator[Batch]:
            with Progress(f"scoring, {hearing} sound, batches", total=len(firsts), quiet=not main) as progress:
                for done, first in enumerate(firsts, start=1):
                    yield load(range(first, min(first + config.batch_size, count)), hearing)
                    progress.update(done, len(firsts))

        results: dict[str, MetricResult] = {}
        for hearing in config.audio:
            predictors = {_row(name, hearing, config.shift): predict for name, predict in models.items()}
            # the references hear nothing: once is enough
            predictors |= {} if results else references
            results |= score(batches(hearing), predictors, k, config.protocol, accelerator)
        results = {name: results[name] for name in (*rows, *references)}
        info = TableInfo(
            context_frames=k,
            frames=frames,
            source=f"{_data_name(run)}, {config.split} split",
            data_seed=run.data.data_seed if run.dataset == "mmnist" else None,
            training_seeds={row: runs[name].seed for row, name in rows.items()},
            sound={hearing: describe(hearing, config.shift) for hearing in config.audio},
            commit=commit(),
            flow_preset=run.flow_preset,
            regenerated=run.dataset == "mmnist",
        )
        tables = format_tables({n: results[n] for n in rows}, {n: results[n] for n in references}, info)
        if out is not None:
            samples = min(config.samples, count)
            for hearing in config.audio if samples else ():
                batch = load(range(samples), hearing)
                for name, predict in models.items():
                    _save_samples(out, _row(name, hearing, config.shift), batch, predict(batch, k), k)
            _write(out, tables, results, references, k)
            refresh_report(out)
        return json.loads(tables.json) | {"out": str(out or target), "markdown": tables.markdown}


def _data_name(run: TrainConfig) -> str:
    return "Multimodal MovingMNIST" if run.clips.data is None else Path(run.clips.data).absolute().name


def _open_runs(paths: Sequence[str]) -> tuple[dict[str, Path], dict[str, TrainConfig]]:
    """Checkpoints, and the configs of their runs, by the name of their row; all share data and lengths."""
    from avfast.training.runs import load_run_config, resolve_checkpoint, run_folder

    checkpoints = [resolve_checkpoint(path) for path in paths]
    runs = [load_run_config(checkpoint) for checkpoint in checkpoints]
    for path, run in zip(paths, runs, strict=True):
        for field in ("dataset", "data", "clips.data", "context_frames", "eval_frames", "flow_preset"):
            value, first = attrgetter(field)(run), attrgetter(field)(runs[0])
            if value != first:
                raise InputError(
                    f"{path} has {field.replace('_', '-')} {value}, expected that of {paths[0]}, {first}: one table "
                    "needs one data set"
                )
    names = [f"{run_folder(c).name}/{c.absolute().name}" for c in checkpoints]
    for path, name in zip(paths, names, strict=True):
        if names.count(name) > 1:
            raise InputError(f"{path} gives a second row {name}, expected every checkpoint once")
    return dict(zip(names, checkpoints, strict=True)), dict(zip(names, runs, strict=True))


def _row(name: str, hearing: Hearing, shift: int) -> str:
    ending = {"own": "", "shifted": f", sound shifted by {shift}"}
    return name + ending.get(hearing, f", {hearing} sound")


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
    with _new_folder(Path(config.out or "eval")) as out:
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
            plots.save_strip(out / f"sample_{i + 1}.png", truth, guess, context_frames=0, first_frame=k + 1)
        _write(out, tables, results, [reference], k)
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
    if not frames:
        return default_frames(context_frames, pred_frames)
    first, last = context_frames + 1, context_frames + pred_frames
    for number in frames:
        if not first <= number <= last:
            raise InputError(f"frames holds {number}, expected numbers of predicted frames, {first} to {last}")
    return frames


def _clip_count(wanted: int | None, available: int) -> int:
    if wanted is not None and wanted > available:
        raise InputError(f"clips is {wanted}, more than the {available} there are")
    return wanted or available


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """`new_folder`, removed again when the block fails and left it empty."""
    folder = new_folder(path)
    try:
        yield folder
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def _save_samples(out: Path, name: str, batch: Batch, prediction: Prediction, k: int) -> None:
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
        with replacing(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    plots.save_metric_curves(out / "curves.png", results, context_frames=context_frames, references=references)


def main(argv: list[str] | None = None) -> None:
    result = evaluate(parse(EvaluateConfig, prog="avfast evaluate", argv=argv))
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{result['markdown']}\ntables and pictures: {result['out']}")


if __name__ == "__main__":
    from avfast.cli.command import run_command

    run_command(main)
