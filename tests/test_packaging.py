"""What gets installed: every module, once, and the native sources in the sdist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

import avfast

ROOT = Path(__file__).parents[1]

# setup.py adds the extension alone, so pyproject.toml is all that decides about the Python files
ASK_SETUPTOOLS = """
import json
from setuptools import Distribution
distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
modules = [[package, module, str(path)] for package, module, path in build.find_all_modules()]
data = [f"{source}/{name}" for _, source, _, names in build.data_files for name in names]
print(json.dumps({"modules": modules, "data": data, "version": distribution.get_version()}))
"""


def sources() -> set[str]:
    """Every Python file that has to be installed, by its installed path; `kernels/` becomes `avfast/kernels/`."""
    own = {p for p in (ROOT / "avfast").rglob("*.py") if p.relative_to(ROOT).parts[1] != "kernels"}
    installed = {p.relative_to(ROOT).as_posix() for p in own}
    return installed | {f"avfast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels").rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("avfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    return copy


def build(kind: str, source: Path, target: Path) -> Path:
    code = f"from setuptools import build_meta; print('\\n' + build_meta.build_{kind}({str(target)!r}))"
    # without CUDA: what nvcc adds is no file of its own
    environment = os.environ | {"AVFAST_CUDA": "0"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return target / ended.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pybind11")
    return build("sdist", checkout, tmp_path_factory.mktemp("sdist"))


def test_setuptools_installs_every_module_once():
    ended = subprocess.run([sys.executable, "-c", ASK_SETUPTOOLS], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout.splitlines()[-1])
    found = Counter(f"{package.replace('.', '/')}/{module}.py" for package, module, _ in answer["modules"])
    assert set(found) == sources()
    assert set(found.values()) == {1}
    assert "avfast/py.typed" in answer["data"]
    assert answer["version"] == avfast.__version__


def test_kernels_link_leads_to_the_same_files():
    link = ROOT / "avfast" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"


def test_sdist_holds_every_source_once(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = Counter(m.name.partition("/")[2] for m in archive.getmembers() if not m.isdir())
    assert set(names.values()) == {1}
    assert not [n for n in names if n.startswith("avfast/kernels")]
    python = {p.removeprefix("avfast/") if p.startswith("avfast/kernels/") else p for p in sources()}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted = python | native | {"pyproject.toml", "setup.py", "README.md", "LICENSE", "avfast/py.typed"}
    assert wanted <= set(names), wanted - set(names)


@pytest.mark.slow
def test_wheel_from_the_sdist_holds_every_file_once(sdist: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = [p for p in tmp_path.iterdir() if p.is_dir()]
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path)) as archive:
        names = Counter(archive.namelist())
    assert set(names.values()) == {1}
    assert {n for n in names if n.endswith(".py")} == sources()
    assert "avfast/py.typed" in names
    assert [n for n in names if n.startswith("avfast/_C.") and n.endswith((".so", ".pyd"))]
    tops = {n.partition("/")[0] for n in names}
    assert tops == {"avfast", f"avfast-{avfast.__version__}.dist-info"}


def test_constraints_pin_everything_that_make_installs():
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition(";")[0].strip().partition("==")
            # a local version (+cpu) exists on one index only
            assert version and "+" not in version, line
            pinned[name] = version
    assert list(pinned) == sorted(pinned)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted += project["project"]["optional-dependencies"]["dev"]
    names = {requirement.partition(";")[0].partition(">")[0].strip() for requirement in wanted}
    assert names <= set(pinned), names - set(pinned)
    assert pinned["torch"] == "2.13.0" and pinned["triton"] == "3.7.1"
