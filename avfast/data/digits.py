"""Digit images for Multimodal MovingMNIST: MNIST's idx files, or drawn handwriting-like strokes that need no file.
Everything here is reproducible on any machine: random bits are raw Philox words, and floating point is confined to
IEEE-exact operations (+ - * / sqrt, elementwise or in a fixed order)."""

from __future__ import annotations

import gzip
import math
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avfast.data.base import Split
from avfast.errors import InputError

DIGIT_SIDE = 28


class Digits(NamedTuple):
    """Digit images (N, 28, 28) uint8 and their classes 0..9, (N,) uint8."""

    images: np.ndarray
    labels: np.ndarray


def philox_words(seed: int, stream: int, first: int, count: int, width: int) -> np.ndarray:
    """Raw 64-bit words of items `first` .. `first + count` of a stream: (count, width) uint64, width a multiple of 4.
    The generator is Philox4x64-10 keyed by (seed, stream); an item owns width / 4 consecutive counter values, so it
    does not depend on how many items are drawn, or in which batch."""
    generator = np.random.Philox(key=seed | stream << 64, counter=first * (width // 4))
    return generator.random_raw(count * width).reshape(count, width)


def uniform(words: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits of each word."""
    return (words >> np.uint64(11)) * 2.0**-53


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array of an idx file (the format of MNIST's four files), gzip-compressed or not. Raises InputError,
    one line, for a file that is missing, damaged, or holds anything but unsigned bytes."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as an idx file ({error})") from None
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or not 1 <= data[3] <= 3:
        raise InputError(f"{path}: magic number 0x{data[:4].hex()}, expected 0x000008 and 01, 02 or 03 (idx)")
    offset = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, offset, 4))
    if len(data) != offset + math.prod(shape):
        raise InputError(f"{path}: {len(data)} bytes, expected {offset + math.prod(shape)} for the shape {shape}")
    return np.frombuffer(data, np.uint8, offset=offset).reshape(shape)


def load_digits(folder: str | Path, split: Split) -> Digits:
    """The digits of one split: the first 11/12 of MNIST's training file (55,000) for train, the rest (5,000) for val,
    the test file (10,000) for test. folder holds MNIST's four files, each also accepted with `.gz` or with a dot before
    `idx`. Raises InputError for a file that is missing, damaged, or of another kind."""
    name = "t10k" if split == "test" else "train"
    images, labels = (_find_and_read(Path(folder), f"{name}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
    if images.shape[1:] != (DIGIT_SIDE, DIGIT_SIDE) or labels.shape != images.shape[:1] or len(images) < 12:
        found = f"images of shape {images.shape} with labels of shape {labels.shape}"
        raise InputError(f"{folder}: {name} {found}, expected (N, 28, 28) and (N,), N at least 12")
    if labels.max() > 9:
        raise InputError(f"{folder}: {name} labels reach {labels.max()}, expected classes 0..9")
    held_out = len(images) // 12
    part = {"train": slice(None, -held_out), "val": slice(-held_out, None), "test": slice(None)}[split]
    return Digits(images[part], labels[part])


def _find_and_read(folder: Path, name: str) -> np.ndarray:
    for candidate in (name, name + ".gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / candidate).exists():
            return read_idx(folder / candidate)
    raise InputError(f"digits={folder}: no file {name} or {name}.gz there")


# one shape a line: its class | control points x,y in hundredths, y down, in a box of about 75 x 100 | the strokes
# through them. An index that two strokes share is a corner; a stroke that ends where it starts is a closed curve
_SHAPES = """
0 | 42,0 14,15 0,50 12,86 38,100 64,84 75,48 66,14 | 012345670
1 | 20,0 19,34 20,68 19,100 | 0123
1 | 2,22 24,0 23,50 22,100 | 01 123
2 | 4,22 30,0 62,14 58,44 30,74 0,98 36,96 76,97 | 012345 567
2 | 6,16 36,0 62,20 46,60 16,95 0,84 20,73 48,93 80,90 | 012345678
3 | 4,12 34,0 62,16 52,38 26,48 58,56 70,76 40,100 0,90 | 01234 45678
4 | 12,2 6,28 4,54 36,54 68,48 64,0 61,50 56,100 | 012 234 567
4 | 56,0 28,34 0,66 40,65 78,63 54,50 50,100 | 012 234 056
5 | 74,0 44,3 18,5 14,26 12,44 42,40 64,62 46,94 18,100 0,90 | 012 234 456789
6 | 52,0 24,22 4,58 8,88 34,100 60,84 56,60 32,55 8,80 | 012345678
7 | 0,7 34,5 70,2 50,38 34,70 24,100 | 012 2345
7 | 0,10 34,4 70,2 50,38 34,70 26,100 16,52 64,47 | 012 2345 67
8 | 62,12 36,0 10,16 30,44 56,68 50,94 22,100 6,80 30,48 58,26 | 01234567890
9 | 60,12 34,0 8,16 8,40 34,46 56,30 60,56 54,100 | 0123450 067
9 | 60,14 36,0 8,14 6,38 34,46 56,28 60,62 42,94 12,98 | 0123450 0678
"""
_SPAN_SEGMENTS = 3
_STYLE_WORDS, _POINT_WORDS = 8, 12


class _Pens(NamedTuple):
    """Every shape as a fixed number of line segments: point = sum over 4 control points of basis * control."""

    shapes_of_class: np.ndarray  # (10, 2), a class with one shape names it twice
    controls: np.ndarray  # (shapes, points, 2)
    points: np.ndarray  # (shapes, segments, 2 ends, 4)
    basis: np.ndarray  # (shapes, segments, 2 ends, 4)


@cache
def _pens() -> _Pens:
    steps = [[_catmull_rom(k / _SPAN_SEGMENTS), _catmull_rom((k + 1) / _SPAN_SEGMENTS)] for k in range(_SPAN_SEGMENTS)]
    labels, controls, points, basis = [], [], [], []
    for line in _SHAPES.strip().splitlines():
        label, places, strokes = line.split(" | ")
        labels.append(int(label))
        xy = [[int(number) / 100 for number in place.split(",")] for place in places.split()]
        controls.append(xy + [[0.0, 0.0]] * (_POINT_WORDS - len(xy)))
        spans = []
        for stroke in strokes.split():
            path = [int(index) for index in stroke]
            closed = path[0] == path[-1]
            path = [path[-2 if closed else 0], *path, path[1 if closed else -1]]
            spans += [path[i : i + 4] for i in range(len(path) - 3)]
        points.append([[span, span] for span in spans for _ in steps])
        basis.append([step for _ in spans for step in steps])
    longest = max(map(len, points))
    for of_points, of_basis in zip(points, basis, strict=True):
        # a shape with fewer segments dwells on its last point, which adds neither ink nor length
        missing = longest - len(of_points)
        of_points += of_points[-1:] * missing
        of_basis += [of_basis[-1][1:] * 2] * missing
    return _Pens(
        np.array([(labels.index(digit), len(labels) - 1 - labels[::-1].index(digit)) for digit in range(10)]),
        np.array(controls, np.float32),
        np.array(points),
        np.array(basis, np.float32),
    )


def _catmull_rom(t: float) -> list[float]:
    """The weights of a span's four points, two before and two after it, where t of the span lies behind: a uniform
    Catmull-Rom spline."""
    return [
        0.5 * (-t + 2.0 * t * t - t * t * t),
        0.5 * (2.0 - 5.0 * t * t + 3.0 * t * t * t),
        0.5 * (t + 4.0 * t * t - 3.0 * t * t * t),
        0.5 * (t * t * t - t * t),
    ]


def draw_digits(seed: int, stream: int, first: int, count: int) -> Digits:
    """Drawings `first` .. `first + count` of a stream: handwriting-like digits in MNIST's format, of uniform class.
    Each is a spline through a class's control points, with jitter of every point, slant, aspect and stroke width. As in
    MNIST the ink fits a box of 20 pixels and its centre of mass is the image's centre."""
    # all is float32: a plain number takes the type of the array
    pens = _pens()
    words = philox_words(seed, stream, first, count, _STYLE_WORDS + _POINT_WORDS)
    style = uniform(words[:, :_STYLE_WORDS]).astype(np.float32)
    labels = ((words[:, 0] >> np.uint64(32)) * np.uint64(10) >> np.uint64(32)).astype(np.uint8)
    shape = pens.shapes_of_class[labels, (words[:, 1] >> np.uint64(63)).astype(np.intp)]
    # the two halves of a word move the point's x and y
    halves = np.stack([words[:, _STYLE_WORDS:] >> np.uint64(32), words[:, _STYLE_WORDS:] & np.uint64(0xFFFFFFFF)], -1)
    jitter = (halves * 2.0**-31 - 1.0).astype(np.float32)
    controls = pens.controls[shape] + 0.055 * jitter

    slant, rise, aspect, width, extent = (style[:, 2 + k, None] for k in range(5))
    x = controls[..., 0] * (0.75 + 0.45 * aspect)
    y = controls[..., 1]
    # shear to the right more often than to the left, as handwriting leans
    x, y = x + (0.55 * slant - 0.15) * (1 - y), y + 0.24 * (rise - 0.5) * x
    controls = np.stack([x, y], -1)

    item = np.arange(count)[:, None, None]
    points, basis = pens.points[shape], pens.basis[shape]
    # explicit sum of four: the order of additions is part of the definition
    corner = [basis[..., k, None] * controls[item, points[..., k]] for k in range(4)]
    ends = ((corner[0] + corner[1]) + corner[2]) + corner[3]

    radius = 0.75 + 1.05 * width[:, 0]
    low, high = ends.min((1, 2)), ends.max((1, 2))
    ink_box = 20.0 - 1.5 * extent[:, 0]
    scale = (ink_box - 2 * radius) / (high - low).max(1)
    ends = ends * scale[:, None, None, None]
    delta = ends[:, :, 1] - ends[:, :, 0]
    squared = delta[..., 0] * delta[..., 0] + delta[..., 1] * delta[..., 1]
    length = np.sqrt(squared)
    middle = (ends[:, :, 0] + ends[:, :, 1]) * 0.5 * length[..., None]
    # accumulate is sequential by definition, where sum may add in any order
    mass = np.add.accumulate(length, 1)[:, -1, None]
    centre = np.add.accumulate(middle, 1)[:, -1] / mass
    start = ends[:, :, 0] - centre[:, None] + (DIGIT_SIDE - 1) / 2

    pixel = np.arange(DIGIT_SIDE, dtype=np.float32)
    nearest = np.full((count, DIGIT_SIDE, DIGIT_SIDE), np.inf, np.float32)
    for k in range(start.shape[1]):
        dx, dy = delta[:, k, 0, None], delta[:, k, 1, None]
        px, py = pixel - start[:, k, 0, None], pixel - start[:, k, 1, None]
        # a segment shorter than a thousandth of a pixel is a point
        inverse = 1 / np.maximum(squared[:, k, None], 1e-6)
        along = np.clip((py * dy * inverse)[:, :, None] + (px * dx * inverse)[:, None, :], 0, 1)
        off_x = px[:, None, :] - along * dx[..., None]
        off_y = py[:, :, None] - along * dy[..., None]
        np.minimum(nearest, off_x * off_x + off_y * off_y, out=nearest)
    # the edge falls over 1.2 px: scanned ink is softer than one pixel of anti-aliasing
    ink = np.clip((radius[:, None, None] + 0.6 - np.sqrt(nearest)) / 1.2, 0, 1)
    return Digits((ink * 255 + 0.5).astype(np.uint8), labels)
