"""Images as arrays: image files as the frames of a film, and resizing. Shapes: H, W the height and width in pixels.
Colour images are (H,W,3) RGB, grey ones (H,W), both uint8."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from avfast.errors import InputError

Pixels = NDArray[np.uint8]
FitMode = Literal["stretch", "crop", "letterbox"]


class Frame(NamedTuple):
    """One frame of a film or of an image folder. image: (H,W,3) RGB, or (H,W) if grey was asked for. number: place in
    the file, from 0; frames chosen at another rate repeat numbers or leave some out. time: the frame's timestamp in
    seconds, or for frames chosen at a rate the time that the frame stands for; None where the file has neither
    timestamps nor a frame rate, or is an image."""

    image: Pixels
    number: int
    time: float | None


def read_images(
    paths: Sequence[str | Path],
    *,
    short_side: int | None = None,
    size: tuple[int, int] | None = None,
    grey: bool = False,
) -> Iterator[Frame]:
    """Image files in the given order as the frames of one film without times; short_side, size and grey are those of
    `avfast.media.video.read_video`. Images are turned upright as their EXIF orientation says, alpha is dropped, 16-bit
    images become their upper 8 bits. Raises InputError, during iteration, for a file that is no image or is truncated,
    and for an image of another size than the first, unless `size` is given."""
    resizer = FrameResizer(short_side, size, grey=grey)
    for number, path in enumerate(paths):
        yield Frame(resizer(_read_image(path), str(path)), number, None)


def _read_image(path: str | Path) -> Pixels:
    """RGB pixels (H,W,3)."""
    from PIL import Image, ImageOps

    # not cv2.imread, which fills the missing half of a truncated JPEG with grey without an error
    try:
        with Image.open(path) as stored:
            image = ImageOps.exif_transpose(stored)
            if image.mode.startswith("I"):
                # Pillow's conversion would clip 16 bits at 255
                grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=2)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise InputError(f"{path}: {reason.replace(f' {str(path)!r}', '')}") from None


def target_size(
    height: int, width: int, short_side: int | None = None, size: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) after resizing to size (width, height), or to a short side with the proportions kept."""
    if size is not None:
        return size[1], size[0]
    if short_side is None:
        return height, width
    scale = short_side / min(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H,W) or (H,W,C), uint8 or float32: area averages where it shrinks, linear where it grows. Without OpenCV
    (`avfast.runtime` does not need it) FFmpeg's area filter resizes, uint8 only."""
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    cv2 = _opencv()
    if cv2 is None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24" if image.ndim == 3 else "gray")
        return frame.reformat(width=width, height=height, interpolation="AREA", threads=1).to_ndarray()
    # shrink first, then grow: OpenCV's area filter takes nearest pixels on both axes as soon as one of them grows
    smaller = min(h, height), min(w, width)
    if smaller != (h, w):
        image = cv2.resize(image, smaller[::-1], interpolation=cv2.INTER_AREA)
    if smaller != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


@dataclass
class FrameResizer:
    """Makes the images of one film into frames of one size, in grey if asked for. Called with an image (H,W,3) and its
    name for errors. Raises InputError where an image has another size than the first one and no `size` is given."""

    short_side: int | None
    size: tuple[int, int] | None
    fit: FitMode = "stretch"
    grey: bool = False
    first: tuple[int, int] | None = None

    def __call__(self, image: Pixels, name: str) -> Pixels:
        h, w = image.shape[:2]
        first_h, first_w = self.first = self.first or (h, w)
        if (h, w) != self.first and self.size is None:
            raise InputError(f"{name} is {w}x{h} pixels, the first one {first_w}x{first_h}: give a size for all")
        if self.grey:
            # before resizing, which then has a third of the work
            image = _to_grey(image)
        height, width = target_size(h, w, self.short_side, self.size)
        if self.fit == "letterbox":
            return _letterbox(image, height, width)
        if self.fit == "crop":
            image = _crop(image, height, width)
        return resize(image, height, width)


def _to_grey(image: Pixels) -> Pixels:
    """BT.601 luma."""
    cv2 = _opencv()
    if cv2 is None:
        return np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.uint8, copy=False)


def _letterbox(image: Pixels, height: int, width: int) -> Pixels:
    """Resized with its proportions, between black bars."""
    h, w = image.shape[:2]
    scale = min(height / h, width / w)
    inner_h, inner_w = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    canvas = np.zeros((height, width, *image.shape[2:]), np.uint8)
    canvas[top : top + inner_h, left : left + inner_w] = resize(image, inner_h, inner_w)
    return canvas


def _crop(image: Pixels, height: int, width: int) -> Pixels:
    """The middle of the image that has the proportions of height x width."""
    h, w = image.shape[:2]
    scale = max(height / h, width / w)
    inner_h, inner_w = min(h, max(1, round(height / scale))), min(w, max(1, round(width / scale)))
    top, left = (h - inner_h) // 2, (w - inner_w) // 2
    return image[top : top + inner_h, left : left + inner_w]


def _opencv() -> Any:
    """The module cv2, or None if it is not installed."""
    try:
        return importlib.import_module("cv2")
    except ImportError:
        return None
