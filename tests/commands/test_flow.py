"""`avfast flow`: what is skipped and done again, how it is killed, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from flow_films import DX, H, W, extract, film, marker, scene, tree
from PIL import Image

from avfast import flow as program
from avfast.cli import main as cli
from avfast.cli.parser import parse
from avfast.errors import InputError
from avfast.files.result_folder import ResultFolder
from avfast.flow import FlowConfig
from avfast.opticalflow import flow_pipeline
from avfast.opticalflow.flow_files import bytes_to_flow
from avfast.opticalflow.tvl1 import tvl1_flow


def pictures(folder: Path, frames: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(frames):
        # without leading zeros: 10 comes after 9
        Image.fromarray(scene(i)).save(folder / f"frame{i + 8}.png")
    return folder


def broken(folder: Path) -> dict[str, str]:
    """Inputs that cannot be done, by name, with the reason."""
    (folder / "text.mp4").write_text("no film")
    (folder / "empty").mkdir()
    pictures(folder / "single", 1)
    pictures(folder / "damaged")
    (folder / "damaged" / "frame9.png").write_bytes((folder / "damaged" / "frame9.png").read_bytes()[:200])
    whole = film(folder / "cut.mkv", 60, 16, 16)
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    film(folder / "short.mkv", 1)
    with av.open(str(folder / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "text.mp4": "Invalid data found",
        "empty": "no video and no image in it",
        "single": "1 frames, expected at least 2 for a pair",
        "damaged": "frame9.png: ",
        "cut.mkv": "truncated, it ends after",
        "short.mkv": "1 frames, expected",
        "sound.m4a": "no video stream in it",
        "none.mp4": "No such file",
        "n*ne.mp4": "it matches no video and no image",
    }


def test_what_cannot_be_read_is_listed_and_the_rest_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = broken(tmp_path)
    film(tmp_path / "good.mkv")
    monkeypatch.setattr(flow_pipeline, "_BATCH_BYTES", 8 * 16 * 16)
    inputs = [str(tmp_path / name) for name in [*reasons, "good.mkv"]]
    with pytest.raises(SystemExit) as stop:
        program.main([*inputs, "--out", str(tmp_path / "o"), "--format", "npy", "hsv-mp4"])
    assert stop.value.code == 3
    failed = {entry["input"]: entry["reason"] for entry in json.loads((tmp_path / "o" / "failed.json").read_text())}
    assert failed.keys() == {str(tmp_path / name) for name in reasons}
    printed = capsys.readouterr().out
    for name, reason in reasons.items():
        found = failed[str(tmp_path / name)]
        assert reason in found and "\n" not in found and f"failed: {tmp_path / name}: {found}" in printed
    assert "1 done, 0 finished before, 9 failed" in printed
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["failed.json", "good"]
    # mended, there is nothing left to list
    film(tmp_path / "text.mp4")
    summary = extract(tmp_path / "text.mp4", tmp_path / "good.mkv", out=tmp_path / "o", format=("npy", "hsv-mp4"))
    assert (summary["done"], summary["skipped"], summary["failed"]) == (1, 1, [])
    assert not (tmp_path / "o" / "failed.json").exists()


def test_nothing_could_be_done(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing could be done: .*none.mp4: No such file or directory, and 1 more$"):
        extract(tmp_path / "none.mp4", tmp_path / "no*.mp4", out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_finished_items_are_skipped_and_changed_ones_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = film(tmp_path / "a.mkv")
    out, done = tmp_path / "o", tmp_path / "o" / "a" / "flow.done.json"

    def run(**settings: Any) -> tuple[int, str]:
        before = done.stat().st_mtime_ns if done.exists() else 0
        summary = extract(path, out=out, **settings)
        assert summary["done"] + summary["skipped"] == 1
        assert (done.stat().st_mtime_ns != before) == bool(summary["done"])
        assert not list(out.glob(".*"))
        return summary["done"], capsys.readouterr().out

    assert run()[0] == 1
    assert run()[0] == 0
    again, said = run(stride=2)
    assert again and "a: done before with stride 1, now 2: done again" in said
    assert np.load(out / "a" / "flow.npy").shape[0] == 4 and run(stride=2)[0] == 0
    # a format more: what is there stays
    again, said = run(stride=2, format=("jpg",))
    assert again and "a: done before without jpg: done again" in said
    assert marker(out / "a")["formats"] == ["npy", "jpg"] and (out / "a" / "flow.npy").exists()
    assert run(stride=2)[0] == run(stride=2, format=("npy",))[0] == 0
    # other parameters: only what is asked for is there afterwards
    assert run(stride=1, format=("png",))[0] == 1
    assert not list((out / "a").glob("*.npy")) and len(list((out / "a").glob("*.png"))) == 10
    film(tmp_path / "a.mkv", 5)
    again, said = run(stride=1, format=("png",))
    assert again and "a: its source has changed since, done again" in said
    assert len(list((out / "a").glob("*.png"))) == 8
    assert run(stride=1, format=("png",), overwrite=True)[0] == 1
    # a folder that was moved as a whole is the same source
    moved = tmp_path / "moved"
    moved.mkdir()
    path = path.rename(moved / "a.mkv")
    assert run(stride=1, format=("png",))[0] == 0


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "o"
    extract(film(tmp_path / "1" / "a.mkv"), out=out)
    first = tree(out)
    film(tmp_path / "2" / "a.mkv", 5)
    with pytest.raises(InputError, match="o/a holds the flow of .*/1/a.mkv: choose another --out, or --overwrite"):
        extract(tmp_path / "2" / "a.mkv", out=out)
    assert {k: v for k, v in tree(out).items() if k != "failed.json"} == first
    # somebody's own file among the results: skipping does no harm, doing it again would
    (out / "a" / "flow_notes.md").write_text("mine")
    assert extract(tmp_path / "1" / "a.mkv", out=out)["skipped"] == 1
    with pytest.raises(InputError, match="o/a holds flow_notes.md, which avfast flow has not written"):
        extract(tmp_path / "1" / "a.mkv", out=out, stride=2)
    assert (out / "a" / "flow_notes.md").read_text() == "mine"
    (out / "b").mkdir()
    (out / "b" / "flow_x_00001.jpg").touch()
    with pytest.raises(InputError, match="o/b was there before, which avfast flow has not written"):
        extract(film(tmp_path / "b.mkv"), out=out)
    film(tmp_path / "3" / "a" / "c.mkv")
    with pytest.raises(InputError, match="o/a/c would lie within the results of another item, .*o/a"):
        extract(tmp_path / "3", out=out)


def test_results_beside_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv")
    pictures(tmp_path / "seq")
    for expected in (2, 0):
        summary = extract(tmp_path, out=tmp_path / "flow", format=("jpg",))
        assert (summary["done"], summary["skipped"]) == (expected, 2 - expected)


# pretends to be stuck in the k-th call, and says so
STUCK = """
import sys, time
from avfast import flow
from avfast.opticalflow import flow_pipeline
calls, solve = 0, flow_pipeline.tvl1_flow
def stuck(*arguments, **settings):
    global calls
    calls += 1
    while calls == int(sys.argv[1]):
        print("stuck", flush=True)
        time.sleep(60)
    return solve(*arguments, **settings)
