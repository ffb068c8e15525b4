"""The pages of README.md and docs/: every shell and Python block runs at demo size, every link leads somewhere. The
blocks of docs/extending.md run in test_extending.py.

The blocks of a page run in their order in one temporary folder, which holds what the pages take for granted: films,
MNIST's files, arrays, and, where the page does not make them itself, a prepared data set, two trained runs and an
export. All of it is as small as it can be, and every `avfast train` gets flags for a tiny model; flags on the page win.

A comment in the line above a block changes that: `<!-- docs-test: slow -->` (`make check` runs it, not `make test`), or
`<!-- docs-test: skip: why -->`.

- `avfast X ...` and `python -m avfast.X ...` run in this process, where PyTorch is loaded already.
- `make X` is a dry run: the target exists. It runs in the checkout, like `python -m pytest`.
- Other lines run in bash.
- Python blocks of a page share their names. `name = ...  # (8,2,64,64)` also says what shape the value has, and so does
  `a.x, a.y  # (2,3), (4,)`: it is compared.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from avfast.cli.main import SUBCOMMANDS
from avfast.cli.main import main as avfast

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]
# extending.md changes the package: test_extending.py runs it, in a copy
RUN_HERE = [page for page in PAGES if page != "docs/extending.md"]
LINKING = [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"]
TINY = {
    "train": "--unet-width 2 --convlstm-layers 1 --context-frames 2 --pred-frames 2 --eval-frames 4 --batch-size 2 "
    "--car-batch-size 2 --mme-steps 2 --car-steps 2 --bn-recalibrate 1 --device cpu"
}
# flags of the generated data set alone
FEW_CLIPS = "--clip-frames 6 --train-clips 4 --val-clips 2 --test-clips 2"
# a predicted frame of a film takes 0.1 s, most of it for the pictures
SMALLER = {"--horizon 60": "--horizon 4", "horizon=60": "horizon=4"}
# what a page finds ready, and the command that makes it: a page that runs the command makes it itself
READY = {"data": "prepare", "runs": "train", "model": "export"}


class Block(NamedTuple):
    """A fenced block of a page."""

    where: str
    """page:line"""
    language: str
    text: str
    mark: str
    """Empty, `slow`, or `skip: why`."""


def blocks(page: str) -> list[Block]:
    """The sh and python blocks of a page."""
    found: list[Block] = []
    lines = (ROOT / page).read_text().splitlines()
    opened, mark = None, ""
    for number, line in enumerate(lines, start=1):
        if opened is None and line.startswith("```"):
            opened = number
            comment = re.fullmatch(r"<!-- docs-test: (slow|skip: .+) -->", lines[number - 2]) if number > 1 else None
            mark = comment[1] if comment else ""
        elif line == "```":
            assert opened is not None
            language = lines[opened - 1].removeprefix("```")
            if language in ("sh", "python"):
                text = "\n".join(lines[opened : number - 1])
                for size, smaller in SMALLER.items():
                    text = text.replace(size, smaller)
                found.append(Block(f"{page}:{opened}", language, text, mark))
            opened = None
    assert opened is None, f"{page}: the block of line {opened} is not closed"
    return found


def commands(text: str) -> list[list[str]]:
    """The command lines of a shell block as words, without comments; backslashes join lines."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def subcommand(words: list[str]) -> str | None:
    """The X of `avfast X ...`, `python -m avfast.X ...` or `torchrun ... -m avfast.X ...`."""
    if words[0] == "avfast":
        return words[1]
    return next((word.removeprefix("avfast.") for word in words if word.startswith("avfast.")), None)


