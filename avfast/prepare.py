"""Videos with sound into a data set to train on.

    python -m avfast.prepare clips/ --out data/mine
    avfast prepare --check data/mine

Every video becomes consecutive clips (avfast.data.clips) in a folder of its own, hidden and locked while it is written,
then renamed: a killed run leaves hidden folders only, which the next run removes, and no video is read twice. When the
last one is there, the clips are joined into one clip store per split, and index.json is written (avfast.data.dataset
has the layout). The finished set does not depend on how often the work was interrupted, nor on how it was shared out:
`--shard-index i --num-shards n` takes every n-th video, any number of such runs may share a folder, on one machine or
many, and whichever finishes last joins. A video is in one split only, chosen by the hash of its name.

Of the sound the waveform is kept, 1470 bytes a frame. Its spectrogram, 3060, is computed with each batch, which takes
0.6 times as long as turning the frames into floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
import torch
import tyro

from avfast import __version__
from avfast.cli.command import EXIT_SOME_FAILED
from avfast.cli.parser import parse
from avfast.data import sound2sight
from avfast.data.clips import ClipSettings, film_rate, iter_clips
from avfast.data.digits import SPLITS, Split
from avfast.data.prepared import DATASET_VERSION, file_digest, read_dataset_index, verify_dataset
from avfast.data.store import DATASET_FORMAT, ClipStore, write_store
from avfast.errors import InputError
from avfast.files.atomic import npy_appender, replacing
from avfast.files.result_folder import Place, locked, sweep
from avfast.machine.device import choose_device
from avfast.media.inputs import Item, find_items
from avfast.media.video import probe_video
from avfast.opticalflow.tvl1 import PRESETS as FLOW_PRESETS
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.ui.plots import ContactRow, save_contact_sheet
from avfast.ui.progress import Progress

SETTINGS, INDEX, SOURCE, SHEET = "prepare.json", "index.json", "source.json", "contact.png"
# clips held at a time: 50 MB with their flow at 64x64 and 45 frames
_CHUNK = 16
_SHEET_ROWS = 12


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
    clip_frames: int = 45
    """Frames per clip."""
    clips: ClipSettings = ClipSettings()
    flow: Literal["store", "online"] = "store"
    """Keep the flow in the data set, as float16, or have it computed with every batch: a fast GPU, or a short disk."""
    flow_preset: str = "chambolle-pock"
    """TV-L1's parameters, see avfast.opticalflow.tvl1.PRESETS."""
    val_share: float = 0.1
    """Share of the videos for the validation split; one at least where there are two videos."""
    test_share: float = 0.1
    """Share of the videos for the test split; one at least where there are three videos."""
    workers: int | None = None
    """Videos at a time, by default one per CPU core."""
    shard_index: int = 0
    """Which of --num-shards this run is, from 0."""
    num_shards: int = 1
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
        for name, value in (
            ("clip-frames", self.clip_frames),
            ("workers", self.workers),
            ("num-shards", self.num_shards),
        ):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if self.clip_frames < 2:
            raise InputError(f"clip-frames is {self.clip_frames}, expected at least 2")
        if not 0 <= self.shard_index < self.num_shards:
            raise InputError(f"shard-index is {self.shard_index}, expected 0 to {self.num_shards - 1} (num-shards - 1)")
        if min(self.val_share, self.test_share) < 0 or self.val_share + self.test_share > 0.9:
            raise InputError(
                f"val-share and test-share are {self.val_share} and {self.test_share}, expected 0.9 in all at most"
            )
        if self.flow_preset not in FLOW_PRESETS:
            raise InputError(f"flow-preset is {self.flow_preset!r}, expected one of {', '.join(FLOW_PRESETS)}")
        choose_device(self.device)

    def parameters(self) -> dict[str, Any]:
        """Everything that decides the bytes of the data set, as JSON gives it back."""
        tvl1 = dataclasses.asdict(FLOW_PRESETS[self.flow_preset])
        values = {
            "dataset": "clips",
            "layout": self.layout,
            "clip_frames": self.clip_frames,
            **dataclasses.asdict(self.clips),
            "spectrogram": dataclasses.asdict(self.clips.spectrogram),
            "flow": {"kept": self.flow, "preset": self.flow_preset, **tvl1},
            "val_share": self.val_share,
            "test_share": self.test_share,
        }
        return json.loads(json.dumps(values))


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Clips of every video of the inputs into `out`, see PrepareConfig; what is finished there already is skipped.

    Returns `out`, `finished` (False: other runs have work left), the counts `done`, `skipped` (finished before),
    `elsewhere` (another run's), `clips` (made now), `seconds`, `splits` (clips of each, when finished), and `failed`, a
    list of {"input", "reason"}. Raises InputError when no video could be used, for settings that do not work, and where
    `out` holds something else, which is left as it is; OSError when the results cannot be written.
    """
    config.refuse_mistakes()
    assert config.out is not None
    out = Path(config.out)
    items, unusable = find_items(config.inputs, SETTINGS)
    if not items:
        raise InputError("nothing could be done: " + "; ".join(f"{text}: {why}" for text, why in unusable.items()))
    _begin(out, config.parameters())
    run = _Run(config, out, items)
    if (out / INDEX).exists():
        _refuse_others(config, out, items)
        run.skipped = len(items)
        return run.summary(unusable)
    run.work()
    found = {item.name: source for item in items if (source := run.source(item))}
    if len(found) == len(items):
        _join(config, out, items, found)
    return run.summary(unusable)


def _begin(out: Path, parameters: dict[str, Any]) -> None:
    """Make the folder and write its settings, or compare them with those that are there."""
    path = out / SETTINGS
    # listed first: another run may be writing the settings now
    names = os.listdir(out) if out.is_dir() else [""] * out.exists()
    if path.exists():
        try:
            was = json.loads(path.read_text())
            version, old = was["version"], was["parameters"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): choose another --out") from None
        if version != DATASET_VERSION:
            raise InputError(f"{path}: version {version}, expected {DATASET_VERSION}: choose another --out")
        for name in [*old, *parameters]:
            if old.get(name) != parameters.get(name):
                raise InputError(
                    f"{out} holds a data set prepared with {name.replace('_', '-')} {old.get(name)}, now "
                    f"{parameters.get(name)}: choose another --out"
                )
        return
    if any(not name.startswith(f".{path.stem}.") for name in names):
        raise InputError(f"{out} is there and was not made by avfast prepare: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(path, {"version": DATASET_VERSION, "parameters": parameters})


def _refuse_others(config: PrepareConfig, out: Path, items: list[Item]) -> None:
    """Raise InputError where a finished data set was made of other videos."""
    index = read_dataset_index(out)
    known = {(s["name"], s["bytes"]) for s in index["sources"] + index["quarantine"]}
    wanted = {(item.name, _identity(config, item)["bytes"]) for item in items}
    for name, _ in sorted(known ^ wanted):
        raise InputError(f"{out} is finished and its videos were others or have changed ({name}): choose another --out")
    _tidy(out)


def _files(config: PrepareConfig, item: Item) -> list[Path]:
    """A video, and the pickle that belongs to it in Sound2Sight's layouts. Raises InputError as `pickle_of` does."""
    return [item.path] if config.layout == "videos" else [item.path, sound2sight.pickle_of(item.path)]


def _identity(config: PrepareConfig, item: Item) -> dict[str, Any]:
    """A digest that changes with the files of a video, and their bytes; or the reason why they cannot be looked at."""
    try:
        files = [item] if item.images is not None else [replace(item, path=path) for path in _files(config, item)]
        sources = [file.source() for file in files]
    except (InputError, OSError) as error:
        return {"digest": "", "bytes": 0, "reason": getattr(error, "strerror", None) or str(error)}
    return {"digest": "-".join(s["digest"] for s in sources), "bytes": sum(s["bytes"] for s in sources), "reason": None}


class _Stopped(Exception):
    """Another worker has failed, or the user has interrupted."""


class _Run:
    """One call of prepare."""

    def __init__(self, config: PrepareConfig, out: Path, items: list[Item]) -> None:
        self.done = self.skipped = self.elsewhere = self.clips = 0
        self._config, self._out, self._items = config, out, items
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._began = time.monotonic()

    def source(self, item: Item) -> dict[str, Any] | None:
        """What is known of a video that was done, or None."""
        try:
            return json.loads((self._place(item).final / SOURCE).read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def work(self) -> None:
        """Do the videos of this shard."""
        config = self._config
        workers = config.workers or len(os.sched_getaffinity(0))
        sweep({self._place(item).final for item in self._items})
        mine = self._items[config.shard_index :: config.num_shards]
        threads = max(1, torch.get_num_threads() // workers)
        with Progress("preparing, videos") as progress, ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self._do, item, threads) for item in mine]
            try:
                for number, job in enumerate(as_completed(jobs), start=1):
                    job.result()
                    rate = self.clips / (time.monotonic() - self._began)
                    progress.update(number, len(mine), f"{self.clips} clips, {rate:.1f} clips/s")
            except BaseException:
                self._stop.set()
                raise

    def summary(self, unusable: dict[str, str]) -> dict[str, Any]:
        index = read_dataset_index(self._out) if (self._out / INDEX).exists() else None
        paths = {item.name: str(item.path) for item in self._items}
        bad = index["quarantine"] if index else [s for s in map(self.source, self._items) if s and s["reason"]]
        failed = [{"input": text, "reason": reason} for text, reason in unusable.items()]
        failed += [{"input": paths[source["name"]], "reason": source["reason"]} for source in bad]
        return {
            "out": str(self._out),
            "finished": index is not None,
            **{name: getattr(self, name) for name in ("done", "skipped", "elsewhere", "clips")},
            "seconds": round(time.monotonic() - self._began, 3),
            "splits": {split: index["splits"][split]["clips"] for split in SPLITS} if index else {},
            "failed": failed,
        }

    def _place(self, item: Item) -> Place:
        return Place(self._out / "sources" / item.name)

    def _do(self, item: Item, threads: int) -> None:
        """Read one video, or say why it cannot be, and put its folder in its place."""
        if self._stop.is_set():
            return
        if (self._out / INDEX).exists():
            # another run has finished the set in the meantime
            with self._lock:
                self.skipped += 1
            return
        known = self.source(item)
        identity = _identity(self._config, item)
        if known is not None and known["digest"] == identity["digest"]:
            with self._lock:
                self.skipped += 1
            return
        place = self._place(item)
        if not place.claim():
            with self._lock:
                self.elsewhere += 1
            return
        try:
            about = {"name": item.name, "file": item.path.name, **identity, "sha256": [], "clips": 0, "fps": None}
            try:
                if about["reason"]:
                    raise InputError(about["reason"])
                about |= self._read(item, place.folder, threads)
            except InputError as error:
                about["reason"] = str(error).removeprefix(f"{item.path}: ")
                for path in place.folder.glob("*.npy"):
                    path.unlink()
            _write_json(place.folder / SOURCE, about)
            place.publish()
            with self._lock:
                self.done += 1
                self.clips += about["clips"]
        except OSError as error:
            # a full disk does not say where
            error.filename = error.filename or str(place.final)
            raise
        except _Stopped:
            pass
        finally:
            place.discard()

    def _read(self, item: Item, folder: Path, threads: int) -> dict[str, Any]:
        """Write the clips of one video; what is known of them. Raises InputError for a video that cannot be used."""
        config = self._config
        if item.images is not None:
            raise InputError("a folder of images has no sound track")
        fps = film_rate(item.path, config.clips) if config.layout == "videos" else probe_video(item.path).fps
        count = 0
        with ExitStack() as stack:
            append: dict[str, Any] = {}
            for chunk in _chunks(config, item.path, threads):
                if self._stop.is_set():
                    raise _Stopped
                for name, array in chunk.items():
                    if name not in append:
                        append[name] = stack.enter_context(npy_appender(folder / f"{name}.npy"))
                    append[name](array)
                count += len(chunk["frames"])
        if not count:
            at = f" ({config.clip_frames / fps:.2f} s at {fps:.5g} frames per second)" if fps else ""
            raise InputError(f"too short: its video or its sound ends before {config.clip_frames} frames{at}")
        return {
            "sha256": [file_digest(path) for path in _files(config, item)],
            "clips": count,
            "fps": None if fps is None else round(fps, 6),
        }


def _chunks(config: PrepareConfig, path: Path, threads: int) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of a clip store for some of a video's clips after another."""
    device = choose_device(config.device)
    read = _videos_chunks if config.layout == "videos" else _sound2sight_chunks
    with closing(read(config, path)) as chunks:
        for chunk in chunks:
            if config.flow == "store":
                frames = torch.from_numpy(chunk["frames"]).to(device)
                flow = tvl1_flow(frames, preset=config.flow_preset, threads=threads)
                chunk["flow"] = flow.cpu().numpy().astype(np.float16)
            yield chunk


def _videos_chunks(config: PrepareConfig, path: Path) -> Generator[dict[str, np.ndarray], None, None]:
    with closing(iter_clips(path, config.clips, frames=config.clip_frames)) as clips:
        while some := list(islice(clips, _CHUNK)):
            names = ("frames", "waveform")
            yield {name: np.stack([getattr(clip, name) for clip in some]) for name in names}


def _sound2sight_chunks(config: PrepareConfig, path: Path) -> Generator[dict[str, np.ndarray], None, None]:
    film = sound2sight.read_film(path, config.clips)
    length = config.clip_frames
    count = len(film.frames) // length
    if count:
        parts = {"frames": film.frames, "audio": film.audio}
        yield {name: part[: count * length].reshape(count, length, *part.shape[1:]) for name, part in parts.items()}


def split_sources(names: list[str], val_share: float, test_share: float) -> dict[str, Split]:
    """The split of every video, by the hash of its name alone: the order of the names means nothing.

    Of n videos round(share * n) go to validation and to test, one at least if the share is not 0 and there are enough:
    two videos are one for training and one for validation, and one is for training.
    """
    ranked = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    splits: dict[str, Split] = dict.fromkeys(ranked, "train")
    taken = 0
    for split, share in (("val", val_share), ("test", test_share)):
        room = len(ranked) - taken - 1
        count = min(room, max(1, round(share * len(ranked)))) if share > 0 else 0
        splits |= dict.fromkeys(ranked[taken : taken + count], split)  # type: ignore[arg-type]
        taken += count
    return splits


def _splits(config: PrepareConfig, items: list[Item]) -> dict[str, Split]:
    """The split of every usable video; Sound2Sight's sets say themselves what is for the test."""
    if config.layout == "videos":
        return split_sources([item.name for item in items], config.val_share, config.test_share)
    test: dict[str, Split] = {item.name: "test" for item in items if sound2sight.is_test(item.path)}
    return split_sources([item.name for item in items if item.name not in test], config.val_share, 0) | test


def _join(config: PrepareConfig, out: Path, items: list[Item], found: dict[str, dict[str, Any]]) -> None:
    """Join the clips of all videos into a store per split, and write the index; then the folders of the videos go.

    One run at a time does this. Killed anywhere, the next run goes on with the stores that are there.
    """
    lock = locked(out)
    if lock is None:
        return
    try:
        good = [item for item in items if not found[item.name]["reason"]]
        if not good:
            first = items[0]
            raise InputError(f"nothing could be done: {first.path}: {found[first.name]['reason']}")
        if not (out / INDEX).exists():
            index = _joined(config, out, {item.name: found[item.name] for item in good}, _splits(config, good))
            index["quarantine"] = [
                {key: source[key] for key in ("name", "file", "bytes", "reason")}
                for source in found.values()
                if source["reason"]
            ]
            _save_sheet(out, index)
            _write_json(out / INDEX, index)
        _tidy(out)
    finally:
        os.close(lock)


def _joined(
    config: PrepareConfig, out: Path, sources: dict[str, dict[str, Any]], splits: dict[str, Split]
) -> dict[str, Any]:
    """Write the stores of the splits; the index without its quarantine."""
    parameters = config.parameters()
    listed, parts = [], {}
    for split in SPLITS:
        names = [name for name in sources if splits[name] == split]
        # a store that a killed run has left is known by the videos in it
        content = json.dumps([(name, sources[name]["sha256"]) for name in names])
        about = parameters | {"split": split, "content": hashlib.sha256(content.encode()).hexdigest()}
        count, first = sum(sources[name]["clips"] for name in names), 0
        for name in names:
            keys = ("name", "file", "bytes", "sha256", "fps", "clips")
            listed.append({"split": split, "first": first, **{key: sources[name][key] for key in keys}})
            first += sources[name]["clips"]
        folder = out / split
        if names and not _is_there(folder, about):
            shutil.rmtree(folder, ignore_errors=True)
            write_store(folder, count, _staged([out / "sources" / name for name in names]), about)
        files = sorted(folder.iterdir()) if names else []
        hashes = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files}
        parts[split] = {"clips": count, "sources": len(names), "files": hashes}
    return {
        "format": DATASET_FORMAT,
        "version": DATASET_VERSION,
        "versions": {"avfast": __version__, "av": av.__version__},
        "parameters": parameters,
        "splits": parts,
        "sources": listed,
    }


