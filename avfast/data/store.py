"""The clip store: a folder of memory-mapped `.npy` arrays and an `index.json` with every parameter that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avfast.audio import spectrogram
from avfast.config import InputError, MMNISTConfig, TrainConfig
from avfast.data.digits import Split
from avfast.data.mmnist import MovingMNIST, mmnist_spectrogram
from avfast.flow import PRESETS, tvl1_flow
from avfast.progress import Progress

FORMAT = "avfast-clips"
FORMAT_VERSION = 1
"""Raised whenever a folder written before could no longer be read."""
_INDEX = "index.json"
# dtype and number of dimensions; little-endian, so that the files serve every machine
_ARRAYS = {"frames": ("|u1", 5), "audio": ("<f4", 5), "flow": ("<f2", 5), "waveform": ("<i2", 2)}
_CHUNK = 32


class Batch(NamedTuple):
    """B windows of T frames on one device."""

    frames: Tensor
    """(B, T, C, H, W) float32 in [0, 1]."""
    audio: Tensor
    """(B, T, 1, F, S) float32 in [0, 1]."""
    flow: Tensor
    """(B, T, 2, H, W) float32, backward, in pixels; flow[:, 0] = 0."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


class ClipStore:
    """N clips of T frames: `frames` (N, T, C, H, W) uint8, `audio` (N, T, 1, F, S) float32, `flow` (N, T, 2, H, W)
    float16 (backward TV-L1, pixels) and `waveform` (N, T * samples) int16, memory-mapped, with the `parameters` that
    made them.
    """

    def __init__(self, folder: Path, arrays: dict[str, np.ndarray], parameters: dict[str, Any]) -> None:
        self.folder, self.parameters = folder, parameters
        self.frames, self.audio, self.flow, self.waveform = (arrays[name] for name in _ARRAYS)

    @classmethod
    def open(cls, folder: str | Path) -> ClipStore:
        """Map the arrays of a folder, after comparing each with the index.

        Raises InputError, one line, for a folder that is missing, foreign, of another format version, truncated, or
        whose arrays differ from its index.
        """
        folder = Path(folder)
        try:
            index = json.loads((folder / _INDEX).read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: not a clip store, {_INDEX} cannot be read ({error})") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise InputError(f"{folder}: not a clip store, {_INDEX} does not say format={FORMAT!r}")
        if index.get("version") != FORMAT_VERSION:
            raise InputError(f"{folder}: clip store of version {index.get('version')}, expected {FORMAT_VERSION}")
        arrays = {}
        for name in _ARRAYS:
            path = folder / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path}: cannot be read, missing or truncated ({error})") from None
            found, expected = {"dtype": array.dtype.str, "shape": list(array.shape)}, index.get("arrays", {}).get(name)
            if found != expected:
                raise InputError(f"{path}: holds {found}, expected {expected} from {_INDEX}")
            arrays[name] = array
        return cls(folder, arrays, index.get("parameters", {}))

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def clip_frames(self) -> int:
        """Frames per clip."""
        return self.frames.shape[1]

    def batch(
        self,
        clips: Sequence[int] | np.ndarray,
        starts: Sequence[int] | np.ndarray,
        length: int,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Windows of `length` frames: window i is clip clips[i] from frame starts[i] (counted from 0).

        The stored types travel to the device and are converted there. flow[:, 0] is 0: a window's first frame has no
        predecessor. Raises ValueError for different lengths or a window outside its clip.
        """
        if len(clips) != len(starts) or not len(clips) or length < 1:
            raise ValueError(f"clips, starts, length: {len(clips)} clips, {len(starts)} starts, length={length}")
        for clip, start in zip(clips, starts, strict=True):
            if not (0 <= clip < len(self) and 0 <= start <= self.clip_frames - length):
                raise ValueError(
                    f"clip {clip}, start {start}, length={length}: expected a window inside the {len(self)} clips of "
                    f"{self.clip_frames} frames"
                )

        def gather(array: np.ndarray) -> Tensor:
            windows = [array[clip, start : start + length] for clip, start in zip(clips, starts, strict=True)]
            return torch.from_numpy(np.stack(windows)).to(device)

        flow = gather(self.flow).float()
        flow[:, 0] = 0
        return Batch(gather(self.frames).float() / 255, gather(self.audio), flow)


def training_mean_image(store: ClipStore) -> Tensor:
    """(C, H, W) float32 in [0, 1]: the mean of every frame of every clip, summed in integers."""
    total = np.zeros(store.frames.shape[2:], np.int64)
    for first in range(0, len(store), 256):
        total += store.frames[first : first + 256].sum((0, 1), dtype=np.int64)
    return torch.from_numpy(total / (255 * len(store) * store.clip_frames)).float()


def write_store(
    folder: str | Path, clips: int, chunks: Iterable[dict[str, np.ndarray]], parameters: dict[str, Any]
) -> ClipStore:
    """Write chunks of clips, one after another, as a clip store and open it.

    Each chunk holds the four arrays of `ClipStore` for some of the `clips` clips. The work happens in a hidden folder
    next to `folder` which is renamed at the end, so `folder` is never half made; where another process was first, its
    result is used. Raises InputError, one line, for a full disk or an unwritable folder, and ValueError for chunks
    that do not fit. Whatever is raised, the unfinished folder is removed; what a killed process left is removed by the
    next build of the same store on the same host.
    """
    folder = Path(folder)
    work = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        host = _host()
        _remove_abandoned(folder, host)
        # not tempfile.mkdtemp, which would hide the store from other users
        work = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}-{os.getpid()}@{host}"
        work.mkdir()
        shapes = _write_arrays(work, clips, chunks)
        arrays = {name: {"dtype": _ARRAYS[name][0], "shape": list(shape)} for name, shape in shapes.items()}
        index = {"format": FORMAT, "version": FORMAT_VERSION, "arrays": arrays, "parameters": parameters}
        (work / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        try:
            work.rename(folder)
        except OSError:
            # the name is taken: by the same store, built meanwhile, or by something that open() will refuse
            if not folder.exists():
                raise
    except OSError as error:
        raise InputError(f"{folder}: cannot write the clip store: {error.strerror or error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return ClipStore.open(folder)


def _host() -> str:
    """Names the place where a process id means something: the host, and on it the container."""
    return f"{socket.gethostname()}-{os.stat('/proc/self/ns/pid').st_ino}"


def _remove_abandoned(folder: Path, host: str) -> None:
    """Remove the work folders of builds of this store by processes of this host that are gone."""
    name = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}-(\d+)@{re.escape(host)}")
    for path in folder.parent.iterdir():
        owner = name.fullmatch(path.name)
        if owner and not _lives(int(owner[1])):
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # it is another user's
        pass
    return True


def _write_arrays(folder: Path, clips: int, chunks: Iterable[dict[str, np.ndarray]]) -> dict[str, tuple[int, ...]]:
    """Append every chunk to the four files; the shape of each array."""
    shapes: dict[str, tuple[int, ...]] = {}
    written = 0
    with ExitStack() as stack:
        # plain writes: a full disk is an OSError here, and a killed process when writing through a memory map
        files: dict[str, BinaryIO] = {name: stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in _ARRAYS}
        for chunk in chunks:
            count = len(chunk["frames"])
            for name, (dtype, ndim) in _ARRAYS.items():
                array = chunk[name]
                if name not in shapes:
                    shapes[name] = (clips, *array.shape[1:])
                    header = {"descr": dtype, "fortran_order": False, "shape": shapes[name]}
                    np.lib.format.write_array_header_1_0(files[name], header)
                if array.dtype != dtype or array.ndim != ndim or array.shape != (count, *shapes[name][1:]):
                    raise ValueError(
                        f"chunk[{name!r}] is {array.dtype} {array.shape}: expected {np.dtype(dtype)} "
                        f"{(count, *shapes[name][1:])} of {ndim} dimensions"
                    )
                files[name].write(np.ascontiguousarray(array, dtype).data)
            written += count
    if written != clips:
        raise ValueError(f"chunks hold {written} clips: expected {clips}")
    return shapes


def load_mmnist(
    config: MMNISTConfig,
    split: Split,
    cache: str | Path,
    *,
    flow_preset: str,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ClipStore:
    """One split of Multimodal MovingMNIST with spectrograms and backward TV-L1 flow, from the cache or built into it.

    The folder is `<cache>/mmnist-<split>-<hash>`, the hash of exactly those parameters that change this split's data
    (digit files by content). progress(done, clips) is called as clips are built; threads are the flow's. Raises
    InputError for bad settings or digit files, a damaged folder in the cache, a full disk or an unwritable cache.
    """
    if flow_preset not in PRESETS:
        raise InputError(f"flow_preset={flow_preset!r}: expected one of {', '.join(PRESETS)}")
    source = MovingMNIST(config, split)
    folder, parameters = _mmnist_place(source, split, cache, flow_preset)
    if folder.exists():
        return ClipStore.open(folder)

    def build() -> Iterable[dict[str, np.ndarray]]:
        config_audio = mmnist_spectrogram(config.tone)
        for first in range(0, len(source), _CHUNK):
            clips = source.clips(first, min(_CHUNK, len(source) - first))
            flow = tvl1_flow(torch.from_numpy(clips.frames), preset=flow_preset, threads=threads)
            yield {
                "frames": clips.frames,
                "audio": spectrogram(torch.from_numpy(clips.waveform), config_audio).numpy(),
                "flow": flow.numpy().astype(np.float16),
                "waveform": clips.waveform,
            }
            if progress is not None:
                progress(first + len(clips.frames), len(source))

    return write_store(folder, len(source), build(), parameters)


def _mmnist_place(
    source: MovingMNIST, split: Split, cache: str | Path, flow_preset: str
) -> tuple[Path, dict[str, Any]]:
    """The folder of a split in a cache, and the parameters whose hash is in its name."""
    flow_parameters = {"preset": flow_preset, **dataclasses.asdict(PRESETS[flow_preset])}
    parameters = {**source.parameters(), "flow": flow_parameters}
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / f"mmnist-{split}-{digest}", parameters


def built_split(run: TrainConfig, split: Split) -> ClipStore | None:
    """One split of a run's data set where it has been built already, else None. Raises InputError as `load_mmnist`."""
    folder, _ = _mmnist_place(MovingMNIST(run.data, split), split, run.data_cache, run.flow_preset)
    return ClipStore.open(folder) if folder.exists() else None


def load_split(run: TrainConfig, split: Split, *, quiet: bool = False) -> ClipStore:
    """One split of a run's data set, from its cache or built into it with progress shown; raises as `load_mmnist`."""
    with Progress(f"data set, {split}", quiet=quiet) as progress:
        return load_mmnist(run.data, split, run.data_cache, flow_preset=run.flow_preset, progress=progress.update)
