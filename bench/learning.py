"""How fast the paper's model learns by different recipes: scores on validation clips after so many minutes of training.

    python bench/learning.py --minutes 5 10 20 --recipe best="--recipe best" --recipe paper="--recipe paper"
        [--digits DIR] [--seeds 0 1 2] [--clips 200] [--threads 2] --out bench/results/0.1.0/learning--MACHINE.json

A recipe is NAME=FLAGS of `avfast train`, on top of --preset mmnist-small. Its schedules run over a number of steps, so
the steps that fill the minutes are found first, from the speed of a few steps of each kind. Three quarters of the time
are the motion stage's. What counts is the time of the training steps, without data generation, evaluations and
checkpoints. Runs are trained one after the other; nothing else should run. The file holds every run: minutes wanted and
taken, steps, and the scores of both stages, frames K+1..T predicted from K. Beside it lies a picture of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

SHARE = {"mme": 0.75, "car": 0.25}


def settings(flags: list[str]) -> dict[str, Any]:
    """The settings of `avfast train` with these flags."""
    command = [sys.executable, "-m", "avfast.train", "--preset", "mmnist-small", *flags, "--print-config"]
    return yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def trained(config: dict[str, Any], folder: str, **changes: Any) -> list[dict[str, Any]]:
    """Train a run into a folder and return its records."""
    file = Path(folder) / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    more = [word for name, value in changes.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "avfast.train", "--config", str(file), "--output-dir", folder, *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (run,) = Path(folder).glob("*/")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def batch_size(config: dict[str, Any], stage: str) -> int:
    """Clips per step of a stage."""
    return (config["training"]["car_batch_size"] if stage == "car" else None) or config["batch_size"]


def step_seconds(config: dict[str, Any]) -> dict[str, float]:
    """Mean seconds of a step of each stage over its whole schedule, from a few steps of each kind."""
    short: dict[str, Any] = {"mme_steps": 8, "car_steps": 4, "curriculum": 0, "log_every": 1, "bn_recalibrate": 1}
    share = config["training"]["teacher_forcing"]
    if share:
        short["teacher_forcing"] = 0.5
    with tempfile.TemporaryDirectory() as folder:
        records = trained(config, folder, **short, eval_clips=1, eval_every=10_000, save_every=10_000)
    times: dict[str, list[float]] = {}
    for record in records:
        if "lr" in record:
            seconds = batch_size(config, record["stage"]) / record["clips_per_s"]
            times.setdefault(record["stage"], []).append(seconds)
    # the first step of each kind warms up
    forced, free = statistics.median(times["mme"][1:4]), statistics.median(times["mme"][5:])
    given, predicted = config["context_frames"], config["pred_frames"]
    # while the horizon grows a step takes about (K + P/2) / (K + P) of the time
    growing = 1 - config["curriculum"] * (predicted / 2) / (given + predicted)
    found = {"mme": share * forced + (1 - share) * free * growing}
    if "car" in times:
        found["car"] = statistics.median(times["car"][1:]) * growing
    return found


def score(config: dict[str, Any], minutes: float, seed: int, seconds: dict[str, float], clips: int) -> dict[str, Any]:
    """Train for so many minutes and return the run's line of the results."""
    shares = SHARE if "car" in seconds else {"mme": 1.0}
    steps = {stage: max(2, round(60 * minutes * shares[stage] / seconds[stage])) for stage in seconds}
    counts = {f"{stage}_steps": count for stage, count in steps.items()}
    with tempfile.TemporaryDirectory() as folder:
        records = trained(
            config, folder, **counts, seed=seed, eval_clips=clips, eval_every=10**6, save_every=10**6, log_every=1
        )
    taken = sum(batch_size(config, r["stage"]) / r["clips_per_s"] for r in records if "lr" in r)
    row: dict[str, Any] = {"minutes": minutes, "taken": round(taken / 60, 2), "seed": seed, "steps": steps}
    for record in records:
        if "ssim" in record:
            # the last evaluation of a stage stays
            row[record["stage"]] = {name: record[name] for name in ("ssim", "psnr", "aepe")}
    return row


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """SSIM, PSNR and AEPE against minutes, a line through the means of each recipe, a point per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, label) in zip(axes, (("ssim", "SSIM"), ("psnr", "PSNR, dB"), ("aepe", "AEPE, px")), strict=True):
        for recipe, rows in results.items():
            values: dict[float, list[float]] = {}
            for row in rows:
                last = row["car"] if "car" in row and name != "aepe" else row["mme"]
                values.setdefault(row["minutes"], []).append(last[name])
            minutes = sorted(values)
            (line,) = axis.plot(minutes, [statistics.mean(values[m]) for m in minutes], label=recipe)
            axis.plot(*zip(*((m, v) for m in minutes for v in values[m]), strict=True), "o", color=line.get_color())
        axis.set(xlabel="minutes of training", ylabel=label, xscale="log")
        axis.set_xticks(minutes, [f"{m:g}" for m in minutes], minor=False)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", nargs="+", type=float, default=[5, 10, 20])
    parser.add_argument("--recipe", action="append", metavar="NAME=FLAGS", help="default: best, and the paper's")
    parser.add_argument("--digits", help="folder with MNIST's four files; default: drawn digits")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--clips", type=int, default=200, help="validation clips")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data-cache", default="data")
    parser.add_argument("--out", type=Path, required=True, help="JSON file; the picture lies beside it")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": "passive"}

    from avfast.machine.environment import environment

    recipes = dict(text.split("=", 1) for text in args.recipe or ["best=--recipe best", "paper=--recipe paper"])
    data = ["--data-cache", args.data_cache, *(["--digits", args.digits] if args.digits else [])]
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in recipes}
    about = {
        "script": ["bench/learning.py"],
        "command": "python " + shlex.join(["bench/learning.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "recipes": recipes,
        "clips": args.clips,
        "environment": environment(),
    }
    for name, text in recipes.items():
        config = settings([*data, *shlex.split(text)])
        seconds = step_seconds(config)
        for minutes in args.minutes:
            for seed in args.seeds:
                row = score(config, minutes, seed, seconds, args.clips)
                results[name].append(row)
                print(name, json.dumps(row), flush=True)
                # written after every run: an hour of them should survive a stop
                args.out.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    draw(results, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
