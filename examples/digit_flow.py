"""TV-L1 presets as the motion model's target: how far each is from the true motion of the digits of MovingMNIST.

    python examples/digit_flow.py [--digits DIR] [--clips 200] [--films FILM ...]

For drawn digits, or those of MNIST's four files, on a canvas of 48 and of 64 shrunk to 48, and for all, slow and fast
digits (above 4.5 px a frame): the end-point error on the digit (grey level above 30), the share of frames in which its
mean is above 1 px, and the error of the warp in grey levels. The time is the preset's against that of the first one.
For films, at 64x64: the error of the warp.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.kernels import backward_warp
from avfast.media.video import read_video
from avfast.opticalflow.tvl1 import tvl1_flow

FAST = 4.5
NAMES = ("chambolle-pock", "training", "fast", "quality")


def warp_error(frames: torch.Tensor, flow: torch.Tensor) -> float:
    """Mean absolute difference in grey levels between frames 2..T and the warp of those before them."""
    grey = frames.float().mean(2, keepdim=True)
    warped = backward_warp(grey[:, :-1].flatten(0, 1), flow[:, 1:].flatten(0, 1))
    return float((warped - grey[:, 1:].flatten(0, 1)).abs().mean())


def digit_errors(config: MMNISTConfig) -> None:
    source = MovingMNIST(config, "val")
    clips = source.clips(0, len(source))
    frames = torch.from_numpy(clips.frames)
    # corners are drawn on whole pixels of the canvas; frame t(p) is frame t-1(p + flow)
    corners = np.trunc(clips.positions[:, :, 0]) * (frames.shape[-1] / config.canvas)
    truth = torch.from_numpy(corners[:, :-1] - corners[:, 1:]).float()
    speed = truth.norm(dim=-1)
    support = frames[:, 1:, 0] > 30
    first = None
    for name in NAMES:
        start = time.perf_counter()
        flow = tvl1_flow(frames, preset=name)
        seconds = time.perf_counter() - start
        first = first or seconds
        error = (flow[:, 1:] - truth[..., None, None]).norm(dim=2)
        mean = (error * support).sum((-2, -1)) / support.sum((-2, -1)).clamp(min=1)
        cells = [
            f"{mean[which].mean():.3f} {(mean[which] > 1).float().mean():7.1%}"
            for which in (speed >= 0, speed <= FAST, speed > FAST)
        ]
        print(
            f"  {name:16}"
            + "".join(f"{cell:>18}" for cell in cells)
            + f"{warp_error(frames, flow):12.2f}{seconds / first:9.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", help="folder with MNIST's four files; default: drawn digits")
    parser.add_argument("--clips", type=int, default=200, help="validation clips")
    parser.add_argument("--films", nargs="*", default=[], help="films whose first 40 frames are warped")
    args = parser.parse_args()
    print("error on the digit in px, share of frames above 1 px; warp error in grey levels; time")
    print(f"  {'':16}{'all':>18}{'slow':>18}{'fast':>18}{'warp':>12}{'time':>9}")
    for canvas in (48, 64):
        print(f"canvas {canvas}, {'drawn digits' if args.digits is None else 'digits of ' + args.digits}")
        digit_errors(MMNISTConfig(canvas=canvas, digits=args.digits, val_clips=args.clips))
    for film in args.films:
        images = [frame.image for _, frame in zip(range(40), read_video(film, size=(64, 64)), strict=False)]
        frames = torch.from_numpy(np.stack(images)).movedim(-1, 1)[None]
        errors = (f"{name} {warp_error(frames, tvl1_flow(frames, preset=name)):.2f}" for name in NAMES)
        print(f"{film}: warp error {', '.join(errors)}", flush=True)


if __name__ == "__main__":
    main()
