"""Predictions of made films against the model on frames and sound read in the test; what every file holds."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from avfast.data.film_clips import ClipSettings, read_clip
from avfast.data.prepared import ClipsConfig
from avfast.errors import InputError
from avfast.media.spectrogram import SpectrogramConfig, spectrogram
from avfast.media.video import read_video
from avfast.models.avmodel import AVModel, ModelConfig, Rollout
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.predict import PredictConfig, predict
from avfast.prepare import PrepareConfig
from avfast.training.config import TrainConfig
from avfast.training.runs import resolve_checkpoint
from avfast.ui import plots

K, P, FPS, RATE = 3, 5, 10, 4400


FILES = {
    "curves.png",
    "film.gif",
    "film.mp4",
    "flow.mp4",
    "flow.npy",
    "frames.npy",
    "prediction.json",
    "strip.png",
    "true_frames.npy",
}


def picture(i: int) -> np.ndarray:
    """Frame i of a made film, (48,64,3): a bright disc that moves over a ramp."""
    y, x = np.mgrid[:48, :64]
    disc = np.hypot(y - 24, x - 20 - 0.7 * i) < 9
    return np.repeat((np.where(disc, 220, 40 + x))[..., None], 3, -1).astype(np.uint8)


def tone(seconds: float, pitch: float, rate: int = 44_100) -> np.ndarray:
    """Clicks of a tone, four a second, each louder than the one before."""
    t = np.arange(round(seconds * rate)) / rate
    return (9000 * np.sin(2 * np.pi * pitch * t) * (t % 0.25 < 0.1) * (0.4 + t / seconds)).astype(np.int16)


def config(model: ModelConfig, **changes: int) -> TrainConfig:
    """The settings of a run of that model."""
    lengths = {"context_frames": K, "pred_frames": P, "eval_frames": P} | changes
    return TrainConfig(model=model, flow_preset="fast", **lengths)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """Both stages."""
    return make_run(tmp_path_factory.mktemp("runs") / "mmnist-full", config(ModelConfig(unet_width=4)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """The quickest model that takes sound."""
    model = ModelConfig(refinement="none", convlstm_layers=1)
    return make_run(tmp_path_factory.mktemp("runs") / "mmnist-quick", config(model), links=("best", "last"))


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, make_film: Callable[..., Path]) -> Path:
    """Two films of 2 seconds, 20 frames at the model's rate, one of 0.5 s with 2 s of sound, and a sound alone."""
    folder = tmp_path_factory.mktemp("films")
    images = np.stack([picture(i) for i in range(60)])
    make_film(folder / "a b ü.mkv", images, tone(2, 500), rate=44_100)
    make_film(folder / "other.mkv", images[::-1], tone(2, 900), rate=44_100)
    make_film(folder / "short.mkv", images[:15], tone(2, 500), rate=44_100)
    # half a second later on its own clock, which must not matter
    make_film(folder / "sound.mkv", images[:1], tone(2, 700), rate=44_100, first_sample=22_050)
    return folder


def settings(run: Path, *inputs: Path, **changes) -> PredictConfig:
    return PredictConfig(tuple(map(str, inputs)), checkpoint=str(run), device="cpu", **changes)


def model_frames(count: int) -> np.ndarray:
    """(T,1,48,48) uint8: every third picture, the middle 48 columns, grey."""
    return np.stack([picture(3 * i)[None, :, 8:56, 0] for i in range(count)])


