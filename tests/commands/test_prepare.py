"""avfast prepare: what a data set holds, how the work is shared out and killed, which files are refused and why."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast import prepare as program
from avfast.cli import main as cli
from avfast.cli.command import EXIT_SOME_FAILED
from avfast.cli.parser import parse
from avfast.data import joining, preparation
from avfast.data.film_clips import ClipSettings, read_clip
from avfast.data.prepared import open_split, verify_dataset
from avfast.errors import InputError
from avfast.media.spectrogram import spectrogram
from avfast.opticalflow.tvl1 import tvl1_flow
from avfast.prepare import PrepareConfig, prepare, split_sources

FRAMES = 8
EXAMPLE = Path(__file__).parents[2] / "examples" / "prepare_datatrove.py"
SMALL = PrepareConfig(clip_frames=FRAMES, clips=ClipSettings(size=(16, 16)), flow_preset="fast", workers=2)


def moving(seed: int, frames: int, side: int = 32) -> np.ndarray:
    """A smooth pattern that wanders, (T,H,W,3)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    phase = rng.uniform(0, 6, 3)
    t = np.arange(frames)[:, None, None]
    planes = [np.sin(0.4 * (x + t) + p) * np.sin(0.3 * (y - t / 2) + p) for p in phase]
    return np.rint(127 + 120 * np.stack(planes, -1)).astype(np.uint8)


@pytest.fixture
def videos(tmp_path: Path, make_film) -> Path:
    """Five good films of two clips and a rest each, in two folders."""
    folder = tmp_path / "videos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a", "b ü", "more/a", "more/c", "d")):
        samples = np.random.default_rng(number).integers(-9000, 9000, 22_050).astype(np.int16)
        make_film(folder / f"{name}.mkv", moving(number, 2 * FRAMES + 3), samples)
    return folder


def config(videos: Path, out: Path, **changes) -> PrepareConfig:
    return replace(SMALL, inputs=(str(videos),), out=str(out), **changes)


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_a_data_set_holds(videos: Path, tmp_path: Path) -> None:
    summary = prepare(config(videos, tmp_path / "set"))
    assert summary["finished"] and summary["splits"] == {"train": 6, "val": 2, "test": 2} and not summary["failed"]
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == [
        "contact.png", "index.json", "prepare.json", "test", "train", "val",
    ]  # fmt: skip
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    assert index["parameters"]["spectrogram"]["samples_per_frame"] == 735
    assert {source["name"] for source in index["sources"]} == {"a", "b ü", "more/a", "more/c", "d"}
    for source in index["sources"]:
        path = videos / f"{source['name']}.mkv"
        assert source["sha256"] == [hashlib.sha256(path.read_bytes()).hexdigest()] and source["clips"] == 2
        store = open_split(tmp_path / "set", source["split"])
        for number in range(2):
            clip = read_clip(path, SMALL.clips, frames=FRAMES, start=number * FRAMES / 30)
            row = source["first"] + number
            np.testing.assert_array_equal(store.frames[row], clip.frames)
            np.testing.assert_array_equal(store.waveform[row], clip.waveform)
            flow = tvl1_flow(torch.from_numpy(clip.frames), preset="fast").numpy()
            np.testing.assert_array_equal(store.flow[row], flow.astype(np.float16))
            batch = store.batch([row], [1], 5)
            audio = spectrogram(torch.from_numpy(clip.waveform), SMALL.clips.spectrogram)[1:6]
            torch.testing.assert_close(batch.audio[0], audio)
    # half the size, half the motion: to the left, so that a frame is found again on the right
    assert np.abs(flow[2:, 0] - 0.5).mean() < 0.05


def test_online_flow_is_the_stored_flow(videos: Path, tmp_path: Path) -> None:
    prepare(config(videos, tmp_path / "stored"))
    prepare(config(videos, tmp_path / "online", flow="online"))
    assert not (tmp_path / "online" / "train" / "flow.npy").exists()
    stored, online = (open_split(tmp_path / name, "train").batch([0, 3], [0, 2], 6) for name in ("stored", "online"))
    torch.testing.assert_close(online.flow, stored.flow, rtol=1e-3, atol=1e-3)
    assert torch.equal(online.frames, stored.frames) and not online.flow[:, 0].any()


