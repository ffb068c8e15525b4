"""Per-frame magnitude spectrograms: each frame's own samples, transformed without context from its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from avfast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SpectrogramConfig:
    """How the sound of one frame becomes an image of F = n_fft // 2 + 1 rows and S = 1 + samples_per_frame // hop
    columns. n_fft (the Hann window and the transform) and hop (from column to column) are in samples. `scale` is the
    magnitude that becomes 1, for a waveform in [-1, 1]; larger ones are clamped, n_fft / 2 is never exceeded.

    Multimodal MovingMNIST is 4400 Hz, 440 samples a frame, n_fft 44, hop 22: 23 x 21. Video at 30 frames a second with
    sound at 22050 Hz is 735 samples a frame, n_fft 88, hop 44: 45 x 17.

    Raises InputError when a length is not positive or n_fft // 2 samples cannot be reflected at a frame's ends."""

    sample_rate: int
    samples_per_frame: int
    n_fft: int
    hop: int
    scale: float

    def __post_init__(self) -> None:
        for name in ("sample_rate", "samples_per_frame", "n_fft", "hop", "scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected above 0")
        if self.n_fft // 2 >= self.samples_per_frame:
            most = f"n_fft // 2 below the {self.samples_per_frame} of samples_per_frame"
            raise InputError(f"n_fft is {self.n_fft}, expected {most}")

    @property
    def shape(self) -> tuple[int, int]:
        """(F, S) of one frame."""
        return self.n_fft // 2 + 1, 1 + self.samples_per_frame // self.hop

    def check_waveform(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError unless a waveform of this shape holds whole frames, one at least."""
        samples = self.samples_per_frame
        if not shape or shape[-1] == 0 or shape[-1] % samples:
            multiple = f"(..., T * {samples}), a positive multiple of samples_per_frame={samples}"
            raise ValueError(f"waveform has shape {shape}: expected {multiple}")


def spectrogram(waveform: Tensor, config: SpectrogramConfig) -> Tensor:
    """Magnitude spectrogram of every frame, in [0, 1].

    waveform: (..., T * samples_per_frame), int16 or floating in [-1, 1] (int16 is divided by 32768).
    Returns (..., T, 1, F, S) float32 on the waveform's device: abs(STFT) / scale clamped to 1, with a periodic Hann
    window, columns centred on multiples of `hop`, and each frame padded by reflection of its own samples.

    Raises ValueError for another dtype or for a length that is not a positive multiple of samples_per_frame."""
    # here: SpectrogramConfig serves avfast.runtime too, which works without PyTorch
    import torch

    samples = config.samples_per_frame
    if waveform.dtype != torch.int16 and not waveform.is_floating_point():
        raise ValueError(f"waveform has dtype {waveform.dtype}: expected int16 or a floating type")
    config.check_waveform(tuple(waveform.shape))
    full_scale = 32768.0 if waveform.dtype == torch.int16 else 1.0
    frames = waveform.to(torch.float32).reshape(-1, samples) / full_scale
    window = torch.hann_window(config.n_fft, device=frames.device)
    transform = torch.stft(
        frames, config.n_fft, config.hop, window=window, center=True, pad_mode="reflect", return_complex=True
    )
    shape = (*waveform.shape[:-1], waveform.shape[-1] // samples, 1, *config.shape)
    return (transform.abs() / config.scale).clamp_(max=1.0).reshape(shape)
