"""Multimodal MovingMNIST against scalar re-statements of its rules, and against another regeneration's figures."""

from __future__ import annotations

import gzip
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
from PIL import Image
from skimage.metrics import structural_similarity

from avfast.data.digits import draw_digits, load_digits, philox_words, read_idx
from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.data.mmnist_rendering import shrink, sine_table
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


def test_philox_words_are_the_published_generator():
    # Random123's known answer for philox4x64-10 with key and counter 0; the counter is raised before the first block,
    # so that the item before item 0, in modular arithmetic, holds it
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert np.random.Philox(key=0, counter=2**256 - 1).random_raw(4).tolist() == expected
    whole = philox_words(5, 3, 0, 10, 8)
    assert (philox_words(5, 3, 7, 2, 8) == whole[7:9]).all()
    assert len(np.unique(np.stack([whole, philox_words(5, 4, 0, 10, 8), philox_words(6, 3, 0, 10, 8)]))) == 240


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


@needs_mnist
def test_real_splits_share_no_image():
    parts = {split: load_digits(MNIST, split) for split in ("train", "val", "test")}
    assert [len(part.labels) for part in parts.values()] == [55000, 5000, 10000]
    seen = [{image.tobytes() for image in part.images} for part in parts.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    # independently of read_idx: 16 bytes of header, then the images
    raw = gzip.decompress((MNIST / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert raw[16:] == parts["test"].images.tobytes()
    assert set(MovingMNIST(variant(digits=str(MNIST)), "test").clips(0, 100).labels.ravel()) == set(range(10))


def test_drawn_digits_are_distinct_and_like_mnist():
    drawings = {split: draw_digits(0, 4 * k + 3, 0, 600) for k, split in enumerate(("train", "val", "test"))}
    images = np.concatenate([part.images for part in drawings.values()])
    assert len({image.tobytes() for image in images}) == 1800
    assert images.dtype == np.uint8 and (images.max((1, 2)) > 250).all()
    # MNIST: mean 0.1307, standard deviation 0.3081; the mean of 1800 drawings has a standard error of 0.001
    assert abs(images.mean() / 255 - 0.1307) < 0.005 and abs(images.std() / 255 - 0.3081) < 0.01
    inked = images > 127
    rows, columns = inked.any(2).sum(1), inked.any(1).sum(1)
    assert np.maximum(rows, columns).max() <= 21 and np.maximum(rows, columns).min() >= 17
    grid = np.arange(28)
    centre = [(images * axis).sum((1, 2)) / images.sum((1, 2), dtype=float) for axis in (grid[:, None], grid[None])]
    assert abs(np.array(centre) - 13.5).max() < 1


def test_drawn_classes_can_be_told_apart():
    train, test = draw_digits(0, 3, 0, 1000), draw_digits(0, 11, 0, 500)
    means = np.stack([train.images[train.labels == digit].mean(0) for digit in range(10)]).reshape(10, -1)
    distance = ((test.images.reshape(500, 1, -1) - means) ** 2).sum(-1)
    right = distance.argmin(1) == test.labels
    # 0.978 here, every class above 0.91; 0.78 on real MNIST; chance is 0.10
    assert right.mean() > 0.9
    assert all(right[test.labels == digit].mean() > 0.75 for digit in range(10))


def idx(array, magic=8):
    return bytes([0, 0, magic, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_read_idx(tmp_path, compress):
    array = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "file").write_bytes(compress(idx(array)))
    assert (read_idx(tmp_path / "file") == array).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such idx file"),
        (b"", "magic number"),
        (idx(np.zeros((2, 3), np.uint8), magic=13), "magic number 0x00000d02"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], "17 bytes, expected 18"),
        (idx(np.zeros((2, 3), np.uint8)) + b"x", "19 bytes, expected 18"),
        (idx(np.zeros((2, 3), np.uint8))[:7], "7 bytes, expected"),
        (gzip.compress(idx(np.zeros((2, 3), np.uint8)))[:-9], "cannot be read"),
        (b"\x1f\x8bnot gzip", "cannot be read"),
    ],
)
def test_read_idx_says_what_is_wrong(tmp_path, content, message):
    if content is not None:
        (tmp_path / "images").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_idx(tmp_path / "images")
    assert str(tmp_path / "images") in str(error.value) and "\n" not in str(error.value)


def write_digits(folder, count=36, labels=None):
    labels = np.arange(count, dtype=np.uint8) % 10 if labels is None else labels
    images = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).reshape(count, 28, 28)
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{name}-labels.idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_load_digits_splits_the_training_file(tmp_path):
    write_digits(tmp_path)
    train, val, test = (load_digits(tmp_path, split) for split in ("train", "val", "test"))
    assert train.images[:, 0, 0].tolist() == list(range(33)) and val.images[:, 0, 0].tolist() == [33, 34, 35]
    assert test.labels.tolist() == [i % 10 for i in range(36)] and train.labels.tolist() == [i % 10 for i in range(33)]


def test_bad_digit_folders(tmp_path):
    with pytest.raises(InputError, match="no file t10k-images-idx3-ubyte"):
        MovingMNIST(variant(digits=str(tmp_path)), "test")
    write_digits(tmp_path, labels=np.zeros(35, np.uint8))
    with pytest.raises(InputError, match=r"labels of shape \(35,\)"):
        load_digits(tmp_path, "train")
    write_digits(tmp_path, labels=np.full(36, 11, np.uint8))
    with pytest.raises(InputError, match="labels reach 11"):
        load_digits(tmp_path, "train")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"block": True}, "block=True with canvas=48"),
        ({"canvas": 50}, "canvas=50: expected 48 or 64"),
        ({"num_digits": 3}, "num_digits=3"),
        ({"bounce": "none"}, "bounce='none'"),
        ({"tone": "loud"}, "tone='loud'"),
        ({"clip_frames": 1}, "clip_frames=1"),
        ({"data_seed": -1}, "data_seed=-1"),
        ({"train_clips": 0}, "train_clips=0"),
    ],
)
def test_bad_settings(changed, message):
    with pytest.raises(InputError, match=message):
        MovingMNIST(variant(**changed), "train")


def test_bad_split_and_range():
    with pytest.raises(InputError, match="split='all'"):
        MovingMNIST(variant(), "all")
    with pytest.raises(ValueError, match="first=199, count=2"):
        MovingMNIST(variant(), "val").clips(199, 2)
