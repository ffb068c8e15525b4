"""`avfast env`: it reports whatever is missing."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from avfast import env
from avfast.machine.environment import environment

ROOT = Path(__file__).parents[2]


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    # None in sys.modules is Python's own way to say that an import must fail
    monkeypatch.setitem(sys.modules, "avfast._C", None)
    report = environment()
    assert report["native"]["available"] is False and "avfast._C" in report["native"]["reason"]
    assert report["cuda"]["native"] == "none: avfast._C is missing"
    env.main([])
    assert "  avfast._C: missing: " in capsys.readouterr().out


def report_without(*names: str, arguments: list[str]) -> str:
    """What the command prints in a process where these modules cannot be imported."""
    # in its own process: modules loaded without them must not stay behind
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in names)
    code = f"import sys; {hide}from avfast import env; env.main({arguments})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_op_is_listed_with_what_runs(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("avfast._C")
    # in its own process: here the modules of the ops are loaded already
    monkeypatch.delenv("AVFAST_BACKEND", raising=False)
    shown = report_without(arguments=[])
    assert "\n  conv2d (cpu): cpp, " in shown and "\n  patch_conv (cpu): torch, " in shown
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    shown = report_without(arguments=[])
    assert "\n  conv2d (cpu): reference, " in shown and "\n  patch_conv (cpu): reference, " in shown
    assert "\n  AVFAST_BACKEND: reference\n" in shown


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
    warnings = environment()["warnings"]
    assert len(warnings) == warned
    env.main([])
    shown = capsys.readouterr().err
    if warned:
        assert all(name in warnings[0] for name in installed)
        assert shown == f"warning: {warnings[0]}\n"
    else:
        assert shown == ""
