"""The clip store: round trip, windows, damage, full disks, and the cache of Multimodal MovingMNIST."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.data import mmnist as mmnist_module
from avfast.data import store as store_module
from avfast.data.mmnist import MMNISTConfig, MovingMNIST, mmnist_spectrogram
from avfast.data.store import ClipStore, training_mean_image, write_store
from avfast.errors import InputError
from avfast.files.result_folder import hidden_folder
from avfast.media.spectrogram import spectrogram
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.ui.progress import Progress

SMALL = MMNISTConfig(clip_frames=6, train_clips=40, val_clips=5, test_clips=3)


def made_up(clips=4, frames=6, channels=3, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "frames": rng.integers(0, 256, (clips, frames, channels, size, size), np.uint8),
        "audio": rng.random((clips, frames, 1, 5, 4), np.float32),
        "flow": rng.normal(size=(clips, frames, 2, size, size)).astype(np.float16),
        "waveform": rng.integers(-32768, 32767, (clips, frames * 10)).astype(np.int16),
    }


def pieces(arrays, *sizes):
    first = 0
    for size in sizes:
        yield {name: array[first : first + size] for name, array in arrays.items()}
        first += size


@pytest.fixture
def quick_flow(monkeypatch):
    """Where the flow is beside the point: the frame's mean in x, minus it in y."""

    def stand_in(frames, *, preset, threads=None):
        mean = (frames.float().mean((2, 3, 4), keepdim=True) / 16).expand(*frames.shape[:2], 1, *frames.shape[3:])
        return torch.cat([mean, -mean], 2)

    monkeypatch.setattr(store_module, "tvl1_flow", stand_in)
    monkeypatch.setattr(mmnist_module, "tvl1_flow", stand_in)


def test_round_trip(tmp_path):
    arrays = made_up()
    store = write_store(tmp_path / "deep" / "set", 4, pieces(arrays, 1, 2, 1), {"made": "up", "rate": 10})
    again = ClipStore.open(str(tmp_path / "deep" / "set"))
    for name, array in arrays.items():
        for opened in (store, again):
            assert (getattr(opened, name) == array).all() and getattr(opened, name).dtype == array.dtype
        assert isinstance(getattr(again, name), np.memmap)
    assert again.parameters == {"made": "up", "rate": 10} and len(again) == 4 and again.clip_frames == 6
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set"]
    index = json.loads((tmp_path / "deep" / "set" / "index.json").read_text())
    assert index["arrays"]["flow"] == {"dtype": "<f2", "shape": [4, 6, 2, 16, 16]} and index["version"] == 1


def test_batch_is_the_windows(tmp_path):
    arrays = made_up()
    store = write_store(tmp_path / "set", 4, [arrays], {})
    batch = store.batch([2, 0, 2], torch.tensor([1, 3, 0]), 3)
    for row, (clip, start) in enumerate([(2, 1), (0, 3), (2, 0)]):
        window = slice(start, start + 3)
        assert np.array_equal(batch.frames[row].numpy(), arrays["frames"][clip, window] / np.float32(255))
        assert np.array_equal(batch.audio[row].numpy(), arrays["audio"][clip, window])
        assert np.array_equal(batch.flow[row, 1:].numpy(), arrays["flow"][clip, window][1:].astype(np.float32))
    assert (batch.flow[:, 0] == 0).all() and all(part.dtype == torch.float32 for part in batch[:3])
    # the zeroed first slice is the batch's own, not the store's
    assert (store.flow == arrays["flow"]).all()
    assert batch.waveform is None
    batch = store.batch([2, 0, 2], torch.tensor([1, 3, 0]), 3, waveform=True)
    samples = arrays["waveform"].shape[1] // arrays["frames"].shape[1]
    assert np.array_equal(batch.waveform[1].numpy(), arrays["waveform"][0, 3 * samples : 6 * samples])
    first = batch.first_frames(2)
    assert torch.equal(first.waveform, batch.waveform[:, : 2 * samples]) and torch.equal(first.flow, batch.flow[:, :2])


@pytest.mark.parametrize(
    ("clips", "starts", "length", "message"),
    [
        ([4], [0], 3, "clip 4, start 0, length=3"),
        ([-1], [0], 3, "clip -1"),
        ([0], [4], 3, "start 4"),
        ([0], [-1], 3, "start -1"),
        ([0, 1], [0], 3, "2 clips, 1 starts"),
        ([], [], 3, "0 clips"),
        ([0], [0], 0, "length=0"),
    ],
)
def test_bad_windows(tmp_path, clips, starts, length, message):
    store = write_store(tmp_path / "set", 4, [made_up()], {})
    with pytest.raises(ValueError, match=message):
        store.batch(clips, starts, length)


