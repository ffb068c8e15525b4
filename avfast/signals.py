"""What the model is fed, as numpy arrays and without PyTorch: spectrograms, TV-L1 flow, and films with their sound.

Each equals its counterpart in `avfast.audio`, `avfast.flow` and `avfast.video`; this is what `avfast.runtime` uses
where nothing but onnxruntime, numpy and av is installed.

Shape legend: B clips, T K frames, C channels, H W pixels, F S the spectrogram of one frame.
"""

from __future__ import annotations

import importlib
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avfast.audio import SpectrogramConfig
from avfast.config import InputError


def spectrogram(waveform: NDArray[Any], config: SpectrogramConfig) -> NDArray[np.float32]:
    """`avfast.audio.spectrogram` of a numpy array: waveform (..., T * samples_per_frame), int16 or floating in [-1, 1]
    -> (..., T, 1, F, S) float32 in [0, 1]. Raises ValueError for another dtype or length."""
    samples, n_fft = config.samples_per_frame, config.n_fft
    if waveform.dtype != np.int16 and waveform.dtype.kind != "f":
        raise ValueError(f"waveform has dtype {waveform.dtype}: expected int16 or a floating type")
    if waveform.ndim == 0 or waveform.shape[-1] == 0 or waveform.shape[-1] % samples:
        raise ValueError(
            f"waveform has shape {waveform.shape}: expected (..., T * {samples}), a positive multiple of "
            f"samples_per_frame={samples}"
        )
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
    engine is not installed.
    """
    engine = _engine()
    fields = dict(params)
    chambolle_pock, opencv = fields.pop("solver") == "chambolle-pock", fields.pop("scheme") == "opencv"
    native = engine.TVL1Params(chambolle_pock=chambolle_pock, opencv=opencv, **fields)
    grey = frames.astype(np.float32) * np.float32(255)
    grey = grey[:, :, 0] if frames.shape[2] == 1 else _luma(grey)
    b, t, h, w = grey.shape
    flow = np.zeros((b, t, 2, h, w), np.float32)
    if t > 1:
        later, earlier = (np.ascontiguousarray(x) for x in (grey[:, 1:], grey[:, :-1]))
        found = np.empty((b, t - 1, 2, h, w), np.float32)
        addresses = (x.ctypes.data for x in (later, earlier, found))
        engine.tvl1_flow(*addresses, b * (t - 1), h, w, native, threads, None)
        flow[:, 1:] = found
    return flow


def _luma(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    red, green, blue = (rgb[..., i, :, :] for i in range(3))
    # plain numbers leave float32 as it is
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _engine() -> Any:
    try:
        return importlib.import_module("avfast._C")
    except ImportError as error:
        raise InputError(
            f"flow is missing, and to compute it avfast._C is needed, which does not load: {error}"
        ) from None


def read_clip(
    path: str | Path, *, size: tuple[int, int], channels: int, sound: SpectrogramConfig, max_frames: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A film as the model wants it: frames (1,T,C,H,W) in [0, 1] at the model's rate, chosen by timestamps and averaged
    down to size (H, W), and the sound (1, T * samples_per_frame) in [-1, 1], mono, from the first frame's time on,
    silence where it ends early.

    max_frames: refuse longer films. Raises InputError for a film that cannot be read, has no sound, or is too long.
    """
    # here: of the parts of avfast that the runtime uses, films alone need av
    from avfast.video import read_video

    rate = Fraction(sound.sample_rate, sound.samples_per_frame)
    frames: list[NDArray[np.float32]] = []
    start = 0.0
    for frame in read_video(path, fps=float(rate)):
        if not frames:
            # read_video gives frame j the time first + j / fps
            start = frame.time or 0.0
        if max_frames is not None and len(frames) == max_frames:
            raise InputError(f"{path}: longer than {max_frames} frames at {float(rate):g} per second, the limit")
        frames.append(_shrink(frame.image, size, channels))
    waveform = _read_sound(path, sound.sample_rate, start, len(frames) * sound.samples_per_frame)
    return np.stack(frames)[None], waveform[None]


def _shrink(image: NDArray[np.uint8], size: tuple[int, int], channels: int) -> NDArray[np.float32]:
    import av

    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    small = frame.reformat(width=size[1], height=size[0], interpolation="AREA", threads=1)
    rgb = small.to_ndarray().astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    return rgb if channels == 3 else _luma(rgb)[None]


def _read_sound(path: str | Path, rate: int, start: float, count: int) -> NDArray[np.float32]:
    """`count` mono samples from the time `start` on, zeros where the file has none."""
    import av
    import av.error

    waveform = np.zeros(count, np.float32)
    found = 0
    try:
        with av.open(f"file:{path}", container_options={"protocol_whitelist": "file"}) as container:
            if not container.streams.audio:
                raise InputError(f"{path}: no sound in it")
            resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
            position = None
            # None at the end: what the resampler still holds
            for frame in chain(container.decode(container.streams.audio[0]), [None]):
                if position is None:
                    if frame is None:
                        break
                    position = round(((frame.time or 0.0) - start) * rate)
                for block in resampler.resample(frame):
                    samples = block.to_ndarray()[0]
                    first, last = max(position, 0), min(position + len(samples), count)
                    if last > first:
                        waveform[first:last] = samples[first - position : last - position]
                        found += last - first
                    position += len(samples)
                if position >= count:
                    break
    except av.error.FFmpegError as error:
        raise InputError(f"{path}: the sound cannot be read: {error.strerror}") from None
    if not found:
        raise InputError(f"{path}: no sound beside its frames")
    return waveform.clip(-1, 1)
