"""TV-L1: against OpenCV and scikit-image at equal work and at their defaults, end-point error beside every time; on
CUDA pairs per second beside the CPU engine's, whose bits are asked for first.

Equal work with OpenCV, as its parameters allow it: protocol A is 5 scales x 5 warps x 30 iterations without a median,
371 full-size iterations; protocol B is 5 x 5 x 300 with 250 medians of 5x5. Images are Middlebury pairs, resized;
OpenCV's time depends on the content, so both always get the same pair.

The limit of an iteration: 51 floating-point operations a pixel (22 multiplications, 26 additions and comparisons, 2
roots and 1 division counted as one each), of which a core can do as many as it does in a matrix product. On CUDA it is
83 instructions (`cuobjdump -sass`: 26 multiplications, 24 additions, 6 multiply-adds, 11 loads and stores, ...), of
which a multiprocessor issues 128 per clock.
"""

from __future__ import annotations

import dataclasses
import lzma
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avfast.kernels.tvl1_reference import level_sizes, warps_of
from avfast.opticalflow.tvl1 import PRESETS, TVL1Params, tvl1_flow

cv2 = pytest.importorskip("cv2")

MIDDLEBURY = Path(__file__).parents[2] / "shared" / "data" / "middlebury"
NAMES = ("RubberWhale", "Venus", "Grove2", "Urban2")
SIZES = [(48, 48), (64, 64), (96, 96), (320, 240), (640, 480), (1280, 720)]
FLOPS = 51
INSTRUCTIONS = 83
OPENCV_TVL1 = pytest.mark.skipif(not hasattr(cv2, "optflow"), reason="this OpenCV is built without its contrib part")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

OPENCV = {
    "default": {},
    "A": {"Epsilon": 0.0, "InnerIterations": 30, "OuterIterations": 1, "MedianFiltering": 1},
    "B": {"Epsilon": 0.0},
}
SAME_WORK = {
    "A": dataclasses.replace(PRESETS["opencv"], epsilon=0.0, outer_iterations=1, median=1),
    "B": dataclasses.replace(PRESETS["opencv"], epsilon=0.0),
}


