"""The commit of a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from avfast.machine import environment as module
from avfast.machine.environment import commit


def test_commit_of_a_checkout_and_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        ended = subprocess.run(["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return ended.stdout.strip()

    package = tmp_path / "avfast" / "machine" / "commit.py"
    package.parent.mkdir(parents=True)
    package.write_text("1")
    monkeypatch.setattr(module, "__file__", str(package))
    assert commit() is None
    git("init", "-q")
    assert commit() is None
    git("add", ".")
    git("commit", "-q", "-m", "one")
    # a tag must not replace the commit
    git("tag", "-a", "v1", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert commit() == head[:12]
    package.write_text("2")
    assert commit() == f"{head[:12]}-dirty"
    installed = tmp_path / "lib" / "avfast" / "machine" / "commit.py"
    monkeypatch.setattr(module, "__file__", str(installed))
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(module, "__file__", str(package))
    assert commit() is None
