"""The command `avfast`: exit status, one-line errors, and that `import avfast` costs nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import avfast
from avfast.cli.command import run_command
from avfast.cli.main import SUBCOMMANDS, main
from avfast.errors import InputError

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def status(error: BaseException) -> int | str | None:
    def command(_argv: list[str] | None) -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(command, [])
    return stop.value.code


def test_import_loads_nothing_heavy():
    heavy = ("torch", "numpy", "triton", "tyro", "av", "cv2", "matplotlib", "rich", "yaml", "accelerate", "avfast._C")
    code = f"import avfast, sys; dir(avfast); print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout.strip() == "[]"


def test_every_export_resolves_to_its_home():
    import avfast.kernels
    import avfast.machine.environment
    import avfast.models.avmodel

    assert avfast.AVModel is avfast.models.avmodel.AVModel
    assert avfast.backward_warp is avfast.kernels.backward_warp
    assert avfast.environment is avfast.machine.environment.environment
    assert all(getattr(avfast, name) is not None for name in avfast.__all__)
    assert set(avfast.__all__) <= set(dir(avfast))
    with pytest.raises(AttributeError, match="no attribute 'backwards_warp'"):
        _ = avfast.backwards_warp


def test_help_and_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"avfast {avfast.__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in SUBCOMMANDS)


def test_no_subcommand_is_an_error_that_shows_the_table(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "evaluate" in shown.err


@pytest.mark.parametrize("typed, near", [("trian", "train"), ("eval", "evaluate"), ("environment", "env")])
def test_unknown_subcommand_suggests_the_nearest(typed: str, near: str):
    ended = python("-m", "avfast", typed, "--seed", "1")
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"avfast: error: unknown subcommand {typed!r}")
    assert f"did you mean {near!r}?" in ended.stderr


def test_unknown_subcommand_without_a_near_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["xylophone"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "avfast: error: unknown subcommand 'xylophone', expected one of "
        "train, evaluate, prepare, predict, report, export, flow, env\n"
    )


def test_a_subcommand_is_its_module():
    assert python("-m", "avfast", "env", "--help").stdout == python("-m", "avfast.env", "--help").stdout != ""


def test_success_returns_0_and_passes_the_arguments():
    seen: list[list[str] | None] = []
    assert run_command(seen.append, ["--seed", "1"]) == 0
    assert run_command(seen.append) == 0
    assert seen == [["--seed", "1"], None]


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("digits is /nowhere,\nexpected a folder"), "digits is /nowhere, expected a folder"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a"), "runs/a: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: Invalid cross-device link"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("cannot identify image file"), "cannot identify image file"),
        (OSError(), "OSError"),
    ],
)
def test_a_users_mistake_is_one_line_and_2(error: Exception, line: str, capsys: pytest.CaptureFixture[str]):
    assert status(error) == 2
    assert capsys.readouterr().err == f"avfast: error: {line}\n"


def test_interrupt_is_130(capsys: pytest.CaptureFixture[str]):
    assert status(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "avfast: interrupted\n"


def test_debug_shows_the_traceback_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("AVFAST_DEBUG", "1")
    assert status(InputError("k is 0")) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("Traceback") and shown.endswith("\navfast: error: k is 0\n")


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), KeyError("bug"), AssertionError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception):
    def command(_argv: list[str] | None) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        run_command(command, [])
    assert raised.value is error


def test_exit_of_the_command_itself_passes_through():
    assert status(SystemExit(7)) == 7


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
def test_a_reader_that_leaves_early_is_not_an_error():
    code = "from avfast.cli.command import run_command; run_command(lambda argv: print('line\\n' * 100_000))"
    ended = subprocess.run(
        f"'{sys.executable}' -c \"{code}\" | head -n 1", cwd=ROOT, shell=True, capture_output=True, text=True
    )
    assert ended.stdout == "line\n" and ended.stderr == ""