def pairs(width: int, height: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The four pairs and their true flow (2,H,W), NaN where it is unknown, resized by area average."""
    if not MIDDLEBURY.exists():
        pytest.skip("the Middlebury pairs are not there")
    found = []
    for name in NAMES:
        folder = MIDDLEBURY / name
        a, b = (cv2.imread(str(folder / f), cv2.IMREAD_GRAYSCALE) for f in ("frame10.png", "frame11.png"))
        words = np.frombuffer(lzma.decompress((folder / "flow10.flo.xz").read_bytes()), "<f4")
        truth = words[3:].reshape(*a.shape, 2).copy()
        truth[(np.abs(truth) > 1e9).any(2)] = np.nan
        scale = np.array([width / a.shape[1], height / a.shape[0]], np.float32)
        a, b, truth = (cv2.resize(x, (width, height), interpolation=cv2.INTER_AREA) for x in (a, b, truth))
        found.append((a, b, (truth * scale).transpose(2, 0, 1)))
    return found


def opencv_solver(settings: dict[str, float]) -> Any:
    solver = cv2.optflow.DualTVL1OpticalFlow_create()
    for name, value in settings.items():
        getattr(solver, f"set{name}")(value)
    return solver


def opencv_flow(a: np.ndarray, b: np.ndarray, settings: dict[str, float]) -> np.ndarray:
    # a solver for every call: it keeps the number of scales of the smallest pair it has seen
    return opencv_solver(settings).calc(a, b, None).transpose(2, 0, 1)


def scikit_flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    from skimage.registration import optical_flow_tvl1

    return optical_flow_tvl1(a, b)[::-1]


def end_point_error(flow: np.ndarray, truth: np.ndarray) -> float:
    known = np.isfinite(truth).all(0)
    return float(np.hypot(*(flow - truth)[:, known]).mean())


def core_gflops() -> float:
    """What one core does in a matrix product."""
    x = torch.rand(768, 768)
    best = 1e9
    for _ in range(10):
        began = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best / 1e9


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(request.param)
    cv2.setNumThreads(request.param)
    yield request.param
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


def rounds_for(width: int, height: int, seconds: float) -> int:
    """As many rounds as fit about `seconds`, at 25 us a pixel for OpenCV's default on four pairs."""
    return max(3, min(15, round(seconds / (width * height * 1e-4))))


def calls_for(width: int, height: int, seconds: float) -> int:
    """As many calls of ours for four pairs as take about `seconds`, at 150 ns a pixel."""
    return max(1, round(seconds / (4 * width * height * 1.5e-7)))


@OPENCV_TVL1
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("protocol", ["A", "B"])
def bench_equal_work(compare: Callable, threads: int, protocol: str, width: int, height: int) -> None:
    if protocol == "B" and width > 320:
        pytest.skip("minutes per pair in OpenCV")
    data, settings, params = pairs(width, height), OPENCV[protocol], SAME_WORK[protocol]
    for a, b, _ in data:
        apart = np.abs(tvl1_flow(a, b, preset=params).numpy() - opencv_flow(a, b, settings)).max(0)
        assert (apart <= 0.1).mean() >= 0.95
    error = np.mean([end_point_error(tvl1_flow(a, b, preset=params).numpy(), t) for a, b, t in data])
    row = compare(
        f"equal work {protocol}: {width}x{height}, {threads} threads",
        lambda: [tvl1_flow(a, b, preset=params, threads=threads) for a, b, _ in data],
        {"opencv": lambda: [opencv_flow(a, b, settings) for a, b, _ in data]},
        rounds=rounds_for(width, height, 20 if protocol == "A" else 60),
        ours_calls=calls_for(width, height, 0.1),
        epe=float(error),
    )
    row["ms_per_pair"] = 1e3 * row["ours_s"] / len(data)


@OPENCV_TVL1
@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize(("width", "height"), [(48, 48), (64, 64), (96, 96)])
def bench_equal_work_in_a_batch(compare: Callable, threads: int, width: int, height: int) -> None:
    """Protocol A, 64 pairs a call."""
    data, params = pairs(width, height) * 16, SAME_WORK["A"]
    a, b = (torch.from_numpy(np.stack([d[i] for d in data]))[:, None] for i in (0, 1))
    together = tvl1_flow(a, b, preset=params)
    assert all(torch.equal(together[i], tvl1_flow(*data[i][:2], preset=params)) for i in range(4))
    row = compare(
        f"equal work A, 64 pairs a call: {width}x{height}",
        lambda: tvl1_flow(a, b, preset=params, threads=threads),
        {"opencv": lambda: [opencv_flow(a, b, OPENCV["A"]) for a, b, _ in data]},
        rounds=5,
    )
    row["ms_per_pair"] = 1e3 * row["ours_s"] / len(data)


@OPENCV_TVL1
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "opencv"])
def bench_presets_against_defaults(compare: Callable, threads: int, preset: str, width: int, height: int) -> None:
    data = pairs(width, height)
    errors = {
        "epe": [end_point_error(tvl1_flow(a, b, preset=preset).numpy(), t) for a, b, t in data],
        "opencv_epe": [end_point_error(opencv_flow(a, b, {}), t) for a, b, t in data],
        "skimage_epe": [end_point_error(scikit_flow(a, b), t) for a, b, t in data],
    }
    row = compare(
        f"{preset}: {width}x{height}, {threads} threads",
        lambda: [tvl1_flow(a, b, preset=preset, threads=threads) for a, b, _ in data],
        {
            "opencv": lambda: [opencv_flow(a, b, {}) for a, b, _ in data],
            "skimage": lambda: [scikit_flow(a, b) for a, b, _ in data],
        },
        rounds=rounds_for(width, height, 20),
        ours_calls=calls_for(width, height, 0.1),
        **{name: float(np.mean(values)) for name, values in errors.items()},
    )
    row["ms_per_pair"] = 1e3 * row["ours_s"] / len(data)


