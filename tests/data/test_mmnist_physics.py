"""The physics of Multimodal MovingMNIST against an enumeration of every start, the generator's hidden positions, and
what frames and sound cannot tell."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from avfast.data.mmnist import Clips, MMNISTConfig, MovingMNIST, mmnist_spectrogram
from avfast.data.mmnist_physics import Physics
from avfast.data.store import Batch
from avfast.media.spectrogram import spectrogram
from avfast.scoring.metrics import position_error

K, T = 5, 25


class Made(NamedTuple):
    batch: Batch
    clips: Clips


def made(count: int, frames: int = T, **settings: Any) -> Made:
    config = MMNISTConfig(**settings)
    clips = MovingMNIST(config, "test").clips(0, count)
    waveform = torch.from_numpy(clips.waveform[:, : frames * 440])
    pixels = torch.from_numpy(clips.frames[:, :frames]).float() / 255
    audio = spectrogram(waveform, mmnist_spectrogram(config.tone))
    return Made(Batch(pixels, audio, torch.zeros(count, frames, 2, 48, 48)), clips)


def predicted(batch: Batch, row: str, k: int = K, **settings: Any) -> torch.Tensor:
    return MMNISTConfig(**settings).reference_frames()[row](batch, k)


def errors(batch: Batch, row: str, k: int = K, **settings: Any) -> np.ndarray:
    """Mean position error per predicted frame, px."""
    frames = predicted(batch, row, k, **settings)
    assert frames.shape == batch.frames[:, k:].shape
    return position_error(frames, batch.frames[:, k:]).mean(0).numpy()


SEEN, HEARD = "physics, seen", "physics, seen and heard"


@pytest.fixture(scope="module")
def forty() -> Made:
    return made(40)


def test_what_the_frames_tell(forty: Made) -> None:
    error = errors(forty.batch, SEEN)
    # 1000 clips with MNIST's digits: 0.31, 1.15, 1.66 px
    assert 0.2 < error[0] < 0.5 and 0.8 < error[9] < 1.6 and 1.2 < error[-1] < 2.4


@pytest.mark.parametrize("tone", ["wrapped", "clean"])
def test_what_the_sound_tells(tone: str, forty: Made) -> None:
    batch = forty.batch if tone == "wrapped" else made(40, tone=tone).batch
    error = errors(batch, HEARD, tone=tone)
    assert error.mean() < 0.1 and error.max() < 0.2


def enumerated(seen: np.ndarray, frame: int) -> np.ndarray:
    """Shares (25, 25), y then x from -2, of the whole pixels in a later frame over a grid of all starts whose corners
    in the first frames, truncated, are `seen` (K, 2): by the rules of the generator's documentation."""
    offset = (np.arange(24) + 0.5) / 24
    angle = (np.arange(1500) + 0.5) * (2 * np.pi / 1500)
    x, y, speed, angle = np.meshgrid(seen[0, 0] + offset, seen[0, 1] + offset, np.arange(2, 7), angle, indexing="ij")
    state = np.stack([x, y, speed * np.cos(angle), speed * np.sin(angle)]).reshape(4, -1)
    for t in range(frame + 1):
        if t < len(seen):
            state = state[:, (np.trunc(state[:2]) == seen[t][:, None]).all(0)]
        if t == frame:
            shares = np.zeros((25, 25))
            x, y = np.trunc(state[:2]).astype(int) + 2
            np.add.at(shares, (y, x), 1 / len(x))
            return shares
        for axis in (0, 1):
            ahead = state[axis] + state[axis + 2]
            state[axis + 2][(ahead < -2) | (ahead > 22)] *= -1
            state[axis] += state[axis + 2]
    raise AssertionError


