"""The clip store: a folder of memory-mapped `.npy` arrays and an `index.json` with every parameter that made them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from avfast.errors import InputError
from avfast.files.atomic import npy_appender
from avfast.files.result_folder import hidden_folder, sweep
from avfast.files.settings import check_name
from avfast.media.prefetch import prefetch
from avfast.media.spectrogram import SpectrogramConfig, spectrogram
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow

FORMAT = "avfast-clips"
FORMAT_VERSION = 1
"""Raised whenever a folder written before could no longer be read."""
_INDEX = "index.json"
DATASET_FORMAT = "avfast-dataset"
_KINDS = {FORMAT: "clip store", DATASET_FORMAT: "data set"}
# dtype and number of dimensions; little-endian, so that the files serve every machine. The frames are always there, and
# of the sound its spectrogram or its waveform
_ARRAYS = {"frames": ("|u1", 5), "audio": ("<f4", 5), "flow": ("<f2", 5), "waveform": ("<i2", 2)}

Indices = Sequence[int] | np.ndarray
Device = torch.device | str


class Batch(NamedTuple):
    """B windows of T frames on one device: frames (B, T, C, H, W) and audio (B, T, 1, F, S), float32 in [0, 1]; flow
    (B, T, 2, H, W) float32, backward, in pixels, flow[:, 0] = 0; waveform (B, T * samples_per_frame) int16, where
    it was asked for."""

    frames: Tensor
    audio: Tensor
    flow: Tensor
    waveform: Tensor | None = None

    def first_frames(self, count: int) -> Batch:
        """The first `count` frames of every window."""
        frames = self.frames.shape[1]
        # the waveform has many samples a frame
        return Batch._make(None if part is None else part[:, : count * part.shape[1] // frames] for part in self)


class ClipStore:
    """N clips of T frames: `frames` (N, T, C, H, W) uint8, `audio` (N, T, 1, F, S) float32, `flow` (N, T, 2, H, W)
    float16 (backward TV-L1, pixels) and `waveform` (N, T * samples) int16, memory-mapped, with the `parameters` that
    made them. What is not stored is None: a spectrogram comes from the waveform then, flow from the frames, with the
    parameters `spectrogram` (those of SpectrogramConfig) and `flow` (`preset`)."""

    def __init__(self, folder: Path, arrays: dict[str, Any], parameters: dict[str, Any]) -> None:
        self.folder, self.parameters, self._arrays = folder, parameters, arrays
        self.frames: np.ndarray = arrays["frames"]
        self.audio, self.flow, self.waveform = (arrays.get(name) for name in ("audio", "flow", "waveform"))

    @classmethod
    def open(cls, folder: str | Path) -> ClipStore:
        """Map the arrays of a folder, after comparing each with the index. Raises InputError, one line, for a folder
        that is missing, foreign, of another format version, truncated, or whose arrays differ from its index."""
        folder = Path(folder)
        index = read_index(folder, FORMAT, FORMAT_VERSION)
        listed, arrays = index.get("arrays", {}), {}
        if "frames" not in listed or not {"audio", "waveform"} & listed.keys() or not listed.keys() <= _ARRAYS.keys():
            raise InputError(f"{folder}: {_INDEX} lists {sorted(listed)}, expected frames, and audio or waveform")
        for name, expected in listed.items():
            path = folder / f"{name}.npy"
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise InputError(f"{path}: cannot be read, missing or truncated ({error})") from None
            found = {"dtype": array.dtype.str, "shape": list(array.shape)}
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

    @property
    def audio_shape(self) -> tuple[int, int]:
        """(F, S) of a frame's spectrogram."""
        return self._spectrogram.shape if self.audio is None else self.audio.shape[3:]

    @property
    def _spectrogram(self) -> SpectrogramConfig:
        return SpectrogramConfig(**self.parameters["spectrogram"])

    def cached(
        self, where: Literal["none", "ram", "device"], device: Device = "cpu", *, waveform: bool = False
    ) -> ClipStore:
        """The same store with what `gather` reads mapped from the disk, copied into memory, or put on the device."""
        if where == "none":
            return self
        copies: dict[str, Any] = {name: np.array(array) for name, array in self._read_arrays(waveform).items()}
        if where == "device":
            copies = {name: torch.from_numpy(array).to(device) for name, array in copies.items()}
        return ClipStore(self.folder, copies, self.parameters)

    def _read_arrays(self, waveform: bool) -> dict[str, Any]:
        """The arrays that are read: the waveform where it is asked for, or stored in place of a spectrogram."""
        wanted = waveform or self.audio is None
        return {name: array for name, array in self._arrays.items() if name != "waveform" or wanted}

    def gather(self, clips: Indices, starts: Indices, length: int, *, waveform: bool = False) -> dict[str, Tensor]:
        """Windows of `length` frames by the names and in the types of the stored arrays: window i is clip clips[i] from
        frame starts[i] (counted from 0). Raises ValueError for different lengths, a window outside its clip, or a
        waveform that is not stored."""
        if len(clips) != len(starts) or not len(clips) or length < 1:
            raise ValueError(f"clips, starts, length: {len(clips)} clips, {len(starts)} starts, length={length}")
        for clip, start in zip(clips, starts, strict=True):
            if not (0 <= clip < len(self) and 0 <= start <= self.clip_frames - length):
                inside = f"inside the {len(self)} clips of {self.clip_frames} frames"
                raise ValueError(f"clip {clip}, start {start}, length={length}: expected a window {inside}")
        if waveform and self.waveform is None:
            raise ValueError(f"waveform: {self.folder} does not hold it")
        windows = {}
        for name, array in self._read_arrays(waveform).items():
            unit = array.shape[1] // self.clip_frames
            parts = [array[c, s * unit : (s + length) * unit] for c, s in zip(clips, starts, strict=True)]
            windows[name] = torch.stack(parts) if isinstance(array, Tensor) else torch.from_numpy(np.stack(parts))
        return windows

    def convert(self, windows: dict[str, Tensor], device: Device = "cpu") -> Batch:
        """Gathered windows as a batch: the stored types travel to the device and are converted there. flow[:, 0] is 0:
        a window's first frame has no predecessor."""
        parts = {name: part.to(device, non_blocking=part.is_pinned()) for name, part in windows.items()}
        frames, waveform = parts["frames"], parts.get("waveform")
        audio = parts["audio"] if "audio" in parts else spectrogram(parts["waveform"], self._spectrogram)
        if "flow" in parts:
            flow = parts["flow"].float()
            flow[:, 0] = 0
        else:
            flow = tvl1_flow(frames, preset=self.parameters["flow"]["preset"])
        return Batch(frames.float() / 255, audio, flow, waveform)

    def batch(
        self,
        clips: Indices,
        starts: Indices,
        length: int,
        device: Device = "cpu",
        *,
        waveform: bool = False,
    ) -> Batch:
        """`gather`, then `convert`."""
        return self.convert(self.gather(clips, starts, length, waveform=waveform), device)

    def batches(
        self, keys: Iterable[tuple[Indices, Indices]], length: int, device: torch.device, *, waveform: bool = False
    ) -> Generator[Batch, None, None]:
        """The batches of many (clips, starts), in their order. For a GPU a thread gathers the next one into pinned
        memory in the meantime; close the iterator to end it."""
        gathered = (self.gather(clips, starts, length, waveform=waveform) for clips, starts in keys)
        if device.type != "cuda" or isinstance(self.frames, Tensor):
            yield from (self.convert(windows, device) for windows in gathered)
            return
        pinned = ({name: part.pin_memory() for name, part in windows.items()} for windows in gathered)
        with closing(prefetch(pinned)) as ready:
            yield from (self.convert(windows, device) for windows in ready)