def run_shell(text: str) -> None:
    """Run the command lines of a block. Raises AssertionError for one that fails."""
    for words in commands(text):
        variables = {}
        while "=" in words[0]:
            name, _, variables[name] = words.pop(0).partition("=")
        command = subcommand(words)
        if "--help" not in words and "--print-config" not in words:
            tiny = shlex.split(TINY.get(command or "", ""))
            if command == "train" and "--data" not in words:
                tiny += shlex.split(FEW_CLIPS)
            for i, word in enumerate(tiny):
                if word.startswith("--") and word not in words:
                    words += tiny[i : i + 2]
        if command is not None and (words[0] == "avfast" or words[:2] == ["python", "-m"]) and ">" not in words:
            arguments = words[2:] if words[0] == "avfast" else words[3:]
            with pytest.MonkeyPatch.context() as environment:
                for name, value in variables.items():
                    environment.setenv(name, value)
                try:
                    avfast([command, *arguments])
                except SystemExit as stop:
                    assert not stop.code, f"{shlex.join(words)}: exit status {stop.code}"
            continue
        in_checkout = words[0] == "make" or words[:3] == ["python", "-m", "pytest"]
        if words[0] == "make":
            words.insert(1, "--dry-run")
        line = " ".join(word if word in (">", "&&", "|") else shlex.quote(word) for word in words)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(
            ["bash", "-c", line],
            cwd=ROOT if in_checkout else None,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **variables},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, f"{line}: exit status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"


SHAPE = re.compile(r"\((?=[\d*, ]*,)[\d*]+(?:, ?[\d*]+)*,?\)")


def run_python(text: str, names: dict[str, Any]) -> int:
    """Run a block with these names, and compare the shapes that its comments state. Returns how many."""
    lines, compared = text.splitlines(), 0
    for statement in ast.parse(text).body:
        exec(compile(ast.Module([statement], []), "<block>", "exec"), names)
        assert statement.end_lineno is not None
        stated = [eval(shape) for shape in SHAPE.findall(lines[statement.end_lineno - 1].partition("  # ")[2])]
        if isinstance(statement, ast.Assign):
            shown: list[ast.expr] = statement.targets
        elif isinstance(statement, ast.Expr) and not isinstance(statement.value, ast.Call):
            shown = [statement.value]
        else:
            continue
        parts = [part for value in shown for part in (value.elts if isinstance(value, ast.Tuple) else [value])]
        values = [eval(ast.unparse(part), names) for part in parts]
        found = [tuple(value.shape) for value in values if hasattr(value, "shape")]
        assert found[: len(stated)] == stated, f"{lines[statement.end_lineno - 1]}: {found}"
        compared += len(stated)
    return compared


def run_page(page: str, folder: Path, slow: bool) -> None:
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for block in blocks(page):
            if block.mark.startswith("skip") or (block.mark == "slow" and not slow):
                continue
            try:
                run_shell(block.text) if block.language == "sh" else run_python(block.text, names)
            except Exception as error:
                error.add_note(f"in the block of {block.where}")
                raise


