"""Multimodal MovingMNIST against scalar re-statements of its rules, and against another regeneration's figures."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.errors import InputError

MNIST = Path(__file__).parents[3] / "shared" / "data" / "mnist"


needs_mnist = pytest.mark.skipif(not MNIST.exists(), reason="no real MNIST files beside the checkout")


# (canvas, digits, bounce, block): the first 16 hex digits of the SHA-256 of training clips 62..66's frames, wrapped and
# clean waveform (little-endian), which span two chunks
HASHES = {
    (48, 1, "mirror", False): ("1d53f5a7a7437314", "d8ad4b1d0c374b48", "b5466414fc9bca25"),
    (48, 1, "random", False): ("389a66805c0a907a", "cbdc05d577378175", "2d9515bd5007ad23"),
    (48, 2, "mirror", False): ("9705ad242bec55d6", "30b815a3094eda4d", "32fb71614b83c404"),
    (48, 2, "random", False): ("7a9b5fda1e756054", "2ef105435fc268fb", "f335a2b4aab70268"),
    (64, 1, "mirror", False): ("ff065edb2ce0095a", "cfcc017d05886a7c", "4591ac8547e52e9f"),
    (64, 1, "mirror", True): ("d9a8a46c96c48c45", "ea62a6def762b7b9", "9d024b11839cd6ec"),
    (64, 1, "random", False): ("e05e3754f22ab888", "e1f3552a85e24823", "9eaa1b10c14b98d5"),
    (64, 1, "random", True): ("5f2fc68c037120a1", "e1f3552a85e24823", "9eaa1b10c14b98d5"),
    (64, 2, "mirror", False): ("97d672c248089f09", "38bcc32a66824cfe", "1115be2d593368c1"),
    (64, 2, "mirror", True): ("32fce5ffb9d3e0ad", "a9df848e44c29ca4", "6ca65bc656e210c7"),
    (64, 2, "random", False): ("c3b2327de31807b6", "0fb5dec47d974dfd", "611411d0fc3bbcea"),
    (64, 2, "random", True): ("b880b6b5c69c911d", "d30262a51d23b7a8", "4cffc3e120cf4aa9"),
}  # fmt: skip


def variant(canvas=48, num_digits=1, bounce="mirror", block=False, **other):
    return MMNISTConfig(canvas=canvas, num_digits=num_digits, bounce=bounce, block=block, **other)


def sha(array):
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()[:16]


def hashes(key):
    wrapped, clean = (MovingMNIST(variant(*key, tone=tone), "train").clips(62, 4) for tone in ("wrapped", "clean"))
    assert (wrapped.frames == clean.frames).all()
    return sha(wrapped.frames), sha(wrapped.waveform), sha(clean.waveform)


@pytest.mark.parametrize("key", HASHES, ids=str)
def test_every_variant_keeps_its_bytes(key):
    assert hashes(key) == HASHES[key]


def test_hashes_cover_every_variant():
    every = set(itertools.product((48, 64), (1, 2), ("mirror", "random"), (False, True)))
    assert set(HASHES) == {key for key in every if key[0] == 64 or not key[3]}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
def test_bytes_do_not_depend_on_the_instruction_set():
    key = (64, 2, "random", True)
    code = (
        "import hashlib; from avfast.data.mmnist import MMNISTConfig, MovingMNIST\n"
        "c = MovingMNIST(MMNISTConfig(canvas=64, num_digits=2, bounce='random', block=True), 'train').clips(62, 4)\n"
        "print(*(hashlib.sha256(a.tobytes()).hexdigest()[:16] for a in (c.frames, c.waveform)))"
    )
    plain = {
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512CD AVX512_SKX X86_V3 X86_V4",
        "OPENBLAS_CORETYPE": "Prescott",
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | plain | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert tuple(done.stdout.split()) == HASHES[key][:2]


@pytest.mark.parametrize("bounce", ["mirror", "random"])
def test_a_clip_does_not_depend_on_its_batch(bounce):
    config = variant(64, 2, bounce, block=True, clip_frames=14)
    whole = MovingMNIST(config, "train").clips(0, 70)
    shorter = MovingMNIST(variant(64, 2, bounce, block=True, clip_frames=14, train_clips=66), "train")
    for clip in (0, 1, 63, 64, 65):
        for part, of_whole in zip(shorter.clips(clip, 1), whole, strict=True):
            assert (part[0] == of_whole[clip]).all()


def test_splits_and_seeds_differ():
    clips = [MovingMNIST(variant(data_seed=seed), split).clips(0, 40) for split, seed in
             [("train", 0), ("val", 0), ("test", 0), ("train", 1)]]  # fmt: skip
    for a, b in itertools.combinations(clips, 2):
        assert not (a.frames == b.frames).all((1, 2, 3, 4)).any()
        assert not (a.positions == b.positions).any()


def moved(position, velocity, limit, corner):
    """One step of one digit, a coordinate at a time: position, velocity, hit a wall, hit the block's corner."""
    wall = False
    velocity = list(velocity)
    for axis in range(2):
        if not -2 <= position[axis] + velocity[axis] <= limit + 2:
            velocity[axis], wall = -velocity[axis], True
    hit = corner is not None and all(corner[k] <= position[k] + velocity[k] < corner[k] + 32 for k in range(2))
    if hit:
        for axis in range(2):
            if not corner[axis] <= position[axis] < corner[axis] + 32:
                velocity[axis] = -velocity[axis]
    return [p + v for p, v in zip(position, velocity, strict=True)], velocity, wall, hit


