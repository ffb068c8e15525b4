"""TV-L1 flow of videos and image folders into files: settings, the pipeline, and the command.

    python -m avfast.flow clips/ --out flow
    avfast flow 'films/**/*.mp4' --out flow --recipe i3d

Per device (every visible GPU, else the CPU) one pipeline takes item after item: a thread decodes, a thread computes
flow, a thread writes, and each is at most one batch ahead of the next. So the batch bounds the memory, not the film's
length: 350 MB for frames of 1280x720 and two threads, besides the 260 MB of PyTorch itself.

An item is written into a hidden folder, which takes its place when it is complete, with a marker in it:

    flow/clip/flow.done.json      parameters, source, versions, and of every frame its number and time
    flow/clip/flow.npy ...        the formats that were asked for, see avfast.opticalflow.flow_files

A killed run leaves hidden folders only, and the next run removes them. Runs may share a folder: each takes the items
that no other holds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from array import array
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated, Any, Literal, NamedTuple, cast

import av
import numpy as np
import torch
import tyro

from avfast import __version__
from avfast.cli.command import print_failures
from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.files.result_folder import MARKER, Place, read_marker, sweep
from avfast.machine.device import choose_device
from avfast.media.images import Frame, read_images, resize, target_size
from avfast.media.inputs import Item, find_items, settle_failures
from avfast.media.prefetch import ahead
from avfast.media.video import probe_video, read_video
from avfast.opticalflow.flow_files import Format, flow_writer
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow
from avfast.ui.progress import Progress

RECIPES: dict[str, dict[str, Any]] = {
    # what two-stream networks (TSN, I3D) were trained on
    "i3d": {"fps": 25.0, "short_side": 256, "bound": 20.0, "format": ("jpg",), "direction": "forward"},
}
# flow of one batch: large enough for all threads (46 pairs of 340x256), small enough to hold three of them
_BATCH_BYTES = 32 << 20
# pace of hsv-mp4 where the input has none
_SHOWN_FPS = 25.0


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
        for name in ("stride", "short_side", "threads", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name.replace('_', '-')} is {value}, expected at least 1")
        for name in ("fps", "bound"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is {value}, expected a positive number")
        if self.size is not None:
            if min(self.size) < 1:
                raise InputError(f"size is {' '.join(map(str, self.size))}, expected at least 1 pixel each way")
            if self.short_side is not None:
                raise InputError(f"short-side is {self.short_side} and size is given too, expected one of them")
        if self.preset not in PRESETS:
            raise InputError(f"preset is {self.preset!r}, expected one of {', '.join(PRESETS)}")
        choose_device(self.device)

    def parameters(self) -> dict[str, Any]:
        """Everything that decides the numbers in the files, as JSON gives it back."""
        names = ("direction", "stride", "fps", "short_side", "size", "resize", "bound", "preset")
        values = {name: getattr(self, name) for name in names} | {"tvl1": dataclasses.asdict(PRESETS[self.preset])}
        return json.loads(json.dumps(values))


def extract_flow(config: FlowConfig) -> dict[str, Any]:
    """Flow of every item of the inputs into `out`, see FlowConfig; what is finished there already is skipped.

    Returns `out`, the counts `done`, `skipped` (finished before) and `elsewhere` (another run is at it), `pairs`,
    `seconds` (of which `decode_seconds`, `flow_seconds`, `write_seconds`, which overlap), and `failed`, a list of
    {"input", "reason"} that failed.json in `out` holds too. Raises InputError when nothing could be done and for
    settings that do not work, OSError when the results cannot be written.
    """
    config = config.resolved()
    config.check()
    assert config.out is not None
    out = Path(config.out)
    items, unusable = find_items(config.inputs, MARKER)
    on_cpu = choose_device(config.device) == "cpu"
    devices = ["cpu"] if on_cpu else [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    pipelines = devices * config.workers
    threads = max(1, (config.threads or torch.get_num_threads()) // len(pipelines))
    sweep({out / item.name for item in items})
    with Progress("flow, pairs") as progress:
        run = _Run(config, out, items, progress)
        # the pool waits for its threads whatever happens: none may write when this function has ended
        with ThreadPoolExecutor(len(pipelines)) as pool:
            workers = [pool.submit(run.work, torch.device(device), threads) for device in pipelines]
            try:
                for worker in as_completed(workers):
                    worker.result()
            except BaseException:
                run.stop.set()
                raise
    failed = [{"input": text, "reason": reason} for text, reason in unusable.items()]
    failed += [{"input": str(i.path), "reason": run.failed[i.name]} for i in items if i.name in run.failed]
    summary = {"out": config.out, **run.summary(), "failed": failed}
    settle_failures(out, failed, bool(run.done + run.skipped + run.elsewhere))
    return summary


@dataclass(eq=False)
class _Job:
    """An item that is being done."""

    item: Item
    place: Place
    formats: tuple[Format, ...]
    source: dict[str, Any]
    fps: float | None
    expected: int
    """Pairs, as far as the file tells."""
    numbers: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    """Of every frame used; NaN: it has no time."""
    pairs: int = 0


class _Part(NamedTuple):
    """The next pairs of a job on their way through the pipeline, or with no data its end."""

    job: _Job
    data: np.ndarray | None = None
    """Grey frames (n + stride, H, W) uint8, then flow (n, 2, H, W) float32."""
    times: tuple[float, ...] = ()
    """Of the n pairs, in seconds."""
    error: str = ""


class _Unreadable(Exception):
    """The rest of an item cannot be had."""


class _Stopped(Exception):
    """Another pipeline has failed, or the user has interrupted."""


class _Run:
    """One call of extract_flow: what its pipelines share."""

    def __init__(self, config: FlowConfig, out: Path, items: list[Item], progress: Progress) -> None:
        self.stop = threading.Event()
        self.done = self.skipped = self.elsewhere = self.pairs = 0
        self.failed: dict[str, str] = {}
        self._config, self._out, self._progress = config, out, progress
        self._parameters = config.parameters()
        self._todo: Queue[Item] = Queue()
        for item in items:
            self._todo.put(item)
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._seconds = {"decode": 0.0, "flow": 0.0, "write": 0.0}
        # pairs of the items begun so far, partly estimated
        self._begun = self._begun_pairs = 0

    def summary(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("done", "skipped", "elsewhere", "pairs")}
        stages = {f"{stage}_seconds": round(seconds, 3) for stage, seconds in self._seconds.items()}
        return counts | {"seconds": round(time.monotonic() - self._began, 3)} | stages

    def work(self, device: torch.device, threads: int) -> None:
        """One pipeline: this thread writes, one computes, one decodes, until no item is left."""
        claimed: list[Place] = []
        try:
            with closing(ahead(self._flows(ahead(self._frames(claimed, threads)), device, threads))) as parts:
                for job, its_parts in groupby(parts, key=lambda part: part.job):
                    self._write(job, its_parts)
        finally:
            for place in claimed:
                place.discard()

    def _frames(self, claimed: list[Place], threads: int) -> Iterator[_Part]:
        while not self.stop.is_set():
            try:
                item = self._todo.get_nowait()
            except Empty:
                return
            job = self._claim(item)
            if job is None:
                continue
            claimed.append(job.place)
            try:
                parts = self._decode(job, threads)
                while True:
                    began = time.perf_counter()
                    part = next(parts, None)
                    self._spent("decode", began)
                    if part is None:
                        break
                    yield part
                yield _Part(job)
            except InputError as error:
                yield _Part(job, error=str(error))

    def _claim(self, item: Item) -> _Job | None:
        """The item with its place taken, or None where there is nothing to do, which is then counted."""
        place = Place(self._out / item.name)
        try:
            source = item.source()
            formats = self._missing(item, place, source)
            if formats:
                place.check(self._out)
            fps, expected = self._expect(item) if formats else (None, 0)
        except (InputError, OSError) as error:
            self._fail(item, error.strerror or str(error) if isinstance(error, OSError) else str(error))
            return None
        taken = bool(formats) and place.claim()
        with self._lock:
            if not formats:
                self.skipped += 1
            elif not taken:
                self.elsewhere += 1
            else:
                self._begun += 1
                self._begun_pairs += expected
        return _Job(item, place, formats, source, fps, expected) if taken else None

    def _missing(self, item: Item, place: Place, source: dict[str, Any]) -> tuple[Format, ...]:
        """The formats to write: all that are asked for, or none where they all are there already.

        Raises InputError where another item's results are in the way.
        """
        wanted = self._config.format
        marker = read_marker(place.final)
        if marker is None or self._config.overwrite:
            return wanted
        was, old = marker["source"], marker["parameters"]
        if was["digest"] != source["digest"]:
            if was["path"] != source["path"]:
                raise InputError(f"{place.final} holds the flow of {was['path']}: choose another --out, or --overwrite")
            self._progress.note(f"{item.name}: its source has changed since, done again")
            return wanted
        changed = [name for name, value in self._parameters.items() if old.get(name) != value]
        if changed:
            values = f"{old.get(changed[0])}, now {self._parameters[changed[0]]}"
            self._progress.note(f"{item.name}: done before with {changed[0].replace('_', '-')} {values}: done again")
            return wanted
        missing = [name for name in wanted if name not in marker["formats"]]
        if not missing:
            return ()
        # all of them anew, so that nothing that took hours is lost for a format more
        self._progress.note(f"{item.name}: done before without {', '.join(missing)}: done again")
        return (*cast(list[Format], marker["formats"]), *missing)

    def _expect(self, item: Item) -> tuple[float | None, int]:
        """The rate of the frames that will be used, and the number of pairs; 0 where the file does not tell."""
        if item.images is not None:
            return None, max(0, len(item.files()) - self._config.stride)
        info = probe_video(item.path)
        fps = self._config.fps or info.fps
        return fps, max(0, round((info.seconds or 0) * (fps or 0)) - self._config.stride)

    def _decode(self, job: _Job, threads: int) -> Iterator[_Part]:
        config, stride, item = self._config, self._config.stride, job.item
        short_side, size = (config.short_side, config.size) if config.resize == "before" else (None, None)
        if item.images is None:
            frames = read_video(item.path, fps=config.fps, short_side=short_side, size=size, grey=True)
        else:
            frames = read_images(item.files(), short_side=short_side, size=size, grey=True)
        held: list[Frame] = []
        limit = 0
        for frame in frames:
            held.append(frame)
            job.numbers.append(frame.number)
            job.times.append(math.nan if frame.time is None else frame.time)
            limit = limit or stride + max(1, _BATCH_BYTES // (8 * frame.image.size) // threads) * threads
            if len(held) == limit:
                yield self._part(job, held)
                held = held[-stride:]
        if len(held) > stride:
            yield self._part(job, held)
        if len(job.numbers) <= stride:
            raise InputError(f"{item.path}: {len(job.numbers)} frames, expected at least {stride + 1} for a pair")

    def _part(self, job: _Job, frames: list[Frame]) -> _Part:
        stride, pace = self._config.stride, self._config.fps or _SHOWN_FPS
        on = frames[stride:] if self._config.direction == "backward" else frames[:-stride]
        times = tuple(f.number / pace if f.time is None else f.time for f in on)
        return _Part(job, np.stack([f.image for f in frames]), times)

    def _flows(self, parts: Generator[_Part, None, None], device: torch.device, threads: int) -> Iterator[_Part]:
        config, stride = self._config, self._config.stride
        # closing, or an error here would leave the decoding thread waiting
        with closing(parts):
            for part in parts:
                if part.data is None:
                    yield part
                    continue
                began = time.perf_counter()
                frames = torch.from_numpy(part.data)[:, None].to(device)
                early, late = frames[:-stride], frames[stride:]
                a, b = (late, early) if config.direction == "backward" else (early, late)
                flow = tvl1_flow(a, b, preset=config.preset, threads=threads).cpu().numpy()
                if config.resize == "after":
                    flow = _resized(flow, config.short_side, config.size)
                self._spent("flow", began)
                yield part._replace(data=flow)

    def _write(self, job: _Job, parts: Iterator[_Part]) -> None:
        config = self._config
        assert config.bound is not None
        shape, first = (0, 0), None
        try:
            with flow_writer(job.place.folder, job.formats, config.bound, job.fps or config.fps or _SHOWN_FPS) as write:
                for part in parts:
                    if self.stop.is_set():
                        raise _Stopped
                    if part.error:
                        raise _Unreadable(part.error)
                    if part.data is None:
                        continue
                    began = time.perf_counter()
                    first = part.times[0] if first is None else first
                    write(part.data, [t - first for t in part.times])
                    shape = part.data.shape[2:]
                    job.pairs += len(part.data)
                    self._spent("write", began)
                    self._advance(job, len(part.data))
            (job.place.folder / MARKER).write_text(json.dumps(self._marker(job, shape)) + "\n")
            job.place.publish()
            done = True
        except _Unreadable as error:
            self._fail(job.item, str(error))
            # now, not at the end: half of a long film fills disks
            job.place.discard()
            done = False
        except OSError as error:
            # a full disk does not say where
            error.filename = error.filename or str(job.place.final)
            raise
        with self._lock:
            self.done += done
            self._begun_pairs += job.pairs - job.expected

    def _marker(self, job: _Job, shape: tuple[int, ...]) -> dict[str, Any]:
        packages = {"avfast": __version__, "torch": torch.__version__, "av": av.__version__}
        return {
            "source": job.source,
            "parameters": self._parameters,
            "formats": job.formats,
            "pairs": job.pairs,
            "height": shape[0],
            "width": shape[1],
            "fps": job.fps,
            "flow_of_8_bit_level": "level * 2 * bound / 255 - bound",
            "versions": packages,
            "frame_numbers": job.numbers.tolist(),
            "frame_times": [None if math.isnan(t) else round(t, 6) for t in job.times],
        }

    def _spent(self, stage: str, began: float) -> None:
        with self._lock:
            self._seconds[stage] += time.perf_counter() - began

    def _fail(self, item: Item, reason: str) -> None:
        with self._lock:
            self.failed[item.name] = reason.removeprefix(f"{item.path}: ")

    def _advance(self, job: _Job, pairs: int) -> None:
        with self._lock:
            self.pairs += pairs
            # items not yet begun are taken to be as long as those that are
            left = self._todo.qsize()
            total = max(round(self._begun_pairs * (1 + left / max(1, self._begun))), self.pairs + 1)
            rate = self.pairs / (time.monotonic() - self._began)
            text = f"{rate:.1f} pairs/s, {self.done + self.skipped} items done, {left} to begin, at {job.item.name}"
            self._progress.update(self.pairs, total, text)


def _resized(flow: np.ndarray, short_side: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """Flow (N,2,H,W) on a grid of another size, in pixels of that grid."""
    h, w = flow.shape[2:]
    height, width = target_size(h, w, short_side, size)
    scale = np.array([width / w, height / h], np.float32)
    pictures = [resize(pair.transpose(1, 2, 0), height, width) * scale for pair in flow]
    return np.stack(pictures).transpose(0, 3, 1, 2)


def main(argv: list[str] | None = None) -> None:
    summary = extract_flow(parse(FlowConfig, prog="avfast flow", argv=argv))
    pairs, seconds = summary["pairs"], summary["seconds"]
    rates = {stage: pairs / max(summary[f"{stage}_seconds"], 1e-9) for stage in ("decode", "flow", "write")}
    alone = ", ".join(f"{stage} {rate:.3g}" for stage, rate in rates.items())
    if pairs:
        print(f"{pairs} pairs in {seconds:.1f} s, {pairs / seconds:.3g} pairs/s; each stage for itself: {alone}")
    counts = [f"{summary['done']} done", f"{summary['skipped']} finished before"]
    counts += [f"{summary['elsewhere']} in the hands of another run"] if summary["elsewhere"] else []
    print(f"items: {', '.join(counts)}, {len(summary['failed'])} failed; results: {summary['out']}")
    print_failures(summary["failed"])
