"""The preset `opencv` of TV-L1 against OpenCV."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest

from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow

MIDDLEBURY = Path(__file__).parents[3] / "shared" / "data" / "middlebury"


def opencv_flow(a: np.ndarray, b: np.ndarray, **settings: float) -> np.ndarray:
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV is built without its contrib part")
    solver = cv2.optflow.DualTVL1OpticalFlow_create()
    for name, value in settings.items():
        getattr(solver, f"set{name}")(value)
    return solver.calc(a, b, None).transpose(2, 0, 1)


# what OpenCV does by default, and with fixed work: epsilon 0, 30 iterations, no median (protocol A)
OPENCV_MODES = pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        (
            {"Epsilon": 0.0, "OuterIterations": 1, "MedianFiltering": 1},
            {"epsilon": 0.0, "outer_iterations": 1, "median": 1},
        ),
        ({"Epsilon": 0.0, "OuterIterations": 2}, {"epsilon": 0.0, "outer_iterations": 2}),
    ],
    ids=["default", "fixed", "fixed-median"],
)


def assert_parity(a: np.ndarray, b: np.ndarray, settings: dict, changes: dict) -> None:
    """OpenCV's own rule: at least 95 % of the pixels within 0.1 px."""
    params = dataclasses.replace(PRESETS["opencv"], **changes)
    apart = np.abs(tvl1_flow(a, b, preset=params).numpy() - opencv_flow(a, b, **settings)).max(0)
    assert (apart <= 0.1).mean() >= 0.95, f"{100 * (apart <= 0.1).mean():.2f} % within 0.1 px"


@OPENCV_MODES
def test_opencv_preset_equals_opencv_on_moving_digits(settings: dict, changes: dict) -> None:
    frames = MovingMNIST(MMNISTConfig(test_clips=4), "test").clips(0, 4).frames[:, :, 0]
    for clip in frames:
        assert_parity(clip[4], clip[3], settings, changes)


@OPENCV_MODES
@pytest.mark.parametrize("name", ["RubberWhale", "Venus", "Grove2", "Urban2"])
@pytest.mark.skipif(not MIDDLEBURY.exists(), reason="the Middlebury pairs are not there")
def test_opencv_preset_equals_opencv_on_middlebury(name: str, settings: dict, changes: dict) -> None:
    """At a third of the size, where OpenCV takes a second; at full size in `make check`."""
    a, b = (cv2.imread(str(MIDDLEBURY / name / f), cv2.IMREAD_GRAYSCALE) for f in ("frame10.png", "frame11.png"))
    a, b = (cv2.resize(image, None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA) for image in (a, b))
    assert_parity(a, b, settings, changes)


@pytest.mark.slow
@OPENCV_MODES
@pytest.mark.parametrize("name", ["RubberWhale", "Venus", "Grove2", "Urban2"])
@pytest.mark.skipif(not MIDDLEBURY.exists(), reason="the Middlebury pairs are not there")
def test_opencv_preset_equals_opencv_at_full_size(name: str, settings: dict, changes: dict) -> None:
    a, b = (cv2.imread(str(MIDDLEBURY / name / f), cv2.IMREAD_GRAYSCALE) for f in ("frame10.png", "frame11.png"))
    assert_parity(a, b, settings, changes)
