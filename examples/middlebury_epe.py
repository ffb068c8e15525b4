"""Accuracy of TV-L1 on Middlebury's training pairs, beside OpenCV's DualTVL1 at its defaults where it is installed.

    python examples/middlebury_epe.py DIR

DIR holds one folder per pair (vision.middlebury.edu/flow) with frame10.png, frame11.png, and flow10.flo or
flow10.flo.xz. The errors are the end-point error (EPE) in pixels and the angular error (AAE) in degrees. They are means
over all pixels of known flow, occluded ones too (Baker et al., IJCV 2011).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from avfast.opticalflow.flow_files import read_flo
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow


def errors(flow: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """End-point error in pixels and angular error in degrees, means over the known pixels."""
    known = (np.abs(truth) <= 1e9).all(0)
    (u, v), (tu, tv) = flow[:, known].astype(np.float64), truth[:, known].astype(np.float64)
    cosine = (u * tu + v * tv + 1) / np.sqrt((u * u + v * v + 1) * (tu * tu + tv * tv + 1))
    return float(np.hypot(u - tu, v - tv).mean()), float(np.degrees(np.arccos(cosine.clip(-1, 1))).mean())


def opencv_flow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return cv2.optflow.DualTVL1OpticalFlow_create().calc(a, b, None).transpose(2, 0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="folder with one folder per pair")
    folder = parser.parse_args().dir
    truths = sorted([*folder.glob("*/flow10.flo"), *folder.glob("*/flow10.flo.xz")])
    if not truths:
        sys.exit(f"dir is {folder}: no */flow10.flo or */flow10.flo.xz in it")

    # the default arguments bind this round's preset
    methods = {name: lambda a, b, name=name: tvl1_flow(a, b, preset=name).numpy() for name in PRESETS}
    if hasattr(cv2, "optflow"):
        methods["opencv"] = opencv_flow
    print(f"{'EPE px / AAE deg / s':24}" + "".join(f"{name:>24}" for name in methods))
    epes: dict[str, list[float]] = {name: [] for name in methods}
    for path in truths:
        images = [cv2.imread(str(path.parent / name), cv2.IMREAD_GRAYSCALE) for name in ("frame10.png", "frame11.png")]
        if any(image is None for image in images):
            sys.exit(f"{path.parent}: frame10.png or frame11.png is missing or unreadable")
        truth = read_flo(path)
        print(f"{path.parent.name:24}", end="", flush=True)
        for name, method in methods.items():
            start = time.perf_counter()
            flow = method(*images)
            seconds = time.perf_counter() - start
            epe, aae = errors(flow, truth)
            epes[name].append(epe)
            print(f"{f'{epe:.3f} / {aae:.2f} / {seconds:.2f}':>24}", end="", flush=True)
        print()
    print(f"{'mean EPE':24}" + "".join(f"{np.mean(values):24.3f}" for values in epes.values()))


if __name__ == "__main__":
    main()