@pytest.mark.parametrize(("canvas", "digits", "block"), [(48, 1, False), (64, 2, False), (64, 1, True), (64, 2, True)])
def test_mirror_physics_against_a_scalar_simulation(canvas, digits, block):
    clips = MovingMNIST(variant(canvas, digits, block=block), "val").clips(0, 100)
    limit, hits = canvas - 28, 0
    for clip, digit in itertools.product(range(100), range(digits)):
        path, (x, y, since) = clips.positions[clip, :, digit], clips.block[clip]
        position, velocity = path[1], path[1] - path[0]
        for t in range(1, 29):
            position, velocity, wall, hit = moved(position, velocity, limit, (x, y) if t >= since else None)
            assert np.allclose(position, path[t + 1], atol=1e-9)
            assert (wall, hit) == (clips.wall_bounces[clip, t, digit], clips.block_bounces[clip, t, digit])
            hits += hit
    assert (hits > 0) == block


def test_start_and_speed():
    clips = MovingMNIST(variant(), "train").clips(0, 2000)
    start = clips.positions[:, 0, 0]
    assert start.min() >= 0 and start.max() < 20
    speed = np.hypot(*np.moveaxis(np.diff(clips.positions[:, :, 0], axis=1), -1, 0))
    assert np.allclose(speed, np.rint(speed), atol=1e-6)
    assert (np.ptp(speed.round(), axis=1) == 0).all()
    # 2000 draws from five: 400 +- 18
    assert (abs(np.bincount(speed[:, 0].round().astype(int), minlength=7)[2:] - 400) < 4 * 18).all()
    step = clips.positions[:, 1, 0] - start
    quadrant = np.floor(np.arctan2(step[:, 1], step[:, 0]) / (np.pi / 4)).astype(int) + 4
    # 2000 draws from eight octants: 250 +- 15; a bounce in the first step only exchanges octants
    assert (abs(np.bincount(quadrant, minlength=8) - 250) < 4 * 15).all()


