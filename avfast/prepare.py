"""Videos with sound into a data set to train on.

    python -m avfast.prepare clips/ --out data/mine
    avfast prepare --check data/mine

Every video becomes consecutive clips in a folder of its own (avfast.data.preparation); when the last one is there, the
clips are joined into the data set (avfast.data.joining; avfast.data.prepared shows its layout). A killed run leaves
hidden folders only, which the next run removes, and no video is read twice. `--shard-index i --num-shards n` takes
every n-th video. Any number of such runs may share a folder, on one machine or many (see the limits of locks in
avfast.files.result_folder), and whichever finishes last joins."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from avfast.cli.command import print_failures, run_command
from avfast.cli.parser import parse
from avfast.data.base import SPLITS
from avfast.data.film_clips import ClipSettings
from avfast.data.joining import CONTACT_SHEET, check_finished, join_clips, split_sources
from avfast.data.preparation import PreparationRun, PreparationSettings, begin_dataset, read_source, source_folder
from avfast.data.prepared import INDEX, SETTINGS, read_dataset_index, verify_dataset
from avfast.errors import InputError
from avfast.files.result_folder import sweep
from avfast.files.settings import Count, Range, Share, check_name, check_values
from avfast.machine.device import choose_device
from avfast.media.inputs import Item, find_items, list_failures
from avfast.opticalflow.tvl1 import PRESETS as FLOW_PRESETS
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.ui.progress import Progress

__all__ = ["PRESETS", "PrepareConfig", "main", "prepare", "split_sources"]


@dataclass(frozen=True)
class PrepareConfig:
    """Turn videos with sound into a data set for avfast train. What is finished is skipped by the next run."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = ()
    """Folders of videos (nested ones too), videos, quoted globs, .txt files with one of these per line."""
    out: str | None = None
    """Folder for the data set."""
    check: str | None = None
    """Instead: verify this data set, every byte of it."""
    layout: Literal["videos", "sound2sight"] = "videos"
    """`sound2sight`: folders train and test as that project lays them out, whose spectrograms are pickles (avfast.data.
    sound2sight). They are taken as they are; fps, sample-rate and what follows it mean nothing then."""
    clip_frames: Annotated[int, Range(2)] = 45
    """Frames per clip."""
    clips: ClipSettings = ClipSettings()
    flow: Literal["store", "online"] = "store"
    """Keep the flow in the data set, as float16, or have it computed with every batch: a fast GPU, or a short disk."""
    flow_preset: str = "training"
    """TV-L1's parameters, see avfast.opticalflow.tvl1.PRESETS."""
    val_share: Share = 0.1
    """Share of the videos for the validation split; one at least where there are two videos."""
    test_share: Share = 0.1
    """Share of the videos for the test split; one at least where there are three videos."""
    workers: Count | None = None
    """Videos at a time, by default one per CPU core."""
    shard_index: Annotated[int, Range(0)] = 0
    """Which of --num-shards this run is, from 0."""
    num_shards: Count = 1
    """Runs that share the work; each takes every so many-th video."""
    device: str = "auto"
    """Where flow is computed: `auto`, `cpu`, `cuda`."""

    def refuse_mistakes(self) -> None:
        """Raise InputError for values that cannot work."""
        if not self.inputs:
            raise InputError("DIR is missing, expected folders of videos, videos, globs or lists")
        if self.out is None:
            raise InputError("--out is missing, expected a folder for the data set")
        self.clips.check()
        check_values(self)
        if self.shard_index >= self.num_shards:
            raise InputError(f"shard-index is {self.shard_index}, expected 0 to {self.num_shards - 1} (num-shards - 1)")
        if self.val_share + self.test_share > 0.9:
            shares = f"{self.val_share} and {self.test_share}"
            raise InputError(f"val-share and test-share are {shares}, expected 0.9 in all at most")
        check_name(self.flow_preset, FLOW_PRESETS, "flow-preset")
        # a backend that cannot run shall be said before anything is written
        tvl1_flow(torch.zeros(2, 1, 1, 1, device=choose_device(self.device)), preset=self.flow_preset)

    def settings(self) -> PreparationSettings:
        """What decides the bytes of the data set."""
        return PreparationSettings(**{field.name: getattr(self, field.name) for field in fields(PreparationSettings)})


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Clips of every video of the inputs into `out`, see PrepareConfig; what is finished there already is skipped.
    Returns `out`, `finished` (False: other runs have work left), the counts `done`, `skipped` (finished before),
    `elsewhere` (another run's), `clips` (made now), `seconds`, `splits` (clips of each, when finished), and `failed`, a
    list of {"input", "reason"}. Raises InputError when no video could be used, for settings that do not work, and where
    `out` holds something else, which is left as it is; OSError when the results cannot be written."""
    config.refuse_mistakes()
    assert config.out is not None
    out, settings = Path(config.out), config.settings()
    items, unusable = find_items(config.inputs, SETTINGS)
    if not items:
        raise InputError("nothing could be done: " + "; ".join(f"{text}: {why}" for text, why in unusable.items()))
    begin_dataset(out, settings)
    run = PreparationRun(items[config.shard_index :: config.num_shards], out, settings)
    if (out / INDEX).exists():
        check_finished(out, items, settings)
        run.skipped = len(items)
    else:
        sweep(source_folder(out, item) for item in items)
        run.prepare(config.workers or len(os.sched_getaffinity(0)), choose_device(config.device))
        sources = {item.name: source for item in items if (source := read_source(out, item))}
        if len(sources) == len(items):
            join_clips(out, items, sources, settings)
    return _summary(out, items, unusable, run)


def _summary(out: Path, items: list[Item], unusable: dict[str, str], run: PreparationRun) -> dict[str, Any]:
    index = read_dataset_index(out) if (out / INDEX).exists() else None
    sources = index["quarantine"] if index else [s for item in items if (s := read_source(out, item)) and s["reason"]]
    return {
        "out": str(out),
        "finished": index is not None,
        **run.counts(),
        "clips": run.clips,
        "seconds": round(run.seconds, 3),
        "splits": {split: index["splits"][split]["clips"] for split in SPLITS} if index else {},
        "failed": list_failures(unusable, items, {source["name"]: source["reason"] for source in sources}),
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(PrepareConfig, prog="avfast prepare", argv=argv, presets=PRESETS)
    if config.check is not None:
        _check(config.check)
        return
    summary = prepare(config)
    counts = [f"{summary['done']} done", f"{summary['skipped']} finished before"]
    counts += [f"{summary['elsewhere']} in the hands of another run"] if summary["elsewhere"] else []
    print(f"videos: {', '.join(counts)}, {len(summary['failed'])} not used")
    if summary["clips"]:
        clips, seconds = summary["clips"], summary["seconds"]
        print(f"{clips} clips of {config.clip_frames} frames in {seconds:.1f} s, {clips / seconds:.3g} clips/s")
    if summary["finished"]:
        print(f"clips: {', '.join(f'{count} {split}' for split, count in summary['splits'].items())}")
        for split in (split for split, count in summary["splits"].items() if not count):
            print(f"the {split} split is empty: too few videos could be used")
        print(f"finished: {summary['out']}; look at {Path(summary['out']) / CONTACT_SHEET}")
    else:
        print(f"not finished: other runs have work left on {summary['out']}")
    print_failures(summary["failed"], "not used")


def _check(folder: str) -> None:
    with Progress("checking, files") as progress:
        wrong = verify_dataset(folder, progress.update)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise InputError(f"{wrong[0]}{more}")
    print(f"{folder}: every file is as the index says")


PRESETS: dict[str, PrepareConfig] = {
    "painting": PrepareConfig(),
    "drums": PrepareConfig(),
    "painting96": PrepareConfig(clips=ClipSettings(size=(96, 96))),
}


if __name__ == "__main__":
    run_command(main)
