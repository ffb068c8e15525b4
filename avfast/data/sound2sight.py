"""Reading data sets in Sound2Sight's layouts, whose spectrograms are pickles: without running what a pickle asks for.

    DIR/{train,test}/gif/<i>.gif   DIR/{train,test}/stft_wav_pickle/<i>.pickle    M3SO (Multimodal MovingMNIST)
    DIR/{train,test}/mp4/<i>.mp4   DIR/{train,test}/stft_pickle/<i>.pickle        AudioSet-Drums, YouTube Painting

A pickle holds one array (T,F,S), row t the magnitudes of frame t's sound in [0,1]. Frames of a GIF are divided by their
own maximum each. The layouts are known from descriptions; no file of these sets was at hand."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from avfast.data.film_clips import ClipSettings, planes
from avfast.errors import InputError
from avfast.media.images import Pixels

_PICKLES = {"gif": "stft_wav_pickle", "mp4": "stft_pickle"}


class Film(NamedTuple):
    """A whole film of such a set: frames (T,C,H,W) uint8, audio (T,1,F,S) float32 in [0,1]."""

    frames: Pixels
    audio: np.ndarray


def pickle_of(video: Path) -> Path:
    """The spectrograms that belong to a video. Raises InputError where the layout has no place for them."""
    folder = _PICKLES.get(video.parent.name)
    if folder is None:
        raise InputError(f"{video}: expected it in a folder gif or mp4, as Sound2Sight's sets have them")
    return video.parent.parent / folder / f"{video.stem}.pickle"


def is_test(video: Path) -> bool:
    """Whether the set's authors keep this video for the test."""
    return video.parent.parent.name == "test"


def read_film(video: Path, settings: ClipSettings) -> Film:
    """Every frame of a video, at the settings' size, with its spectrograms. Raises InputError where one of the two
    cannot be read, or is more than a frame longer than the other, and for values outside [0,1]."""
    path = pickle_of(video)
    audio = load_array(path)
    if audio.ndim != 3 or audio.dtype.kind != "f" or 0 in audio.shape:
        raise InputError(f"{path}: holds {audio.dtype} {audio.shape}, expected floats (frames, frequencies, columns)")
    low, high = float(audio.min()), float(audio.max())
    # the negation catches NaN too
    if not (low >= 0 and high <= 1):
        raise InputError(f"{path}: holds values from {low:g} to {high:g}, expected magnitudes in [0, 1]")
    frames = planes(list(settings.read_video(video)))
    if abs(len(frames) - len(audio)) > 1:
        raise InputError(f"{video}: {len(frames)} frames, but {len(audio)} spectrograms in {path}")
    if video.parent.name == "gif":
        peak = np.maximum(frames.max((1, 2, 3), keepdims=True), 1)
        frames = np.rint(frames * (255 / peak)).astype(np.uint8)
    count = min(len(frames), len(audio))
    return Film(frames[:count], audio[:count, None].astype(np.float32))


def load_array(path: str | Path) -> np.ndarray:
    """The one numpy array of numbers that a pickle holds, of any protocol. A pickle from a stranger runs nothing of its
    own: InputError for a file that asks for anything else (object arrays too), is damaged, or is not there."""
    try:
        found = _ArrayUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except _Refused as error:
        raise InputError(f"{path}: refused, it asks for {error}, expected one numpy array of numbers") from None
    except Exception as error:
        # a damaged pickle can fail in every way
        raise InputError(f"{path}: not a pickle, or a damaged one ({type(error).__name__}: {error})") from None
    if not isinstance(found, np.ndarray):
        raise InputError(f"{path}: holds {type(found).__name__}, expected one numpy array of numbers")
    return found


class _Refused(Exception):
    """What a pickle asks for and does not get."""


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what numpy's arrays are made of, by functions of our own made for each file, and nothing else."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._known = _array_parts()

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 calls its core numpy._core
        known = self._known.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise _Refused(f"{module}.{name}")
        return known


def _array_parts() -> dict[tuple[str, str], Callable[..., Any]]:
    def numbers(name: str, *_how: Any) -> np.dtype:
        dtype = np.dtype(name)
        if dtype.kind not in "biuf":
            raise _Refused(f"an array of dtype {dtype}")
        # a copy: what the pickle then sets must not reach numpy's own
        return np.dtype(dtype, copy=True)

    def ndarray(*_anything: Any) -> Any:
        raise _Refused("numpy.ndarray by itself")

    def reconstruct(kind: Any, _shape: Any, _typecode: Any) -> np.ndarray:
        if kind is not ndarray:
            raise _Refused(f"an array of class {kind!r}")
        return np.ndarray.__new__(np.ndarray, (0,), "b")

    def frombuffer(data: Any, dtype: np.dtype, shape: Any, order: str) -> np.ndarray:
        return np.frombuffer(bytes(data), dtype).reshape(shape, order=order)  # type: ignore[call-overload]

    def encode(text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise _Refused(f"the codec {encoding}")
        return text.encode("latin1")

    return {
        ("numpy", "dtype"): numbers,
        ("numpy", "ndarray"): ndarray,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): frombuffer,
        # how protocols below 3 write bytes, and no bytes
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): lambda: b"",
    }
