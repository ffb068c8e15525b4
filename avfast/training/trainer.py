"""The training loop, the same for every stage of every model; a stage says what is trained and how a batch becomes a
loss (`avfast.models.base.Stage`)."""

from __future__ import annotations

import json
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from avfast.data.store import Batch
from avfast.errors import InputError
from avfast.machine.device import choose_device
from avfast.machine.environment import environment
from avfast.models.base import Rollout, Stage
from avfast.models.checkpoint import load_weights
from avfast.models.networks import BatchNorm, batch_norms
from avfast.models.registry import MODELS, build_model, read_model
from avfast.scoring.metrics import VideoMetrics
from avfast.training.config import TrainConfig
from avfast.training.order import DataOrder
from avfast.training.runs import Run, best_link, resolve_checkpoint
from avfast.ui import plots
from avfast.ui.progress import Progress


class Trainer:
    """One training run: the accelerator, the data, the model, the run folder, and the loop over all of it."""

    def __init__(self, config: TrainConfig, run: Run | None) -> None:
        config.check()
        self.config = config
        self.accelerator = _accelerator(config)
        _seed(config)
        self.resumed = None if run is None else run.load_state()
        # the run folder is made last: a mistake in the settings leaves none behind
        with self.accelerator.main_process_first():
            quiet = not self.accelerator.is_local_main_process
            train_data = config.load_split("train", quiet=quiet)
            self.val_data = config.load_split("val", quiet=quiet)
        self.waveform = MODELS[config.model.name].wants_waveform
        self.train_data = train_data.cached(config.cache, self.accelerator.device, waveform=self.waveform)
        self.model = build_model(config.model).to(self.accelerator.device)
        self.length = config.context_frames + config.pred_frames
        for name, path in config.training.earlier_checkpoints().items():
            self._load_stage(name, resolve_checkpoint(path))
        if run is None:
            # made by the main process, known to all; only the main process writes
            made = [str(Run.create(config).folder) if self.accelerator.is_main_process else ""]
            run = Run(Path(broadcast_object_list(made)[0]))
        self.run = run
        if self.accelerator.is_main_process:
            self._begin_run(train_data.parameters)

    def _begin_run(self, data_parameters: dict[str, Any]) -> None:
        print(f"run folder {self.run.folder}", flush=True)
        for name, content in (("data.json", data_parameters), ("env.json", environment())):
            self.run.write(name, (json.dumps(content, indent=2) + "\n").encode())
        self.run.write_settings(self.config)
        with open(self.run.folder / "command.txt", "a") as file:
            file.write(" ".join(sys.argv) + "\n")
        if self.resumed:
            self.run.rewind(self.resumed["stage"], self.resumed["step"])
            print(f"resumed after step {self.resumed['step']} (stage {self.resumed['stage']})", flush=True)

    def fit(self) -> Path:
        """Train the configured stages and return the run folder."""
        config, resumed = self.config, self.resumed
        names = config.stage_names if config.stage == "all" else (config.stage,)
        done = 0
        for i, name in enumerate(names):
            if i > 0 and not (resumed and resumed["stage"] == name):
                # a stage begins with the best weights of the one before it
                self.accelerator.wait_for_everyone()
                self._load_stage(names[i - 1], self.run.checkpoints / best_link(config, names[i - 1]))
            stage = self.model.stage(name, config.training, config.context_frames)
            steps = min(stage.steps, config.max_steps or stage.steps)
            if resumed and resumed["stage"] == name and resumed.get("first_step", min(done, resumed["step"])) != done:
                raise InputError(
                    f"the steps of a stage before {name} cannot change in a resumed run ({self.run.folder})"
                )
            if not (resumed and resumed["step"] >= done + steps):
                self._train(stage, first=done, steps=steps)
            done += steps
        self.accelerator.end_training()
        return self.run.folder

    def _load_stage(self, name: str, checkpoint: Path) -> None:
        """Load the weights of a stage that ended before this one begins."""
        settings, weights = read_model(checkpoint)
        model = self.model.stage(name, self.config.training, self.config.context_frames).model
        load_weights(model, model.stage_weights(settings, weights), str(checkpoint))

    def _train(self, stage: Stage, first: int, steps: int) -> None:
        """Train one stage; its steps are numbered first+1 .. first+steps in logs and checkpoints."""
        config, accelerator = self.config, self.accelerator
        optimizer = torch.optim.Adam(stage.trained.parameters(), lr=stage.lr)
        batch_size = stage.batch_size or config.batch_size
        start, best = 0, math.inf
        if self.resumed and self.resumed["stage"] == stage.name:
            start, best = self.resumed["step"] - first, self.resumed["best"]
            load_weights(stage.model, read_model(self.resumed["folder"])[1], str(self.resumed["folder"]))
            optimizer.load_state_dict(self.resumed["optimizer"])
            torch.set_rng_state(self.resumed["rng"])
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(self.resumed["scaler"])
        starts = self.train_data.clip_frames - self.length + 1
        rank, world = accelerator.process_index, accelerator.num_processes
        self.order = DataOrder(len(self.train_data), starts, batch_size, config.seed, rank, world)
        norms = batch_norms(stage.trained)
        stage.trained, optimizer = accelerator.prepare(stage.trained, optimizer)
        parameters = list(stage.trained.parameters())
        self.average = [parameter.detach().clone() for parameter in parameters] if config.ema else []
        if self.resumed and start:
            for mine, saved in zip(self.average, self.resumed.get("average", []), strict=True):
                mine.copy_(saved)
        if start == 0:
            best = self._evaluate(stage, first, best)

        pending: list[tuple[int, Tensor, Tensor]] = []
        quiet = not accelerator.is_local_main_process
        keys = (self.order[index] for index in range(start, steps))
        with (
            Progress(f"stage {stage.name}", total=steps, done=start, quiet=quiet) as progress,
            closing(self.train_data.batches(keys, self.length, accelerator.device, waveform=self.waveform)) as batches,
        ):
            began, counted = time.perf_counter(), start
            for index in range(start, steps):
                if index == steps - round(config.bn_freeze * steps):
                    self._estimate_statistics(stage, norms)
                if index >= steps - round(config.bn_freeze * steps):
                    for module in norms:
                        module.frozen = True
                for group in optimizer.param_groups:
                    group["lr"] = stage.lr * _schedule(config, index, steps)
                key, batch = self.order[index], next(batches)
                forced, horizon = index < stage.forced_share * steps, _horizon(stage, config, index, steps)
                with accelerator.autocast():
                    loss = stage.forced_loss(batch) if forced else stage.loss(batch, key, horizon)
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(parameters, config.clip_grad or math.inf)
                optimizer.step()
                if self.average:
                    # shorter at first: the weights that training starts from are soon forgotten
                    decay = min(config.ema, (1 + index) / (10 + index))
                    get_ema_multi_avg_fn(decay)(self.average, parameters, index)
                for module in norms:
                    module.commit()
                pending.append((first + index + 1, loss.detach(), norm))

                step, last = first + index + 1, index + 1 == steps
                save = last or (index + 1) % config.save_every == 0
                evaluate = last or (index + 1) % config.eval_every == 0
                if save or evaluate or (index + 1) % config.log_every == 0 or index == start:
                    value = self._check(stage, pending)
                    pending.clear()
                    rate = (index + 1 - counted) * batch_size * world / (time.perf_counter() - began)
                    progress.update(index + 1, steps, f"loss {value:.4f}  {rate:.1f} clips/s")
                    if accelerator.is_main_process:
                        lr = optimizer.param_groups[0]["lr"]
                        record = {"stage": stage.name, "step": step, "loss": value, "lr": lr, "clips_per_s": rate}
                        self.run.log(record | {"horizon": horizon})
                    if index == start and accelerator.device.type == "cpu":
                        # a step's work grows with its frames
                        frames = [
                            config.context_frames + _horizon(stage, config, i, steps) for i in range(start, steps)
                        ]
                        total = (time.perf_counter() - began) * sum(frames) / frames[0]
                        progress.note(f"about {_time(total)} for the {steps - start} steps of stage {stage.name}")
                if evaluate:
                    best = self._evaluate(stage, step, best, progress)
                if save:
                    self._save(stage, first, step, best, optimizer)
                if save or evaluate:
                    began, counted = time.perf_counter(), index + 1
        stage.trained = accelerator.unwrap_model(stage.trained)

    def _check(self, stage: Stage, pending: list[tuple[int, Tensor, Tensor]]) -> float:
        """The mean loss since the last record. Raises InputError at the first non-finite loss or gradient; under fp16
        the gradient scaler already skips steps with such a gradient."""
        for step, loss, norm in pending:
            if not math.isfinite(loss.item()) or (self.config.mixed_precision != "fp16" and not math.isfinite(norm)):
                what = "loss" if not math.isfinite(loss.item()) else "gradient"
                kept = "no checkpoint was written yet"
                if (self.run.checkpoints / "last").exists():
                    kept = f"the last good checkpoint is {(self.run.checkpoints / 'last').resolve().name}"
                raise InputError(f"the {what} of stage {stage.name} is not finite at step {step}; {kept}")
        return sum(loss.item() for _, loss, _ in pending) / len(pending)

    def _save(self, stage: Stage, first: int, step: int, best: float, optimizer: Any) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {
            "stage": stage.name,
            "step": step,
            "first_step": first,
            "best": best,
            "optimizer": optimizer.state_dict(),
            "average": self.average,
            "rng": torch.get_rng_state(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        self.run.save("last", step, stage.model, {"stage": stage.name, "step": step}, state, self.config.keep_last)

    def _evaluate(self, stage: Stage, step: int, best: float, progress: Progress | None = None) -> float:
        """Score the stage on the validation split with re-estimated BatchNorm statistics, write pictures, and save the
        model if it is the best so far. Training goes on as if nothing had happened."""
        with self._recalibrated(stage):
            metrics, sample = self._validate(stage)
            if self.accelerator.is_main_process:
                self.run.log({"stage": stage.name, "step": step, **metrics})
                self.run.write_results()
                plots.save_loss_curves(self.run.folder / "metrics.jsonl", self.run.folder / "curves.png")
                if sample:
                    self._save_sample(stage, step, *sample)
                if metrics["val_loss"] < best:
                    self.run.save(best_link(self.config, stage.name), step, stage.model, metrics)
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)
            if self.accelerator.is_main_process:
                (progress.note if progress else print)(f"stage {stage.name}, step {step}: {text}")
        return min(best, metrics["val_loss"])

    @contextmanager
    def _recalibrated(self, stage: Stage) -> Iterator[None]:
        """Within: evaluation mode, averaged weights, BatchNorm's running statistics re-estimated over training batches
        with them."""
        trained = self.accelerator.unwrap_model(stage.trained)
        norms = batch_norms(trained)
        before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
        averaged = list(zip(trained.parameters(), self.average, strict=True)) if self.average else []
        weights = [parameter.detach().clone() for parameter, _ in averaged]
        for parameter, average in averaged:
            parameter.data.copy_(average)
        self._estimate_statistics(stage, norms)
        trained.eval()
        try:
            yield
        finally:
            trained.train()
            for module, (mean, var) in zip(norms, before, strict=True):
                module.running_mean.copy_(mean)
                module.running_var.copy_(var)
            for (parameter, _), weight in zip(averaged, weights, strict=True):
                parameter.data.copy_(weight)

    def _estimate_statistics(self, stage: Stage, norms: list[BatchNorm]) -> None:
        """Set BatchNorm's running statistics to their means over training batches, unless they are frozen."""
        if not self.config.bn_recalibrate or any(module.frozen for module in norms):
            return
        with torch.no_grad():
            for index in range(self.config.bn_recalibrate):
                key = self.order[index]
                batch = self.train_data.batch(*key, self.length, self.accelerator.device, waveform=self.waveform)
                stage.loss(batch, key, self.config.pred_frames)
        for module in norms:
            module.sums = self.accelerator.reduce(module.sums, "sum")
            module.calls = self.accelerator.reduce(module.calls, "sum")
            module.commit(momentum=1.0)

    def _validate(self, stage: Stage) -> tuple[dict[str, Any], tuple[Batch, Rollout] | None]:
        """Metrics over the validation clips, each process scoring its share; the first batch with its prediction."""
        config, accelerator = self.config, self.accelerator
        k, length = config.context_frames, config.context_frames + config.eval_frames
        clips = np.arange(min(config.eval_clips, len(self.val_data)))
        metrics = VideoMetrics(config.eval_frames, protocol="paper")
        total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        sample = None
        batch_size = stage.batch_size or config.batch_size
        parts = np.array_split(clips, math.ceil(len(clips) / batch_size))
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            batch = self.val_data.batch(part, np.zeros_like(part), length, accelerator.device, waveform=self.waveform)
            with accelerator.autocast():
                rollout = stage.model.predict(batch.frames[:, :k], batch.flow[:, :k], stage.model.sound(batch))
            true_flow = None if rollout.flow is None else batch.flow[:, k:]
            metrics.update(rollout.frames, batch.frames[:, k:], rollout.flow, true_flow)
            # the loss is that of as many frames as training predicts
            n = min(config.pred_frames, config.eval_frames)
            loss = stage.validation_loss(rollout.first_frames(n), batch.first_frames(k + n))
            total += torch.stack((loss.double() * len(part), torch.tensor(float(len(part)), device=total.device)))
            sample = sample or (batch, rollout)
        total = accelerator.reduce(total, "sum")
        result = metrics.reduce(accelerator).compute()
        scores = {"aepe": result.mean_aepe, "ssim": result.mean_ssim, "psnr": result.mean_psnr}
        return {"val_loss": (total[0] / total[1]).item(), **scores}, sample

    def _save_sample(self, stage: Stage, step: int, batch: Batch, rollout: Rollout) -> None:
        k = self.config.context_frames
        base = self.run.folder / "samples" / f"{stage.name}_{step:08d}"
        base.parent.mkdir(exist_ok=True)
        true, true_flow = batch.frames[:4].cpu(), batch.flow[0].cpu()
        frames, flow = rollout.frames[:4].cpu(), None if rollout.flow is None else rollout.flow[0].cpu()
        plots.save_strip(base.with_suffix(".png"), true[0], frames[0], true_flow, flow, context_frames=k)
        plots.save_gif(base.with_suffix(".gif"), true, frames, context_frames=k)


def _accelerator(config: TrainConfig) -> Accelerator:
    cpu = choose_device(config.device) == "cpu"
    if cpu and config.mixed_precision == "fp16":
        # accelerate would train in fp32 without a word
        raise InputError("mixed-precision is fp16 on the CPU, expected bf16 or no")
    # every process computes its own batch statistics, averaged when they are re-estimated
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # PyTorch 2.11 knows no other name
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # accelerate keeps the first precision of a process and refuses another
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision=config.mixed_precision, cpu=cpu, kwargs_handlers=[ddp])


def _seed(config: TrainConfig) -> None:
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)
    torch.manual_seed(config.seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True)


def _schedule(config: TrainConfig, index: int, steps: int) -> float:
    """Factor on the learning rate at optimiser step `index` (from 0) of a stage."""
    if config.schedule == "constant":
        return 1.0
    warmup = max(1, round(0.02 * steps))
    if index < warmup:
        return (index + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (index - warmup) / max(1, steps - warmup)))


def _horizon(stage: Stage, config: TrainConfig, index: int, steps: int) -> int:
    """Frames predicted at optimiser step `index` (from 0) of a stage; all of them with teacher forcing."""
    forced = stage.forced_share * steps
    growing = config.curriculum * (steps - forced) if stage.grows else 0
    if index < forced or index - forced >= growing:
        return config.pred_frames
    return 1 + int((config.pred_frames - 1) * (index - forced) / growing)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
