"""The spectrogram against numpy's FFT, written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avfast.data.mmnist import MMNISTConfig, MovingMNIST, mmnist_spectrogram
from avfast.media.spectrogram import SpectrogramConfig, spectrogram

MMNIST = SpectrogramConfig(4400, 440, 44, 22, 22.0)
VIDEO = SpectrogramConfig(22050, 735, 88, 44, 44.0)


def by_numpy(frame, config):
    """One frame's samples -> (F, S): reflect, cut into columns, Hann window, FFT, magnitude."""
    half = config.n_fft // 2
    padded = np.concatenate([frame[half:0:-1], frame, frame[-2 : -half - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(config.n_fft) / config.n_fft)
    starts = range(0, len(padded) - config.n_fft + 1, config.hop)
    columns = [np.abs(np.fft.rfft(window * padded[start : start + config.n_fft])) for start in starts]
    return np.minimum(np.stack(columns, 1) / config.scale, 1)


@pytest.mark.parametrize(("config", "shape"), [(MMNIST, (23, 21)), (VIDEO, (45, 17))])
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
def test_against_numpy(config, shape, dtype):
    samples = np.random.default_rng(0).integers(-32768, 32768, (2, 3, 4 * config.samples_per_frame))
    waveform = torch.from_numpy(samples).to(dtype)
    result = spectrogram(waveform if dtype == torch.int16 else waveform / 32768, config)
    assert config.shape == shape and result.shape == (2, 3, 4, 1, *shape) and result.dtype == torch.float32
    for index in np.ndindex(2, 3):
        for t in range(4):
            frame = samples[index][t * config.samples_per_frame : (t + 1) * config.samples_per_frame] / 32768
            assert np.allclose(result[index][t, 0], by_numpy(frame, config), rtol=1e-5, atol=1e-6)


def test_a_frame_does_not_depend_on_its_neighbours():
    waveform = torch.rand(3 * 440, generator=torch.Generator().manual_seed(0)) * 2 - 1
    changed = waveform.clone()
    changed[:440], changed[880:] = 0, 0
    result, of_changed = spectrogram(waveform, MMNIST), spectrogram(changed, MMNIST)
    assert torch.equal(result[1], of_changed[1])
    assert (of_changed[0] == 0).all() and (of_changed[2] == 0).all() and (result[0] > 0).any()


def test_clamped_at_scale():
    loud = spectrogram(torch.ones(440), SpectrogramConfig(4400, 440, 44, 22, 11.0))
    # a constant's magnitude at frequency 0 is the window's sum, 22
    assert (loud[0, 0, 0] == 1).all()
    assert torch.allclose(spectrogram(torch.ones(440), MMNIST)[0, 0, 0], torch.ones(21))


@pytest.mark.parametrize("tone", ["wrapped", "clean"])
@pytest.mark.parametrize("num_digits", [1, 2])
def test_mmnist_scale_fits_the_training_set(tone, num_digits):
    clips = MovingMNIST(MMNISTConfig(tone=tone, num_digits=num_digits), "train").clips(0, 300)
    result = spectrogram(torch.from_numpy(clips.waveform), mmnist_spectrogram(tone))
    assert result.shape == (300, 30, 1, 23, 21)
    # nothing is clamped, and half the scale would clamp
    assert 0.5 < result.max() < 1 and result.min() >= 0


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(441), r"shape \(441,\): expected \(\.\.\., T \* 440\)"),
        (torch.zeros(2, 0), r"shape \(2, 0\)"),
        (torch.zeros(()), r"shape \(\)"),
        (torch.zeros(440, dtype=torch.int32), "dtype torch.int32"),
    ],
)
def test_bad_waveform(waveform, message):
    with pytest.raises(ValueError, match=message):
        spectrogram(waveform, MMNIST)


def test_bad_config():
    with pytest.raises(ValueError, match="hop is 0, expected above 0"):
        SpectrogramConfig(4400, 440, 44, 0, 1.0)
    with pytest.raises(ValueError, match="n_fft is 44, expected n_fft // 2 below the 22"):
        SpectrogramConfig(4400, 22, 44, 22, 1.0)
