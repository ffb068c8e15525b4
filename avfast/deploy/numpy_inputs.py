"""Model inputs as numpy arrays, made without PyTorch: spectrograms and TV-L1 flow.

Each equals its counterpart in `avfast.media.spectrogram` and `avfast.opticalflow.tvl1`. `avfast.runtime` uses them
where nothing but onnxruntime, numpy and av is installed.

Shape legend: B clips, T K frames, C channels, H W pixels, F S the spectrogram of one frame."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avfast.errors import InputError
from avfast.media.spectrogram import SpectrogramConfig


def spectrogram(waveform: NDArray[Any], config: SpectrogramConfig) -> NDArray[np.float32]:
    """`avfast.media.spectrogram.spectrogram` of numpy: waveform (..., T * samples_per_frame), int16 or floating in
    [-1, 1] -> (..., T, 1, F, S) float32 in [0, 1]. Raises ValueError for another dtype or length."""
    samples, n_fft = config.samples_per_frame, config.n_fft
    if waveform.dtype != np.int16 and waveform.dtype.kind != "f":
        raise ValueError(f"waveform has dtype {waveform.dtype}: expected int16 or a floating type")
    config.check_waveform(waveform.shape)
    frames = waveform.reshape(-1, samples).astype(np.float32)
    if waveform.dtype == np.int16:
        frames /= 32768
    padded = np.pad(frames, ((0, 0), (n_fft // 2, n_fft // 2)), mode="reflect")
    columns = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=1)[:, :: config.hop]
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)
    magnitude = np.abs(np.fft.rfft(columns * window)).swapaxes(1, 2)
    scaled = np.minimum(magnitude / np.float32(config.scale), 1).astype(np.float32)
    return scaled.reshape(*waveform.shape[:-1], -1, 1, *config.shape)


def backward_flow(frames: NDArray[np.float32], params: dict[str, Any], threads: int = 0) -> NDArray[np.float32]:
    """`avfast.tvl1_flow(frames)` of numpy frames (B,T,C,H,W) in [0, 1], C = 1 or 3 -> (B,T,2,H,W), flow[:, 0] = 0.
    params: the fields of a TVL1Params. threads: 0 for as many as there are cores. Raises InputError where the compiled
    engine is not installed."""
    try:
        engine = importlib.import_module("avfast._C")
    except ImportError as error:
        reason = f"flow is missing, and to compute it avfast._C is needed, which does not load: {error}"
        raise InputError(reason) from None
    channels = np.moveaxis(frames.astype(np.float32) * np.float32(255), 2, 0)
    # plain numbers leave float32 as it is
    grey = channels[0] if len(channels) == 1 else 0.299 * channels[0] + 0.587 * channels[1] + 0.114 * channels[2]
    b, t, h, w = grey.shape
    flow = np.zeros((b, t, 2, h, w), np.float32)
    if t > 1:
        later, earlier = (np.ascontiguousarray(x) for x in (grey[:, 1:], grey[:, :-1]))
        found = np.empty((b, t - 1, 2, h, w), np.float32)
        engine.tvl1_flow(
            a=later.ctypes.data, b=earlier.ctypes.data, flow=found.ctypes.data, pairs=b * (t - 1), height=h, width=w,
            params=engine.TVL1Params(**params), uint8=False, threads=threads or os.cpu_count() or 1,
        )  # fmt: skip
        flow[:, 1:] = found
    return flow
