"""The runner against AVModel.predict, its inputs against their torch counterparts, and what it refuses."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avfast.errors import InputError
from avfast.media import spectrogram as audio
from avfast.models.avmodel import AVModel
from avfast.opticalflow.tvl1 import tvl1_flow

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from avfast.deploy.onnx_session import METADATA, Session  # noqa: E402
from avfast.runtime import Predictor  # noqa: E402
from avfast.training.config import TrainConfig  # noqa: E402

CLIPS = Path(__file__).parents[3] / "shared" / "data" / "clips"


def inputs(batch: int, given: int, total: int, height: int = 48, width: int = 48) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    frames = generator.random((batch, given, 1, height, width), np.float32)
    flow = generator.normal(0, 2, (batch, given, 2, height, width)).astype(np.float32)
    flow[:, 0] = 0
    return [frames, flow, generator.random((batch, total, 1, 23, 21), np.float32)]


def expect(model: AVModel, frames: np.ndarray, flow: np.ndarray, sound: np.ndarray) -> list[np.ndarray]:
    return [x.numpy() for x in model.predict(*map(torch.from_numpy, (frames, flow, sound)))]


@pytest.fixture(scope="module")
def predictor(exported: tuple[Path, AVModel]) -> Predictor:
    return Predictor(exported[0], device="cpu", threads=2)


@pytest.mark.parametrize("sizes", [(1, 1, 2), (1, 5, 35), (3, 2, 6, 64, 32), (2, 3, 5, 16, 16)], ids=str)
def test_predict_equals_the_model(exported: tuple[Path, AVModel], predictor: Predictor, sizes: tuple[int, ...]):
    frames, flow, sound = inputs(*sizes)
    # a step that hears its neighbour's sound is off by 1.6e-4
    for found in (predictor.predict(frames, sound, flow=flow), predictor.rollout(frames, flow, sound)):
        for ours, theirs in zip(found, expect(exported[1], frames, flow, sound), strict=True):
            assert ours.shape == theirs.shape and ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_predict_computes_the_flow_and_the_spectrogram(predictor: Predictor):
    frames, _, _ = inputs(2, 4, 7)
    waveform = np.random.default_rng(1).integers(-9000, 9000, (2, 7 * 440)).astype(np.int16)
    flow = tvl1_flow(frames, preset=TrainConfig().flow_preset).numpy()
    assert predictor.spectrogram is not None and predictor.fps == 10
    sound = audio.spectrogram(torch.from_numpy(waveform), predictor.spectrogram).numpy()
    given = predictor.predict(frames, sound, flow=flow)
    found = predictor.predict(frames, waveform)
    for ours, theirs in zip(found, given, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    # 8-bit frames are the same as their share of 255
    bytes_ = np.round(frames * 255).astype(np.uint8)
    shares = predictor.predict(bytes_.astype(np.float32) / 255, sound, flow=flow).frames
    np.testing.assert_array_equal(predictor.predict(bytes_, sound, flow=flow).frames, shares)


def test_stream_in_pieces_equals_the_whole(predictor: Predictor):
    frames, flow, sound = inputs(2, 4, 8)
    whole = predictor.predict(frames, sound, flow=flow)
    stream = predictor.stream()
    for t in range(4):
        stream.push_sound(sound[:, t + int(t > 0) : t + 2])
        stream.push(frames[:, t], flow[:, t])
    assert (stream.given, stream.newest, stream.sound_frames) == (4, 4, 5)
    for t in range(4):
        frame, motion = stream.next()
        np.testing.assert_allclose(frame, whole.frames[:, t], rtol=0, atol=1e-5)
        np.testing.assert_allclose(motion, whole.flow[:, t], rtol=0, atol=1e-4)
        if t < 3:
            stream.push_sound(sound[:, 5 + t : 6 + t])


def test_given_frames_replace_predicted_ones(predictor: Predictor):
    frames, flow, sound = inputs(1, 4, 6)
    stream = predictor.stream()
    stream.push_sound(sound)
    stream.push(frames[:, :2], flow[:, :2])
    stream.next()
    stream.next()
    stream.push(frames[:, 2:], flow[:, 2:])
    found = np.stack([stream.next()[0] for _ in range(2)], axis=1)
    np.testing.assert_allclose(found, predictor.predict(frames, sound, flow=flow).frames, rtol=0, atol=1e-5)


def test_stream_computes_the_flow_to_the_frame_before(predictor: Predictor):
    frames, _, sound = inputs(1, 3, 4)
    stream = predictor.stream()
    stream.push_sound(sound)
    for t in range(3):
        stream.push(frames[:, t])
    whole = predictor.predict(frames, sound)
    np.testing.assert_allclose(stream.next()[0], whole.frames[:, 0], rtol=0, atol=1e-5)


def test_bound_outputs_equal_plain_ones(exported: tuple[Path, AVModel], predictor: Predictor):
    bound = Predictor(exported[0], device="cpu")
    paths = {name: exported[0] / f"{name}.onnx" for name in predictor.metadata["graphs"]}
    bound.graphs = {n: Session(p, ["CPUExecutionProvider"], 2, bind=True) for n, p in paths.items()}
    frames, flow, sound = inputs(2, 3, 6)
    plain = predictor.predict(frames, sound, flow=flow)
    for ours, theirs in zip(bound.predict(frames, sound, flow=flow), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def nan_at_the_end(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flat[-1] = np.nan
    return x


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a list": ({"frames": [1, 2]}, "frames is a list, expected a numpy array"),
    "two channels": ({"frames": lambda f: f.repeat(2, 2)}, r"frames has shape .* with C = 1"),
    "an odd size": ({"frames": lambda f: f[..., :40]}, r"frames has shape .*multiples of 16"),
    "no frames": ({"frames": lambda f: f[:, :0]}, "frames has shape"),
    "integers": ({"frames": lambda f: (f * 255).astype(np.int32)}, "frames has dtype int32"),
    "levels 0..255": ({"frames": lambda f: f * 255}, r"frames holds values from .*expected \[0, 1\]"),
    "NaN frames": ({"frames": nan_at_the_end}, "frames holds values that are not finite"),
    "another spectrogram": (
        {"sound": lambda s: s[..., :20]},
        r"sound has shape .*expected spectrograms \(B, T, 1, 23, 21\)",
    ),
    "NaN sound": ({"sound": nan_at_the_end}, "sound holds values that are not finite"),
    "half a window": (
        {"sound": lambda s: np.zeros((2, 441), np.float32)},
        "positive multiple of samples_per_frame=440",
    ),
    "too short": ({"sound": lambda s: s[:, :3]}, "sound covers T = 3 frames, expected more than the K = 3"),
    "one clip's sound": ({"sound": lambda s: s[:1]}, "sound has 1 clips, frames has 2"),
    "flow of another size": ({"flow": lambda f: f[:, 1:]}, r"flow has shape .*expected \(2, 3, 2, 48, 48\)"),
    "NaN flow": ({"flow": nan_at_the_end}, "flow holds values that are not finite"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(predictor: Predictor, case: str):
    changes, message = BAD[case]
    arguments = dict(zip(("frames", "flow", "sound"), inputs(2, 3, 6), strict=True))
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message) as raised:
        predictor.predict(arguments["frames"], arguments["sound"], flow=arguments["flow"])
    assert "\n" not in str(raised.value)


def test_stream_refuses_what_cannot_be_predicted(predictor: Predictor):
    frames, flow, sound = inputs(1, 3, 4)
    stream = predictor.stream()
    with pytest.raises(ValueError, match="0 frames were pushed"):
        stream.next()
    with pytest.raises(ValueError, match="sound covers 0 frames, expected 3 or more"):
        stream.push(frames, flow)
    stream.push_sound(sound[:, :3])
    stream.push(frames, flow)
    with pytest.raises(ValueError, match="sound covers 3 frames, expected 4 or more to predict"):
        stream.next()
    with pytest.raises(ValueError, match="frames are 32x48, those before 48x48"):
        stream.push(frames[:, 0, :, :32], flow[:, 0, :, :32])


def test_folders_that_are_no_model(exported: tuple[Path, AVModel], tmp_path: Path):
    with pytest.raises(InputError, match="holds no exported model: step.onnx is missing"):
        Predictor(tmp_path)
    (tmp_path / "step.onnx").write_bytes(b"not a graph")
    with pytest.raises(InputError, match="step.onnx cannot be loaded"):
        Predictor(tmp_path)
    foreign = onnx.load(exported[0] / "context.onnx")
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "step.onnx")
    with pytest.raises(InputError, match="was not written by avfast.export"):
        Predictor(tmp_path)


def test_graphs_of_different_exports_do_not_run_together(exported: tuple[Path, AVModel], tmp_path: Path):
    shutil.copytree(exported[0], tmp_path / "model")
    (tmp_path / "model" / "context.onnx").unlink()
    with pytest.raises(InputError, match=r"lacks context.onnx"):
        Predictor(tmp_path / "model")
    rewrite(exported[0] / "context.onnx", tmp_path / "model" / "context.onnx", hash="another")
    with pytest.raises(InputError, match=r"context.onnx and step.onnx are of different exports"):
        Predictor(tmp_path / "model")


def rewrite(source: Path, target: Path, **changes: Any) -> None:
    """Copy a graph with other values in what it says of itself."""
    graph = onnx.load(source)
    about = json.loads(graph.metadata_props[0].value)
    onnx.helper.set_model_props(graph, {METADATA: json.dumps({**about, **changes})})
    onnx.save(graph, target)


def test_exports_that_this_version_does_not_know(exported: tuple[Path, AVModel], predictor: Predictor, tmp_path: Path):
    shutil.copytree(exported[0], tmp_path / "model")
    step = tmp_path / "model" / "step.onnx"
    rewrite(exported[0] / "step.onnx", step, format=99)
    with pytest.raises(InputError, match="is of format 99, this avfast runs format 1"):
        Predictor(tmp_path / "model")
    thought = {"name": "thought", "shape": ["B", 128]}
    rewrite(exported[0] / "step.onnx", step, inputs=[*predictor.inputs["step"], thought])
    with pytest.raises(InputError, match="its step takes thought, which this avfast does not know"):
        Predictor(tmp_path / "model")


def test_device_is_chosen_and_its_reason_given(exported: tuple[Path, AVModel], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="device is 'tpu', expected auto, cpu or cuda"):
        Predictor(exported[0], device="tpu")  # type: ignore[arg-type]
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    chosen = Predictor(exported[0])
    assert chosen.device == "cpu" and chosen.note is not None and "install onnxruntime-gpu" in chosen.note
    with pytest.raises(InputError, match="device is 'cuda', but this onnxruntime is built without CUDA"):
        Predictor(exported[0], device="cuda")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    with pytest.raises(InputError, match="onnxruntime and onnxruntime-gpu are both installed and overwrite each other"):
        Predictor(exported[0], device="cuda")


WITHOUT = """
import sys
import numpy as np
for name in ("torch", "triton", "cv2", "PIL", "tyro", "rich", "yaml", "safetensors", "accelerate"):
    sys.modules[name] = None  # an import of it fails
