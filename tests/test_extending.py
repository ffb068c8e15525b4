"""docs/extending.md, carried out: each walk's files are made and changed in a copy of the package as the page says, and
its commands run there.

A walk is a section that begins with "Files: N." Its blocks are done in their order:

- A block below "New file `path`:" is that file. A `diff` block changes the file that the paragraph above it begins
  with: each part, between `@@`, is found by its context, which has to be there once.
- `sh` and `python` blocks run in the copy, in one process. A block that builds the extension begins another, because
  what is loaded stays loaded. A line with `# refused: TEXT` has to end with status 2 and that text. A block after
  `<!-- docs-test: slow -->` is run by `make check` only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
COPIED = ("avfast", "kernels", "csrc", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE")

# runs blocks, given as JSON on stdin, with the modules of the copy; `python -m X` costs no new process
RUNNER = """
import contextlib, io, json, re, runpy, shlex, sys
names = {}
for language, text in json.load(sys.stdin):
    if language == "python":
        exec(text, names)
        continue
    for line in text.replace("\\\\\\n", " ").splitlines():
        print("$", line, flush=True)
        refused = re.search("# refused: (.+)", line)
        python, *words = shlex.split(line, comments=True)
        assert python == "python", line
        module = words[0] == "-m"
        sys.argv = words[module:]
        heard = io.StringIO()
        status = 0
        try:
            with contextlib.redirect_stderr(heard if refused else sys.stderr):
                if module:
                    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        assert status == (2 if refused else 0), f"{line}: exit status {status}"
        assert not refused or refused[1] in heard.getvalue(), heard.getvalue()
"""


class Block(NamedTuple):
    """A fenced block of the page."""

    language: str
    text: str
    paragraph: str
    """What stands above it."""
    slow: bool

    @property
    def new_file(self) -> str | None:
        """The file that it is the text of."""
        found = re.fullmatch(r"New file `(.+)`:", self.paragraph)
        return found and found[1]

    @property
    def changed_file(self) -> str | None:
        """The file that it changes."""
        found = re.match(r"`(.+?)`", self.paragraph)
        return found[1] if found and self.language == "diff" else None


class Walk(NamedTuple):
    """A section of the page."""

    files: int
    """As it says."""
    blocks: list[Block]


def blocks(section: str) -> list[Block]:
    """The fenced blocks of a section."""
    found: list[Block] = []
    opened: list[str] | None = None
    language, paragraph, slow = "", "", False
    for line in section.splitlines():
        if opened is not None and line == "```":
            found.append(Block(language, "".join(opened), paragraph.strip(), slow))
            opened, paragraph, slow = None, "", False
        elif opened is not None:
            opened.append(f"{line}\n")
        elif line.startswith("```"):
            opened, language = [], line.removeprefix("```")
        elif line == "<!-- docs-test: slow -->":
            slow = True
        elif line:
            paragraph = f"{paragraph} {line}"
        else:
            # the blank line right above a block does not end its paragraph
            paragraph = paragraph if paragraph.endswith(":") else ""
    return found


def walks() -> dict[str, Walk]:
    """The walks of the page by their titles."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        said = re.match(r"\nFiles: (\d+)\.", body)
        assert said, f"{title} does not begin with the number of its files"
        found[title] = Walk(int(said[1]), blocks(body))
    return found


def patched(text: str, diff: str) -> str:
    """The text with every part of a diff applied; its context and the lines that it removes are there once."""
    for part in diff.split("@@\n"):
        lines = part.splitlines()
        assert all(line[:1] in ("", " ", "+", "-") for line in lines), part
        old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] != other) for other in "+-")
        assert old and f"\n{text}".count(f"\n{old}") == 1, f"not found, or more than once:\n{old}"
        text = text.replace(old, new) if text.startswith(old) else text.replace(f"\n{old}", f"\n{new}")
    return text


def carry_out(walk: Walk, copy: Path) -> set[str]:
    """Make and change the files that a walk names, in a copy of the package. Returns their paths."""
    touched = set()
    for block in walk.blocks:
        if (path := block.new_file) is not None:
            assert not (copy / path).exists(), path
            (copy / path).write_text(block.text)
            touched.add(path)
        elif (path := block.changed_file) is not None:
            (copy / path).write_text(patched((copy / path).read_text(), block.text))
            touched.add(path)
    return touched


def run(walk: Walk, copy: Path, *, slow: bool) -> None:
    """Run the commands of a walk in the copy that it was carried out in."""
    processes: list[list[tuple[str, str]]] = [[]]
    for block in walk.blocks:
        if block.language in ("sh", "python") and block.new_file is None and (slow or not block.slow):
            if "setup.py" in block.text:
                processes.append([])
            processes[-1].append((block.language, block.text))
    # without CUDA: nvcc takes minutes
    environment = {**os.environ, "PYTHONPATH": str(copy), "AVFAST_CUDA": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    for commands in filter(None, processes):
        ended = subprocess.run(
            [sys.executable, "-c", RUNNER],
            input=json.dumps(commands),
            cwd=copy,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout[-6000:]


@pytest.fixture
def copy(tmp_path: Path, make_film: Callable[..., Path]) -> Path:
    """The package with its tests, and a film."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    sound = (8000 * np.sin(np.arange(12 * 2205) / 20)).astype(np.int16)
    make_film(tmp_path / "clip.mp4", pictures, sound, fps=10, codecs=("mpeg4", "aac"))
    return tmp_path


@pytest.mark.parametrize("title", walks())
def test_walk(title: str, copy: Path) -> None:
    walk = walks()[title]
    assert len(carry_out(walk, copy)) == walk.files
    run(walk, copy, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("title", [title for title, walk in walks().items() if any(b.slow for b in walk.blocks)])
def test_walk_with_the_extension_built(title: str, copy: Path) -> None:
    carry_out(walks()[title], copy)
    run(walks()[title], copy, slow=True)


def test_a_part_of_a_diff_has_one_place() -> None:
    assert patched("a\nb\nc\n", " a\n-b\n+B\n@@\n c\n+d\n") == "a\nB\nc\nd\n"
    for diff in (" a\n-x\n", " a\n+y\n", "+y\n"):
        with pytest.raises(AssertionError):
            patched("a\nb\na\n", diff)
