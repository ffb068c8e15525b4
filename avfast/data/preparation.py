"""The first half of `avfast prepare`: every video becomes clips in a folder of its own.

That folder, sources/<name>/ below the data set, appears when it is complete, so no video is read twice. It holds the
arrays of a clip store and source.json: what the video is, or why it cannot be used. Of the sound the waveform is kept,
1470 bytes a frame. Its spectrogram, 3060, is computed with each batch, which takes 0.6 times as long as turning the
frames into floats. The second half, avfast.data.joining, makes the data set of these folders."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from avfast.data import sound2sight
from avfast.data.film_clips import ClipSettings, film_rate, iter_clips
from avfast.data.prepared import DATASET_VERSION, INDEX, SETTINGS, file_digest
from avfast.data.store import write_arrays
from avfast.errors import InputError
from avfast.files.atomic import replacing
from avfast.files.result_folder import ResultFolder
from avfast.media.inputs import Item
from avfast.media.item_run import ItemRun
from avfast.media.video import probe_video
from avfast.opticalflow.tvl1 import PRESETS as FLOW_PRESETS
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.ui.progress import Progress

SOURCES, SOURCE = "sources", "source.json"
CLIPS_AT_A_TIME = 16
"""Clips in memory per worker: 50 MB with their flow at 64x64 and 45 frames."""


@dataclass(frozen=True)
class PreparationSettings:
    """What decides the bytes of a data set; see avfast.prepare.PrepareConfig for each."""

    layout: Literal["videos", "sound2sight"]
    clip_frames: int
    clips: ClipSettings
    flow: Literal["store", "online"]
    flow_preset: str
    val_share: float
    test_share: float

    def as_dict(self) -> dict[str, Any]:
        """These, and the values of the flow preset, as JSON gives them back."""
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


def begin_dataset(out: Path, settings: PreparationSettings) -> None:
    """Make the folder of a data set and write its settings, or compare them with those that are there. Raises
    InputError for a folder that was not made by avfast prepare, or was made with other settings."""
    path, parameters = out / SETTINGS, settings.as_dict()
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
                change = f"{name.replace('_', '-')} {old.get(name)}, now {parameters.get(name)}"
                raise InputError(f"{out} holds a data set prepared with {change}: choose another --out")
        return
    if any(not name.startswith(f".{path.stem}.") for name in names):
        raise InputError(f"{out} is there and was not made by avfast prepare: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {"version": DATASET_VERSION, "parameters": parameters})


def source_folder(out: Path, item: Item) -> Path:
    """The folder of a video's clips while the data set is made."""
    return out / SOURCES / item.name