@pytest.mark.parametrize("cache", ["ram", "device"])
def test_caches_and_batches_are_the_files(cache: str, videos: Path, tmp_path: Path) -> None:
    prepare(config(videos, tmp_path / "set"))
    store = open_split(tmp_path / "set", "train")
    keys = [(np.array([1, 5]), np.array([0, 2])), (np.array([3, 0]), np.array([1, 1]))]
    cached = store.cached(cache)  # type: ignore[arg-type]
    assert not isinstance(cached.frames, np.memmap)
    for key, batch in zip(keys, cached.batches(keys, 5, torch.device("cpu")), strict=True):
        for part, expected in zip(batch, store.batch(*key, 5), strict=True):
            assert torch.equal(part, expected)


def test_nothing_is_done_twice(videos: Path, tmp_path: Path, monkeypatch) -> None:
    summary = prepare(config(videos, tmp_path / "set"))
    assert (summary["done"], summary["clips"]) == (5, 10)
    before = content(tmp_path / "set")
    monkeypatch.setattr(preparation, "iter_clips", None)
    again = prepare(config(videos, tmp_path / "set"))
    assert (again["done"], again["skipped"]) == (0, 5) and content(tmp_path / "set") == before
    with pytest.raises(InputError, match=r"its videos were others or have changed \(a\)"):
        (videos / "a.mkv").write_bytes(b"")
        prepare(config(videos, tmp_path / "set"))
    (videos / "a.mkv").unlink()
    with pytest.raises(InputError, match="choose another --out"):
        prepare(config(videos, tmp_path / "set"))
    with pytest.raises(InputError, match=r"prepared with fps 30.0, now 15.0: choose another --out"):
        prepare(config(videos, tmp_path / "set", clips=replace(SMALL.clips, fps=15.0)))
    assert content(tmp_path / "set") == before


def test_the_set_may_lie_among_the_videos(videos: Path) -> None:
    assert prepare(config(videos, videos / "set"))["clips"] == 10
    assert prepare(config(videos, videos / "set"))["skipped"] == 5


def test_shards_make_the_same_set(videos: Path, tmp_path: Path) -> None:
    """In any order, and with another number of workers; the last one joins."""
    prepare(config(videos, tmp_path / "whole"))
    for index in (2, 0, 1):
        summary = prepare(config(videos, tmp_path / "shards", shard_index=index, num_shards=3, workers=1))
        assert summary["finished"] == (index == 1)
    assert content(tmp_path / "shards") == content(tmp_path / "whole")


COMMAND = [sys.executable, "-m", "avfast.prepare", "--clip-frames", str(FRAMES), "--size", "16", "16"]
COMMAND += ["--flow-preset", "fast", "--workers", "2"]


def kill_and_finish(videos: Path, tmp_path: Path, delays: list[float]) -> None:
    """Kill a run after each of the delays (from the moment it has begun), then let one end: the same set."""
    prepare(config(videos, tmp_path / "whole"))
    out = tmp_path / "killed"
    command = [*COMMAND, str(videos), "--out", str(out)]
    for delay in delays:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (out / "prepare.json").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert content(out) == content(tmp_path / "whole")


def test_killed_and_gone_on(videos: Path, tmp_path: Path) -> None:
    kill_and_finish(videos, tmp_path, [0.03])


