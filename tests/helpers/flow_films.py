"""Films of known motion, and what `avfast flow` makes of them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from avfast.flow import FlowConfig, extract_flow

H, W = 40, 56
# moves per frame, in pixels: exact for whole ones, see the tests of TV-L1
DX, DY = 1, -2


def scene(i: int, h: int = H, w: int = W) -> np.ndarray:
    """A smooth grey texture (h,w) uint8 that has moved i times by (DX, DY): a formula, nothing is interpolated."""
    y, x = np.mgrid[:h, :w]
    y, x = y - DY * i, x - DX * i
    return (
        127 + 36 * (np.sin(0.55 * x + 0.2 * y) + np.sin(0.13 * x - 0.47 * y) + np.sin(0.054 * x + 0.21 * y))
    ).astype(np.uint8)


def film(path: Path, frames: int = 6, h: int = H, w: int = W, times: list[int] | None = None, start: int = 0) -> Path:
    """A lossless film of the scene from move `start` on, at 25 fps or at times in ms."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = h, w, "gray"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(scene(start + i, h, w), format="gray")
            frame.pts, frame.time_base = (i, Fraction(1, 25)) if times is None else (times[i], Fraction(1, 1000))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def extract(*inputs: str | Path, out: Path, **settings: Any) -> dict[str, Any]:
    return extract_flow(FlowConfig(inputs=tuple(map(str, inputs)), out=str(out), **settings))


def marker(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "flow.done.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