@pytest.mark.parametrize(("width", "height"), [(48, 48), (64, 64), (96, 96)])
def bench_batch_on_two_threads(compare: Callable, width: int, height: int) -> None:
    """256 pairs at a time: two threads against one."""
    data = pairs(width, height)
    a, b = (torch.from_numpy(np.stack([d[i] for d in data] * 64))[:, None] for i in (0, 1))
    assert torch.equal(tvl1_flow(a, b, threads=2), tvl1_flow(a, b, threads=1))
    row = compare(
        f"batch of 256: {width}x{height}",
        lambda: tvl1_flow(a, b, threads=2),
        {"one_thread": lambda: tvl1_flow(a, b, threads=1)},
        rounds=25,
    )
    row["pairs_per_s"] = 256 / row["ours_s"]


@pytest.mark.parametrize(("width", "height"), SIZES)
def bench_iteration(compare: Callable, width: int, height: int) -> None:
    """One iteration alone, from the difference of 300 and 100: its share of the core's limit."""
    a, b, _ = pairs(width, height)[0]
    gflops = core_gflops()
    short, long = (TVL1Params(scales=1, warps=1, iterations=n, median=1) for n in (100, 300))
    row = compare(
        f"iteration: {width}x{height}",
        lambda: tvl1_flow(a, b, preset=long, threads=1),
        {"short": lambda: tvl1_flow(a, b, preset=short, threads=1)},
        rounds=7,
    )
    seconds = (row["ours_s"] - row["short_s"]) / 200
    row["ns_per_px"] = 1e9 * seconds / (width * height)
    row["share_of_limit"] = FLOPS * width * height / seconds / 1e9 / gflops


def full_size_iterations(width: int, height: int, params: TVL1Params) -> float:
    """Iterations of all levels, in iterations of the finest."""
    sizes = level_sizes(height, width, params)
    work = sum(warps_of(i, len(sizes), params) * math.prod(size) for i, size in enumerate(sizes))
    return params.outer_iterations * params.iterations * work / (width * height)


@CUDA
@pytest.mark.parametrize("batch", ["one", "many"])
@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("preset", ["fast", "quality", "chambolle-pock"])
def bench_cuda(compare: Callable, preset: str, width: int, height: int, batch: str) -> None:
    """One pair, or as many as have 2^24 pixels."""
    data = pairs(width, height)
    a, b = (torch.from_numpy(np.stack([d[i] for d in data]))[:, None] for i in (0, 1))
    assert torch.equal(tvl1_flow(a.cuda(), b.cuda(), preset=preset).cpu(), tvl1_flow(a, b, preset=preset))
    count = 1 if batch == "one" else max(1, 2**22 // (width * height)) * 4
    on_gpu = [x.cuda().repeat(-(-count // 4), 1, 1, 1)[:count] for x in (a, b)]
    # the CPU engine with a pair or more for every thread
    rows = -(-torch.get_num_threads() // 4)
    on_cpu = [x.repeat(rows, 1, 1, 1) for x in (a, b)]
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        tvl1_flow(*on_cpu, preset=preset)
        seconds.append(time.perf_counter() - began)
    row = compare(
        f"cuda {preset}: {count} of {width}x{height}", lambda: tvl1_flow(*on_gpu, preset=preset), {}, rounds=9
    )
    row["pairs_per_s"] = count / row["ours_s"]
    row |= {"cpu_pairs_per_s": 4 * rows / statistics.median(seconds), "cpu_threads": torch.get_num_threads()}
    clock = subprocess.run(
        ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"], capture_output=True, text=True
    ).stdout.split()
    if clock and preset != "chambolle-pock":
        limit = torch.cuda.get_device_properties(0).multi_processor_count * 128 * float(clock[0]) * 1e6 / INSTRUCTIONS
        done = row["pairs_per_s"] * width * height * full_size_iterations(width, height, PRESETS[preset])
        row["share_of_limit"] = done / limit
