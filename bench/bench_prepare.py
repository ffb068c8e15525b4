"""Preparing videos: how fast clips are read, and what the flow costs with ours and with OpenCV's TV-L1.

The rival is the same program with OpenCV's TV-L1 at its defaults in place of `tvl1_flow`, as many pairs at a time as
there are threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("av", "tyro"):
    pytest.importorskip(package)
cv2 = pytest.importorskip("cv2")

from avfast.data import preparation as program  # noqa: E402
from avfast.data.film_clips import ClipSettings, iter_clips  # noqa: E402
from avfast.media.spectrogram import spectrogram  # noqa: E402
from avfast.prepare import PrepareConfig, prepare  # noqa: E402

CLIPS = Path(__file__).parents[2] / "shared" / "data" / "clips"


@pytest.fixture
def videos() -> Path:
    if not CLIPS.exists():
        pytest.skip("the clips are not there")
    return CLIPS


def opencv_flow(frames: torch.Tensor, preset: str, threads: int) -> torch.Tensor:
    """As `tvl1_flow(frames)` for (B,T,C,H,W) uint8."""
    grey = [[cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in clip] for clip in frames.permute(0, 1, 3, 4, 2).numpy()]
    flow = np.zeros((*frames.shape[:2], 2, *frames.shape[3:]), np.float32)

    def pair(place: tuple[int, int]) -> None:
        b, t = place
        solver = cv2.optflow.DualTVL1OpticalFlow_create()
        flow[place] = solver.calc(grey[b][t], grey[b][t - 1], None).transpose(2, 0, 1)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(pair, [(b, t) for b in range(frames.shape[0]) for t in range(1, frames.shape[1])]))
    return torch.from_numpy(flow)


@pytest.mark.parametrize("preset", ["chambolle-pock", "fast"])
def bench_flow(
    preset: str, videos: Path, tmp_path: Path, compare: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PrepareConfig(
        inputs=(str(videos / "brush.avi"),), out=str(tmp_path / "set"), workers=1, flow_preset=preset
    )
    real = program.tvl1_flow

    def run(flow: Callable[..., torch.Tensor]) -> None:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        monkeypatch.setattr(program, "tvl1_flow", flow)
        assert prepare(config)["clips"] == 3

    case = f"prepare: 3 clips of 45 frames, 64x64, preset {preset}"
    row = compare(case, lambda: run(real), {"opencv": lambda: run(opencv_flow)}, rounds=3)
    row["clips_per_s"] = 3 / row["ours_s"]


@pytest.mark.parametrize("name", ["brush.avi", "tennis.mp4", "bunny.webm"])
def bench_reading(name: str, videos: Path, compare: Callable[..., dict[str, Any]]) -> None:
    """Decoding, choosing, cropping and shrinking frames, sound and spectrograms; no flow, nothing written."""
    settings, counts = ClipSettings(), []

    def read() -> None:
        clips = list(iter_clips(videos / name, settings, frames=45))
        spectrogram(torch.from_numpy(np.stack([clip.waveform for clip in clips])), settings.spectrogram)
        counts.append(len(clips))

    row = compare(f"prepare: reading {name}", read, {}, rounds=5)
    row["clips_per_s"] = counts[0] / row["ours_s"]
