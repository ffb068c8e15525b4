"""The inputs that an export makes with numpy against those that PyTorch makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avfast.deploy import numpy_inputs as signals
from avfast.media import spectrogram as audio
from avfast.media.spectrogram import SpectrogramConfig
from avfast.opticalflow.tvl1 import PRESETS, tvl1_flow

MNIST = SpectrogramConfig(4400, 440, 44, 22, 20.0)


VIDEO = SpectrogramConfig(22050, 735, 88, 44, 44.0)


@pytest.mark.parametrize("config", [MNIST, VIDEO, SpectrogramConfig(8000, 321, 32, 17, 9.0)], ids=str)
@pytest.mark.parametrize("kind", ["int16", "float32", "float64"])
def test_spectrogram_equals_the_torch_one(config: SpectrogramConfig, kind: str):
    wave = np.random.default_rng(0).uniform(-1, 1, (2, 3 * config.samples_per_frame))
    wave = (wave * 32767).astype(np.int16) if kind == "int16" else wave.astype(kind)
    theirs = audio.spectrogram(torch.from_numpy(wave), config).numpy()
    ours = signals.spectrogram(wave, config)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape == (2, 3, 1, *config.shape)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_spectrogram_refuses_what_the_torch_one_refuses():
    with pytest.raises(ValueError, match="expected int16 or a floating type"):
        signals.spectrogram(np.zeros(440, np.int32), MNIST)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., T \* 440\)"):
        signals.spectrogram(np.zeros(441, np.float32), MNIST)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", ["fast", "chambolle-pock", "opencv"])
def test_flow_equals_tvl1_flow_bit_by_bit(channels: int, preset: str):
    pytest.importorskip("avfast._C")
    frames = np.random.default_rng(0).random((2, 3, channels, 32, 48), np.float32)
    ours = signals.backward_flow(frames, vars(PRESETS[preset]))
    np.testing.assert_array_equal(ours, tvl1_flow(frames, preset=preset, backend="cpp").numpy())
