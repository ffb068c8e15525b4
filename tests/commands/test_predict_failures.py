"""`avfast predict` where it fails: bad files, settings that cannot work, folders that cannot be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from avfast.errors import InputError
from avfast.models.avmodel import ModelConfig
from avfast.predict import PredictConfig, main, predict
from avfast.training.config import TrainConfig
from avfast.ui import plots

K, P = 3, 5
RATE = 44_100


def picture(i: int) -> np.ndarray:
    """Frame i of a made film, (48,64,3): a ramp that brightens."""
    return np.broadcast_to((40 + i + np.arange(64))[:, None], (48, 64, 3)).astype(np.uint8)


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).integers(-9000, 9000, round(seconds * RATE)).astype(np.int16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """The quickest model that takes sound."""
    model = ModelConfig(refinement="none", convlstm_layers=1)
    config = TrainConfig(model=model, flow_preset="fast", context_frames=K, pred_frames=P, eval_frames=P)
    return make_run(tmp_path_factory.mktemp("runs") / "mmnist-quick", config)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory, make_film: Callable[..., Path]) -> Path:
    """A film of 2 seconds, 20 frames at the model's rate."""
    images = np.stack([picture(i) for i in range(60)])
    return make_film(tmp_path_factory.mktemp("films") / "good.mkv", images, noise(2), rate=RATE)


def settings(run: Path, *inputs: Path, **changes) -> PredictConfig:
    return PredictConfig(tuple(map(str, inputs)), checkpoint=str(run), device="cpu", **changes)


@pytest.fixture
def bad(film: Path, make_film, tmp_path: Path) -> Path:
    """A folder of files that cannot be predicted, and one that can."""
    folder = tmp_path / "bad"
    folder.mkdir()
    shutil.copy(film, folder)
    images = np.stack([picture(i) for i in range(60)])
    make_film(folder / "mute.mkv", images, None)
    make_film(folder / "two.mkv", images[:6], noise(2), rate=RATE)
    make_film(folder / "soundends.mkv", images, noise(0.3), rate=RATE)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no film")
    whole = make_film(tmp_path / "whole.mkv", images, noise(2), rate=RATE).read_bytes()
    (folder / "cut.mkv").write_bytes(whole[: len(whole) // 10])
    return folder


REASONS = {
    "mute.mkv": "no sound track in it",
    "two.mkv": "2 frames at 10 a second, expected the 3 given ones at least",
    "soundends.mkv": "its sound ends at 0.30 s",
    "empty.mp4": "Invalid data found",
    "text.mp4": "Invalid data found",
}


def test_bad_files_are_listed_and_the_rest_is_done(
    run: Path, bad: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (bad / "cut.mkv").unlink()
    with pytest.raises(SystemExit) as stop:
        main([str(bad), str(tmp_path / "nowhere.mp4"), "--checkpoint", str(run), "--out", str(out)])
    assert stop.value.code == 3
    shown = capsys.readouterr().out
    failed = json.loads((out / "failed.json").read_text())
    assert {Path(f["input"]).name for f in failed} == {*REASONS, "nowhere.mp4"}
    for failure in failed:
        name = Path(failure["input"]).name
        assert failure["reason"].startswith(REASONS.get(name, "No such file")) and "\n" not in failure["reason"]
        assert f"failed: {failure['input']}: {failure['reason']}\n" in shown
    assert f"{bad / 'good.mkv'}: {P} frames predicted, SSIM 0." in shown and str(out / "good") in shown
    assert sorted(p.name for p in out.iterdir()) == ["failed.json", "good"]
    # nothing is written over
    assert main([str(bad / "good.mkv"), "--checkpoint", str(run), "--out", str(out)]) is None
    assert sorted(p.name for p in out.iterdir()) == ["good", "good-2"]


@pytest.mark.parametrize("name", [*REASONS, "cut.mkv"])
def test_a_bad_file_alone_is_one_line(name: str, run: Path, bad: Path, tmp_path: Path) -> None:
    reason = REASONS.get(name, r"truncated|Invalid data|\d frames at 10 a second")
    with pytest.raises(InputError, match=f"^nothing could be done: .*{name}: ({reason})") as error:
        predict(settings(run, bad / name, out=str(tmp_path / "out")))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": ()}, "VIDEO is missing"),
        ({"checkpoint": None}, "expected either --checkpoint PATH"),
        ({"checkpoint": "nowhere"}, "nowhere is neither a checkpoint"),
        ({"checkpoint": "a/best"}, "a/best is neither a checkpoint"),
        ({"horizon": 0}, "horizon is 0, expected at least 1"),
        ({"horizon": 100}, "its sound ends at 2.00 s, 10.20 s and a frame are wanted: it covers 21 of 103 frames"),
        ({"sound": "nowhere.wav"}, "nowhere.wav: No such file"),
        ({"sound": "x.wav", "audio": "silent"}, "--sound x.wav would not be heard: audio is silent"),
        ({"audio": "shuffled"}, "audio is shuffled, which wants two videos or more, and there are 1"),
        ({"audio": "shifted", "shift": 8}, "shift is 8, which leaves the sound of 8 frames as it is"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_settings_that_do_not_work(changes: dict, message: str, run: Path, film: Path, tmp_path: Path) -> None:
    given = {"inputs": (str(film),), "checkpoint": str(run), "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match=message) as error:
        predict(PredictConfig(**given | changes))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written(run: Path, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out is .*file, which is not a folder"):
        predict(settings(run, film, out=str(tmp_path / "file")))
    with pytest.raises(OSError, match="file"):
        predict(settings(run, film, out=str(tmp_path / "file" / "out")))

    def full(path: Path, *_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(plots, "save_strip", full)
    with pytest.raises(OSError, match="No space left"):
        predict(settings(run, film, out=str(tmp_path / "out")))
    assert not list((tmp_path / "out").iterdir())


def test_a_model_is_asked_for_once() -> None:
    for config in (PredictConfig(("a.mp4",)), PredictConfig(("a.mp4",), checkpoint="a", onnx="b")):
        with pytest.raises(InputError, match="expected either --checkpoint PATH .* or --onnx FOLDER"):
            predict(config)