def read_source(out: Path, item: Item) -> dict[str, Any] | None:
    """The source.json of a video that was done, or None."""
    try:
        return json.loads((source_folder(out, item) / SOURCE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None


def identify(item: Item, layout: str) -> dict[str, Any]:
    """`digest`, which changes with the files of a video, and their `bytes`; `reason`: why they cannot be looked at."""
    try:
        files = [item] if item.images is not None else [replace(item, path=path) for path in _files(item, layout)]
        sources = [file.source() for file in files]
    except (InputError, OSError) as error:
        return {"digest": "", "bytes": 0, "reason": item.reason(error)}
    return {"digest": "-".join(s["digest"] for s in sources), "bytes": sum(s["bytes"] for s in sources), "reason": None}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small file under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


class PreparationRun(ItemRun):
    """One run over videos: the clips of each into its folder below `out`."""

    def __init__(self, items: Sequence[Item], out: Path, settings: PreparationSettings) -> None:
        super().__init__(items)
        self.clips = 0
        self._out, self._settings = out, settings

    def prepare(self, workers: int, device: str) -> None:
        """Do all items, `workers` at a time, with flow on the device. Raises OSError when clips cannot be written."""
        threads = max(1, torch.get_num_threads() // workers)
        with Progress("preparing, videos") as progress:
            self.run([partial(self._work, device, threads, progress, self.waiting)] * workers)

    def _work(self, device: str, threads: int, progress: Progress, total: int) -> None:
        for item in self.items():
            clips = self._do(item, device, threads)
            with self.lock:
                self.done += clips is not None
                self.clips += clips or 0
                ended = self.done + self.skipped + self.elsewhere
                progress.update(ended, total, f"{self.clips} clips, {self.clips / self.seconds:.1f} clips/s")

    def _do(self, item: Item, device: str, threads: int) -> int | None:
        """Read one video, or note why it cannot be used; the number of its clips, None where there is nothing to do."""
        known, identity = read_source(self._out, item), identify(item, self._settings.layout)
        # with an index, another run has finished the whole set in the meantime
        if (self._out / INDEX).exists() or (known is not None and known["digest"] == identity["digest"]):
            self.skip()
            return None
        result = ResultFolder(source_folder(self._out, item))
        if not self.claim(result):
            return None
        with result.writing() as folder:
            source = {"name": item.name, "file": item.path.name, **identity, "sha256": [], "clips": 0, "fps": None}
            try:
                if source["reason"]:
                    raise InputError(source["reason"])
                source |= self._read(item, folder, device, threads)
            except InputError as error:
                source["reason"] = item.reason(error)
                for path in folder.glob("*.npy"):
                    path.unlink()
            write_json(folder / SOURCE, source)
        return source["clips"]

    def _read(self, item: Item, folder: Path, device: str, threads: int) -> dict[str, Any]:
        """Write the clips of one video; what is known of them. Raises InputError for a video that cannot be used."""
        settings = self._settings
        if item.images is not None:
            raise InputError("a folder of images has no sound track")
        fps = film_rate(item.path, settings.clips) if settings.layout == "videos" else probe_video(item.path).fps
        count, _ = write_arrays(folder, self._chunks(item.path, device, threads))
        if not count:
            at = f" ({settings.clip_frames / fps:.2f} s at {fps:.5g} frames per second)" if fps else ""
            raise InputError(f"too short: its video or its sound ends before {settings.clip_frames} frames{at}")
        return {
            "sha256": [file_digest(path) for path in _files(item, settings.layout)],
            "clips": count,
            "fps": None if fps is None else round(fps, 6),
        }

    def _chunks(self, path: Path, device: str, threads: int) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of a clip store for some of a video's clips after another."""
        settings = self._settings
        read = _video_chunks if settings.layout == "videos" else _sound2sight_chunks
        with closing(read(settings, path)) as chunks:
            for chunk in chunks:
                self.raise_if_stopped()
                if settings.flow == "store":
                    frames = torch.from_numpy(chunk["frames"]).to(device)
                    flow = tvl1_flow(frames, preset=settings.flow_preset, threads=threads)
                    chunk["flow"] = flow.cpu().numpy().astype(np.float16)
                yield chunk


def _files(item: Item, layout: str) -> list[Path]:
    """A video, and the pickle that belongs to it in Sound2Sight's layouts. Raises InputError as `pickle_of` does."""
    return [item.path] if layout == "videos" else [item.path, sound2sight.pickle_of(item.path)]


def _video_chunks(settings: PreparationSettings, path: Path) -> Generator[dict[str, np.ndarray], None, None]:
    with closing(iter_clips(path, settings.clips, frames=settings.clip_frames)) as clips:
        while some := list(islice(clips, CLIPS_AT_A_TIME)):
            yield {name: np.stack([getattr(clip, name) for clip in some]) for name in ("frames", "waveform")}


def _sound2sight_chunks(settings: PreparationSettings, path: Path) -> Generator[dict[str, np.ndarray], None, None]:
    film = sound2sight.read_film(path, settings.clips)
    length = settings.clip_frames
    count = len(film.frames) // length
    if count:
        arrays = {"frames": film.frames, "audio": film.audio}
        yield {name: a[: count * length].reshape(count, length, *a.shape[1:]) for name, a in arrays.items()}
