"""Flow of made films: known motion, sizes, rates, every format, and memory that does not grow with the film."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from flow_films import DX, DY, H, W, extract, film, marker, scene, tree
from PIL import Image

from avfast.media.video import read_video
from avfast.opticalflow import flow_pipeline
from avfast.opticalflow.flow_files import read_flo
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.ui.plots import flow_to_rgb


@pytest.mark.parametrize("direction", ["backward", "forward"])
@pytest.mark.parametrize("stride", [1, 2])
def test_known_motion(direction: str, stride: int, tmp_path: Path) -> None:
    """Backward flow of frame t points to t - stride, where its content came from; forward flow to t + stride."""
    summary = extract(film(tmp_path / "a.mkv"), out=tmp_path / "o", direction=direction, stride=stride)
    flow = np.load(tmp_path / "o" / "a" / "flow.npy")
    assert flow.shape == (6 - stride, 2, H, W) and flow.dtype == np.float16 and summary["pairs"] == len(flow)
    sign = -1 if direction == "backward" else 1
    want = np.array([sign * stride * DX, sign * stride * DY])
    error = (flow - want[:, None, None])[..., 8:-8, 8:-8]
    assert np.hypot(error[:, 0], error[:, 1]).mean() < 0.05
    frames = torch.tensor(np.stack([scene(i) for i in range(6)]))[:, None]
    early, late = frames[:-stride], frames[stride:]
    exact = tvl1_flow(late, early) if direction == "backward" else tvl1_flow(early, late)
    np.testing.assert_array_equal(flow, exact.numpy().astype(np.float16))
    known = marker(tmp_path / "o" / "a")
    assert (known["pairs"], known["width"], known["height"], known["fps"]) == (6 - stride, W, H, 25)
    assert known["frame_numbers"] == list(range(6)) and known["frame_times"] == [i * 0.04 for i in range(6)]
    assert known["parameters"]["direction"] == direction and known["parameters"]["stride"] == stride


@pytest.mark.parametrize("stride", [1, 3])
def test_batches_change_nothing(stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "a.mkv", 9)
    extract(tmp_path / "a.mkv", out=tmp_path / "one", stride=stride, format=("npy", "hsv-mp4"))
    for pairs in (1, 2, 9 - stride):
        monkeypatch.setattr(flow_pipeline, "_BATCH_BYTES", pairs * 8 * H * W)
        out = tmp_path / str(pairs)
        extract(tmp_path / "a.mkv", out=out, stride=stride, format=("npy", "hsv-mp4"), threads=1)
        assert tree(out) == tree(tmp_path / "one")


def test_resizing_the_flow(tmp_path: Path) -> None:
    """Half the size: means over 2x2 pixels, and half the values."""
    path = film(tmp_path / "a.mkv")
    extract(path, out=tmp_path / "full")
    full = np.load(tmp_path / "full" / "a" / "flow.npy").astype(np.float64)
    extract(path, out=tmp_path / "after", size=(W // 2, H // 2), resize="after")
    after = np.load(tmp_path / "after" / "a" / "flow.npy")
    assert after.shape == (5, 2, H // 2, W // 2)
    np.testing.assert_allclose(after, full.reshape(5, 2, H // 2, 2, W // 2, 2).mean((3, 5)) / 2, atol=2e-3)
    error = after[..., 4:-4, 4:-4] - np.array([-DX / 2, -DY / 2])[:, None, None]
    assert np.abs(error).mean() < 0.05
    # one axis alone
    extract(path, out=tmp_path / "wide", size=(2 * W, H), resize="after")
    wide = np.load(tmp_path / "wide" / "a" / "flow.npy")[..., 8:-8, 16:-16]
    assert np.abs(wide - np.array([-2 * DX, -DY])[:, None, None]).mean() < 0.06


def test_resizing_the_frames(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv")
    extract(path, out=tmp_path / "o", short_side=H // 2)
    flow = np.load(tmp_path / "o" / "a" / "flow.npy")
    frames = np.stack([f.image for f in read_video(path, short_side=H // 2, grey=True)])[:, None]
    np.testing.assert_array_equal(flow, tvl1_flow(frames[1:], frames[:-1]).numpy().astype(np.float16))
    assert np.abs(flow[..., 5:-5, 5:-5] - np.array([-DX / 2, -DY / 2])[:, None, None]).mean() < 0.1


def test_rate_and_uneven_times(tmp_path: Path) -> None:
    """Frames 2 and 3 are close: at 10 fps 2 is left out, and 4 stands for two of the times."""
    path = film(tmp_path / "a.mkv", times=[0, 100, 190, 205, 350, 500])
    extract(path, out=tmp_path / "o", fps=10, format=("npy", "hsv-mp4"))
    known = marker(tmp_path / "o" / "a")
    assert known["frame_numbers"] == [0, 1, 3, 4, 4, 5] and known["fps"] == 10 and known["pairs"] == 5
    assert known["frame_times"] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    flow = np.load(tmp_path / "o" / "a" / "flow.npy")[..., 8:-8, 8:-8].astype(np.float32).mean((2, 3))
    np.testing.assert_allclose(flow, -np.outer([1, 2, 1, 0, 1], [DX, DY]), atol=0.1)
    shown = [f.time for f in read_video(tmp_path / "o" / "a" / "flow_hsv.mp4")]
    assert shown == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    # without a rate the pictures of the flow keep the film's own times
    extract(path, out=tmp_path / "o", overwrite=True, format=("hsv-mp4",))
    shown = [f.time for f in read_video(tmp_path / "o" / "a" / "flow_hsv.mp4")]
    assert shown == pytest.approx([0, 0.09, 0.105, 0.25, 0.4], abs=1e-3)


def test_formats_agree(tmp_path: Path) -> None:
    formats = ("npy", "flo", "jpg", "png", "hsv-png", "hsv-mp4")
    extract(film(tmp_path / "a.mkv", 4), out=tmp_path / "o", format=formats, bound=3, stride=2)
    folder = tmp_path / "o" / "a"
    half = np.load(folder / "flow.npy")
    names = {"flow.done.json", "flow.npy", "flow_hsv.mp4"}
    for k, name in enumerate(("00001", "00002")):
        flow = read_flo(folder / f"flow_{name}.flo")
        np.testing.assert_array_equal(flow, cv2.readOpticalFlow(str(folder / f"flow_{name}.flo")).transpose(2, 0, 1))
        np.testing.assert_array_equal(flow.astype(np.float16), half[k])
        # written out: clip, then -bound -> 0 and bound -> 255
        want = [[round((min(max(v, -3.0), 3.0) + 3) / 6 * 255) for v in axis.ravel().tolist()] for axis in flow]
        for axis, levels in zip("xy", want, strict=True):
            png = np.asarray(Image.open(folder / f"flow_{axis}_{name}.png"))
            jpg = np.asarray(Image.open(folder / f"flow_{axis}_{name}.jpg"))
            assert png.shape == jpg.shape == (H, W)
            np.testing.assert_array_equal(png.ravel(), levels)
            assert np.abs(jpg.astype(int) - png).mean() < 2
            names |= {f"flow_{axis}_{name}.png", f"flow_{axis}_{name}.jpg"}
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"flow_hsv_{name}.png")), flow_to_rgb(flow, 3))
        names |= {f"flow_{name}.flo", f"flow_hsv_{name}.png"}
    assert {p.name for p in folder.iterdir()} == names
    colours = [f.image.astype(int) for f in read_video(folder / "flow_hsv.mp4")]
    assert len(colours) == 2 and np.abs(colours[0] - flow_to_rgb(read_flo(folder / "flow_00001.flo"), 3)).mean() < 8
    assert marker(folder)["parameters"]["bound"] == 3 and marker(folder)["formats"] == list(formats)


def test_memory_does_not_grow_with_the_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """120 pairs of 64x64 are 3.9 MB of flow; a batch of 8 is 0.26 MB."""

    def made(a: torch.Tensor, _b: torch.Tensor, **_settings: Any) -> torch.Tensor:
        # tracemalloc sees numpy's memory, not PyTorch's
        return torch.from_numpy(np.ones((len(a), 2, 64, 64), np.float32))

    monkeypatch.setattr(flow_pipeline, "tvl1_flow", made)
    monkeypatch.setattr(flow_pipeline, "_BATCH_BYTES", 8 * 8 * 64 * 64)
    path = film(tmp_path / "a.mkv", 121, 64, 64)
    tracemalloc.start()
    extract(path, out=tmp_path / "o", threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5e6
    flow = np.load(tmp_path / "o" / "a" / "flow.npy", mmap_mode="r")
    assert flow.shape == (120, 2, 64, 64) and (np.asarray(flow) == 1).all()
