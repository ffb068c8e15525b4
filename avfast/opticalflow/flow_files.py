"""Flow in files: .flo, .npy in float16, 8-bit JPEG and PNG, and colours to look at.

Flow is (2,H,W) or (N,2,H,W) in pixels, x then y. N pairs give `flow.npy`, (N,2,H,W) float16, or numbered files, from 1:
`flow_00001.flo`, `flow_x_00001.jpg` and `flow_y_00001.jpg` (or .png), `flow_hsv_00001.png`; or `flow_hsv.mp4`. A folder
of `avfast flow` holds them, and a marker, flow.done.json, that says what they are of."""

from __future__ import annotations

import itertools
import json
import lzma
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from avfast.errors import InputError
from avfast.files.atomic import npy_appender, replacing
from avfast.media.images import Pixels
from avfast.media.video_writer import video_writer
from avfast.ui.plots import flow_to_rgb

Format = Literal["npy", "flo", "jpg", "png", "hsv-png", "hsv-mp4"]
Write = Callable[[np.ndarray, Sequence[float]], None]

MARKER = "flow.done.json"
_FILE_NAME = re.compile(r"flow(\.done\.json|\.npy|_hsv\.mp4|_(x_|y_|hsv_)?\d{5,}\.(flo|jpg|png))")
# a float, 202021.25, whose bytes read PIEH
_FLO_MAGIC = b"PIEH"


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a finished folder; None where there is none. Raises InputError for a damaged one."""
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text())
        if not {"source", "parameters", "formats"} <= marker.keys():
            raise ValueError("keys are missing")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove the folder to have it done again") from None
    return marker


def refuse_foreign_files(folder: Path, out: Path) -> None:
    """Raise InputError where new flow in `folder`, below `out`, would replace files that avfast flow has not written,
    or would lie within the results of another film."""
    for parent in folder.relative_to(out).parents:
        if parent.name and (out / parent / MARKER).exists():
            raise InputError(f"{folder} would lie within the results of another item, {out / parent}")
    if not os.path.lexists(folder):
        return
    names = sorted(os.listdir(folder)) if folder.is_dir() else [""]
    foreign = [name for name in names if not _FILE_NAME.fullmatch(name)]
    if foreign or (names and MARKER not in names):
        what = f"holds {foreign[0]}" if foreign and foreign[0] else "was there before"
        raise InputError(f"{folder} {what}, which avfast flow has not written: choose another --out")


def read_flo(path: str | Path) -> np.ndarray:
    """Flow (2,H,W) float32 from a Middlebury .flo file, plain or .xz; where it is unknown it holds more than 1e9.
    Raises InputError for another kind of file or a truncated one. Source: Baker et al., IJCV 2011."""
    path = Path(path)
    try:
        data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path}: cannot be decompressed: {error}") from None
    if data[:4] != _FLO_MAGIC or len(data) < 12:
        raise InputError(f"{path}: not a .flo file")
    width, height = np.frombuffer(data, "<i4", 2, 4).tolist()
    if width < 1 or height < 1 or len(data) < 12 + 8 * width * height:
        raise InputError(f"{path}: {len(data)} bytes, too few for a .flo file of {width}x{height} pixels")
    flow = np.frombuffer(data, "<f4", 2 * width * height, 12).reshape(height, width, 2)
    return flow.transpose(2, 0, 1).astype(np.float32)


def write_flo(path: str | Path, flow: np.ndarray) -> None:
    """Write flow (2,H,W) as a .flo file. Raises ValueError for another shape."""
    if flow.ndim != 3 or flow.shape[0] != 2:
        raise ValueError(f"flow has shape {flow.shape}, expected (2, H, W)")
    header = _FLO_MAGIC + np.array(flow.shape[:0:-1], "<i4").tobytes()
    with replacing(path) as temporary:
        temporary.write_bytes(header + flow.transpose(1, 2, 0).astype("<f4").tobytes())


def flow_to_bytes(flow: np.ndarray, bound: float) -> Pixels:
    """Flow of any shape as 8 bits: clipped to [-bound, bound] pixels, then linearly to 0..255, rounded."""
    return np.rint((np.clip(flow, -bound, bound) + bound) * (255 / (2 * bound))).astype(np.uint8)


def bytes_to_flow(levels: np.ndarray, bound: float) -> np.ndarray:
    """What `flow_to_bytes` stored, float32: level * 2 * bound / 255 - bound, within bound / 255 pixels of the original.
    No level stands for exactly 0: no motion is stored as 127 or 128 and comes back as -+ bound / 255."""
    return (levels.astype(np.float64) * (2 * bound / 255) - bound).astype(np.float32)


@contextmanager
def flow_writer(folder: Path, formats: Sequence[Format], bound: float, fps: float) -> Iterator[Write]:
    """Write the flow of one film into an existing folder, in several formats at once. The block gets a function
    `write(flow, times)` and calls it with the next pairs: (N,2,H,W) float32 and N times in seconds, all of one H and W.
    Only the last call stays in memory. bound: pixels, for 8 bits and for full colour. fps: of hsv-mp4, see
    `video_writer`."""
    numbers = itertools.count(1)
    with ExitStack() as stack:
        append = stack.enter_context(npy_appender(folder / "flow.npy")) if "npy" in formats else None
        show = stack.enter_context(video_writer(folder / "flow_hsv.mp4", fps)) if "hsv-mp4" in formats else None

        def write(flow: np.ndarray, times: Sequence[float]) -> None:
            if append is not None:
                append(flow.astype("<f2"))
            for pair, time in zip(flow, times, strict=True):
                if show is not None:
                    show(flow_to_rgb(pair, bound), time)
                _write_pair(folder, formats, f"{next(numbers):05d}", pair, bound)

        yield write


def _write_pair(folder: Path, formats: Sequence[Format], number: str, flow: np.ndarray, bound: float) -> None:
    """The files that a pair has for itself."""
    if "flo" in formats:
        write_flo(folder / f"flow_{number}.flo", flow)
    if "hsv-png" in formats:
        _write_picture(folder / f"flow_hsv_{number}.png", flow_to_rgb(flow, bound)[..., ::-1])
    for ending in {"jpg", "png"}.intersection(formats):
        for axis, levels in zip("xy", flow_to_bytes(flow, bound), strict=True):
            _write_picture(folder / f"flow_{axis}_{number}.{ending}", levels)


def _write_picture(path: Path, pixels: Pixels) -> None:
    # cv2.imwrite says nothing of a full disk
    path.write_bytes(cv2.imencode(path.suffix, pixels)[1].tobytes())
