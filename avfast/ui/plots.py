"""Pictures: flow colours, strips and GIFs of true and predicted clips, loss and metric curves.

Clips are tensors or arrays on the CPU: frames (T,C,H,W) in [0,1] with C = 1 or 3, flow (T,2,H,W) in pixels. Predictions
(P,...) are the last P of the T frames; the true clip (T',...) may end before them. Given frames have a white border,
predicted ones a red one, true future ones a grey one. Every file is written under a temporary name, then renamed."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from avfast.errors import InputError
from avfast.files.atomic import read_records, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GIVEN, FUTURE, PREDICTED = (255, 255, 255), (110, 110, 110), (230, 40, 40)
BACKGROUND, TEXT = (24, 24, 24), (230, 230, 230)
BORDER, GAP, TEXT_SIZE = 2, 4, 14
HEADER, LEGEND, LEGEND_WIDTH = TEXT_SIZE + 2 * GAP, 64, 320
STRIP_SIDE, FILM_SIDE = 96, 240
"""Frames are enlarged by a whole factor until their longer side has at least this many pixels: in strips and GIFs, and
in films."""

# the wheel of Baker et al.: how many hues lie between six corner colours, more where the eye distinguishes more
WHEEL_ENDS = np.cumsum([0, 15, 6, 4, 11, 13, 6])
WHEEL_COLOURS = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=float)

Pixels = NDArray[np.uint8]
_NEAREST = Image.Resampling.NEAREST


def flow_to_rgb(flow: ArrayLike, max_flow: float | None = None) -> Pixels:
    """Colour-code a flow: (...,2,H,W) in pixels, x then y -> uint8 (...,H,W,3). Hue is direction, saturation magnitude.

    A vector to the right is red, down yellow, left sky blue, up violet; white is no motion. A vector of `max_flow`
    pixels is fully saturated, a longer one is darkened by a quarter; by default max_flow is the largest magnitude in
    the whole array, one scale for all of its frames. A vector that is not finite is black. ValueError: another shape,
    max_flow <= 0. Source: Baker et al., "A Database and Evaluation Methodology for Optical Flow", IJCV 2011, with its
    wheel as a continuous circle."""
    flow = np.asarray(flow, dtype=np.float64)
    if flow.ndim < 3 or flow.shape[-3] != 2:
        raise ValueError(f"flow has shape {flow.shape}, expected (..., 2, H, W)")
    if max_flow is not None and not max_flow > 0:
        raise ValueError(f"max_flow is {max_flow}, expected more than 0 pixels")
    finite = np.isfinite(flow).all(axis=-3)
    x, y = (np.where(finite, flow[..., axis, :, :], 0.0) for axis in (0, 1))
    magnitude = np.hypot(x, y)
    radius = (magnitude / (max_flow or magnitude.max(initial=0.0) or 1.0))[..., None]
    position = np.arctan2(y, x) / (2 * math.pi) % 1.0 * WHEEL_ENDS[-1]
    hue = np.stack([np.interp(position, WHEEL_ENDS, channel) for channel in WHEEL_COLOURS.T], axis=-1)
    colour = np.where(radius <= 1, 1 - radius * (1 - hue), 0.75 * hue)
    return np.where(finite[..., None], np.rint(255 * colour), 0).astype(np.uint8)


def colour_wheel(diameter: int) -> Pixels:
    """The legend of `flow_to_rgb`, (diameter,diameter,3): each pixel has the colour of the vector from the centre to
    it, fully saturated at the rim. Outside the wheel is `BACKGROUND`."""
    axis = (np.arange(diameter) + 0.5) * 2 / diameter - 1
    vectors = np.stack(np.meshgrid(axis, axis))
    inside = np.hypot(*vectors) <= 1
    return np.where(inside[..., None], flow_to_rgb(vectors, 1.0), BACKGROUND).astype(np.uint8)


def save_strip(
    path: str | Path,
    true: ArrayLike,
    predicted: ArrayLike,
    true_flow: ArrayLike | None = None,
    predicted_flow: ArrayLike | None = None,
    audio: ArrayLike | None = None,
    *,
    context_frames: int,
    frames: Collection[int] | None = None,
    first_frame: int = 1,
) -> None:
    """One clip as labelled rows over time: true, predicted, true flow, predicted flow, sound; a column per frame.

    true (T',C,H,W), predicted (P,C,H,W), true_flow (T',2,H,W), predicted_flow (P,2,H,W), audio (T,1,F,S) magnitudes,
    T = context_frames + P; if the true clip is shorter, T' < T, its last cells stay empty. Frames are numbered from 1,
    and `frames` chooses some of them; `first_frame` is the number printed over the first. Small frames are enlarged
    with nearest neighbour. The flow rows share one scale, the largest true magnitude (without true flow the largest
    predicted one), and the colour wheel below them states it. The sound has low frequencies at the bottom and 60 dB
    from black to the loudest value. ValueError: shapes that do not fit, a frame number outside 1..T."""
    images, predictions = _pair(_images("true", true), _images("predicted", predicted), context_frames)
    total = context_frames + len(predictions)
    rows: list[tuple[str, Pixels]] = [("true", images), ("predicted", predictions)]
    flows = {"true flow": (true_flow, len(images)), "predicted flow": (predicted_flow, len(predictions))}
    scale = next((_max_flow(flow) for flow, _ in flows.values() if flow is not None), None)
    for label, (flow, count) in flows.items():
        if flow is not None:
            _check_shape(label.replace(" ", "_"), flow, (count, 2, *images.shape[1:3]))
            rows.append((label, flow_to_rgb(flow, scale)))
    if audio is not None:
        _check_shape("audio", audio, (total, 1, *np.shape(audio)[2:]))
        rows.append(("sound", _spectrogram_images(audio)))
    numbers = range(1, total + 1) if frames is None else sorted(set(frames))
    if not numbers or numbers[0] < 1 or numbers[-1] > total:
        raise ValueError(f"frames is {list(numbers)}, expected numbers from 1 to {total}")

    height, width = _cell_size(images, STRIP_SIDE)
    font = ImageFont.load_default(TEXT_SIZE)
    margin = math.ceil(max(font.getlength(label) for label, _ in rows)) + 3 * GAP
    canvas, draw = _canvas(margin + len(numbers) * (width + GAP), HEADER + len(rows) * (height + GAP), scale)
    for column, number in enumerate(numbers):
        left = margin + column * (width + GAP)
        draw.text((left + width // 2, HEADER // 2), str(number + first_frame - 1), fill=TEXT, font=font, anchor="mm")
        for row, (label, pictures) in enumerate(rows):
            index = number - 1 - (context_frames if label.startswith("predicted") else 0)
            if not 0 <= index < len(pictures):
                continue
            true_colour = GIVEN if number <= context_frames else FUTURE
            colour = PREDICTED if label.startswith("predicted") else true_colour
            canvas.paste(_framed(pictures[index], height, width, colour), (left, HEADER + row * (height + GAP)))
    for row, (label, _) in enumerate(rows):
        draw.text((GAP, HEADER + row * (height + GAP) + height // 2), label, fill=TEXT, font=font, anchor="lm")
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def save_gif(
    path: str | Path, true: ArrayLike, predicted: ArrayLike, *, context_frames: int, frames_per_second: float = 10.0
) -> None:
    """True clip on the left, given then predicted frames on the right, over time; several clips one below the other.
    true (T',C,H,W) or (N,T',C,H,W), predicted (P,C,H,W) or (N,P,C,H,W), context_frames <= T' <= context_frames + P.
    Small frames are enlarged with nearest neighbour. ValueError: shapes that do not fit."""
    true, predicted = np.asarray(true), np.asarray(predicted)
    if true.ndim == 4:
        true, predicted = true[None], predicted[None]
    if true.ndim != 5 or len(true) != len(predicted) or not len(true):
        raise ValueError(f"true has shape {true.shape}, predicted {predicted.shape}, expected N clips each")
    clips = zip(true, predicted, strict=True)
    pairs = [_pair(_images("true", t), _images("predicted", p), context_frames) for t, p in clips]
    pictures = list(_side_by_side(pairs, context_frames, STRIP_SIDE))
    # GIF counts in hundredths of a second: each frame is rounded, the mean is right
    ends = [round(100 * (i + 1) / frames_per_second) for i in range(len(pictures))]
    durations = [10 * (end - begin) for begin, end in zip([0, *ends], ends, strict=False)]
    with replacing(path) as temporary:
        pictures[0].save(temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)


def film_frames(true: ArrayLike, predicted: ArrayLike, *, context_frames: int) -> Iterator[Pixels]:
    """The pictures of `save_gif` for one clip, larger, one after the other: (height,width,3) uint8 for a film.
    ValueError: shapes that do not fit."""
    pair = _pair(_images("true", true), _images("predicted", predicted), context_frames)
    return map(np.asarray, _side_by_side([pair], context_frames, FILM_SIDE))


def flow_film_frames(true_flow: ArrayLike, predicted_flow: ArrayLike, *, context_frames: int) -> Iterator[Pixels]:
    """The pictures of `film_frames` for flow, true_flow (T',2,H,W) and predicted_flow (P,2,H,W), with the colour wheel
    below. The largest true magnitude is fully saturated, as in `save_strip`."""
    scale = _max_flow(true_flow)
    pair = _pair(flow_to_rgb(true_flow, scale), flow_to_rgb(predicted_flow, scale), context_frames)
    return map(np.asarray, _side_by_side([pair], context_frames, FILM_SIDE, scale))


class ContactRow(NamedTuple):
    """One clip of a contact sheet: frames (T,C,H,W) and audio (T,1,F,S) in [0,1], flow (T,2,H,W) in pixels."""

    label: str
    frames: ArrayLike
    audio: ArrayLike
    flow: ArrayLike


def save_contact_sheet(path: str | Path, rows: Sequence[ContactRow], columns: int = 8) -> None:
    """Clips one below another, each as evenly spaced frames with the sound and the flow that belong to them. The sound
    is the frame's spectrogram, drawn as in `save_strip`. The clip's largest flow vector is fully saturated. ValueError:
    no row, shapes that do not fit."""
    if not rows:
        raise ValueError("rows is empty, expected at least one clip")
    font = ImageFont.load_default(TEXT_SIZE)
    blocks = []
    for row in rows:
        images = _images("frames", row.frames)
        _check_shape("audio", row.audio, (len(images), 1, *np.shape(row.audio)[2:]))
        _check_shape("flow", row.flow, (len(images), 2, *images.shape[1:3]))
        height, width = (side - 2 * BORDER for side in _cell_size(images, STRIP_SIDE))
        pictures = (images, height), (_spectrogram_images(row.audio), height // 2), (flow_to_rgb(row.flow), height)
        block, draw = _canvas(GAP + columns * (width + GAP), HEADER + 2 * height + height // 2 + 2 * GAP)
        draw.text((GAP, HEADER // 2), row.label, fill=TEXT, font=font, anchor="lm")
        for column, t in enumerate(sorted({round(i) for i in np.linspace(0, len(images) - 1, columns)})):
            top = HEADER
            for pixels, high in pictures:
                picture = Image.fromarray(pixels[t]).resize((width, high), _NEAREST)
                block.paste(picture, (GAP + column * (width + GAP), top))
                top += high + GAP // 2
        blocks.append(block)
    canvas, _ = _canvas(max(b.width for b in blocks), sum(b.height + GAP for b in blocks))
    top = 0
    for block in blocks:
        canvas.paste(block, (0, top))
        top += block.height + GAP
    with replacing(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)


def save_loss_curves(metrics_jsonl: str | Path, path: str | Path) -> None:
    """Draw a run's losses from its metrics.jsonl, one panel per stage: "loss" and every key that ends with "_loss".
    Records are objects with "stage", "step" and some of those keys. A last line that a kill cut short is left out.
    InputError: another line that is not a JSON object, no loss at all."""
    stages: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for record in read_records(metrics_jsonl):
        for key, value in record.items():
            if key == "loss" or key.endswith("_loss"):
                stages.setdefault(record["stage"], {}).setdefault(key, []).append((record["step"], value))
    if not stages:
        raise InputError(f"{metrics_jsonl} holds no record with a loss")
    figure = _figure(len(stages))
    for axes, (stage, curves) in zip(figure.axes, stages.items(), strict=True):
        for key, points in curves.items():
            steps, values = zip(*points, strict=True)
            # a line of few points is hard to see
            axes.plot(steps, values, label=key, marker="." if len(points) < 50 else None, linewidth=1.2)
        if all(value > 0 for points in curves.values() for _, value in points):
            axes.set_yscale("log")
        axes.set(title=f"stage {stage}", xlabel="step", ylabel="loss")
        axes.legend()
    _save_figure(figure, path)


def save_metric_curves(
    path: str | Path, results: Mapping[str, Any], *, context_frames: int = 0, references: Collection[str] = ()
) -> None:
    """Draw SSIM and PSNR, and AEPE and the position error where some predictor has them, over the frame number;
    `references` are dashed. results: {predictor: scores}, all of clips of the same length. Scores have `ssim`, `psnr`,
    `aepe` and `position_error`, lists of one value per predicted frame (the latter two may be None), as
    `avfast.scoring.metrics.MetricResult` has. ValueError: no results."""
    if not results:
        raise ValueError("results is empty, expected at least one predictor")
    panels: list[tuple[str, dict[str, list[float]]]] = [
        ("SSIM", {name: r.ssim for name, r in results.items()}),
        ("PSNR, dB", {name: r.psnr for name, r in results.items()}),
        ("AEPE, px", {name: r.aepe for name, r in results.items() if r.aepe is not None}),
        ("position error, px", {n: r.position_error for n, r in results.items() if r.position_error is not None}),
    ]
    panels = [(title, curves) for title, curves in panels if curves]
    figure = _figure(len(panels))
    colours = {name: f"C{i % 10}" for i, name in enumerate(results)}
    for axes, (title, curves) in zip(figure.axes, panels, strict=True):
        for name, values in curves.items():
            style: dict[str, Any] = {"linewidth": 1, "linestyle": "--"} if name in references else {"linewidth": 2}
            numbers = range(context_frames + 1, context_frames + len(values) + 1)
            axes.plot(numbers, values, color=colours[name], label=name, marker=".", **style)
        axes.set(title=title, xlabel="frame")
        axes.locator_params(axis="x", integer=True)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    _save_figure(figure, path)


def _images(name: str, frames: ArrayLike) -> Pixels:
    """(T,C,H,W) in [0,1] -> uint8 (T,H,W,3); values that are not finite are black."""
    frames = np.asarray(frames, dtype=np.float64)
    if frames.ndim != 4 or frames.shape[1] not in (1, 3) or 0 in frames.shape:
        raise ValueError(f"{name} has shape {frames.shape}, expected (T, 1 or 3, H, W)")
    pixels = np.rint(255 * np.nan_to_num(frames).clip(0, 1)).astype(np.uint8)
    return np.repeat(pixels, 3 // frames.shape[1], axis=1).transpose(0, 2, 3, 1)


def _pair(true: Pixels, predicted: Pixels, context_frames: int) -> tuple[Pixels, Pixels]:
    """The two clips. Raises ValueError where their sizes or lengths do not fit."""
    total = context_frames + len(predicted)
    if predicted.shape[1:] != true.shape[1:] or not context_frames <= len(true) <= total:
        raise ValueError(
            f"true has {len(true)} frames of {true.shape[1:3]}, predicted {len(predicted)} of {predicted.shape[1:3]}, "
            f"expected one size and {context_frames} to {total} true frames: context_frames is {context_frames}"
        )
    return true, predicted


def _check_shape(name: str, array: ArrayLike, shape: tuple[int, ...]) -> None:
    if np.shape(array) != shape:
        raise ValueError(f"{name} has shape {np.shape(array)}, expected {shape}")


def _spectrogram_images(audio: ArrayLike) -> Pixels:
    """Magnitudes (T,1,F,S) -> uint8 (T,F,S,3), the lowest frequency in the last row, brightness in dB."""
    from matplotlib import colormaps

    magnitude = np.asarray(audio, dtype=np.float64)[:, 0, ::-1]
    # silence has no logarithm: it is drawn at -60 dB
    decibels = 20 * np.log10(np.maximum(magnitude / (magnitude.max() or 1.0), 1e-3))
    return (255 * colormaps["magma"](1 + decibels / 60)[..., :3]).astype(np.uint8)


def _max_flow(flow: ArrayLike) -> float:
    """The largest finite magnitude, 1 if nothing moves."""
    x, y = np.moveaxis(np.nan_to_num(np.asarray(flow, dtype=np.float64), posinf=0, neginf=0), -3, 0)
    return float(np.hypot(x, y).max(initial=0.0)) or 1.0


def _cell_size(images: Pixels, side: int) -> tuple[int, int]:
    """(height, width) of a frame with its border, enlarged by the whole factor that makes the longer side at least
    `side` pixels."""
    h, w = images.shape[1:3]
    factor = max(1, math.ceil(side / max(h, w)))
    return factor * h + 2 * BORDER, factor * w + 2 * BORDER


def _framed(pixels: Pixels, height: int, width: int, colour: tuple[int, int, int]) -> Image.Image:
    """The pixels resized to a cell of this size with a border of this colour."""
    inner = Image.fromarray(pixels).resize((width - 2 * BORDER, height - 2 * BORDER), _NEAREST)
    return ImageOps.expand(inner, BORDER, colour)


def _canvas(width: int, height: int, flow_scale: float | None = None) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture and what draws on it; with a flow scale the colour wheel and its meaning stand below."""
    size = (width, height) if flow_scale is None else (max(width, LEGEND_WIDTH), height + LEGEND)
    canvas = Image.new("RGB", size, BACKGROUND)
    draw, diameter = ImageDraw.Draw(canvas), LEGEND - 2 * GAP
    if flow_scale is not None:
        canvas.paste(Image.fromarray(colour_wheel(diameter)), (GAP, height + GAP))
        text = f"flow: the hue points to where a pixel\ncomes from, full colour {flow_scale:.2g} px"
        middle = (3 * GAP + diameter, height + LEGEND // 2)
        draw.text(middle, text, TEXT, ImageFont.load_default(TEXT_SIZE), anchor="lm")
    return canvas, draw


def _side_by_side(
    pairs: list[tuple[Pixels, Pixels]], context_frames: int, side: int, flow_scale: float | None = None
) -> Iterator[Image.Image]:
    """One picture per frame: a row per pair of clips, true on the left, given or predicted on the right."""
    true, predicted = pairs[0]
    height, width = _cell_size(true, side)
    font = ImageFont.load_default(TEXT_SIZE)
    for t in range(context_frames + len(predicted)):
        given = t < context_frames
        canvas, draw = _canvas(2 * width + 3 * GAP, HEADER + len(pairs) * (height + GAP), flow_scale)
        for column, title in enumerate((f"true {t + 1}", "given" if given else "predicted")):
            draw.text((GAP + column * (width + GAP) + width // 2, HEADER // 2), title, TEXT, font, anchor="mm")
        for row, (true, predicted) in enumerate(pairs):
            top = HEADER + row * (height + GAP)
            if t < len(true):
                canvas.paste(_framed(true[t], height, width, GIVEN if given else FUTURE), (GAP, top))
            else:
                middle = (GAP + width // 2, top + height // 2)
                draw.text(middle, "no frame:\nthe film\nhas ended", FUTURE, font, anchor="mm", align="center")
            shown = true[t] if given else predicted[t - context_frames]
            canvas.paste(_framed(shown, height, width, GIVEN if given else PREDICTED), (width + 2 * GAP, top))
        yield canvas


def _figure(panels: int) -> Figure:
    # without pyplot, which keeps global state and depends on the display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * panels, 4.2), dpi=110, layout="constrained")
    for axes in np.atleast_1d(figure.subplots(1, panels)):
        axes.grid(alpha=0.3)
    return figure


def _save_figure(figure: Figure, path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
