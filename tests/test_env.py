"""The environment report: right where it can be checked another way, and alive whatever is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import avfast
from avfast import env

ROOT = Path(__file__).parents[1]


def test_report_is_json_and_true():
    report = env.environment()
    assert json.loads(json.dumps(report)) == report
    assert report["avfast"] == avfast.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["cores"] == os.cpu_count()
    assert isinstance(report["cuda"]["torch"], list) == torch.cuda.is_available()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/cpuinfo is Linux's")
def test_instruction_sets_agree_with_pytorch():
    best = torch.backends.cpu.get_cpu_capability()
    found = env.environment()["cpu"]["instruction_sets"]
    assert ("avx2" in found) == (best in ("AVX2", "AVX512"))
    assert ("avx512f" in found) >= (best == "AVX512")


def test_every_op_is_listed_for_both_devices():
    from avfast.kernels import registry

    rows = env.environment()["backends"]
    wanted = {(op, device) for op in registry.OPS for device in ("cpu", "cuda")}
    assert {(row["op"], row["device"]) for row in rows} == wanted and len(rows) == len(wanted)
    assert {"backward_warp", "tvl1_flow"} <= registry.OPS.keys()
    assert all(row["runs"] not in row["others"] for row in rows)


def test_a_forced_backend_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    report = env.environment()
    assert report["variables"]["AVFAST_BACKEND"] == "reference"
    assert {row["runs"] for row in report["backends"]} == {"reference"}


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    # None in sys.modules is Python's own way to say that an import must fail
    monkeypatch.setitem(sys.modules, "avfast._C", None)
    report = env.environment()
    assert report["native"]["available"] is False and "avfast._C" in report["native"]["reason"]
    assert report["cuda"]["native"] == "none: avfast._C is missing"
    env.main([])
    assert "  avfast._C: missing: " in capsys.readouterr().out


def test_the_extension_names_the_instruction_sets_of_this_cpu():
    report = env.environment()
    sets = report["native"]["instruction_sets"]
    assert sets[-1] == "baseline"
    if platform.machine() == "x86_64":
        flags = report["cpu"]["instruction_sets"]
        assert [name for name, flag in (("avx512", "avx512f"), ("avx2", "avx2")) if flag in flags] == sets[:-1]


def report_without(*names: str, arguments: list[str]) -> str:
    """What the command prints in a process where these modules cannot be imported."""
    # in its own process: modules loaded without them must not stay behind
    hide = "; ".join(f"sys.modules[{name!r}] = None" for name in names)
    code = f"import sys; {hide}; from avfast import env; env.main({arguments})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_without_the_packages():
    report = json.loads(report_without("av", "cv2", "triton", arguments=["--json"]))
    assert all("import fails" in report["packages"][name] for name in ("av", "cv2", "triton"))
    assert report["packages"]["torch"] == torch.__version__


def test_without_rich_the_report_is_plain():
    assert report_without("rich", arguments=[]).startswith("machine:\n  avfast: ")


def test_without_pytorch():
    report = json.loads(report_without("torch", arguments=["--json"]))
    assert "import fails" in report["packages"]["torch"]
    assert report["cuda"]["torch"].startswith("unknown: ")
    assert report["backends"].startswith("unknown: ")


@pytest.mark.parametrize(
    "installed, warned",
    [
        ([], False),
        (["opencv-contrib-python-headless"], False),
        (["opencv-python", "opencv-contrib-python-headless"], True),
    ],
)
def test_two_opencv_distributions_are_warned_about(
    installed: list[str], warned: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    version = importlib.metadata.version

    def pretend(name: str) -> str:
        if not name.startswith("opencv"):
            return version(name)
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.0.0"

    monkeypatch.setattr(importlib.metadata, "version", pretend)
    warnings = env.environment()["warnings"]
    assert len(warnings) == warned
    env.main([])
    shown = capsys.readouterr().err
    if warned:
        assert all(name in warnings[0] for name in installed)
        assert shown == f"warning: {warnings[0]}\n"
    else:
        assert shown == ""


def test_commit_of_a_checkout_and_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        ended = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return ended.stdout.strip()

    package = tmp_path / "avfast" / "env.py"
    package.parent.mkdir()
    package.write_text("1")
    monkeypatch.setattr(env, "__file__", str(package))
    assert env.commit() is None
    git("init", "-q")
    assert env.commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "one")
    # a tag must not replace the commit
    git("tag", "-a", "v1", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert env.commit() == head[:12]
    package.write_text("2")
    assert env.commit() == f"{head[:12]}-dirty"
    installed = tmp_path / "lib" / "avfast" / "env.py"
    monkeypatch.setattr(env, "__file__", str(installed))
    assert env.commit() is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(env, "__file__", str(package))
    assert env.commit() is None