def test_training_mean_image(tmp_path):
    arrays = made_up(clips=5)
    image = training_mean_image(write_store(tmp_path / "set", 5, [arrays], {}))
    assert image.shape == (3, 16, 16) and image.dtype == torch.float32
    assert np.allclose(image, arrays["frames"].astype(np.float64).mean((0, 1)) / 255, rtol=1e-6)


def damage_truncated(folder):
    with open(folder / "flow.npy", "r+b") as file:
        file.truncate(5000)


def damage_header(folder):
    with open(folder / "audio.npy", "r+b") as file:
        file.truncate(20)


def damage_other_array(folder):
    np.save(folder / "frames.npy", np.zeros((4, 6, 3, 16, 17), np.uint8))


def damage_pickle(folder):
    np.save(folder / "frames.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


def rewrite_index(**changes):
    def damage(folder):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(index | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "not a clip store"),
        (lambda folder: (folder / "index.json").unlink(), "not a clip store"),
        (lambda folder: (folder / "index.json").write_text('{"format": "avf'), "not a clip store"),
        (lambda folder: (folder / "index.json").write_text("[]"), "not a clip store"),
        (rewrite_index(format="other"), "not a clip store"),
        (rewrite_index(version=99), "version 99, expected 1"),
        (rewrite_index(arrays={}), "expected frames, and audio or waveform"),
        (lambda folder: (folder / "waveform.npy").unlink(), "waveform.npy: cannot be read"),
        (damage_truncated, "flow.npy: cannot be read"),
        (damage_header, "audio.npy: cannot be read"),
        (damage_other_array, "frames.npy: holds"),
        (damage_pickle, "frames.npy: cannot be read"),
    ],
)
def test_damage_is_found_on_opening(tmp_path, damage, message):
    write_store(tmp_path / "set", 4, [made_up()], {})
    damage(tmp_path / "set")
    with pytest.raises(InputError, match=message) as error:
        ClipStore.open(tmp_path / "set")
    assert str(tmp_path / "set") in str(error.value) and "\n" not in str(error.value)


