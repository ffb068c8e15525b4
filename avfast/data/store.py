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


class Batch(NamedTuple):
    """B windows of T frames on one device."""

    frames: Tensor
    """(B, T, C, H, W) float32 in [0, 1]."""
    audio: Tensor
    """(B, T, 1, F, S) float32 in [0, 1]."""
    flow: Tensor
    """(B, T, 2, H, W) float32, backward, in pixels; flow[:, 0] = 0."""
    waveform: Tensor | None = None
    """(B, T * samples_per_frame) int16, where it was asked for."""

    def first_frames(self, count: int) -> Batch:
        """The first `count` frames of every window."""
        frames, audio, flow = (part[:, :count] for part in self[:3])
        samples = 0 if self.waveform is None else self.waveform.shape[1] // self.frames.shape[1]
        return Batch(frames, audio, flow, None if self.waveform is None else self.waveform[:, : count * samples])


class Windows(NamedTuple):
    """B windows of T frames as they are stored; what is not stored is None."""

    frames: Tensor
    """(B, T, C, H, W) uint8."""
    audio: Tensor | None
    """(B, T, 1, F, S) float32."""
    flow: Tensor | None
    """(B, T, 2, H, W) float16."""
    waveform: Tensor | None
    """(B, T * samples_per_frame) int16, gathered where it is asked for or there is no spectrogram."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Windows:
        """Every part changed, such as brought to another device."""
        return Windows(change(self.frames), *(None if part is None else change(part) for part in self[1:]))


class ClipStore:
    """N clips of T frames: `frames` (N, T, C, H, W) uint8, `audio` (N, T, 1, F, S) float32, `flow` (N, T, 2, H, W)
    float16 (backward TV-L1, pixels) and `waveform` (N, T * samples) int16, memory-mapped, with the `parameters` that
    made them. What is not stored is None: a spectrogram comes from the waveform then, flow from the frames, with the
    parameters `spectrogram` (those of SpectrogramConfig) and `flow` (`preset`).
    """

    def __init__(self, folder: Path, arrays: dict[str, Any], parameters: dict[str, Any]) -> None:
        self.folder, self.parameters = folder, parameters
        self._arrays = arrays
        self.frames: np.ndarray = arrays["frames"]
        self.audio, self.flow, self.waveform = (arrays.get(name) for name in ("audio", "flow", "waveform"))

    @classmethod
    def open(cls, folder: str | Path) -> ClipStore:
        """Map the arrays of a folder, after comparing each with the index.

        Raises InputError, one line, for a folder that is missing, foreign, of another format version, truncated, or
        whose arrays differ from its index.
        """
        folder = Path(folder)
        index = read_index(folder, FORMAT, FORMAT_VERSION)
        listed = index.get("arrays", {})
        if "frames" not in listed or not {"audio", "waveform"} & listed.keys() or not listed.keys() <= _ARRAYS.keys():
            raise InputError(
                f"{folder}: {_INDEX} lists the arrays {sorted(listed)}, expected frames, and audio or waveform"
            )
        arrays = {}
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
        self, where: Literal["none", "ram", "device"], device: torch.device | str = "cpu", *, waveform: bool = False
    ) -> ClipStore:
        """The same store with what `gather` reads mapped from the disk, copied into memory, or put on the device."""
        if where == "none":
            return self
        wanted = waveform or self.audio is None
        read = {name: array for name, array in self._arrays.items() if name != "waveform" or wanted}
        copies: dict[str, Any] = {name: np.array(array) for name, array in read.items()}
        if where == "device":
            copies = {name: torch.from_numpy(array).to(device) for name, array in copies.items()}
        return ClipStore(self.folder, copies, self.parameters)

    def gather(
        self,
        clips: Sequence[int] | np.ndarray,
        starts: Sequence[int] | np.ndarray,
        length: int,
        *,
        waveform: bool = False,
    ) -> Windows:
        """Windows of `length` frames as stored: window i is clip clips[i] from frame starts[i] (counted from 0). The
        waveform is among them where it is asked for, or stored in place of a spectrogram.

        Raises ValueError for different lengths or a window outside its clip.
        """
        if len(clips) != len(starts) or not len(clips) or length < 1:
            raise ValueError(f"clips, starts, length: {len(clips)} clips, {len(starts)} starts, length={length}")
        for clip, start in zip(clips, starts, strict=True):
            if not (0 <= clip < len(self) and 0 <= start <= self.clip_frames - length):
                raise ValueError(
                    f"clip {clip}, start {start}, length={length}: expected a window inside the {len(self)} clips of "
                    f"{self.clip_frames} frames"
                )

        def take(array: Any, unit: int = 1) -> Tensor | None:
            if array is None:
                return None
            windows = [array[c, s * unit : (s + length) * unit] for c, s in zip(clips, starts, strict=True)]
            return torch.stack(windows) if isinstance(array, Tensor) else torch.from_numpy(np.stack(windows))

        if waveform and self.waveform is None:
            raise ValueError(f"waveform: {self.folder} does not hold it")
        sound = self.waveform if waveform or self.audio is None else None
        samples = 0 if sound is None else sound.shape[1] // self.clip_frames
        frames = take(self.frames)
        assert frames is not None
        return Windows(frames, take(self.audio), take(self.flow), take(sound, samples))

    def convert(self, windows: Windows) -> Batch:
        """Gathered windows as a batch, on the device they are on; flow[:, 0] is 0: a window's first frame has no
        predecessor."""
        audio = windows.audio
        if audio is None:
            assert windows.waveform is not None
            audio = spectrogram(windows.waveform, self._spectrogram)
        if windows.flow is None:
            flow = tvl1_flow(windows.frames, preset=self.parameters["flow"]["preset"])
        else:
            flow = windows.flow.float()
            flow[:, 0] = 0
        return Batch(windows.frames.float() / 255, audio, flow, windows.waveform)

    def batch(
        self,
        clips: Sequence[int] | np.ndarray,
        starts: Sequence[int] | np.ndarray,
        length: int,
        device: torch.device | str = "cpu",
        *,
        waveform: bool = False,
    ) -> Batch:
        """`gather`, then `convert`: the stored types travel to the device and are converted there."""
        windows = self.gather(clips, starts, length, waveform=waveform)
        return self.convert(windows.map(lambda part: part.to(device)))

    def batches(
        self,
        keys: Iterable[tuple[np.ndarray, np.ndarray]],
        length: int,
        device: torch.device,
        *,
        waveform: bool = False,
    ) -> Generator[Batch, None, None]:
        """The batches of many (clips, starts), in their order. For a GPU a thread gathers the next one into pinned
        memory in the meantime; close the iterator to end it."""
        gathered = (self.gather(clips, starts, length, waveform=waveform) for clips, starts in keys)
        if device.type != "cuda" or isinstance(self.frames, Tensor):
            yield from (self.convert(windows.map(lambda part: part.to(device))) for windows in gathered)
            return
        with closing(prefetch(windows.map(Tensor.pin_memory) for windows in gathered)) as pinned:
            for windows in pinned:
                yield self.convert(windows.map(lambda part: part.to(device, non_blocking=True)))


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
    with those of its flow added.

    The folder is `<cache>/<dataset>-<split>-<hash of all parameters>`; two of them are `dataset` and `split`. Raises
    InputError for an unknown flow preset.
    """
    if flow_preset not in PRESETS:
        raise InputError(f"flow_preset={flow_preset!r}: expected one of {', '.join(PRESETS)}")
    flow_parameters = {"preset": flow_preset, **dataclasses.asdict(PRESETS[flow_preset])}
    parameters = {**parameters, "flow": flow_parameters}
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache) / f"{parameters['dataset']}-{parameters['split']}-{digest}", parameters