from avfast.runtime import Predictor
model, given, out = sys.argv[1:]
arrays = np.load(given)
rollout = Predictor(model, device="cpu").predict(arrays["frames"], arrays["sound"])
np.save(out, rollout.frames)
print("av" in sys.modules)
"""


def test_runs_where_torch_is_absent(exported: tuple[Path, AVModel], predictor: Predictor, tmp_path: Path):
    frames, _, sound = inputs(1, 3, 6)
    np.savez(tmp_path / "given.npz", frames=frames, sound=sound)
    command = [sys.executable, "-c", WITHOUT, str(exported[0]), str(tmp_path / "given.npz"), str(tmp_path / "out.npy")]
    ended = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "False"
    np.testing.assert_allclose(
        np.load(tmp_path / "out.npy"), predictor.predict(frames, sound).frames, rtol=0, atol=1e-4
    )


def make_film(path: Path, *, fps: int, frames: int, rate: int | None = 16000, click: float = 0.5) -> None:
    """A film whose frames brighten one by one, with a click in its sound."""
    import av

    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "8"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        sound = None if rate is None else container.add_stream("aac", rate=rate, layout="mono")
        for i in range(frames):
            image = np.full((64, 96, 3), 40 + 5 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(video.encode())
        if sound is not None:
            assert rate is not None
            wave = np.zeros((1, rate * frames // fps), np.float32)
            wave[0, int(click * rate) : int(click * rate) + 200] = 0.9
            block = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            block.sample_rate, block.pts = rate, 0
            container.mux(sound.encode(block))
            container.mux(sound.encode())


def test_films_are_read_as_the_model_was_trained(predictor: Predictor, tmp_path: Path):
    make_film(tmp_path / "film.mp4", fps=20, frames=30)
    frames, wave, fps, start = predictor.read(tmp_path / "film.mp4")
    # 10 frames a second of 20: every other one
    assert (
        frames.shape == (1, 15, 1, 48, 48)
        and wave.shape == (1, 15 * 440)
        and wave.dtype == np.int16
        and fps == 10
        and start == 0
    )
    levels = frames[0].mean((1, 2, 3)) * 255
    np.testing.assert_allclose(levels, 40 + 10 * np.arange(15), atol=3)
    loud = np.flatnonzero(np.abs(wave[0]) > 0.45 * 32768) / 4400
    assert abs(loud[0] - 0.5) < 2e-3 and abs(loud[-1] - 0.5 - 200 / 16000) < 2e-3


def test_films_are_read_without_opencv(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_film(tmp_path / "film.mp4", fps=20, frames=30)
    expected = predictor.read(tmp_path / "film.mp4")
    monkeypatch.setitem(sys.modules, "cv2", None)
    found = predictor.read(tmp_path / "film.mp4")
    np.testing.assert_allclose(found.frames, expected.frames, atol=2 / 255)
    np.testing.assert_array_equal(found.sound, expected.sound)


def test_films_that_cannot_be_used_are_refused(predictor: Predictor, tmp_path: Path):
    make_film(tmp_path / "mute.mp4", fps=10, frames=5, rate=None)
    with pytest.raises(InputError, match="no sound track in it"):
        predictor.read(tmp_path / "mute.mp4")
    make_film(tmp_path / "long.mp4", fps=10, frames=9, click=0.1)
    with pytest.raises(InputError, match="longer than 8 frames at 10 per second"):
        predictor.read(tmp_path / "long.mp4", max_frames=8)
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(InputError, match="text.mp4"):
        predictor.read(tmp_path / "text.mp4")


@pytest.mark.skipif(not CLIPS.exists(), reason="the real clips are not there")
def test_a_real_clip_is_predicted(predictor: Predictor):
    path = sorted(p for p in CLIPS.iterdir() if p.suffix in (".mp4", ".webm", ".mkv", ".ogv", ".mov"))[0]
    film = predictor.read(path)
    rollout = predictor.predict(film.frames[:, :5], film.sound[:, : 12 * 440])
    assert rollout.frames.shape == (1, 7, 1, 48, 48) and np.isfinite(rollout.frames).all()
