"""Settings of the models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides the model's weights and what they mean."""

    motion: Literal["v", "v+recall", "mme"] = "mme"
    """Motion stage (Table 4): `v` without sound, `v+recall` attends over all audio vectors, `mme` condenses first."""
    refinement: Literal["none", "unet", "unet+context", "car"] = "car"
    """Appearance stage (Table 5); `none` predicts the warped frame."""
    image_channels: Literal[1, 3] = 1
    """Channels of the frames."""
    audio_shape: tuple[int, int] = (23, 21)
    """Frequencies and columns of one frame's spectrogram."""
    convlstm_layers: int = 4
    """Stacked ConvLSTM cells."""
    unet_width: int = 64
    """Channels of the U-Net's first level; the others are 2, 4, 8, 16 times as wide."""
