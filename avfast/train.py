"""Training: the motion stage (MME, Eq. 8), then the appearance stage (CAR, Eq. 11) with MME frozen.

    python -m avfast.train --preset demo
    torchrun --nproc_per_node 2 -m avfast.train --preset mmnist

One loop serves both stages; a stage says what is trained, how a batch becomes a loss, and how it predicts. The order of
the data is a function of (seed, epoch, rank) alone, so that a resumed run continues in the middle of an epoch, bit for
bit the same as an uninterrupted one on a CPU.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn

from avfast.cli.parser import parse
from avfast.data.prepared import load_split
from avfast.data.store import Batch
from avfast.errors import InputError
from avfast.machine.device import choose_device
from avfast.models import losses
from avfast.models.avmodel import AVModel, Rollout, load_weights, read_pretrained
from avfast.models.networks import batch_norms
from avfast.report import write_report
from avfast.scoring.metrics import VideoMetrics
from avfast.training.config import PRESETS, TrainConfig
from avfast.training.runs import Run, find_run, load_run_config, resolve_checkpoint
from avfast.ui import plots
from avfast.ui.progress import Progress


class DataOrder:
    """Which clips and windows make which step's batch: a function of (seed, epoch), cut into slices by rank."""

    def __init__(self, clips: int, starts: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.clips, self.starts, self.seed = clips, starts, seed
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.steps_per_epoch = clips // (batch_size * world)
        self._drawn: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))
        if self.steps_per_epoch == 0:
            raise InputError(f"batch-size is {batch_size} on {world} processes, more than the {clips} training clips")

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Clip indices and window starts of this rank's part of a step's batch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        # the thread that loads ahead asks too: what is drawn is replaced as a whole
        drawn = self._drawn
        if epoch != drawn[0]:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            order = generator.permutation(self.clips)
            self._drawn = drawn = (epoch, order, generator.integers(self.starts, size=self.clips))
        _, order, starts = drawn
        first = (position * self.world + self.rank) * self.batch_size
        clips = order[first : first + self.batch_size]
        return clips, starts[clips]


class MotionStage:
    """Stage `mme`: MME learns the true flow (Eq. 8). Its checkpoints hold the model with refinement `none`."""

    name, link = "mme", "best-mme"

    def __init__(self, config: TrainConfig, model: AVModel) -> None:
        self.config = config
        self.model = model.motion_only()
        self.trained: nn.Module = model.mme
        self.lr, self.batch_size = config.mme_lr, config.batch_size

    def loss(self, batch: Batch, key: tuple[np.ndarray, np.ndarray], horizon: int) -> Tensor:
        k, end = self.config.context_frames, self.config.context_frames + horizon
        motion = self.trained(batch.frames[:, :k], batch.flow[:, :k], batch.audio[:, :end])
        weight = self.config.smooth_weight
        return losses.motion_loss(motion.flow, batch.flow[:, k:end], batch.frames[:, k:end], weight)

    def validation_loss(self, rollout: Rollout, frames: Tensor, flow: Tensor) -> Tensor:
        return losses.motion_loss(rollout.flow, flow, frames, self.config.smooth_weight)


class AppearanceStage:
    """Stage `car`: CAR learns the true frames (Eq. 11) on the flow of a frozen MME in evaluation mode.

    MME's recurrence never sees CAR's output, so its flow of a window is kept for the next time that window comes, as
    fp32 and exact, until `flow_cache_gb` is full.
    """

    name, link = "car", "best"

    def __init__(self, config: TrainConfig, model: AVModel) -> None:
        self.config, self.model = config, model
        model.mme.requires_grad_(False).eval()
        assert model.car is not None
        self.trained: nn.Module = model.car
        self.lr, self.batch_size = config.car_lr, config.car_batch_size or config.batch_size
        self._cache: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self._free = int(config.flow_cache_gb * 2**30)

    @torch.no_grad()
    def _motion(self, batch: Batch, key: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, Tensor | None]:
        """MME's flow (B,P,2,H,W) and the audio vectors of A_K..A_{T-1} (B,P,D), from the cache or computed."""
        windows = list(zip(key[0].tolist(), key[1].tolist(), strict=True))
        if all(w in self._cache for w in windows):
            flow, *rest = (torch.stack(parts) for parts in zip(*(self._cache[w] for w in windows), strict=True))
            return flow, (rest[0] if rest else None)
        # a batch with any unknown window is computed whole: the batch size, and with it the rounding, stays the same
        k = self.config.context_frames
        motion = self.model.mme(batch.frames[:, :k], batch.flow[:, :k], batch.audio)
        audio = None if motion.audio is None else motion.audio[:, k - 1 : -1]
        for i, window in enumerate(windows):
            parts = tuple(x[i].clone() for x in (motion.flow, audio) if x is not None)
            size = sum(x.nbytes for x in parts)
            if window not in self._cache and size <= self._free:
                self._cache[window] = parts
                self._free -= size
        return motion.flow, audio

    def loss(self, batch: Batch, key: tuple[np.ndarray, np.ndarray], horizon: int) -> Tensor:
        k = self.config.context_frames
        flow, audio = self._motion(batch, key)
        frames = self.trained(batch.frames[:, k - 1], flow[:, :horizon], audio, self.model.mme.encoder)
        return losses.frame_loss(frames, batch.frames[:, k : k + horizon])

    def validation_loss(self, rollout: Rollout, frames: Tensor, flow: Tensor) -> Tensor:
        return losses.frame_loss(rollout.frames, frames)


