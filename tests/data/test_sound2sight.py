"""Sound2Sight's layouts, and pickles that want more than an array."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from avfast.data.film_clips import ClipSettings
from avfast.data.prepared import open_split
from avfast.data.sound2sight import load_array, read_film
from avfast.errors import InputError
from avfast.prepare import PrepareConfig, prepare

SETTINGS = ClipSettings(size=(16, 16))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "u1", "<i8", ">f4"])
def test_arrays_of_every_protocol(protocol: int, dtype: str, tmp_path: Path) -> None:
    array = np.random.default_rng(0).uniform(0, 100, (4, 5, 3)).astype(dtype)
    for value in (array, array[:, ::2], np.asfortranarray(array), array[:0]):
        data = pickle.dumps(value, protocol)
        (tmp_path / "a.pickle").write_bytes(data)
        found = load_array(tmp_path / "a.pickle")
        np.testing.assert_array_equal(found, value)
        assert found.dtype == pickle.loads(data).dtype and type(found) is np.ndarray


def test_arrays_of_older_numpy(tmp_path: Path) -> None:
    """numpy 1 wrote numpy.core where numpy 2 writes numpy._core."""
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    text = pickle.dumps(array, 0)
    assert b"numpy._core.multiarray" in text
    (tmp_path / "a.pickle").write_bytes(text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(load_array(tmp_path / "a.pickle"), array)


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def malicious(marker: Path) -> dict[str, bytes]:
    command = f"touch {marker}"
    inside = np.empty(1, object)
    inside[0] = Calls(os.system, command)
    return {
        "a command": pickle.dumps(Calls(os.system, command)),
        "eval": pickle.dumps(Calls(eval, f"open({str(marker)!r}, 'w')")),
        "in an object array": pickle.dumps(inside),
        "in an object array, protocol 5": pickle.dumps(inside, 5),
        "by the old opcode": f"(S'{command}'\nios\nsystem\n.".encode(),
        "numpy's own loader": pickle.dumps(Calls(np.load, str(marker))),
        "a codec": pickle.dumps(Calls(__import__("_codecs").encode, "x", "rot13"), 2),
        "a subclass": pickle.dumps(np.arange(3).view(np.matrix)),
        "a module's attribute": b"\x80\x04\x8c\x05numpy\x8c\x0ftesting.rundocs\x93.",
    }


@pytest.mark.parametrize("name", malicious(Path("x")))
def test_a_malicious_pickle_runs_nothing(name: str, tmp_path: Path) -> None:
    marker, path = tmp_path / "it ran".replace(" ", "_"), tmp_path / "a.pickle"
    data = malicious(marker)[name]
    pickletools.dis(data, io.StringIO())
    path.write_bytes(data)
    with pytest.raises(InputError, match="refused, it asks for .*, expected one numpy array of numbers"):
        load_array(path)
    assert not marker.exists()


def test_the_test_would_notice(tmp_path: Path) -> None:
    """The first of them does run under pickle itself."""
    pickle.loads(malicious(tmp_path / "marker")["a command"])
    assert (tmp_path / "marker").exists()


def test_pickles_that_are_none_or_hold_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pickle"
    for data, message in (
        (b"", "not a pickle, or a damaged one"),
        (b"no pickle", "not a pickle, or a damaged one"),
        (pickle.dumps(np.arange(9))[:-20], "not a pickle, or a damaged one"),
        (pickle.dumps([1, 2]), "holds list, expected one numpy array"),
        (pickle.dumps(np.array([1, "x"], object)), "refused, it asks for an array of dtype object"),
        (pickle.dumps(np.array(["text"])), "refused, it asks for an array of dtype <U4"),
        (pickle.dumps(np.ones(2, complex)), "refused, it asks for an array of dtype complex128"),
    ):
        path.write_bytes(data)
        with pytest.raises(InputError, match=message):
            load_array(path)
    with pytest.raises(InputError, match="No such file"):
        load_array(tmp_path / "gone.pickle")


@pytest.fixture
def drums(tmp_path: Path, make_film: Callable[..., Path]) -> Path:
    """Four films for training and one for the test, of 12 frames, with pickles of (12,45,17)."""
    rng = np.random.default_rng(0)
    root = tmp_path / "AudioSet_Dataset"
    for split, numbers in (("train", range(4)), ("test", range(1))):
        for folder in ("mp4", "stft_pickle"):
            (root / split / folder).mkdir(parents=True)
        for number in numbers:
            images = np.full((12, 16, 16, 3), 40 * number + 20, np.uint8)
            make_film(root / split / "mp4" / f"{number}.mp4", images, None, codecs=("libx264", ""))
            audio = rng.random((12, 45, 17)).astype(np.float32)
            (root / split / "stft_pickle" / f"{number}.pickle").write_bytes(pickle.dumps(audio))
    return root


def test_drums_become_a_data_set(drums: Path, tmp_path: Path) -> None:
    summary = prepare(
        PrepareConfig(
            inputs=(str(drums),),
            out=str(tmp_path / "set"),
            layout="sound2sight",
            clip_frames=5,
            clips=SETTINGS,
            flow_preset="fast",
        )
    )
    assert summary["splits"] == {"train": 6, "val": 2, "test": 2} and not summary["failed"]
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    for source in index["sources"]:
        assert (source["split"] == "test") == source["name"].startswith("test/")
        store = open_split(tmp_path / "set", source["split"])
        folder, number = drums / source["name"].split("/")[0], source["name"].split("/")[-1]
        audio = pickle.loads((folder / "stft_pickle" / f"{number}.pickle").read_bytes())
        batch = store.batch([source["first"] + 1], [0], 5)
        np.testing.assert_array_equal(batch.audio[0, :, 0], audio[5:10])
        assert np.abs(batch.frames.numpy() * 255 - (40 * int(number) + 20)).max() <= 2
        assert store.audio_shape == (45, 17)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.ones((12, 45, 17), np.int32), "holds int32"),
        (np.ones((12, 45)), r"expected floats \(frames, frequencies, columns\)"),
        (np.full((12, 45, 17), 1.5), r"holds values from 1.5 to 1.5, expected magnitudes in \[0, 1\]"),
        (np.full((12, 45, 17), np.nan), "values from nan"),
        (np.ones((9, 45, 17)), "12 frames, but 9 spectrograms"),
    ],
)
def test_pickles_that_do_not_fit(audio: np.ndarray, message: str, drums: Path) -> None:
    (drums / "train" / "stft_pickle" / "0.pickle").write_bytes(pickle.dumps(audio))
    with pytest.raises(InputError, match=message):
        read_film(drums / "train" / "mp4" / "0.mp4", SETTINGS)


def test_gifs_are_divided_by_their_maximum(tmp_path: Path) -> None:
    for folder in ("gif", "stft_wav_pickle"):
        (tmp_path / "train" / folder).mkdir(parents=True)
    frames = [np.zeros((16, 16), np.uint8) for _ in range(3)]
    for i, frame in enumerate(frames):
        frame[4:8, 4:8], frame[8:12, 4:8] = 100 + 50 * i, 50 + 25 * i
    first, *rest = [Image.fromarray(frame) for frame in frames]
    first.save(tmp_path / "train" / "gif" / "7.gif", save_all=True, append_images=rest, duration=100)
    audio = np.random.default_rng(0).random((3, 23, 21))
    (tmp_path / "train" / "stft_wav_pickle" / "7.pickle").write_bytes(pickle.dumps(audio, 2))
    film = read_film(tmp_path / "train" / "gif" / "7.gif", ClipSettings(size=(16, 16), channels=1))
    assert film.frames.shape == (3, 1, 16, 16) and film.audio.shape == (3, 1, 23, 21)
    for frame in film.frames[:, 0]:
        assert frame.max() == 255 and abs(int(frame[9, 5]) - 128) <= 2 and not frame[:4].any()