@pytest.mark.parametrize("clip", [0, 1, 4])
def test_seen_shows_the_place_of_least_error_among_all_starts(clip: int, forty: Made) -> None:
    """Clips whose digit lies where its centre of mass says to a tenth of a pixel, so that the corner is known."""
    corners = np.trunc(forty.clips.positions[clip, :, 0]).astype(int)
    given = forty.batch.frames[clip, :, 0].numpy()
    shown = predicted(forty.batch._replace(frames=forty.batch.frames[clip : clip + 1]), SEEN)[0, :, 0].numpy()
    pixels = [(x, y) for y in range(-2, 23) for x in range(-2, 23)]
    for t in (K, 10, 24):
        pasted = [np.roll(given[0], (y - corners[0, 1], x - corners[0, 0]), (0, 1)) for x, y in pixels]
        found = [i for i, frame in enumerate(pasted) if np.array_equal(frame, shown[t - K])]
        shares, columns = enumerated(corners[:K], t), np.arange(-2, 23)
        expected = [(shares * np.hypot(columns - x, columns[:, None] - y)).sum() for x, y in pixels]
        # the least error, or as good as that: the grid has other starts than the particles
        assert len(found) == 1 and expected[found[0]] < 1.02 * min(expected) + 0.02


def test_distances_are_those_of_the_positions_one_frame_later() -> None:
    for tone in ("wrapped", "clean"):
        batch, clips = made(20, 30, tone=tone)
        physics = Physics(mmnist_spectrogram(tone), wrapped=tone == "wrapped", centre=13.5, doubt=0.2)
        heard = physics._distances(batch.audio)[:, :-1]
        true = np.hypot(*np.moveaxis(clips.positions[:, 1:, 0], -1, 0))
        # half a step of the table, and silence from the opposite corner on
        limit = np.inf if tone == "wrapped" else 20 * 2**0.5
        assert abs(heard - np.minimum(true, limit)).max() < 1 / 32


def test_nothing_looks_ahead_and_no_clip_sees_another(forty: Made) -> None:
    batch = Batch(*(part[:10] for part in forty.batch[:3]))
    blind = batch._replace(frames=batch.frames.clone(), audio=torch.zeros_like(batch.audio))
    blind.frames[:, K:] = 0.5
    seen, heard = predicted(batch, SEEN), predicted(batch, HEARD)
    assert torch.equal(predicted(blind, SEEN), seen)
    assert torch.equal(predicted(blind._replace(audio=batch.audio), HEARD), heard)
    for clip in (0, 7):
        alone = Batch(*(part[clip : clip + 1] for part in batch[:3]))
        assert torch.equal(predicted(alone, SEEN)[0], seen[clip])
        assert torch.equal(predicted(alone, HEARD)[0], heard[clip])


def test_more_frames_tell_more(forty: Made) -> None:
    batch = Batch(*(part[:20] for part in forty.batch[:3]))
    last = [errors(batch, SEEN, k)[-1] for k in (2, K, 12)]
    assert last[0] > 4 > last[1] > 1.5 * last[2]
    assert errors(batch, HEARD, 12).mean() < 0.1


def test_frames_that_no_start_explains() -> None:
    frames = torch.rand(2, 8, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    frames[1] = 0
    # a digit that leaps across the canvas and stands still
    frames[0, 1:] = 0
    frames[0, 3:6, 0, 4:9, 40:44] = 1
    batch = Batch(frames, torch.rand(2, 8, 1, 23, 21), torch.zeros(2, 8, 2, 48, 48))
    for row in (SEEN, HEARD):
        out = predicted(batch, row)
        assert out.shape == (2, 3, 1, 48, 48) and out[0].isfinite().all() and not out[1].any()


def test_sets_that_have_no_such_bounds() -> None:
    assert list(MMNISTConfig().reference_frames()) == [SEEN, HEARD] and MMNISTConfig().one_object
    for other in ({"num_digits": 2}, {"bounce": "random"}, {"canvas": 64}, {"canvas": 64, "block": True}):
        config = MMNISTConfig(**other)
        assert not config.reference_frames()
        assert config.one_object == (config.num_digits == 1 and not config.block)