def write_store(
    folder: str | Path, clips: int, chunks: Iterable[dict[str, np.ndarray]], parameters: dict[str, Any]
) -> ClipStore:
    """Write chunks of clips, one after another, as a clip store and open it.

    Each chunk holds the same arrays of `ClipStore`, all four or fewer, for some of the `clips` clips. The store appears
    whole, by a rename; where another process was first, its store is used. Raises InputError, one line, for a full disk
    or an unwritable folder, and ValueError for chunks that do not fit. Whatever is raised, the unfinished folder is
    removed; what a killed process left is removed by the next build beside it on the same machine.
    """
    folder = Path(folder)
    try:
        sweep([folder])
        with hidden_folder(folder) as unfinished:
            shapes = _write_arrays(unfinished, clips, chunks)
            arrays = {name: {"dtype": _ARRAYS[name][0], "shape": list(shape)} for name, shape in shapes.items()}
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


def _write_arrays(folder: Path, clips: int, chunks: Iterable[dict[str, np.ndarray]]) -> dict[str, tuple[int, ...]]:
    """Append every chunk to the files of its arrays; the shape of each array."""
    shapes: dict[str, tuple[int, ...]] = {}
    written = 0
    with ExitStack() as stack:
        append: dict[str, Callable[[np.ndarray], None]] = {}
        for chunk in chunks:
            count = len(chunk["frames"])
            for name, array in chunk.items():
                dtype, ndim = _ARRAYS[name]
                if name not in shapes:
                    shapes[name] = (clips, *array.shape[1:])
                    append[name] = stack.enter_context(npy_appender(folder / f"{name}.npy"))
                if array.dtype != dtype or array.ndim != ndim or array.shape != (count, *shapes[name][1:]):
                    raise ValueError(
                        f"chunk[{name!r}] is {array.dtype} {array.shape}: expected {np.dtype(dtype)} "
                        f"{(count, *shapes[name][1:])} of {ndim} dimensions"
                    )
                append[name](np.ascontiguousarray(array, dtype))
            if chunk.keys() != shapes.keys():
                raise ValueError(f"a chunk holds {sorted(chunk)}: expected {sorted(shapes)} as in the first one")
            written += count
    if written != clips:
        raise ValueError(f"chunks hold {written} clips: expected {clips}")
    return shapes