def _is_there(folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether a killed run has already written this store."""
    try:
        return ClipStore.open(folder).parameters == parameters
    except InputError:
        return False


def _staged(folders: list[Path]) -> Iterator[dict[str, np.ndarray]]:
    """The clips of videos one after another, some at a time."""
    for folder in folders:
        arrays: dict[str, np.ndarray] = {
            path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))
        }
        for first in range(0, len(arrays["frames"]), _CHUNK):
            yield {name: array[first : first + _CHUNK] for name, array in arrays.items()}


def _tidy(out: Path) -> None:
    """Remove what a finished data set does not need: the folders of the videos, and what killed runs have left."""
    shutil.rmtree(out / "sources", ignore_errors=True)
    # whatever else is hidden there is somebody else's
    for name in (*SPLITS, Path(SETTINGS).stem, Path(INDEX).stem, Path(SHEET).stem):
        for path in out.glob(f".{name}.*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _save_sheet(out: Path, index: dict[str, Any]) -> None:
    """A picture of the first clip of some videos of every split."""
    sources = index["sources"]
    rows = []
    for i in sorted({round(i) for i in np.linspace(0, len(sources) - 1, _SHEET_ROWS)}):
        source = sources[i]
        store = ClipStore.open(out / source["split"])
        batch = store.batch([source["first"]], [0], store.clip_frames)
        label = f"{source['name']}: {source['split']}, {source['clips']} clips, {source['fps']:.5g} fps"
        rows.append(ContactRow(label, *(part[0].numpy() for part in batch)))
    save_contact_sheet(out / SHEET, rows)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


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
        rate = summary["clips"] / summary["seconds"]
        print(
            f"{summary['clips']} clips of {config.clip_frames} frames in {summary['seconds']:.1f} s, {rate:.3g} clips/s"
        )
    if summary["finished"]:
        print(f"clips: {', '.join(f'{count} {split}' for split, count in summary['splits'].items())}")
        for split in (split for split, count in summary["splits"].items() if not count):
            print(f"the {split} split is empty: too few videos could be used")
        print(f"finished: {summary['out']}; look at {Path(summary['out']) / SHEET}")
    else:
        print(f"not finished: other runs have work left on {summary['out']}")
    for failure in summary["failed"]:
        print(f"not used: {failure['input']}: {failure['reason']}")
    if summary["failed"]:
        raise SystemExit(EXIT_SOME_FAILED)


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
    from avfast.cli.command import run_command

    run_command(main)