Stage = MotionStage | AppearanceStage


class Trainer:
    """What both stages share: the accelerator, the data, the run folder."""

    def __init__(self, config: TrainConfig, run: Run | None) -> None:
        config.check()
        self.config = config
        self.accelerator = _accelerator(config)
        _seed(config)
        resumed = None if run is None else run.load_state()
        if run is None:
            # made by the main process, known to all; only the main process writes
            made = [str(Run.create(config).folder) if self.accelerator.is_main_process else ""]
            run = Run(Path(broadcast_object_list(made)[0]))
        self.run = run
        if self.accelerator.is_main_process:
            self._describe(resumed)
        with self.accelerator.main_process_first():
            quiet = not self.accelerator.is_local_main_process
            train_data = load_split(config, "train", quiet=quiet)
            self.val_data = load_split(config, "val", quiet=quiet)
        if self.accelerator.is_main_process:
            run.write("data.json", (json.dumps(train_data.parameters, indent=2) + "\n").encode())
        self.train_data = train_data.cached(config.cache, self.accelerator.device)
        self.model = AVModel(config.model).to(self.accelerator.device)
        self.resumed = resumed
        self.length = config.context_frames + config.pred_frames

    def _describe(self, resumed: dict[str, Any] | None) -> None:
        from avfast.machine.environment import environment

        print(f"run folder {self.run.folder}", flush=True)
        if resumed:
            self.run.rewind(resumed["stage"], resumed["step"])
            print(f"resumed after step {resumed['step']} (stage {resumed['stage']})", flush=True)
            return
        self.run.write("env.json", (json.dumps(environment(), indent=2) + "\n").encode())
        self.run.write("command.txt", (" ".join(sys.argv) + "\n").encode())

    def fit(self) -> Path:
        """Train the configured stages and return the run folder."""
        config, resumed = self.config, self.resumed
        done = 0
        if config.stage == "car" and config.mme is not None:
            self._load_mme(resolve_checkpoint(config.mme))
        for kind in (MotionStage, AppearanceStage):
            if config.stage not in (kind.name, "both") or (kind is AppearanceStage and self.model.car is None):
                continue
            steps = {"mme": config.mme_steps, "car": config.car_steps}[kind.name]
            steps = min(steps, config.max_steps or steps)
            if resumed and resumed["step"] >= done + steps:
                done += steps
                continue
            if kind is AppearanceStage and config.stage == "both" and not (resumed and resumed["stage"] == "car"):
                self.accelerator.wait_for_everyone()
                self._load_mme(self.run.checkpoints / "best-mme")
            stage = kind(config, self.model)
            self._train(stage, first=done, steps=steps)
            done += steps
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            write_report(self.run.folder)
        return self.run.folder

    def _load_mme(self, checkpoint: Path) -> None:
        config, weights = read_pretrained(checkpoint)
        if config.motion != self.config.model.motion:
            raise InputError(
                f"{checkpoint} holds the motion variant {config.motion!r}, expected {self.config.model.motion!r}"
            )
        own = {name.removeprefix("mme."): w for name, w in weights.items() if name.startswith("mme.")}
        load_weights(self.model.mme, own, str(checkpoint))

    def _train(self, stage: Stage, first: int, steps: int) -> None:
        """Train one stage; its steps are numbered first+1 .. first+steps in logs and checkpoints."""
        config, accelerator = self.config, self.accelerator
        optimizer = torch.optim.Adam(stage.trained.parameters(), lr=stage.lr)
        start, best = 0, math.inf
        if self.resumed and self.resumed["stage"] == stage.name:
            start, best = self.resumed["step"] - first, self.resumed["best"]
            load_weights(stage.model, read_pretrained(self.resumed["folder"])[1], str(self.resumed["folder"]))
            optimizer.load_state_dict(self.resumed["optimizer"])
            torch.set_rng_state(self.resumed["rng"])
            if accelerator.scaler:
                accelerator.scaler.load_state_dict(self.resumed["scaler"])
        self.order = DataOrder(
            len(self.train_data),
            self.train_data.clip_frames - self.length + 1,
            stage.batch_size,
            config.seed,
            accelerator.process_index,
            accelerator.num_processes,
        )
        norms = batch_norms(stage.trained)
        stage.trained, optimizer = accelerator.prepare(stage.trained, optimizer)
        parameters = list(stage.trained.parameters())
        if start == 0:
            best = self._evaluate(stage, first, best)

        pending: list[tuple[int, Tensor, Tensor]] = []
        clips = stage.batch_size * accelerator.num_processes
        description = f"stage {stage.name}"
        keys = (self.order[index] for index in range(start, steps))
        with (
            Progress(description, total=steps, done=start, quiet=not accelerator.is_local_main_process) as progress,
            closing(self.train_data.batches(keys, self.length, accelerator.device)) as batches,
        ):
            began, counted = time.perf_counter(), start
            for index in range(start, steps):
                for group in optimizer.param_groups:
                    group["lr"] = stage.lr * _schedule(config, index, steps)
                key = self.order[index]
                batch = next(batches)
                with accelerator.autocast():
                    loss = stage.loss(batch, key, _horizon(config, index, steps))
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(parameters, config.clip_grad or math.inf)
                optimizer.step()
                for module in norms:
                    module.commit()
                pending.append((first + index + 1, loss.detach(), norm))

                step, last = first + index + 1, index + 1 == steps
                save = last or (index + 1) % config.save_every == 0
                evaluate = last or (index + 1) % config.eval_every == 0
                if save or evaluate or (index + 1) % config.log_every == 0 or index == start:
                    value = self._check(stage, pending)
                    pending.clear()
                    rate = (index + 1 - counted) * clips / (time.perf_counter() - began)
                    progress.update(index + 1, steps, f"loss {value:.4f}  {rate:.1f} clips/s")
                    if accelerator.is_main_process:
                        lr = optimizer.param_groups[0]["lr"]
                        record = {"stage": stage.name, "step": step, "loss": value, "lr": lr, "clips_per_s": rate}
                        self.run.log(record | {"horizon": _horizon(config, index, steps)})
                    if index == start and accelerator.device.type == "cpu":
                        # a step's work grows with its frames
                        frames = [config.context_frames + _horizon(config, i, steps) for i in range(start, steps)]
                        total = (time.perf_counter() - began) * sum(frames) / frames[0]
                        progress.note(f"about {_time(total)} for the {steps - start} steps of stage {stage.name}")
                if evaluate:
                    best = self._evaluate(stage, step, best, progress)
                if save:
                    self._save(stage, step, best, optimizer)
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

    def _save(self, stage: Stage, step: int, best: float, optimizer: Any) -> None:
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {
            "stage": stage.name,
            "step": step,
            "best": best,
            "optimizer": optimizer.state_dict(),
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
                    self.run.save(stage.link, step, stage.model, metrics)
            text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            if self.accelerator.is_main_process:
                (progress.note if progress else print)(f"stage {stage.name}, step {step}: {text}")
        return min(best, metrics["val_loss"])

    @contextmanager
    def _recalibrated(self, stage: Stage) -> Iterator[None]:
        """Within: evaluation mode, BatchNorm's running statistics re-estimated over training batches."""
        trained = self.accelerator.unwrap_model(stage.trained)
        norms = batch_norms(trained)
        before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
        if self.config.bn_recalibrate:
            with torch.no_grad():
                for index in range(self.config.bn_recalibrate):
                    key = self.order[index]
                    batch = self.train_data.batch(*key, self.length, self.accelerator.device)
                    stage.loss(batch, key, self.config.pred_frames)
            for module in norms:
                module.sums = self.accelerator.reduce(module.sums, "sum")
                module.calls = self.accelerator.reduce(module.calls, "sum")
                module.commit(momentum=1.0)
        trained.eval()
        try:
            yield
        finally:
            trained.train()
            for module, (mean, var) in zip(norms, before, strict=True):
                module.running_mean.copy_(mean)
                module.running_var.copy_(var)

    def _validate(self, stage: Stage) -> tuple[dict[str, Any], tuple[Batch, Rollout] | None]:
        """Metrics over the validation clips, each process scoring its share; the first batch with its prediction."""
        config, accelerator = self.config, self.accelerator
        k, length = config.context_frames, config.context_frames + config.eval_frames
        clips = np.arange(min(config.eval_clips, len(self.val_data)))
        metrics = VideoMetrics(config.eval_frames, protocol="paper")
        total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        sample = None
        parts = np.array_split(clips, math.ceil(len(clips) / stage.batch_size))
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            batch = self.val_data.batch(part, np.zeros_like(part), length, accelerator.device)
            with accelerator.autocast():
                rollout = stage.model.predict(batch.frames[:, :k], batch.flow[:, :k], batch.audio)
            true_frames, true_flow = batch.frames[:, k:], batch.flow[:, k:]
            metrics.update(rollout.frames, true_frames, rollout.flow, true_flow)
            n = config.pred_frames
            seen = Rollout(rollout.frames[:, :n], rollout.flow[:, :n])
            loss = stage.validation_loss(seen, true_frames[:, :n], true_flow[:, :n])
            total += torch.stack((loss.double() * len(part), torch.tensor(float(len(part)), device=total.device)))
            sample = sample or (batch, rollout)
        total = accelerator.reduce(total, "sum")
        result = metrics.reduce(accelerator).compute()
        values = {
            "val_loss": (total[0] / total[1]).item(),
            "aepe": result.mean_aepe,
            "ssim": result.mean_ssim,
            "psnr": result.mean_psnr,
        }
        return values, sample

    def _save_sample(self, stage: Stage, step: int, batch: Batch, rollout: Rollout) -> None:
        k = self.config.context_frames
        base = self.run.folder / "samples" / f"{stage.name}_{step:08d}"
        plots.save_strip(
            base.with_suffix(".png"),
            batch.frames[0].cpu(),
            rollout.frames[0].cpu(),
            batch.flow[0].cpu(),
            rollout.flow[0].cpu(),
            context_frames=k,
        )
        plots.save_gif(base.with_suffix(".gif"), batch.frames[:4].cpu(), rollout.frames[:4].cpu(), context_frames=k)


def _accelerator(config: TrainConfig) -> Accelerator:
    cpu = choose_device(config.device) == "cpu"
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


def _horizon(config: TrainConfig, index: int, steps: int) -> int:
    """Frames predicted at optimiser step `index` (from 0) of a stage."""
    growing = config.curriculum * steps
    if index >= growing:
        return config.pred_frames
    return 1 + int((config.pred_frames - 1) * index / growing)


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


def train(config: TrainConfig) -> Path:
    """Train as configured and return the run folder. Raises InputError for anything the user can mend."""
    return Trainer(config, find_run(config)).fit()


def main(argv: list[str] | None = None) -> None:
    config = parse(TrainConfig, prog="avfast train", argv=argv, presets=PRESETS)
    run = find_run(config)
    if run is not None:
        # the run's own settings, with the flags given now on top
        own = load_run_config(run.checkpoints)
        again = parse(TrainConfig, prog="avfast train", argv=argv, presets=PRESETS, default=own)
        for name in (
            "dataset",
            "data",
            "clips.data",
            "model",
            "stage",
            "context_frames",
            "pred_frames",
            "batch_size",
            "car_batch_size",
            "curriculum",
            "seed",
        ):
            if attrgetter(name)(again) != attrgetter(name)(own):
                raise InputError(f"{name.replace('_', '-')} cannot change in a resumed run ({run.folder})")
        config = again
    trainer = Trainer(config, run)
    folder = trainer.fit()
    if trainer.accelerator.is_main_process:
        print("\n".join([*trainer.run.summary(), f"done: {folder}"]))


if __name__ == "__main__":
    from avfast.cli.command import run_command

    run_command(main)
