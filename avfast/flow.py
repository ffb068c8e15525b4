"""TV-L1 flow of videos and image folders into files.

    python -m avfast.flow clips/ --out flow
    avfast flow 'films/**/*.mp4' --out flow --recipe i3d

avfast.opticalflow.flow_pipeline does the work and says what lies in the folders, avfast.opticalflow.flow_files how."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from avfast.cli.command import print_failures, run_command
from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.files.result_folder import sweep
from avfast.files.settings import check_least, check_name
from avfast.machine.device import choose_device
from avfast.media.inputs import find_items, list_failures, write_failures
from avfast.opticalflow.flow_files import MARKER, Format
from avfast.opticalflow.flow_pipeline import FlowParameters, FlowRun
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow
from avfast.ui.progress import Progress

RECIPES: dict[str, dict[str, Any]] = {
    # what two-stream networks (TSN, I3D) were trained on
    "i3d": {"fps": 25.0, "short_side": 256, "bound": 20.0, "format": ("jpg",), "direction": "forward"},
}


@dataclass(frozen=True)
class FlowConfig:
    """TV-L1 flow of videos and image folders, into files. What is finished is skipped by the next run."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IN")] = ()
    """Videos, folders of videos or images (nested ones too), quoted globs, .txt files with one of these per line."""
    out: str | None = None
    """Folder for the results: one folder per item, in the tree of the inputs."""
    format: tuple[Format, ...] = ()
    """One or more of `npy` (default; float16), `flo`, `jpg` and `png` (8-bit, x and y apart), and to look at `hsv-png`
    and `hsv-mp4` (direction as colour)."""
    recipe: Literal["i3d"] | None = None
    """`i3d`: 25 fps, short side 256, bound 20, jpg, forward, where no flag says otherwise."""
    direction: Literal["backward", "forward"] | None = None
    """`backward` (default): from frame t to t - stride; `forward`: from t to t + stride. Both lie on frame t's grid."""
    stride: int = 1
    """Distance of a pair's frames, after fps; every frame begins a pair, whatever the stride."""
    fps: float | None = None
    """Choose a video's frames at this rate, by timestamps; by default all. Images of a folder are always all taken."""
    short_side: int | None = None
    """Resize to this shorter side, in pixels, proportions kept."""
    size: tuple[int, int] | None = None
    """Resize to this width and height."""
    resize: Literal["before", "after"] = "before"
    """Resize the frames, or the flow, its values with it."""
    bound: float | None = None
    """Pixels (default 20): 8-bit formats clip there, colours are full there."""
    preset: str = "fast"
    """TV-L1's parameters, see avfast.opticalflow.tvl1.PRESETS."""
    threads: int | None = None
    """CPU threads for flow, by default PyTorch's number."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` (every visible GPU)."""
    workers: int = 1
    """Items at a time per device: for GPUs that wait for decoding."""
    overwrite: bool = False
    """Do finished items again."""

    def resolved(self) -> FlowConfig:
        """The same settings with the recipe's, then the defaults, where nothing was said."""
        wanted: dict[str, Any] = {"direction": "backward", "bound": 20.0, "format": ("npy",)}
        wanted |= RECIPES[self.recipe] if self.recipe else {}
        if self.size is not None:
            wanted.pop("short_side", None)
        config = replace(self, **{k: v for k, v in wanted.items() if getattr(self, k) in (None, ())})
        return replace(config, format=tuple(dict.fromkeys(config.format)))

    def check(self) -> None:
        """Raise InputError for values that cannot work."""
        if not self.inputs:
            raise InputError("IN is missing, expected videos, folders, globs or lists")
        if self.out is None:
            raise InputError("--out is missing, expected a folder for the results")
        if Path(self.out).exists() and not Path(self.out).is_dir():
            raise InputError(f"out is {self.out}, which is not a folder")
        check_least(self, stride=1, short_side=1, threads=1, workers=1)
        for name in ("fps", "bound"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}, expected a positive number")
        if self.size is not None and min(self.size) < 1:
            raise InputError(f"size is {' '.join(map(str, self.size))}, expected at least 1 pixel each way")
        if self.size is not None and self.short_side is not None:
            raise InputError(f"short-side is {self.short_side} and size is given too, expected one of them")
        check_name(self.preset, PRESETS, "preset")
        # a backend that cannot run shall be said before anything is written
        tvl1_flow(torch.zeros(2, 1, 1, 1, device=choose_device(self.device)), preset=self.preset)

    def parameters(self) -> FlowParameters:
        """What decides the numbers in the files."""
        return FlowParameters(**{field.name: getattr(self, field.name) for field in fields(FlowParameters)})


def extract_flow(config: FlowConfig) -> dict[str, Any]:
    """Flow of every item of the inputs into `out`, see FlowConfig; what is finished there already is skipped. Returns
    `out`, the counts `done`, `skipped` (finished before) and `elsewhere` (another run is at it), `pairs`, `seconds` (of
    which `decode_seconds`, `flow_seconds`, `write_seconds`, which overlap), and `failed`, a list of {"input", "reason"}
    that failed.json in `out` holds too. Raises InputError when nothing could be done and for settings that do not work,
    OSError when the results cannot be written."""
    config = config.resolved()
    config.check()
    assert config.out is not None
    out = Path(config.out)
    items, unusable = find_items(config.inputs, MARKER)
    on_cpu = choose_device(config.device) == "cpu"
    devices = ["cpu"] if on_cpu else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    sweep(out / item.name for item in items)
    with Progress("flow, pairs") as progress:
        run = FlowRun(items, out, config.parameters(), config.format, progress, overwrite=config.overwrite)
        run.extract(devices * config.workers, config.threads or torch.get_num_threads())
    failed = list_failures(unusable, items, run.failed)
    write_failures(out, failed, some_done=any(run.counts().values()))
    return {"out": config.out, **run.summary(), "failed": failed}


def main(argv: list[str] | None = None) -> None:
    summary = extract_flow(parse(FlowConfig, prog="avfast flow", argv=argv))
    pairs, seconds = summary["pairs"], summary["seconds"]
    rates = {stage: pairs / max(summary[f"{stage}_seconds"], 1e-9) for stage in ("decode", "flow", "write")}
    stages = ", ".join(f"{stage} {rate:.3g}" for stage, rate in rates.items())
    if pairs:
        print(f"{pairs} pairs in {seconds:.1f} s, {pairs / seconds:.3g} pairs/s; each stage for itself: {stages}")
    counts = [f"{summary['done']} done", f"{summary['skipped']} finished before"]
    counts += [f"{summary['elsewhere']} in the hands of another run"] if summary["elsewhere"] else []
    print(f"items: {', '.join(counts)}, {len(summary['failed'])} failed; results: {summary['out']}")
    print_failures(summary["failed"])


if __name__ == "__main__":
    run_command(main)