def read_index(folder: Path, kind: str, version: int) -> dict[str, Any]:
    """The index.json of a folder that avfast has made. Raises InputError, one line, where there is none, or a damaged
    one, or one of another format or version."""
    try:
        index = json.loads((folder / _INDEX).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a {_KINDS[kind]}, {_INDEX} cannot be read ({error})") from None
    if not isinstance(index, dict) or index.get("format") != kind:
        raise InputError(f"{folder}: not a {_KINDS[kind]}, {_INDEX} does not say format={kind!r}")
    found = index.get("version")
    if found != version:
        newer = " (a newer avfast has written it)" if isinstance(found, int) and found > version else ""
        raise InputError(f"{folder}: {_KINDS[kind]} of version {found}, expected {version}{newer}")
    return index


def training_mean_image(store: ClipStore) -> Tensor:
    """(C, H, W) float32 in [0, 1]: the mean of every frame of every clip, summed in integers."""
    total = np.zeros(store.frames.shape[2:], np.int64)
    for first in range(0, len(store), 256):
        total += store.frames[first : first + 256].sum((0, 1), dtype=np.int64)
    return torch.from_numpy(total / (255 * len(store) * store.clip_frames)).float()


def generated_folder(cache: str | Path, parameters: dict[str, Any], flow_preset: str) -> tuple[Path, dict[str, Any]]:
    """Where a split of a generated data set is kept in the folder `cache`, and `parameters`, which decide its bytes,
    with those of its flow added. The folder is `<cache>/<dataset>-<split>-<hash of all parameters>`; two of them are
    `dataset` and `split`. Raises InputError for an unknown flow preset."""
    check_name(flow_preset, PRESETS, "flow-preset")
    parameters = {**parameters, "flow": {"preset": flow_preset, **dataclasses.asdict(PRESETS[flow_preset])}}
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / f"{parameters['dataset']}-{parameters['split']}-{digest}", parameters


def write_store(
    folder: str | Path, clips: int, chunks: Iterable[dict[str, np.ndarray]], parameters: dict[str, Any]
) -> ClipStore:
    """Write chunks of clips, one after another, as a clip store and open it. Each chunk holds the same arrays of
    `ClipStore` for some of the `clips` clips. The store appears whole, by a rename; where another process was first,
    its store is used. Raises InputError, one line, for a full disk or an unwritable folder, and ValueError for chunks
    that do not fit."""
    folder = Path(folder)
    try:
        sweep([folder])
        with hidden_folder(folder) as unfinished:
            found, shapes = write_arrays(unfinished, chunks)
            if found != clips:
                raise ValueError(f"chunks hold {found} clips: expected {clips}")
            arrays = {name: {"dtype": _ARRAYS[name][0], "shape": [clips, *shape]} for name, shape in shapes.items()}
            index = {"format": FORMAT, "version": FORMAT_VERSION, "arrays": arrays, "parameters": parameters}
            (unfinished / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
            try:
                os.rename(unfinished, folder)
            except OSError:
                # the name is taken: by the same store, built meanwhile, or by something that open() will refuse
                if not folder.exists():
                    raise
    except OSError as error:
        raise InputError(f"{folder}: cannot write the clip store: {error.strerror or error}") from error
    return ClipStore.open(folder)


def write_arrays(folder: Path, chunks: Iterable[dict[str, np.ndarray]]) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Write chunks of clips, one after another, as the `.npy` files of a clip store; the number of clips, and the shape
    of one clip in each file. Raises ValueError for chunks that do not fit each other or a clip store, OSError when a
    file cannot be written."""
    clips, shapes = 0, {}
    append: dict[str, Callable[[np.ndarray], None]] = {}
    with ExitStack() as stack:
        for chunk in chunks:
            for name, array in chunk.items():
                dtype, ndim = _ARRAYS[name]
                if name not in shapes:
                    shapes[name] = array.shape[1:]
                    append[name] = stack.enter_context(npy_appender(folder / f"{name}.npy"))
                shape = (len(chunk["frames"]), *shapes[name])
                if array.dtype != dtype or array.ndim != ndim or array.shape != shape:
                    expected = f"{np.dtype(dtype)} {shape} of {ndim} dimensions"
                    raise ValueError(f"chunk[{name!r}] is {array.dtype} {array.shape}: expected {expected}")
                append[name](np.ascontiguousarray(array, dtype))
            if chunk.keys() != shapes.keys():
                raise ValueError(f"a chunk holds {sorted(chunk)}: expected {sorted(shapes)} as in the first one")
            clips += len(chunk["frames"])
    return clips, shapes