@pytest.mark.slow
def test_killed_ten_times(videos: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    # a run takes three seconds to import and one to work
    kill_and_finish(videos, tmp_path, [rng.uniform(0, 1.0 if i == 0 else 4.5) for i in range(10)])


@pytest.mark.parametrize(
    "step", ["_write_stores", "write_store", "_save_contact_sheet", "_remove_leftovers", "file_digest"]
)
def test_stopped_while_joining(step: str, videos: Path, tmp_path: Path, monkeypatch) -> None:
    """Whatever the step at which joining stops, the next run ends with the same set and reads no video again."""
    prepare(config(videos, tmp_path / "whole"))
    real, calls = getattr(joining, step), 0

    def stops(*args, **kwargs):
        nonlocal calls
        calls += 1
        # the second store; the second file of the first store that is hashed
        if calls == {"write_store": 2, "file_digest": 2}.get(step, 1):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(joining, step, stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(videos, tmp_path / "set"))
    monkeypatch.undo()
    monkeypatch.setattr(preparation, "iter_clips", None)
    assert prepare(config(videos, tmp_path / "set"))["done"] == 0
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_bad_files_are_listed_and_the_rest_is_done(videos: Path, tmp_path: Path, make_film, capsys) -> None:
    noise = np.random.default_rng(0).integers(-9000, 9000, 22_050).astype(np.int16)
    make_film(videos / "mute.mkv", moving(8, 20), None)
    make_film(videos / "one.mkv", moving(8, 1), noise)
    make_film(videos / "short sound.mkv", moving(8, 20), noise[: 735 * 3])
    whole = make_film(tmp_path / "whole.mp4", moving(9, 60), np.tile(noise, 2), codecs=("libx264", "aac"))
    (videos / "cut.mp4").write_bytes(whole.read_bytes()[:-4000])
    (videos / "empty.mp4").touch()
    (videos / "text.mp4").write_text("no film\n" * 300)
    (videos / "stills").mkdir()
    (videos / "stills" / "1.png").touch()
    (videos / "more" / "loop").symlink_to(videos)
    command = [*COMMAND[3:], str(videos), "--out", str(tmp_path / "set")]
    with pytest.raises(SystemExit) as stop:
        cli.run_command(program.main, command)
    assert stop.value.code == EXIT_SOME_FAILED
    lines = {
        line.split(": ", 2)[1]: line.split(": ", 2)[2]
        for line in capsys.readouterr().out.splitlines()
        if "not used:" in line
    }
    reasons = {Path(path).name: reason for path, reason in lines.items()}
    assert reasons.keys() == {
        "mute.mkv", "one.mkv", "short sound.mkv", "cut.mp4", "empty.mp4", "text.mp4", "stills",
    }  # fmt: skip
    assert reasons["mute.mkv"] == "no sound track in it"
    assert reasons["one.mkv"].startswith("too short: ") and reasons["short sound.mkv"].startswith("too short: ")
    assert reasons["stills"] == "a folder of images has no sound track"
    assert all("Invalid data" in reasons[name] for name in ("cut.mp4", "empty.mp4", "text.mp4"))
    index = json.loads((tmp_path / "set" / "index.json").read_text())
    assert {bad["name"] for bad in index["quarantine"]} == {Path(name).stem for name in reasons}
    assert index["splits"]["train"]["clips"] == 6 and verify_dataset(tmp_path / "set") == []


def test_splits_are_by_video_and_leave_none_empty(tmp_path: Path) -> None:
    names = [f"film {i}" for i in range(200)]
    splits = split_sources(names, 0.1, 0.1)
    assert [list(splits.values()).count(s) for s in ("train", "val", "test")] == [160, 20, 20]
    assert split_sources(names[::-1], 0.1, 0.1) == splits
    for count, wanted in ((1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (9, (7, 1, 1))):
        found = list(split_sources(names[:count], 0.1, 0.1).values())
        assert tuple(found.count(s) for s in ("train", "val", "test")) == wanted
    assert set(split_sources(names, 0, 0).values()) == {"train"}


def test_an_empty_split_is_said(videos: Path, tmp_path: Path, capsys) -> None:
    assert cli.run_command(program.main, [*COMMAND[3:], str(videos / "a.mkv"), "--out", str(tmp_path / "set")]) == 0
    out = capsys.readouterr().out
    assert "the val split is empty: too few videos" in out and "the test split is empty" in out
    with pytest.raises(InputError, match="its val split is empty"):
        open_split(tmp_path / "set", "val")


def test_check_finds_damage(videos: Path, tmp_path: Path, capsys) -> None:
    prepare(config(videos, tmp_path / "set"))
    assert cli.run_command(program.main, ["--check", str(tmp_path / "set")]) == 0
    frames, waveform = tmp_path / "set" / "train" / "frames.npy", tmp_path / "set" / "val" / "waveform.npy"
    data = bytearray(frames.read_bytes())
    data[-1] ^= 1
    frames.write_bytes(data)
    waveform.write_bytes(waveform.read_bytes()[:-1])
    (tmp_path / "set" / "test" / "flow.npy").unlink()
    wrong = verify_dataset(tmp_path / "set")
    assert [w for w in wrong if "frames.npy: its content has changed" in w]
    assert [w for w in wrong if "waveform.npy" in w and "expected" in w] and [w for w in wrong if "flow.npy" in w]
    with pytest.raises(SystemExit) as stop:
        cli.run_command(program.main, ["--check", str(tmp_path / "set")])
    assert stop.value.code == 2 and "and" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "DIR is missing"),
        ({"out": None}, "--out is missing"),
        ({"inputs": ("nowhere",)}, "nothing could be done: nowhere: No such file or directory"),
        ({"clip_frames": 1}, "clip-frames is 1, expected at least 2"),
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"shard_index": 3, "num_shards": 3}, "shard-index is 3, expected 0 to 2"),
        ({"test_share": 1.0}, "val-share and test-share are 0.1 and 1.0"),
        ({"flow_preset": "slow"}, "flow-preset is 'slow', expected one of fast"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"clips": ClipSettings(size=(60, 64))}, "size is 60 64, expected multiples of 16"),
    ],
)
def test_settings_that_cannot_work(change: dict, message: str, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        prepare(replace(config(videos, tmp_path / "set"), **change))
    assert not (tmp_path / "set").exists()


def test_a_wrong_backend_is_no_fault_of_the_videos(videos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("AVFAST_BACKEND", "fast")
    with pytest.raises(InputError, match="AVFAST_BACKEND is 'fast', expected one of"):
        prepare(config(videos, tmp_path / "set"))
    assert not (tmp_path / "set").exists()


def test_folders_that_are_in_the_way(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no video and no image in it"):
        prepare(config(tmp_path / "empty", tmp_path / "set"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="was not made by avfast prepare: choose another --out"):
        prepare(config(videos, tmp_path / "foreign"))
    assert content(tmp_path / "foreign") == {"thesis.txt": hashlib.sha256(b"mine").hexdigest()}
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="was not made by avfast prepare"):
        prepare(config(videos, tmp_path / "file"))
    with pytest.raises(NotADirectoryError):
        prepare(config(videos, tmp_path / "file" / "set"))
    prepare(config(videos, tmp_path / "set"))
    for name, newer in (("index.json", "a newer avfast has written it"), ("prepare.json", "version 99, expected 1")):
        path = tmp_path / "set" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
        before = content(tmp_path / "set")
        with pytest.raises(InputError, match=newer):
            prepare(config(videos, tmp_path / "set"))
        assert content(tmp_path / "set") == before
        path.write_text(json.dumps({"format": "avfast-dataset", "version": 1, "splits": {}}))
        with pytest.raises(InputError, match="is damaged"):
            prepare(config(videos, tmp_path / "set"))


def test_nothing_usable_is_an_error(tmp_path: Path, make_film) -> None:
    make_film(tmp_path / "mute.mkv", moving(0, 20), None)
    with pytest.raises(InputError, match="nothing could be done: .*mute.mkv: no sound track in it"):
        prepare(config(tmp_path / "mute.mkv", tmp_path / "set"))
    # other settings are not held against what these have not made
    with pytest.raises(InputError, match="nothing could be done: .*mute.mkv: no sound track in it"):
        prepare(replace(config(tmp_path / "mute.mkv", tmp_path / "set"), clip_frames=7))
    assert not list((tmp_path / "set").iterdir())


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/self/ns").exists(), reason="mounts a small disk")
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(videos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mount.returncode:
        pytest.skip("no mounts here")
    try:
        with pytest.raises((InputError, OSError), match="No space left"):
            prepare(config(videos, disk / "set"))
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert prepare(config(videos, disk / "set"))["finished"]
        prepare(config(videos, tmp_path / "whole"))
        assert content(disk / "set") == content(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=False)


def shard_step():
    spec = importlib.util.spec_from_file_location("prepare_datatrove", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.prepare_shard


def test_a_datatrove_task_is_a_shard(videos: Path, tmp_path: Path) -> None:
    for rank in range(3):
        assert list(shard_step()(config(videos, tmp_path / "set"), rank=rank, world_size=3)) == []
    prepare(config(videos, tmp_path / "whole"))
    assert content(tmp_path / "set") == content(tmp_path / "whole")


@pytest.mark.slow
def test_under_datatroves_local_executor(videos: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    command = [sys.executable, EXAMPLE, str(videos), str(tmp_path / "set"), "--tasks", "3", "--workers", "2"]
    command += ["--clip-frames", str(FRAMES)]
    for _ in range(2):
        assert subprocess.run(command, capture_output=True, cwd=tmp_path).returncode == 0
    assert len(list((tmp_path / "set-datatrove" / "completions").iterdir())) == 3
    assert len(open_split(tmp_path / "set", "train")) == 6 and verify_dataset(tmp_path / "set") == []


def test_the_command_is_the_function(videos: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["prepare", str(videos), "--out", str(tmp_path / "set"), *COMMAND[3:]]) == 0
    out = capsys.readouterr().out
    assert "videos: 5 done, 0 finished before, 0 not used" in out and "clips: 6 train, 2 val, 2 test" in out
    parsed = parse(PrepareConfig, prog="p", argv=[str(videos), "--out", "x", *COMMAND[3:]])
    assert replace(parsed, out=None, inputs=()) == SMALL
    shutil.rmtree(tmp_path / "set")
