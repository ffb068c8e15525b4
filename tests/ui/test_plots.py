"""Colours against the published wheel, pictures by their size, frames and borders, and nothing half-written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from avfast.errors import InputError
from avfast.scoring.metrics import MetricResult
from avfast.ui import plots
from avfast.ui.plots import (
    colour_wheel,
    film_frames,
    flow_film_frames,
    flow_to_rgb,
    save_gif,
    save_loss_curves,
    save_metric_curves,
    save_strip,
)

T, K, H, W = 6, 2, 16, 32


def published_wheel() -> np.ndarray:
    """The 55 colours of Baker et al. 2011, written as its six ramps."""
    up, down = (lambda n: [255 * i // n for i in range(n)]), (lambda n: [255 - 255 * i // n for i in range(n)])
    on, off = (lambda n: [255] * n), (lambda n: [0] * n)
    ramps = [
        (15, on, up, off),
        (6, down, on, off),
        (4, off, on, up),
        (11, off, down, on),
        (13, up, off, on),
        (6, on, off, down),
    ]
    return np.array([rgb for n, *channels in ramps for rgb in zip(*(c(n) for c in channels), strict=True)])


def arrow(turn: float, length: float = 1.0) -> np.ndarray:
    angle = 2 * math.pi * turn
    return np.array([length * math.cos(angle), length * math.sin(angle)]).reshape(2, 1, 1)


def test_hue_is_the_published_wheel() -> None:
    got = np.array([flow_to_rgb(arrow(i / 55), 1.0)[0, 0] for i in range(55)], dtype=int)
    # the published ramps are cut down to whole numbers, ours are rounded
    assert np.abs(got - published_wheel()).max() <= 1


@pytest.mark.parametrize(
    ("x", "y", "near"), [(1, 0, (255, 0, 0)), (0, 1, (255, 234, 0)), (-1, 0, (0, 197, 255)), (0, -1, (103, 0, 255))]
)
def test_directions(x: float, y: float, near: tuple[int, int, int]) -> None:
    flow = torch.tensor([x, y], dtype=torch.float32).view(1, 2, 1, 1)
    assert np.abs(flow_to_rgb(flow, 1.0)[0, 0, 0].astype(int) - near).max() <= 1


def test_saturation_is_the_magnitude() -> None:
    def saturation(length: float) -> float:
        return 1 - flow_to_rgb(arrow(0.3, length), 4.0)[0, 0].min() / 255

    assert saturation(0) == 0
    for length in (1, 2, 3, 4):
        assert saturation(length) == pytest.approx(length / 4, abs=0.5 / 255)
    full, beyond = (flow_to_rgb(arrow(0.3, n), 4.0)[0, 0].astype(float) for n in (4, 4.001))
    np.testing.assert_allclose(beyond, 0.75 * full, atol=1)


def test_one_scale_for_all_frames_and_odd_values() -> None:
    flow = np.zeros((2, 3, 2, 5, 7))
    flow[1, 2, 0, 4, 6] = 8.0
    flow[0, 0, 0, 0, 0] = 4.0
    flow[0, 1, 1, 2, 2] = np.nan
    flow[0, 1, 0, 3, 3] = np.inf
    rgb = flow_to_rgb(flow)
    assert rgb.shape == (2, 3, 5, 7, 3) and rgb.dtype == np.uint8
    assert rgb[1, 2, 4, 6].tolist() == [255, 0, 0] and rgb[0, 0, 0, 0].tolist() == [255, 128, 128]
    assert (rgb[0, 1, 2, 2] == 0).all() and (rgb[0, 1, 3, 3] == 0).all() and (rgb[1, 0] == 255).all()
    assert (flow_to_rgb(np.zeros((2, 4, 4))) == 255).all() and flow_to_rgb(np.zeros((0, 2, 4, 4))).shape == (0, 4, 4, 3)


def clip(channels: int = 1) -> dict[str, torch.Tensor]:
    """Frame t is flat grey of value t / 8, so that a picture tells which frame it shows."""
    true = torch.arange(T).view(T, 1, 1, 1).expand(T, channels, H, W) / 8
    flow = torch.zeros(T, 2, H, W)
    flow[1:, 0] = 2.0
    return {"true": true, "predicted": true[K:] / 2, "true_flow": flow, "predicted_flow": flow[K:] / 2}


def cells(image: Image.Image, rows: int, columns: int, legend: bool = False) -> tuple[np.ndarray, int, int, int]:
    """The picture's pixels, the left edge of the first cell, a cell's height and width (borders and gap included)."""
    height, width = 3 * H + 2 * plots.BORDER + plots.GAP, 3 * W + 2 * plots.BORDER + plots.GAP
    left = image.width - columns * width
    assert image.height - rows * height == plots.TEXT_SIZE + 2 * plots.GAP + legend * plots.LEGEND and left > 0
    return np.asarray(image.convert("RGB")), left, height, width


@pytest.mark.parametrize("channels", [1, 3])
def test_strip(tmp_path: Path, channels: int) -> None:
    path = tmp_path / "strip.png"
    save_strip(path, **clip(channels), context_frames=K)
    pixels, left, height, width = cells(Image.open(path), rows=4, columns=T, legend=True)
    top = plots.TEXT_SIZE + 2 * plots.GAP
    for row in range(4):
        for t in range(T):
            y, x = top + row * height, left + t * width
            border, centre = pixels[y, x], pixels[y + height // 2, x + width // 2]
            if row in (1, 3) and t < K:
                assert (pixels[y : y + height, x : x + width] == plots.BACKGROUND).all()
                continue
            want = plots.PREDICTED if row in (1, 3) else plots.GIVEN if t < K else plots.FUTURE
            assert tuple(border) == want
            if row < 2:
                assert (centre == round(255 * t / (8 if row == 0 else 16))).all()
            elif t > 0:
                # 2 px to the right are full red on the shared scale, 1 px is half of it
                assert centre.tolist() == ([255, 0, 0] if row == 2 else [255, 128, 128])
    # the legend's rim is the direction's own colour: red to the right
    wheel = pixels[-plots.LEGEND + plots.GAP : -plots.GAP, plots.GAP :][:, : plots.LEGEND - 2 * plots.GAP]
    assert wheel[28, 54, 0] == 255 and wheel[28, 54, 1] < 20 and wheel[28, 1, 2] == 255 and wheel[28, 1, 0] < 20
    assert [p.name for p in tmp_path.iterdir()] == ["strip.png"]


def test_strip_enlarges_without_blurring_and_chooses_frames(tmp_path: Path) -> None:
    true = torch.zeros(T, 1, H, W)
    true[3, 0, 5, 7] = 1.0
    save_strip(tmp_path / "strip.png", true, true[K:], context_frames=K, frames=[4, 1])
    pixels, left, height, width = cells(Image.open(tmp_path / "strip.png"), rows=2, columns=2)
    top, left = plots.TEXT_SIZE + 2 * plots.GAP + plots.BORDER, left + width + plots.BORDER
    frame = pixels[top : top + 3 * H, left : left + 3 * W, 0]
    assert set(np.unique(frame)) == {0, 255}
    assert (frame[15:18, 21:24] == 255).all() and (frame == 255).sum() == 9


def test_the_wheel_is_its_own_legend() -> None:
    wheel = colour_wheel(41)
    assert wheel.shape == (41, 41, 3) and (wheel[20, 20] == 255).all() and (wheel[0, 0] == plots.BACKGROUND).all()
    for turn in (0.1, 0.4, 0.8):
        x, y = (round(20 + 14 * f(2 * math.pi * turn)) for f in (math.cos, math.sin))
        vector = np.array([x - 20, y - 20]).reshape(2, 1, 1) * 2 / 41
        assert wheel[y, x].tolist() == flow_to_rgb(vector, 1.0)[0, 0].tolist()


def test_strip_with_sound_where_the_true_clip_ends_early(tmp_path: Path) -> None:
    data = clip()
    short = {"true": data["true"][:4], "true_flow": data["true_flow"][:4]}
    audio = torch.zeros(T, 1, 5, 4)
    # loudest at the lowest frequency of frame 5, 60 dB below that and less is black
    audio[4, 0, 0], audio[4, 0, 1], audio[4, 0, 2] = 1.0, 1e-3, 1e-5
    save_strip(tmp_path / "strip.png", **data | short, audio=audio, context_frames=K)
    pixels, left, height, width = cells(Image.open(tmp_path / "strip.png"), rows=5, columns=T, legend=True)
    top = plots.HEADER
    for row in (0, 2):
        assert (pixels[top + row * height : top + (row + 1) * height, left + 4 * width :] == plots.BACKGROUND).all()
        assert (pixels[top + row * height + 3, left + 3 * width] == plots.FUTURE).all()
    sound = pixels[top + 4 * height + plots.BORDER :, left + plots.BORDER :]
    loud, quiet = sound[: 3 * H, 4 * width : 4 * width + 3 * W].astype(int), sound[: 3 * H, : 3 * W]
    assert loud[-1].sum(-1).min() > 600 and (loud[: 3 * H // 5 * 4 - 1] == quiet[0, 0]).all() and quiet.max() < 10
    for column, colour in ((0, plots.GIVEN), (K, plots.FUTURE)):
        assert tuple(pixels[top + 4 * height, left + column * width]) == colour


def test_film_frames() -> None:
    data = clip(3)
    short = data["true"][:4]
    frames = list(film_frames(short, data["predicted"], context_frames=K))
    factor = math.ceil(plots.FILM_SIDE / W)
    assert len(frames) == T and {f.shape for f in frames} == {frames[0].shape} and frames[0].dtype == np.uint8
    height, width = factor * H + 2 * plots.BORDER, factor * W + 2 * plots.BORDER
    assert frames[0].shape == (plots.HEADER + height + plots.GAP, 2 * width + 3 * plots.GAP, 3)
    for t, frame in enumerate(frames):
        y, lefts = plots.HEADER, (plots.GAP, 2 * plots.GAP + width)
        if t < 4:
            assert tuple(frame[y, lefts[0]]) == (plots.GIVEN if t < K else plots.FUTURE)
            assert (frame[y + height // 2, lefts[0] + width // 2] == round(255 * t / 8)).all()
        else:
            assert (frame[y : y + 9, lefts[0] : lefts[0] + width] == plots.BACKGROUND).all()
        assert tuple(frame[y, lefts[1]]) == (plots.GIVEN if t < K else plots.PREDICTED)
        assert (frame[y + height // 2, lefts[1] + width // 2] == round(255 * t / (8 if t < K else 16))).all()


def test_flow_film_frames() -> None:
    data = clip()
    frames = list(flow_film_frames(data["true_flow"][:4], data["predicted_flow"], context_frames=K))
    factor = math.ceil(plots.FILM_SIDE / W)
    height, width = factor * H + 2 * plots.BORDER, factor * W + 2 * plots.BORDER
    assert len(frames) == T
    for t, frame in enumerate(frames):
        assert frame.shape == (plots.HEADER + height + plots.GAP + plots.LEGEND, 2 * width + 3 * plots.GAP, 3)
        left, right = frame[plots.HEADER + height // 2, [width // 2, width // 2 + width]].tolist()
        if t < 4:
            assert left == ([255, 0, 0] if t else [255, 255, 255])
        assert right == (left if t < K else [255, 128, 128])


def test_gifs_keep_their_pace(tmp_path: Path) -> None:
    """GIF counts hundredths of a second: 30 frames a second are three, three and four of them in turn."""
    save_gif(tmp_path / "a.gif", clip()["true"], clip()["predicted"], context_frames=K, frames_per_second=30)
    image = Image.open(tmp_path / "a.gif")
    durations = []
    for t in range(T):
        image.seek(t)
        durations.append(image.info["duration"])
    assert set(durations) == {30, 40} and sum(durations) == 200


def test_gif(tmp_path: Path) -> None:
    path, data = tmp_path / "clip.gif", clip()
    clips = [torch.stack([data[name], 1 - data[name]]) for name in ("true", "predicted")]
    save_gif(path, *clips, context_frames=K)
    image = Image.open(path)
    assert image.n_frames == T and image.info["duration"] == 100 and image.info["loop"] == 0
    for t in range(T):
        image.seek(t)
        pixels, _, height, width = cells(image, rows=2, columns=2)
        top = plots.TEXT_SIZE + 2 * plots.GAP
        for row in range(2):
            for column in range(2):
                y, x = top + row * height, plots.GAP + column * width
                grey = t / 8 if column == 0 or t < K else t / 16
                grey = grey if row == 0 else 1 - grey
                border = plots.GIVEN if t < K else plots.FUTURE if column == 0 else plots.PREDICTED
                np.testing.assert_allclose(pixels[y, x], border, atol=2)
                np.testing.assert_allclose(pixels[y + height // 2, x + width // 2], [255 * grey] * 3, atol=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, c: flow_to_rgb(np.zeros((3, 4, 4))), r"flow has shape \(3, 4, 4\)"),
        (lambda p, c: flow_to_rgb(np.zeros((2, 4, 4)), 0.0), "max_flow is 0.0"),
        (
            lambda p, c: save_strip(p, **c | {"predicted": c["true"][:3]}, context_frames=K),
            "true has 6 .* 2 to 5 true",
        ),
        (
            lambda p, c: save_strip(p, **c | {"true": c["true"][:1]}, context_frames=K),
            "one size and 2 to 6 true",
        ),
        (lambda p, c: save_strip(p, **c, audio=torch.zeros(5, 1, 2, 2), context_frames=K), "audio has shape"),
        (lambda p, c: save_strip(p, **c | {"true_flow": c["predicted_flow"]}, context_frames=K), "true_flow has shape"),
        (
            lambda p, c: save_strip(p, **c, context_frames=K, frames=[7]),
            r"frames is \[7\], expected numbers from 1 to 6",
        ),
        (lambda p, c: save_strip(p, c["true_flow"], c["predicted"], context_frames=K), r"true has shape \(6, 2,"),
        (lambda p, c: save_gif(p, c["true"][None], c["predicted"], context_frames=K), "true has shape"),
        (lambda p, c: save_metric_curves(p, {}), "results is empty"),
    ],
)
def test_wrong_input_is_named_and_leaves_no_file(call, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "x.png", clip())
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "strip.png"
    save_strip(path, **clip(), context_frames=K)
    before = path.read_bytes()

    def full(self: Image.Image, target: Path, **_: object) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_strip(path, **clip(), context_frames=K)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def write_records(path: Path, *records: dict, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The figures that are saved from here on, to look at what they hold."""
    figures: list = []
    save = plots._save_figure
    monkeypatch.setattr(plots, "_save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_loss_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    log = write_records(
        tmp_path / "metrics.jsonl",
        {"stage": "mme", "step": 0, "val_loss": 3.0, "ssim": 0.5},
        {"stage": "mme", "step": 1, "loss": 2.0, "lr": 1e-4},
        {"stage": "mme", "step": 2, "loss": 1.0, "lr": 1e-4},
        {"stage": "car", "step": 3, "loss": 0.5},
        tail='{"stage": "ca',
    )
    save_loss_curves(log, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    curves = {
        (a.get_title(), line.get_label()): line.get_xydata().tolist() for a in figures[0].axes for line in a.lines
    }
    assert curves == {
        ("stage mme", "val_loss"): [[0, 3]],
        ("stage mme", "loss"): [[1, 2], [2, 1]],
        ("stage car", "loss"): [[3, 0.5]],
    }


def test_loss_curves_of_a_bad_log(tmp_path: Path) -> None:
    log = write_records(tmp_path / "m.jsonl", {"stage": "mme", "step": 1, "lr": 1.0})
    with pytest.raises(InputError, match="m.jsonl holds no record with a loss"):
        save_loss_curves(log, tmp_path / "x.png")
    log.write_text('{"stage"\n{"stage": "mme", "step": 1, "loss": 1.0}\n')
    with pytest.raises(InputError, match="m.jsonl, line 1 is not a JSON object"):
        save_loss_curves(log, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_metric_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = drawn(monkeypatch)
    results = {
        "ours": MetricResult("paper", 2, [0.9, 0.8], [20.0, 18.0], 0.0, 19.0, [0.1, 0.2]),
        "black": MetricResult("paper", 2, [0.7, 0.7], [14.0, 14.0], 0.0, 14.0, None),
    }
    save_metric_curves(tmp_path / "curves.png", results, context_frames=5, references=["black"])
    ssim, psnr, aepe = figures[0].axes
    assert [line.get_label() for line in ssim.lines] == ["ours", "black"] == [line.get_label() for line in psnr.lines]
    assert [line.get_linestyle() for line in ssim.lines] == ["-", "--"]
    assert ssim.lines[0].get_xydata().tolist() == [[6, 0.9], [7, 0.8]]
    assert [line.get_xydata().tolist() for line in aepe.lines] == [[[6, 0.1], [7, 0.2]]]
    save_metric_curves(tmp_path / "curves.png", {"black": results["black"]})
    assert len(figures[1].axes) == 2
    placed = {name: replace(r, position_error=[1.5, 2.5]) for name, r in results.items()}
    save_metric_curves(tmp_path / "curves.png", placed)
    assert figures[2].axes[3].lines[1].get_xydata().tolist() == [[1, 1.5], [2, 2.5]]


def test_contact_sheet_shows_frames_sound_and_flow(tmp_path: Path) -> None:
    """A red clip whose sound is one low note and whose flow goes right: all three are where they belong."""
    frames = np.zeros((9, 3, 96, 96))
    frames[:, 0] = 1
    audio = np.zeros((9, 1, 45, 17))
    audio[:, :, 2] = 0.5
    flow = np.zeros((9, 2, 96, 96))
    flow[1:, 0] = 3
    row = plots.ContactRow("a film", frames, audio, flow)
    plots.save_contact_sheet(tmp_path / "sheet.png", [row, row], columns=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == plots.GAP + 3 * (96 + plots.GAP)
    top = plots.TEXT_SIZE + 2 * plots.GAP
    middle = plots.GAP + (96 + plots.GAP) + 48
    assert (sheet[top + 10, middle] == (255, 0, 0)).all()
    sound = sheet[top + 96 + plots.GAP // 2 :][:48, middle]
    # low notes are at the bottom: row 2 of 45 lies 2 / 45 of the height above it
    assert sound.max() > 240 and abs(sound[:, 0].argmax() / 48 - 42 / 45) < 0.04 and sound[:40].max() < 10
    moving = top + 96 + 48 + plots.GAP
    assert (sheet[moving + 10, middle] == (255, 0, 0)).all() and (sheet[moving + 10, plots.GAP + 10] == 255).all()
    with pytest.raises(ValueError, match="rows is empty"):
        plots.save_contact_sheet(tmp_path / "none.png", [])
    with pytest.raises(ValueError, match="flow has shape"):
        plots.save_contact_sheet(tmp_path / "none.png", [row._replace(flow=flow[:3])])
    assert not (tmp_path / "none.png").exists()
