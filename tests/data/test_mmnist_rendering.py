"""Frames and sound of Multimodal MovingMNIST against Pillow and libm."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from avfast.data.digits import draw_digits
from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.data.mmnist_rendering import shrink, sine_table


def variant(canvas=48, num_digits=1, bounce="mirror", block=False, **other):
    return MMNISTConfig(canvas=canvas, num_digits=num_digits, bounce=bounce, block=block, **other)


@pytest.mark.parametrize(("canvas", "digits", "block"), [(48, 1, False), (48, 2, False), (64, 1, False), (64, 2, True)])
def test_frames_against_pasting_with_pillow(canvas, digits, block):
    clips = MovingMNIST(variant(canvas, digits, block=block), "test").clips(0, 6)
    drawings = draw_digits(0, 11, 0, 6 * digits)
    assert (drawings.labels.reshape(6, digits) == clips.labels).all()
    for clip, t in itertools.product(range(6), range(30)):
        image = np.zeros((canvas + 80, canvas + 80), int)
        for digit in range(digits):
            x, y = (40 + math.trunc(p) for p in clips.positions[clip, t, digit])
            image[y : y + 28, x : x + 28] += drawings.images[clip * digits + digit]
        image = image[40 : 40 + canvas, 40 : 40 + canvas].clip(0, 255).astype(np.uint8)
        x, y, since = clips.block[clip]
        if block and t >= since:
            image[y : y + 32, x : x + 32] = 255
        if canvas == 64:
            image = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.LANCZOS))
        expected = np.floor(image / image.max() * 255 + 0.5)
        assert (clips.frames[clip, t, 0] == expected).all()


def test_every_frame_reaches_full_intensity():
    for canvas in (48, 64):
        assert (MovingMNIST(variant(canvas), "val").clips(0, 50).frames.max((2, 3, 4)) == 255).all()


def test_shrink_is_pillows_lanczos():
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64), np.uint8)
    noise[0], noise[1] = 0, 255
    expected = [np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.LANCZOS)) for image in noise]
    assert (shrink(noise) == np.stack(expected)).all()


@pytest.mark.parametrize("n", [48, 440, 16384])
def test_sine_table(n):
    assert (sine_table(n) == np.rint(2.0**30 * np.sin(2 * np.pi * np.arange(n) / n))).all()


@pytest.mark.parametrize("tone", ["wrapped", "clean"])
@pytest.mark.parametrize(("canvas", "digits", "block"), [(48, 1, False), (48, 2, False), (64, 2, True)])
def test_sound_against_libm(tone, canvas, digits, block):
    clips = MovingMNIST(variant(canvas, digits, block=block, tone=tone), "test").clips(0, 60)
    time, heard = np.arange(440) / 440, set()
    for clip, t in itertools.product(range(60), range(29)):
        wall, hit = clips.wall_bounces[clip, t].any(), clips.block_bounces[clip, t].any()
        total = 0.0
        for digit in range(digits):
            symbol = 11 if wall and not hit else 12 if hit and not wall else int(clips.labels[clip, digit])
            heard.add(symbol)
            f1, f2 = 16 * 2 ** (symbol // 4), 256 * 2 ** (symbol % 4)
            # the sound of frame t is that of the position drawn in frame t + 1
            a = np.linalg.norm(clips.positions[clip, t + 1, digit]) / (math.sqrt(2) * (canvas - 28))
            sines = (np.sin(2 * np.pi * f1 * time) + np.sin(2 * np.pi * f2 * time)) / 2
            total += 32767 + a * 32767 * sines if tone == "wrapped" else max(0.0, 1 - a) * 32767 * sines
        error = clips.waveform[clip, t * 440 : (t + 1) * 440] - total / digits
        # truncation and rounding stay below 2, around the wrap
        assert (abs((error + 32768) % 65536 - 32768) < 2).all()
    assert {11} < heard and (12 in heard) == block


def test_audio_leads_the_picture_by_one_frame():
    clips = MovingMNIST(variant(tone="clean"), "train").clips(0, 200)
    spectrum = abs(np.fft.rfft(clips.waveform.reshape(200, 30, 440)))
    step = np.diff(clips.positions[:, :, 0], axis=1)
    turn = ~np.isclose(step[:, 1:], step[:, :-1]).all(-1)
    # symbol 11 is 64 and 2048 cycles a frame, and 2048 aliases to 152; of the ten digits' only symbol 8's row is 64 too
    loud = spectrum.max(-1) > 1e5
    both = (spectrum[..., 64] > 0.9 * spectrum.max(-1)) & (spectrum[..., 152] > 0.9 * spectrum.max(-1))
    # frame t sounds the turn that lies between the steps t - 1 -> t and t -> t + 1
    heard, loud = both[:, 1:29], loud[:, 1:29]
    assert loud.mean() > 0.9 and (heard == turn)[loud].all()
    assert 0.15 < turn.mean() < 0.3