@pytest.fixture(scope="session")
def workshop(make_film: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted, but for an export."""
    folder = tmp_path_factory.mktemp("workshop")
    rng = np.random.default_rng(0)

    def film(name: str, frames: int = 92) -> None:
        picture = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(12, 0).repeat(12, 1)
        images = np.stack([np.roll(picture, t, axis=1)[:64, :64] for t in range(frames)])
        tone = 8000 * np.sin(np.arange(frames * 735) * rng.uniform(0.02, 0.2))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_film(folder / name, images, tone.astype(np.int16), codecs=("mpeg4", "aac"))

    for name in ("clips/brush.mp4", "clips/drum.mp4", "clips/tennis.mp4", "films/day/one.mp4"):
        film(name)
    film("clip.mp4", 120)
    shutil.copy(folder / "clips/drum.mp4", folder / "other.mp4")
    (folder / "list.txt").write_text("clips/drum.mp4\n")
    (folder / "frames").mkdir()
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 48), np.uint8)).save(folder / f"frames/frame_{i}.png")
    digits = folder / "path/to/mnist"
    digits.mkdir(parents=True)
    for name, count in (("train", 60), ("t10k", 20)):
        header = bytes([0, 0, 8, 3]) + np.array([count, 28, 28], ">i4").tobytes()
        pictures = rng.integers(0, 256, (count, 28, 28), np.uint8).tobytes()
        (digits / f"{name}-images-idx3-ubyte").write_bytes(header + pictures)
        labels = (np.arange(count) % 10).astype(np.uint8).tobytes()
        (digits / f"{name}-labels-idx1-ubyte").write_bytes(
            bytes([0, 0, 8, 1]) + np.array([count], ">i4").tobytes() + labels
        )
    for name in ("predicted.npy", "true.npy"):
        np.save(folder / name, rng.random((4, 3, 1, 48, 48), np.float32))
    with contextlib.chdir(folder):
        run_shell("avfast prepare clips/ --out data/mine")
        run_shell("avfast train --preset demo")
        run_shell("avfast train --preset painting --dataset clips --data data/mine")
    return folder


@pytest.fixture
def room(workshop: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str, bool], Path]:
    """room(page, slow): a folder with what the page needs and does not make itself."""

    def furnish(page: str, slow: bool) -> Path:
        text = "".join(b.text for b in blocks(page) if not b.mark or (slow and b.mark == "slow"))
        made = {name for name, command in READY.items() if re.search(rf"avfast[. ]{command}\b", text)}
        for path in workshop.iterdir():
            if path.is_file():
                shutil.copy(path, tmp_path)
            elif path.name not in made:
                shutil.copytree(path, tmp_path / path.name, symlinks=True)
        if "model/" in text and "model" not in made:
            shutil.copytree(request.getfixturevalue("exported")[0], tmp_path / "model")
        (tmp_path / "examples").symlink_to(ROOT / "examples")
        return tmp_path

    return furnish


@pytest.mark.parametrize("page", [page for page in RUN_HERE if not all(block.mark for block in blocks(page))])
def test_page_runs(page: str, room: Callable[[str, bool], Path]) -> None:
    run_page(page, room(page, False), slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in RUN_HERE if any(block.mark == "slow" for block in blocks(page))])
def test_page_runs_whole(page: str, room: Callable[[str, bool], Path]) -> None:
    run_page(page, room(page, True), slow=True)


def test_marks_are_known() -> None:
    for page in PAGES:
        lines = (ROOT / page).read_text().splitlines()
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if "docs-test" in line:
                assert re.fullmatch(r"<!-- docs-test: (slow|skip: .+) -->", line), f"{page}: {line}"
                assert below in ("```sh", "```python"), f"{page}: {line}: no block below"


def test_runner_sees_mistakes() -> None:
    assert run_python("import numpy as np\nx = np.zeros((2, 3))  # (2,3), metres\nx.T, x  # (3,2), (2, 3)\n", {}) == 3
    with pytest.raises(AssertionError, match=r"\(2, 3\)"):
        run_python("import numpy as np\nx = np.zeros((2, 3))  # (2,4)", {})
    with pytest.raises(AssertionError, match="exit status 2"):
        run_shell("avfast flow nothing/ --out flow")
    with pytest.raises(AssertionError, match="exit status 1"):
        run_shell("false")
    assert commands("a b \\\n  c  # comment\n# comment\n") == [["a", "b", "c"]]


def prose(page: str) -> Iterator[str]:
    """The lines of a page outside its fenced blocks."""
    inside = False
    for line in (ROOT / page).read_text().splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            yield line


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = [line.lstrip("#").strip() for line in prose(page.relative_to(ROOT).as_posix()) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.resolve()), f"{page}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = set(re.findall(r"\]\(([^)\s]+\.md)\)", (ROOT / "docs/README.md").read_text()))
    assert {Path(page).name for page in PAGES} - {"README.md"} <= index
    assert {f"{name}.md" for name in SUBCOMMANDS} <= index


def test_flags_of_the_pages_exist() -> None:
    known = {"--help", "--config", "--print-config", "--preset"}
    for name in SUBCOMMANDS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            avfast([name, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]*", text.getvalue()))
    for name in SUBCOMMANDS:
        page = f"docs/{name}.md"
        for code in re.findall(r"`([^`]+)`", "\n".join(prose(page))):
            flags = set() if code.startswith("pip ") else set(re.findall(r"(?<!\S)--[a-z][a-z-]*", code))
            assert flags <= known, f"{page}: {code}"


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 180
    assert "make demo" in text and "make test" in text
    for name in SUBCOMMANDS:
        assert f"(docs/{name}.md)" in text, name
