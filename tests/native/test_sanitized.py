"""The CPU code under AddressSanitizer and UBSan, by drivers of random input: Python would hide its allocations."""

from __future__ import annotations

import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ISA_FLAGS = runpy.run_path(str(ROOT / "setup.py"))["ISA_FLAGS"]


# building takes half a minute each
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tvl1", "fused"])
def test_random_inputs_under_sanitizers(name: str, tmp_path: Path) -> None:
    if COMPILER is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no C++ compiler for x86-64")
    objects = []
    for isa, flags in ISA_FLAGS.items():
        objects.append(tmp_path / f"{isa}.o")
        source = ["-c", f"csrc/{name}/kernels.cpp", "-o", objects[-1]]
        subprocess.run([COMPILER, *FLAGS, *flags, f"-DAVFAST_ISA={isa}", *source], cwd=ROOT, check=True)
    program = tmp_path / "fuzz"
    others = [path for path in (ROOT / "csrc" / name).glob("*.cpp") if path.name != "kernels.cpp"]
    sources = [*others, "csrc/common/threads.cpp", f"tests/native/fuzz_{name}.cpp"]
    subprocess.run([COMPILER, *FLAGS, *sources, *objects, "-o", program, "-pthread"], cwd=ROOT, check=True)
    run = subprocess.run([program, "10000", "0"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "10000 inputs\n"