def test_chunks_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="hold 4 clips: expected 5"):
        write_store(tmp_path / "set", 5, [made_up()], {})
    wrong = made_up() | {"flow": made_up()["flow"].astype(np.float32)}
    with pytest.raises(ValueError, match=r"chunk\['flow'\] is float32"):
        write_store(tmp_path / "set", 4, [wrong], {})
    with pytest.raises(ValueError, match=r"chunk\['frames'\] is uint8 \(4, 6, 3, 8, 8\)"):
        write_store(tmp_path / "set", 8, [made_up(), made_up(size=8)], {})
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # writing past the limit fails with EFBIG, as on a full disk it does with ENOSPC
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(InputError) as error:
            write_store(tmp_path / "set", 40, (made_up(seed=seed) for seed in range(10)), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(error.value) == f"{tmp_path / 'set'}: cannot write the clip store: {os.strerror(errno.EFBIG)}"
    assert not list(tmp_path.iterdir())


def test_unwritable_cache(tmp_path, quick_flow):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write the clip store"):
        SMALL.load("test", cache=tmp_path / "file", flow_preset="fast")
    assert (tmp_path / "file").read_text() == "in the way"


def test_interrupted_build_leaves_nothing_behind(tmp_path, quick_flow, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SMALL.load("train", cache=tmp_path, flow_preset="fast")
    assert not list(tmp_path.iterdir())


def test_the_second_of_two_builders_uses_the_first_ones_store(tmp_path):
    def late():
        write_store(tmp_path / "set", 4, [made_up(seed=1)], {"first": True})
        yield made_up(seed=2)

    store = write_store(tmp_path / "set", 4, late(), {})
    assert store.parameters == {"first": True} and (store.frames == made_up(seed=1)["frames"]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_the_next_build_removes_what_a_killed_one_left(tmp_path):
    code = (
        "import os, sys; from avfast.data.store import write_store\n"
        "write_store(sys.argv[1], 1, (os.kill(os.getpid(), 9) for _ in '1'), {})"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")], cwd=Path(__file__).parents[2])
    (left,) = (path.name for path in tmp_path.iterdir())
    assert killed.returncode == -9 and left.startswith(".avfast-")
    # another machine's locks do not always reach this one, and what has another name is not ours
    others = [left + "x", left.replace(".avfast-", ".set.")]
    for name in others:
        (tmp_path / name).mkdir()
    with hidden_folder(tmp_path / "set") as living:
        write_store(tmp_path / "set", 4, [made_up()], {})
        assert {path.name for path in tmp_path.iterdir()} == {"set", living.name, *others}


def test_what_is_in_the_way_is_kept(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "note").write_text("mine")
    with pytest.raises(InputError, match="not a clip store"):
        write_store(tmp_path / "set", 4, [made_up()], {})
    assert [path.name for path in tmp_path.rglob("*")] == ["set", "note"]


def test_load_with_true_flow(tmp_path):
    config = dataclasses.replace(SMALL, tone="clean")
    store = config.load("test", cache=tmp_path, flow_preset="fast")
    clips = MovingMNIST(config, "test").clips(0, 3)
    assert (store.frames == clips.frames).all() and (store.waveform == clips.waveform).all()
    audio = spectrogram(torch.from_numpy(clips.waveform), mmnist_spectrogram("clean"))
    assert np.allclose(store.audio, audio, atol=1e-6)
    for clip, t in ((0, 1), (2, 5)):
        now, before = (torch.from_numpy(clips.frames[clip, k]) for k in (t, t - 1))
        # float16 keeps 11 bits: 0.004 px at 8 px
        assert np.allclose(store.flow[clip, t], tvl1_flow(now, before, threads=1), atol=0.004)
    assert (store.flow[:, 0] == 0).all() and abs(store.flow[:, 1:]).max() > 1


def test_load_opens_what_it_built(tmp_path, quick_flow, monkeypatch):
    steps = []
    monkeypatch.setattr(Progress, "update", lambda _, *step: steps.append(step))
    built = SMALL.load("train", cache=tmp_path, flow_preset="fast")
    assert steps[-1] == (40, 40) and steps == sorted(steps) and len(steps) > 1
    assert built.folder.parent == tmp_path and built.folder.name.startswith("mmnist-train-")
    assert built.parameters["flow"]["preset"] == "fast" and built.parameters["digits"] == "drawn"
    monkeypatch.setattr(mmnist_module, "write_store", None)
    again = SMALL.load("train", cache=tmp_path, flow_preset="fast")
    assert again.folder == built.folder and (again.flow == built.flow).all()


def test_name_depends_on_what_changes_the_data_only(tmp_path, quick_flow):
    def name(config=SMALL, split="val", preset="fast"):
        return config.load(split, cache=tmp_path, flow_preset=preset).folder.name

    same = dataclasses.replace(SMALL, train_clips=41, test_clips=4)
    assert name(same) == name()
    others = [
        {"canvas": 64}, {"canvas": 64, "block": True}, {"num_digits": 2}, {"bounce": "random"}, {"tone": "clean"},
        {"clip_frames": 7}, {"data_seed": 1}, {"val_clips": 6},
    ]  # fmt: skip
    names = [name(dataclasses.replace(SMALL, **change)) for change in others]
    names += [name(), name(split="test"), name(preset="chambolle-pock")]
    assert len(set(names)) == len(others) + 3


def test_digit_files_count_by_content(tmp_path, quick_flow):
    def idx(array):
        return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()

    def digits(folder, pack, brightness=200, suffix=""):
        folder.mkdir()
        images, labels = np.full((24, 28, 28), brightness, np.uint8), np.arange(24, dtype=np.uint8) % 10
        (folder / f"t10k-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
        (folder / f"t10k-labels-idx1-ubyte{suffix}").write_bytes(pack(idx(labels)))
        config = dataclasses.replace(SMALL, digits=str(folder))
        return config.load("test", cache=tmp_path / "cache", flow_preset="fast").folder.name

    plain = digits(tmp_path / "a", bytes)
    assert digits(tmp_path / "b", gzip.compress, suffix=".gz") == plain
    assert digits(tmp_path / "c", bytes, brightness=100) != plain


def test_unknown_flow_preset(tmp_path):
    with pytest.raises(InputError, match="flow-preset is 'slow', expected one of fast"):
        SMALL.load("test", cache=tmp_path, flow_preset="slow")