@pytest.mark.parametrize("canvas", [48, 64])
def test_random_bounce_keeps_the_speed_and_leads_back_inside(canvas):
    clips = MovingMNIST(variant(canvas, 2, "random"), "train").clips(0, 300)
    path, bounced = clips.positions, clips.wall_bounces
    assert path.min() >= -2 and path.max() <= canvas - 28 + 2
    step = np.diff(path, axis=1)
    speed = np.hypot(step[..., 0], step[..., 1])
    assert np.allclose(speed, speed[:, :1])
    before, after, hit = step[:, :-1], step[:, 1:], bounced[:, 1:-1]
    assert np.allclose(before[~hit], after[~hit])
    ahead = (path[:, 1:-1] + before)[hit]
    outside = (ahead < -2) | (ahead > canvas - 28 + 2)
    assert outside.any(1).all()
    assert (np.sign(after[hit])[outside] == -np.sign(before[hit])[outside]).all()
    # a mirror would keep the size of both components
    assert np.isclose(abs(after[hit]), abs(before[hit])).all(1).mean() < 0.02
    # directions uniform over a half plane: |cos| of the angle to the wall's normal averages 2 / pi = 0.637, with a
    # standard deviation of 0.308
    single = outside.sum(1) == 1
    cosine = (abs(after[hit]) / np.hypot(*after[hit].T)[:, None])[outside & single[:, None]]
    assert abs(cosine.mean() - 2 / math.pi) < 4 * 0.308 / math.sqrt(len(cosine))


def test_block_appears_with_room_and_keeps_digits_out():
    clips = MovingMNIST(variant(64, 2, "random", block=True), "train").clips(0, 400)
    since = clips.block[:, 2]
    assert since.min() == 11 and (since == 11).mean() > 0.8 and (since < 30).mean() > 0.99
    for path, (x, y, first) in zip(clips.positions, clips.block, strict=True):
        if first < 30:
            assert 12 <= x <= 32 and 12 <= y <= 32
        later = path[first:]
        assert not ((later >= (x, y)) & (later < (x + 32, y + 32))).all(-1).any()
    assert clips.positions.min() >= -2 and clips.positions.max() <= 38


@pytest.mark.parametrize(("canvas", "per_25_frames"), [(48, 5.9), (64, 3.3)])
def test_bounce_rate_displacement_and_reach(canvas, per_25_frames):
    clips = MovingMNIST(variant(canvas), "train").clips(0, 600)
    bounces = clips.wall_bounces[:, 5:, 0].sum(1)
    # the expected figures are of 4000 clips and rounded to 0.1; standard deviation between clips 2.45 (48), 1.42 (64)
    error = bounces.std() * math.sqrt(1 / len(bounces) + 1 / 4000)
    assert abs(bounces.mean() - per_25_frames) < 3 * error + 0.05
    drawn = np.diff(np.trunc(clips.positions[:, :, 0]), axis=1)
    distance = np.hypot(drawn[..., 0], drawn[..., 1])
    # between clips 1.39 px, so 0.05 px for both samples together
    error = distance.mean(1).std() * math.sqrt(1 / len(distance) + 1 / 4000)
    if canvas == 48:
        assert abs(distance.mean() - 3.94) < 3 * error
    assert distance.max() <= 7.25
    assert clips.positions.min() >= -2 and clips.positions.max() <= canvas - 28 + 2


def test_wrapped_amplitude_falls_with_the_distance():
    clips = MovingMNIST(variant(train_clips=4000), "train").clips(0, 2500)
    a = (np.hypot(*np.moveaxis(clips.positions[:, 1:, 0], -1, 0)) / (20 * math.sqrt(2)))[:, :29]
    # between clips 0.16
    assert abs(a.mean() - 0.55) < 3 * a.mean(1).std() / math.sqrt(len(a)) + 0.005
    assert 1.05 < a.max() < 22 / 20
    loudness = abs(clips.waveform.reshape(2500, 30, 440)[:, :29] / 32768.0).mean(-1)
    # the expected figures fit one symbol: |s| averages 0.388 over a frame of symbol 3, 0.400 over those of all digits
    three = (clips.labels == 3) & ~clips.wall_bounces[:, :29, 0]
    for at, expected in ((0.02, 0.99), (0.5, 0.81), (1.0, 0.61)):
        near = abs(a - at) < 0.02
        one = loudness[near & three]
        # half a unit of the last digit, and the spread over the 0.04 wide window
        assert len(one) > 4 and abs(one.mean() - expected) < 0.005 + 3 * one.std() / math.sqrt(len(one))
        assert abs((loudness[near] - (1 - 0.4 * a[near])).mean()) < 0.004