flow_pipeline.tvl1_flow = stuck
flow_pipeline._BATCH_BYTES = 0
flow.main(sys.argv[2:])
"""


def test_killed_and_continued(tmp_path: Path) -> None:
    """Three films of five pairs, one pair a batch: killed in the middle of the second."""
    for name in ("a", "b", "c"):
        film(tmp_path / "in" / f"{name}.mkv")
    arguments = [str(tmp_path / "in"), "--format", "npy", "flo", "jpg", "hsv-mp4", "--threads", "1", "--out"]
    command = [sys.executable, "-c", STUCK, "9", *arguments, str(tmp_path / "o")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = "stuck\n"
        assert any(seen == line for seen in process.stdout)
        # the writer may still be at it
        until = time.monotonic() + 60
        hidden: list[Path] = []
        while not (hidden and (tmp_path / "o" / "a" / "flow.done.json").exists()):
            assert time.monotonic() < until
            hidden = [p for p in (tmp_path / "o").glob(".avfast-*") if (p / "flow_00001.flo").exists()]
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert {p.name for p in (tmp_path / "o").iterdir() if not p.name.startswith(".")} == {"a"}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "o" / "a").iterdir()}
    extract(tmp_path / "in" / "a.mkv", out=tmp_path / "o", format=("npy", "flo", "jpg", "hsv-mp4"))
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["a"]
    summary = extract(tmp_path / "in", out=tmp_path / "o", format=("npy", "flo", "jpg", "hsv-mp4"))
    assert (summary["done"], summary["skipped"], summary["pairs"]) == (2, 1, 10)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "o" / "a").iterdir()} == before
    extract(tmp_path / "in", out=tmp_path / "whole", format=("npy", "flo", "jpg", "hsv-mp4"))
    assert tree(tmp_path / "o") == tree(tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["a", "b", "c"]


def test_two_runs_share_a_folder(tmp_path: Path) -> None:
    film(tmp_path / "a.mkv")
    film(tmp_path / "b.mkv")
    other = ResultFolder(tmp_path / "o" / "a")
    assert other.claim() and not ResultFolder(tmp_path / "o" / "a").claim()
    summary = extract(tmp_path / "a.mkv", tmp_path / "b.mkv", out=tmp_path / "o")
    assert (summary["done"], summary["elsewhere"], summary["failed"]) == (1, 1, [])
    # the other run dies while ours goes on: what it left is no part of the results
    (other.folder / "flow_00001.flo").touch()
    assert other._lock is not None
    os.close(other._lock)
    ours = ResultFolder(tmp_path / "o" / "a")
    assert ours.claim() and list(ours.folder.iterdir()) == []
    ours.discard()
    assert extract(tmp_path / "a.mkv", tmp_path / "b.mkv", out=tmp_path / "o")["done"] == 1


@pytest.mark.parametrize("workers", [1, 3])
def test_several_items_at_a_time(workers: int, tmp_path: Path) -> None:
    for i in range(5):
        film(tmp_path / "in" / f"{i}.mkv", 3 + i, start=i)
    (tmp_path / "in" / "bad.mkv").write_text("no")
    summary = extract(tmp_path / "in", out=tmp_path / "o", workers=workers, device="cpu")
    assert summary["done"] == 5 and summary["pairs"] == sum(range(2, 7)) and len(summary["failed"]) == 1
    for i in range(5):
        flow = np.load(tmp_path / "o" / str(i) / "flow.npy")
        frames = np.stack([scene(i + j) for j in range(3 + i)])[:, None]
        np.testing.assert_array_equal(flow, tvl1_flow(frames[1:], frames[:-1]).numpy().astype(np.float16))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["tvl1_flow", "flow_writer", "read_video"])
def test_what_ends_the_run_leaves_nothing_behind(
    error: BaseException, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: Any, **_settings: Any) -> Any:
        raise error

    for i in range(4):
        film(tmp_path / "in" / f"{i}.mkv", 2, 16, 16)
    threads = threading.active_count()
    monkeypatch.setattr(flow_pipeline, stage, fail)
    with pytest.raises(type(error)) as raised:
        extract(tmp_path / "in", out=tmp_path / "o", workers=2)
    assert raised.value is error
    if isinstance(error, OSError) and stage == "flow_writer":
        assert Path(error.filename).parent == tmp_path / "o"
    assert threading.active_count() == threads
    assert not [p for p in (tmp_path / "o").rglob("*")]


def test_recipe_i3d(tmp_path: Path) -> None:
    resolved = FlowConfig(recipe="i3d").resolved()
    assert (resolved.fps, resolved.short_side, resolved.bound) == (25, 256, 20)
    assert (resolved.format, resolved.direction) == (("jpg",), "forward")
    own = FlowConfig(recipe="i3d", size=(20, 10), bound=15, format=("npy",), direction="backward", fps=10).resolved()
    assert (own.short_side, own.size, own.bound, own.format) == (None, (20, 10), 15, ("npy",))
    assert (own.direction, own.fps) == ("backward", 10)
    plain = FlowConfig().resolved()
    assert (plain.fps, plain.short_side, plain.bound) == (None, None, 20)
    assert (plain.format, plain.direction) == (("npy",), "backward")
    # a folder of pictures has no times to choose by
    extract(pictures(tmp_path / "seq"), out=tmp_path / "o", recipe="i3d", size=(W, H))
    assert marker(tmp_path / "o" / "seq")["fps"] is None
    assert {p.name for p in (tmp_path / "o" / "seq").glob("*.jpg")} == {
        f"flow_{axis}_0000{k}.jpg" for axis in "xy" for k in (1, 2, 3)
    }
    x = np.asarray(Image.open(tmp_path / "o" / "seq" / "flow_x_00002.jpg"))
    assert abs(bytes_to_flow(x, 20)[8:-8, 8:-8].mean() - DX) < 0.1


def test_command_and_python_are_the_same(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", 5)
    line = f"{path} --out {tmp_path / 'cli'} --format npy png --direction forward --stride 2 --fps 20 --size 30 20"
    line += " --resize after --bound 4 --preset fast --threads 1 --device cpu --workers 2 --overwrite"
    settings: dict[str, Any] = {
        "format": ("npy", "png"), "direction": "forward", "stride": 2, "fps": 20.0, "size": (30, 20),
        "resize": "after", "bound": 4.0, "preset": "fast", "threads": 1, "device": "cpu", "workers": 2,
        "overwrite": True,
    }  # fmt: skip
    config = FlowConfig(inputs=(str(path),), out=str(tmp_path / "cli"), **settings)
    assert parse(FlowConfig, prog="avfast flow", argv=line.split()) == config
    program.main(line.split())
    extract(path, out=tmp_path / "python", **settings)
    assert tree(tmp_path / "cli") == tree(tmp_path / "python")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--out o", "IN is missing"),
        ("a.mp4", "--out is missing"),
        ("a.mp4 --out o --stride 0", "stride is 0, expected at least 1"),
        ("a.mp4 --out o --short-side 0", "short-side is 0, expected at least 1"),
        ("a.mp4 --out o --threads 0", "threads is 0"),
        ("a.mp4 --out o --workers -1", "workers is -1"),
        ("a.mp4 --out o --fps 0", "fps is 0.0, expected above 0 and at most 1000"),
        ("a.mp4 --out o --fps nan", "fps is nan"),
        ("a.mp4 --out o --bound -2", "bound is -2.0, expected at least 0.01 and at most 10000"),
        ("a.mp4 --out o --size 0 5", "size is 0, expected at least 1 and at most 16384"),
        ("a.mp4 --out o --size 8 5 --short-side 5", "short-side is 5 and size is given too"),
        ("a.mp4 --out o --preset slow", "preset is 'slow', expected one of fast"),
        ("a.mp4 --out o --device tpu", "device is 'tpu'"),
        ("a.mp4 --out o --format zip", "--format is 'zip', expected one of npy, flo, "),
        ("a.mp4 --out o --recipe c3d", "--recipe is 'c3d' (did you mean 'i3d'?), expected one of i3d"),
        ("a.mp4 --out o --formt npy", "unknown argument '--formt' (did you mean '--format'?)"),
        ("a.mp4 --out o b.mp4", "unknown argument 'b.mp4'"),
        ("a.mp4 --out README.md", "out is README.md, which is not a folder"),
    ],
)
def test_settings_that_do_not_work(line: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(InputError) as error:
        program.main(line.split())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_backend_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film(tmp_path / "a.mkv", 3)
    monkeypatch.setenv("AVFAST_BACKEND", "fast")
    with pytest.raises(InputError, match="AVFAST_BACKEND is 'fast', expected one of"):
        extract(tmp_path / "a.mkv", out=tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_the_command_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    film(tmp_path / "a.mkv", 3)
    command = [sys.executable, "-m", "avfast.flow", "a.mkv", "none.mkv", "--out", "o"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 3 and ended.stderr == ""
    assert "items: 1 done, 0 finished before, 1 failed; results: o" in ended.stdout
    assert "failed: none.mkv: No such file or directory" in ended.stdout
    # the same through `avfast flow`, in this process
    with pytest.raises(SystemExit) as stop:
        cli.main(["flow", str(tmp_path / "none.mkv"), "--out", str(tmp_path / "o")])
    shown = capsys.readouterr()
    assert stop.value.code == 2 and shown.out == ""
    assert shown.err == f"avfast: error: nothing could be done: {tmp_path}/none.mkv: No such file or directory\n"
