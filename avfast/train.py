"""Train a model, stage after stage: by default the paper's, motion first (MME, Eq. 8), then appearance (CAR, Eq. 11).

python -m avfast.train --preset demo
torchrun --nproc_per_node 2 -m avfast.train --preset mmnist"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from pathlib import Path

from avfast.cli.command import run_command
from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.report import write_report
from avfast.training.config import PRESETS, TrainConfig, flag_choices, recipes
from avfast.training.runs import Run, find_run, load_run_config
from avfast.training.trainer import Trainer

# what decides the data, their order, the weights' meaning or what the best loss is compared with
_FIXED = ("data", "flow_preset", "model", "stage", "batch_size", "curriculum", "bn_freeze", "ema", "seed")
_FIXED_FRAMES = ("context_frames", "pred_frames", "eval_frames")


def train(config: TrainConfig) -> Path:
    """Train as configured and return the run folder. Raises InputError for anything the user can mend."""
    return _train(config, find_run(config)).run.folder


def _train(config: TrainConfig, run: Run | None) -> Trainer:
    trainer = Trainer(config, run)
    folder = trainer.fit()
    if trainer.accelerator.is_main_process:
        write_report(folder)
    return trainer


def main(argv: list[str] | None = None) -> None:
    read = partial(parse, TrainConfig, prog="avfast train", argv=argv, presets=PRESETS, choices=flag_choices())
    read = partial(read, recipes=recipes)
    config = read()
    run = find_run(config)
    if run is not None:
        # the run's own settings, with the flags given now on top
        own = load_run_config(run.checkpoints)
        config = read(default=own)
        for name in (*_FIXED, *_FIXED_FRAMES, *(f"training.{field}" for field in own.training.fixed)):
            if attrgetter(name)(config) != attrgetter(name)(own):
                flag = name.rpartition(".")[2].replace("_", "-")
                raise InputError(f"{flag} cannot change in a resumed run ({run.folder})")
    trainer = _train(config, run)
    if trainer.accelerator.is_main_process:
        print("\n".join([*trainer.run.summary(), f"done: {trainer.run.folder}"]))


if __name__ == "__main__":
    run_command(main)