def sound_of(pitch: float, total: int) -> torch.Tensor:
    """(1,T,1,23,21): the clicks drawn at the model's own rate."""
    samples = torch.from_numpy(tone(2, pitch, RATE)[: total * RATE // FPS])
    return spectrogram(samples, SpectrogramConfig(RATE, RATE // FPS, 44, 22, 19.0))[None]


def assert_heard(audio: torch.Tensor, want: torch.Tensor) -> None:
    """Alike but for FFmpeg's resampling: clicks of another pitch, or a frame later, differ by more than their mean."""
    assert audio.shape == want.shape
    assert (audio - want).abs().mean() <= 0.15 * want.mean()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """What models are given from here on: frames, flow, audio."""
    return spied(monkeypatch)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    calls: list[tuple[torch.Tensor, ...]] = []
    original = AVModel.predict

    def predict(self: AVModel, *inputs: torch.Tensor) -> Rollout:
        calls.append(inputs)
        return original(self, *inputs)

    monkeypatch.setattr(AVModel, "predict", predict)
    return calls


def heard_in(path: Path) -> tuple[np.ndarray, int]:
    """Samples of a film's sound in [-1,1] and their rate."""
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    assert frames[0].time == 0
    return np.concatenate([f.to_ndarray().mean(0) for f in frames]), frames[0].sample_rate


def lag(samples: np.ndarray, want: np.ndarray) -> int:
    """By how many samples the first comes later."""
    want, samples = want[: len(samples)] / 32_768, samples[: len(want)]
    lags = range(-60, 61)
    return lags[int(np.argmax([np.dot(samples[100:-100], np.roll(want, n)[100:-100]) for n in lags]))]


class Done(NamedTuple):
    folder: Path
    given: tuple[torch.Tensor, ...]


@pytest.fixture(scope="module")
def done(full: Path, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The results of one film, and what the model was given."""
    out = tmp_path_factory.mktemp("out") / "predictions"
    with pytest.MonkeyPatch.context() as patch:
        calls = spied(patch)
        summary = predict(settings(full, films / "a b ü.mkv", out=str(out)))
    assert summary["failed"] == [] and [p["folder"] for p in summary["predictions"]] == [str(out / "a b ü")]
    assert len(calls) == 1
    return Done(out / "a b ü", calls[0])


def test_every_file_and_nothing_else(done: Done) -> None:
    names = [p.name for p in done.folder.iterdir()]
    assert sorted(names) == sorted(FILES) and [p.name for p in done.folder.parent.iterdir()] == ["a b ü"]


def test_what_the_model_is_given(done: Done) -> None:
    frames, flow, audio = done.given
    true = np.load(done.folder / "true_frames.npy")
    assert true.dtype == np.uint8 and np.abs(true.astype(int) - model_frames(K + P)).max() <= 1
    np.testing.assert_allclose(frames[0].numpy(), true[:K] / 255, atol=1e-6)
    np.testing.assert_array_equal(flow.numpy(), tvl1_flow(torch.from_numpy(true[None, :K]), preset="fast").numpy())
    assert_heard(audio, sound_of(500, K + P))


def test_arrays_are_the_models(full: Path, done: Done) -> None:
    frames, flow = (np.load(done.folder / f"{name}.npy") for name in ("frames", "flow"))
    assert frames.dtype == flow.dtype == np.float32 and frames.shape == (P, 1, 48, 48) and flow.shape == (P, 2, 48, 48)
    want = AVModel.from_pretrained(full / "checkpoints" / "best").predict(*done.given)
    np.testing.assert_array_equal(frames, want.frames[0].numpy())
    np.testing.assert_array_equal(flow, want.flow[0].numpy())


def test_settings_and_scores(full: Path, done: Done) -> None:
    folder = done.folder
    about = json.loads((folder / "prediction.json").read_text())
    assert about["given_frames"] == K and about["predicted_frames"] == P and about["true_frames"] == K + P
    assert about["fps"] == FPS and about["audio"] == "own" and about["sound"] == about["video"]
    assert about["checkpoint"] == str(full / "checkpoints" / "best") and about["reading"]["sample_rate"] == RATE
    true, frames = np.load(folder / "true_frames.npy")[:, 0] / 255, np.load(folder / "frames.npy")[:, 0].astype(float)
    true, still = true[K:], true[K - 1]
    scores = about["scores"]
    assert list(scores) == ["predicted", "repeat last frame", "copy-last-flow"]
    for t in range(P):
        psnr, ssim = (scores["predicted"][name][t] for name in ("psnr", "ssim"))
        assert psnr == pytest.approx(peak_signal_noise_ratio(true[t], frames[t], data_range=1), rel=1e-5)
        assert ssim == pytest.approx(structural_similarity(true[t], frames[t], win_size=7, data_range=2), rel=1e-5)
        psnr = peak_signal_noise_ratio(true[t], still, data_range=1)
        assert scores["repeat last frame"]["psnr"][t] == pytest.approx(psnr, rel=1e-5)


def test_film(done: Done) -> None:
    frames = list(read_video(done.folder / "film.mp4"))
    assert [f.time for f in frames] == pytest.approx([i / FPS for i in range(K + P)], abs=1e-4)
    side = math.ceil(plots.FILM_SIDE / 48) * 48 + 2 * plots.BORDER
    height = plots.HEADER + side + plots.GAP
    size = (height + height % 2, (2 * side + 3 * plots.GAP + 1) // 2 * 2, 3)
    predicted, true = np.load(done.folder / "frames.npy"), np.load(done.folder / "true_frames.npy")
    for t, frame in enumerate(frames):
        assert frame.image.shape == size
        for left, border, shown in (
            (plots.GAP, plots.GIVEN if t < K else plots.FUTURE, true[t, 0]),
            (
                2 * plots.GAP + side,
                plots.GIVEN if t < K else plots.PREDICTED,
                true[t, 0] if t < K else 255 * predicted[t - K, 0],
            ),
        ):
            # the border is two pixels, as coarse as the film's colours
            edge = frame.image[plots.HEADER : plots.HEADER + 2, left + 20 : left + side - 20].mean((0, 1))
            assert np.abs(edge - border).max() < 40, (t, left)
            inside = frame.image[plots.HEADER + plots.BORDER :, left + plots.BORDER :][: side - 4, : side - 4]
            grid = inside.reshape(48, side // 48, 48, side // 48, 3).mean((1, 3, 4))
            assert np.abs(grid - shown).mean() < 3


def test_the_films_sound_is_the_original(done: Done) -> None:
    for name in ("film.mp4", "flow.mp4"):
        samples, rate = heard_in(done.folder / name)
        assert rate == 44_100 and 0 <= len(samples) - (K + P) / FPS * rate <= 1024
        assert lag(samples, tone(2, 500)) == 0
        want = tone(2, 500)[: len(samples)] / 32_768
        assert np.abs(samples[: len(want)] - want).mean() < 0.1 * np.abs(want).mean()


def test_pictures(done: Done) -> None:
    gif = Image.open(done.folder / "film.gif")
    assert gif.n_frames == K + P and gif.info["duration"] == 100
    strip = Image.open(done.folder / "strip.png")
    # five rows: true and predicted frames, true and predicted flow, sound
    assert strip.height == plots.HEADER + 5 * (2 * 48 + 2 * plots.BORDER + plots.GAP) + plots.LEGEND
    assert Image.open(done.folder / "curves.png").format == "PNG"
    assert len(list(read_video(done.folder / "flow.mp4"))) == K + P


def test_a_horizon_behind_the_films_end(run: Path, films: Path, tmp_path: Path) -> None:
    """0.5 s of film, so 5 frames, and 2 s of sound."""
    summary = predict(settings(run, films / "short.mkv", out=str(tmp_path), horizon=17))
    about, folder = summary["predictions"][0], tmp_path / "short"
    assert about["true_frames"] == 5 and about["predicted_frames"] == 17
    assert len(about["scores"]["predicted"]["psnr"]) == 2
    assert np.load(folder / "frames.npy").shape[0] == np.load(folder / "flow.npy").shape[0] == 17
    assert np.load(folder / "true_frames.npy").shape[0] == 5
    frames = [f.image for f in read_video(folder / "film.mp4")]
    assert len(frames) == 20 and Image.open(folder / "film.gif").n_frames == 20
    samples, rate = heard_in(folder / "film.mp4")
    assert abs(len(samples) - 2 * rate) <= 1024
    side = math.ceil(plots.FILM_SIDE / 48) * 48 + 2 * plots.BORDER
    for t, frame in enumerate(frames):
        edge = frame[plots.HEADER : plots.HEADER + 2, 40 : side - 40].mean((0, 1))
        want = plots.GIVEN if t < K else plots.FUTURE if t < 5 else plots.BACKGROUND
        assert np.abs(edge - want).max() < 12
    with pytest.raises(InputError, match="short.mkv: its sound ends at 2.00 s.*covers 21 of 23 frames"):
        # a tenth of a second of silence at the end is let through
        predict(settings(run, films / "short.mkv", out=str(tmp_path), horizon=20))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["short"]


def test_a_film_of_nothing_but_given_frames(run: Path, make_film, tmp_path: Path) -> None:
    images = np.stack([picture(i) for i in range(3 * K)])
    path = make_film(tmp_path / "k.mkv", images, tone(2, 500), rate=44_100)
    about = predict(settings(run, path, out=str(tmp_path / "out")))["predictions"][0]
    assert about["true_frames"] == K and about["scores"] == {}
    assert {p.name for p in Path(about["folder"]).iterdir()} == FILES - {"curves.png"}


@pytest.mark.parametrize(
    ("changes", "pitch", "change"),
    [
        ({"sound": "sound.mkv"}, 700, lambda audio: audio),
        ({"audio": "silent"}, 500, torch.zeros_like),
        ({"audio": "shifted", "shift": 2}, 500, lambda audio: torch.cat((audio[:, -2:], audio[:, :-2]), 1)),
        ({"audio": "shifted", "shift": -1}, 500, lambda audio: torch.cat((audio[:, 1:], audio[:, :1]), 1)),
    ],
)
def test_other_sounds(
    changes: dict, pitch: float, change: Callable, run: Path, films: Path, tmp_path: Path, given: list
) -> None:
    if "sound" in changes:
        changes = {"sound": str(films / changes["sound"])}
    about = predict(settings(run, films / "a b ü.mkv", out=str(tmp_path), **changes))["predictions"][0]
    assert_heard(given[0][2], change(sound_of(pitch, K + P)))
    samples, rate = heard_in(Path(about["folder"]) / "film.mp4")
    total = (K + P) * rate // FPS
    played = np.roll(tone(2, pitch)[:total], changes.get("shift", 0) * rate // FPS)
    if about["audio"] == "silent":
        assert np.abs(samples).max() < 1e-4 and about["sound"] is None
    else:
        assert lag(samples, played) == 0 and about["sound"] == str(changes.get("sound", films / "a b ü.mkv"))
        assert np.abs(samples[:total] - played / 32_768).mean() < 0.15 * np.abs(played / 32_768).mean()


def test_shuffled_sound_is_that_of_another_video(run: Path, films: Path, tmp_path: Path, given: list) -> None:
    paths = films / "a b ü.mkv", films / "other.mkv"
    summary = predict(settings(run, *paths, out=str(tmp_path), audio="shuffled"))
    for about, inputs, pitch, other in zip(summary["predictions"], given, (900, 500), reversed(paths), strict=True):
        assert about["sound"] == str(other) != about["video"]
        assert_heard(inputs[2], sound_of(pitch, K + P))
        assert lag(heard_in(Path(about["folder"]) / "film.mp4")[0], tone(2, pitch)) == 0


def test_colour_models(films: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    model = ModelConfig(image_channels=3, refinement="none", convlstm_layers=1)
    run = make_run(tmp_path / "run", config(model, context_frames=1, eval_frames=2))
    predict(settings(run, films / "other.mkv", out=str(tmp_path / "out")))
    assert np.load(tmp_path / "out" / "other" / "frames.npy").shape == (2, 3, 48, 48)
    assert np.load(tmp_path / "out" / "other" / "true_frames.npy").shape == (3, 3, 48, 48)


def test_a_run_on_prepared_clips_says_how_videos_are_read(
    films: Path, make_run: Callable[..., Path], tmp_path: Path, given: list
) -> None:
    model = ModelConfig(image_channels=3, refinement="none", convlstm_layers=1, audio_shape=(33, 12))
    run = make_run(tmp_path / "run", replace(config(model), data=ClipsConfig("anywhere")))
    with pytest.raises(InputError, match="data.json cannot be read, which tells what the run was trained on"):
        predict(settings(run, films / "other.mkv", out=str(tmp_path / "out")))
    clips = ClipSettings(fps=12, size=(32, 16), sample_rate=8800, n_fft=64, hop=64, spectrogram_scale=9.0)
    (run / "data.json").write_text(json.dumps(PrepareConfig(clips=clips, layout="sound2sight").settings().as_dict()))
    with pytest.raises(InputError, match="was trained on the ready-made spectrograms of layout sound2sight"):
        predict(settings(run, films / "other.mkv", out=str(tmp_path / "out")))
    (run / "data.json").write_text(json.dumps(PrepareConfig(clips=clips).settings().as_dict()))
    predict(settings(run, films / "other.mkv", out=str(tmp_path / "out")))
    about = json.loads((tmp_path / "out" / "other" / "prediction.json").read_text())
    assert about["fps"] == 12 and about["reading"] == json.loads(json.dumps(dataclasses.asdict(clips)))
    frames, _, audio = given[0]
    want = read_clip(films / "other.mkv", clips, frames=K + P)
    assert np.array_equal(np.load(tmp_path / "out" / "other" / "true_frames.npy"), want.frames)
    np.testing.assert_allclose(frames[0].numpy(), want.frames[:K] / 255, atol=1e-6)
    assert torch.equal(audio[0], spectrogram(torch.from_numpy(want.waveform), clips.spectrogram))


def test_ways_to_name_a_checkpoint(run: Path, films: Path, tmp_path: Path) -> None:
    for named, expected in (("", "best"), ("best", "best"), ("last", "last"), ("checkpoints/last", "last")):
        assert resolve_checkpoint(run / named) == run / "checkpoints" / expected
    about = predict(settings(run / "last", films / "other.mkv", out=str(tmp_path), horizon=1))["predictions"][0]
    assert about["checkpoint"] == str(run / "checkpoints" / "last")


def test_results_within_a_run_go_into_its_report(run: Path, films: Path) -> None:
    predict(settings(run, films / "other.mkv", out=str(run / "predictions"), horizon=1))
    page = (run / "report.html").read_text()
    assert page.count("<video ") == 2 and "1 frames predicted from 3" in page


def test_earlier_results_are_no_input(run: Path, films: Path, tmp_path: Path) -> None:
    shutil.copy(films / "other.mkv", tmp_path / "other.mkv")
    for expected in (["other"], ["other-2"]):
        summary = predict(settings(run, tmp_path, out=str(tmp_path / "predictions"), horizon=1))
        assert [Path(p["folder"]).name for p in summary["predictions"]] == expected


def test_an_export_gives_the_same_film(run: Path, films: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from avfast.export import ExportConfig, export

    export(ExportConfig(run=str(run), out=str(tmp_path / "model"), rollout=False))
    film = films / "a b ü.mkv"
    ours = predict(settings(run, film, out=str(tmp_path / "torch")))["predictions"][0]
    onnx = PredictConfig((str(film),), onnx=str(tmp_path / "model"), out=str(tmp_path / "onnx"), device="cpu")
    theirs = predict(onnx)["predictions"][0]
    for name in ("frames.npy", "flow.npy"):
        a, b = (np.load(Path(done["folder"]) / name) for done in (ours, theirs))
        assert a.shape == b.shape and np.abs(a - b).max() <= 1e-4
    for name in ("fps", "given_frames", "predicted_frames", "reading", "flow_preset"):
        assert ours[name] == theirs[name]
    films_ = [[f.image for f in read_video(Path(done["folder"]) / "film.mp4")] for done in (ours, theirs)]
    assert len(films_[0]) == len(films_[1]) == K + P
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(*films_, strict=True)) < 0.5