# SSIM and PSNR over frames 6 to 25, 5 seen, of another regeneration of the set. Its sample was not recorded: 300 clips
# for scores and for the training-set mean are assumed (100 or 4000 would move the latter's SSIM by -0.01 or +0.003)
TRIVIAL = {
    48: {
        "black": (0.771, 14.42), "repeat": (0.655, 12.27), "mean of seen": (0.567, 14.17),
        "another clip": (0.636, 11.94), "training mean": (0.363, 14.97),
    },
    64: {
        "black": (0.837, 17.15), "repeat": (0.727, 14.69), "mean of seen": (0.661, 16.22),
        "another clip": (0.713, 14.32), "training mean": (0.412, 17.46),
    },
}  # fmt: skip


@needs_mnist
@pytest.mark.parametrize("canvas", [48, 64])
def test_trivial_predictors_score_as_on_another_regeneration(canvas):
    config = variant(canvas, digits=str(MNIST))
    video = MovingMNIST(config, "test").clips(0, 150).frames[:, :25, 0].astype(np.float32) / 255
    train = MovingMNIST(config, "train").clips(0, 1200).frames[:, :, 0]
    # four means of 300 clips each: their spread is the table's mean image's own sampling error
    means = (train.reshape(4, -1, 48, 48).mean(1) / 255).astype(np.float32)
    seen, true = video[:, :5], video[:, 5::2]
    predictions = {
        "black": np.zeros_like(true),
        "repeat": np.broadcast_to(seen[:, 4:], true.shape),
        "mean of seen": np.broadcast_to(seen.mean(1, keepdims=True), true.shape),
        "another clip": np.roll(true, 1, 0),
    } | {f"training mean {k}": np.broadcast_to(image, true.shape) for k, image in enumerate(means)}

    def score(prediction, stop=None):
        """Per clip; frames reproduced exactly have no PSNR and are left out, as in the table."""
        ssim = [
            [structural_similarity(a, b, win_size=7, data_range=2) for a, b in zip(x, y, strict=True)]
            for x, y in zip(true[:stop], prediction[:stop], strict=True)
        ]
        error = ((true - prediction).astype(np.float64) ** 2).mean((2, 3))
        psnr = -10 * np.log10(np.where(error > 0, error, np.nan))
        return np.mean(ssim, 1), np.nanmean(psnr, 1)

    scores = {name: score(prediction, 60 if "training" in name else None) for name, prediction in predictions.items()}
    for name, expected in TRIVIAL[canvas].items():
        matching = [value for key, value in scores.items() if key.startswith(name)]
        for metric in range(2):
            of_images = [value[metric].mean() for value in matching]
            per_clip = matching[0][metric]
            # 3 standard errors of both samples: the clips' own and, for the mean image, that of the images
            image_variance = np.var(of_images, ddof=1) * (1 + 1 / len(of_images)) if len(of_images) > 1 else 0.0
            error = math.sqrt(per_clip.var() * (1 / len(per_clip) + 1 / 300) + image_variance)
            assert abs(np.mean(of_images) - expected[metric]) < 3 * error, (name, np.mean(of_images), error)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": True}, "canvas is 48 with block, expected 64"),
        ({"canvas": 50}, "canvas is 50, expected one of 48, 64"),
        ({"num_digits": 3}, "num-digits is 3, expected one of 1, 2"),
        ({"bounce": "none"}, "bounce is 'none', expected one of mirror, random"),
        ({"tone": "loud"}, "tone is 'loud', expected one of wrapped, clean"),
        ({"clip_frames": 1}, "clip-frames is 1, expected at least 2"),
        ({"data_seed": -1}, "data-seed is -1, expected at least 0"),
        ({"train_clips": 0}, "train-clips is 0, expected at least 1"),
    ],
)
def test_bad_settings(changed, message):
    with pytest.raises(InputError, match=message):
        MovingMNIST(variant(**changed), "train")


def test_bad_split_and_range():
    with pytest.raises(InputError, match="split is 'all', expected one of"):
        MovingMNIST(variant(), "all")
    with pytest.raises(ValueError, match="first=199, count=2"):
        MovingMNIST(variant(), "val").clips(199, 2)
