"""The flow of many films into files: the pipeline behind `avfast flow`.

Per device (every visible GPU, else the CPU) one pipeline takes film after film. One of its threads decodes, one
computes flow, one writes, and each is at most one batch in advance of the next. So the batch bounds the memory, not the
film's length: 350 MB for frames of 1280x720 and two threads, besides the 260 MB of PyTorch itself.

A film's results are a folder, which appears when it is complete (avfast.files.result_folder):

    flow/clip/flow.done.json      parameters, source, versions, and of every frame its number and time
    flow/clip/flow.npy ...        the formats that were asked for, see avfast.opticalflow.flow_files

A killed run leaves hidden folders only, and the next run removes them. Runs may share a folder: each takes the films
that no other holds."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import torch

from avfast import __version__
from avfast.errors import InputError
from avfast.files.result_folder import ResultFolder
from avfast.media.images import Frame, read_images, resize, target_size
from avfast.media.inputs import Item
from avfast.media.item_run import ItemRun
from avfast.media.prefetch import prefetch
from avfast.media.video import probe_video, read_video
from avfast.opticalflow.flow_files import MARKER, Format, flow_writer, read_marker, refuse_foreign_files
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow
from avfast.ui.progress import Progress

# flow of one batch: large enough for all threads (46 pairs of 340x256), small enough to hold three of them
_BATCH_BYTES = 32 << 20
# frames a second of hsv-mp4 where the input has no rate
_DEFAULT_FPS = 25.0


@dataclass(frozen=True)
class FlowParameters:
    """What decides the numbers in the files; see avfast.flow.FlowConfig for each."""

    direction: Literal["backward", "forward"]
    stride: int
    fps: float | None
    short_side: int | None
    size: tuple[int, int] | None
    resize: Literal["before", "after"]
    bound: float
    preset: str

    def as_dict(self) -> dict[str, Any]:
        """These, and the values of the preset, as JSON gives them back."""
        return json.loads(json.dumps({**dataclasses.asdict(self), "tvl1": dataclasses.asdict(PRESETS[self.preset])}))


@dataclass(eq=False)
class _Film:
    """An item that is being done."""

    item: Item
    result: ResultFolder
    formats: tuple[Format, ...]
    source: dict[str, Any]
    fps: float | None
    expected_pairs: int
    """As far as the file tells."""
    numbers: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    """Of every frame used; NaN: it has no time."""
    pairs: int = 0


class _Batch(NamedTuple):
    """Some pairs of a film on their way through the pipeline; the last one of a film has no data."""

    film: _Film
    data: np.ndarray | None = None
    """Grey frames (n + stride, H, W) uint8, then flow (n, 2, H, W) float32."""
    times: tuple[float, ...] = ()
    """Of the n pairs, in seconds."""
    error: InputError | None = None
    """Why the rest of the film cannot be read."""


class _Unreadable(Exception):
    """The rest of a film cannot be read. An InputError of another stage is not of the film, and ends the run."""


class FlowRun(ItemRun):
    """One run over films: flow of each into its folder below `out`."""

    def __init__(
        self,
        items: Sequence[Item],
        out: Path,
        parameters: FlowParameters,
        formats: tuple[Format, ...],
        progress: Progress,
        *,
        overwrite: bool = False,
    ) -> None:
        super().__init__(items)
        self.pairs = 0
        self._out, self._parameters, self._formats = out, parameters, formats
        self._progress, self._overwrite = progress, overwrite
        self._stage_seconds = {"decode": 0.0, "flow": 0.0, "write": 0.0}
        # pairs of the films begun so far, partly estimated
        self._begun = self._begun_pairs = 0

    def extract(self, devices: Sequence[str], threads: int) -> None:
        """Do all items with a pipeline per entry of `devices`, which share the CPU threads for flow. Raises OSError
        when results cannot be written, InputError where flow cannot be computed. Items that cannot be read are in
        `failed`."""
        each = max(1, threads // len(devices))
        self.run([partial(self._pipeline, torch.device(device), each) for device in devices])

    def summary(self) -> dict[str, Any]:
        """Counts of items and pairs, and seconds: in all, and of each stage."""
        stages = {f"{stage}_seconds": round(seconds, 3) for stage, seconds in self._stage_seconds.items()}
        return self.counts() | {"pairs": self.pairs, "seconds": round(self.seconds, 3)} | stages

    def _pipeline(self, device: torch.device, threads: int) -> None:
        """Do item after item: this thread writes, one computes, one decodes."""
        frames = prefetch(self._frames(threads))
        with closing(prefetch(self._flow(frames, device, threads))) as batches:
            for film, its_batches in groupby(batches, key=lambda batch: batch.film):
                self._write(film, its_batches)

    def _frames(self, threads: int) -> Iterator[_Batch]:
        """First stage: claim items and decode them."""
        for item in self.items():
            film = self._claim_item(item)
            if film is None:
                continue
            try:
                began = time.perf_counter()
                for batch in self._decode(film, threads):
                    self._add_seconds("decode", began)
                    yield batch
                    began = time.perf_counter()
                self._add_seconds("decode", began)
                yield _Batch(film)
            except InputError as error:
                yield _Batch(film, error=error)

    def _claim_item(self, item: Item) -> _Film | None:
        """The item with its folder claimed; None where there is nothing to do, which is then counted or noted."""
        result = ResultFolder(self._out / item.name)
        try:
            source = item.source()
            formats = self._formats_to_write(item, result.final, source)
            if not formats:
                self.skip()
                return None
            refuse_foreign_files(result.final, self._out)
            fps, expected = self._probe(item)
        except (InputError, OSError) as error:
            self.fail(item, error)
            return None
        if not self.claim(result):
            return None
        with self.lock:
            self._begun += 1
            self._begun_pairs += expected
        return _Film(item, result, formats, source, fps, expected)

    def _formats_to_write(self, item: Item, folder: Path, source: dict[str, Any]) -> tuple[Format, ...]:
        """All formats that the folder will hold, or none where those that are asked for are there already. Raises
        InputError where the folder holds the results of another item."""
        wanted = self._formats
        marker = read_marker(folder)
        if marker is None or self._overwrite:
            return wanted
        was, old, new = marker["source"], marker["parameters"], self._parameters.as_dict()
        changed = [name for name, value in new.items() if old.get(name) != value]
        missing = [name for name in wanted if name not in marker["formats"]]
        if was["digest"] != source["digest"]:
            if was["path"] != source["path"]:
                raise InputError(f"{folder} holds the flow of {was['path']}: choose another --out, or --overwrite")
            why = "its source has changed since,"
        elif changed:
            values = f"{old.get(changed[0])}, now {new[changed[0]]}"
            why = f"done before with {changed[0].replace('_', '-')} {values}:"
        elif missing:
            # all of them anew, so that nothing that took hours is lost for a format more
            why, wanted = f"done before without {', '.join(missing)}:", (*marker["formats"], *missing)
        else:
            return ()
        self._progress.note(f"{item.name}: {why} done again")
        return wanted

    def _probe(self, item: Item) -> tuple[float | None, int]:
        """The rate of the frames that will be used, and the number of pairs; 0 where the file does not tell."""
        if item.images is not None:
            return None, max(0, len(item.files()) - self._parameters.stride)
        info = probe_video(item.path)
        fps = self._parameters.fps or info.fps
        return fps, max(0, round((info.seconds or 0) * (fps or 0)) - self._parameters.stride)

    def _decode(self, film: _Film, threads: int) -> Iterator[_Batch]:
        parameters, stride, item = self._parameters, self._parameters.stride, film.item
        resized = parameters.resize == "before"
        short_side, size = (parameters.short_side, parameters.size) if resized else (None, None)
        if item.images is None:
            frames = read_video(item.path, fps=parameters.fps, short_side=short_side, size=size, grey=True)
        else:
            frames = read_images(item.files(), short_side=short_side, size=size, grey=True)
        held: list[Frame] = []
        limit = 0
        for frame in frames:
            held.append(frame)
            film.numbers.append(frame.number)
            film.times.append(math.nan if frame.time is None else frame.time)
            limit = limit or stride + max(1, _BATCH_BYTES // (8 * frame.image.size) // threads) * threads
            if len(held) == limit:
                yield self._batch(film, held)
                held = held[-stride:]
        if len(held) > stride:
            yield self._batch(film, held)
        if len(film.numbers) <= stride:
            raise InputError(f"{item.path}: {len(film.numbers)} frames, expected at least {stride + 1} for a pair")

    def _batch(self, film: _Film, frames: list[Frame]) -> _Batch:
        stride, fps = self._parameters.stride, self._parameters.fps or _DEFAULT_FPS
        # the frames on whose grids the flow lies
        of_flow = frames[stride:] if self._parameters.direction == "backward" else frames[:-stride]
        times = tuple(f.number / fps if f.time is None else f.time for f in of_flow)
        return _Batch(film, np.stack([f.image for f in frames]), times)

    def _flow(self, batches: Generator[_Batch, None, None], device: torch.device, threads: int) -> Iterator[_Batch]:
        """Second stage: the flow of each batch's frames."""
        parameters, stride = self._parameters, self._parameters.stride
        # closing, or an error here would leave the decoding thread waiting
        with closing(batches):
            for batch in batches:
                if batch.data is None:
                    yield batch
                    continue
                began = time.perf_counter()
                frames = torch.from_numpy(batch.data)[:, None].to(device)
                early, late = frames[:-stride], frames[stride:]
                a, b = (late, early) if parameters.direction == "backward" else (early, late)
                flow = tvl1_flow(a, b, preset=parameters.preset, threads=threads).cpu().numpy()
                if parameters.resize == "after":
                    flow = _resize_flow(flow, parameters.short_side, parameters.size)
                self._add_seconds("flow", began)
                yield batch._replace(data=flow)

    def _write(self, film: _Film, batches: Iterator[_Batch]) -> None:
        """Third stage: the files of one film."""
        parameters = self._parameters
        fps = film.fps or parameters.fps or _DEFAULT_FPS
        shape, first, done = (0, 0), None, 0
        try:
            # a film that cannot be read to its end is removed at once: half of a long one fills disks
            with film.result.writing() as folder:
                with flow_writer(folder, film.formats, parameters.bound, fps) as write:
                    for batch in batches:
                        self.raise_if_stopped()
                        if batch.error is not None:
                            raise _Unreadable(batch.error)
                        if batch.data is None:
                            continue
                        began = time.perf_counter()
                        first = batch.times[0] if first is None else first
                        write(batch.data, [t - first for t in batch.times])
                        shape = batch.data.shape[2:]
                        film.pairs += len(batch.data)
                        self._add_seconds("write", began)
                        self._advance(film, len(batch.data))
                (folder / MARKER).write_text(json.dumps(self._marker(film, shape)) + "\n")
            done = 1
        except _Unreadable as unreadable:
            self.fail(film.item, unreadable.args[0])
        with self.lock:
            self.done += done
            self._begun_pairs += film.pairs - film.expected_pairs

    def _marker(self, film: _Film, shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            "source": film.source,
            "parameters": self._parameters.as_dict(),
            "formats": film.formats,
            "pairs": film.pairs,
            "height": shape[0],
            "width": shape[1],
            "fps": film.fps,
            "flow_of_8_bit_level": "level * 2 * bound / 255 - bound",
            "versions": {"avfast": __version__, "torch": torch.__version__, "av": av.__version__},
            "frame_numbers": film.numbers.tolist(),
            "frame_times": [None if math.isnan(t) else round(t, 6) for t in film.times],
        }

    def _add_seconds(self, stage: str, began: float) -> None:
        with self.lock:
            self._stage_seconds[stage] += time.perf_counter() - began

    def _advance(self, film: _Film, pairs: int) -> None:
        with self.lock:
            self.pairs += pairs
            # films not yet begun are taken to be as long as those that are
            left = self.waiting
            total = max(round(self._begun_pairs * (1 + left / max(1, self._begun))), self.pairs + 1)
            rate = self.pairs / self.seconds
            text = f"{rate:.1f} pairs/s, {self.done + self.skipped} items done, {left} to begin, at {film.item.name}"
            self._progress.update(self.pairs, total, text)


def _resize_flow(flow: np.ndarray, short_side: int | None, size: tuple[int, int] | None) -> np.ndarray:
    """Flow (N,2,H,W) on a grid of another size, in pixels of that grid."""
    h, w = flow.shape[2:]
    height, width = target_size(h, w, short_side, size)
    scale = np.array([width / w, height / h], np.float32)
    pictures = [resize(pair.transpose(1, 2, 0), height, width) * scale for pair in flow]
    return np.stack(pictures).transpose(0, 3, 1, 2)
