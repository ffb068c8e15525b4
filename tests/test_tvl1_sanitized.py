"""The CPU engine of TV-L1 under AddressSanitizer and UBSan, by a driver: Python would hide its allocations."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ISAS = {"avx512": ["-mavx512f"], "avx2": ["-mavx2"], "baseline": []}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no C++ compiler for x86-64")
    folder = tmp_path_factory.mktemp("sanitized")
    objects = []
    for isa, flags in ISAS.items():
        objects.append(folder / f"{isa}.o")
        source = ["-c", "csrc/tvl1_kernels.cpp", "-o", objects[-1]]
        subprocess.run([COMPILER, *FLAGS, *flags, f"-DAVFAST_ISA={isa}", *source], cwd=ROOT, check=True)
    program = folder / "fuzz"
    sources = ["csrc/tvl1.cpp", "tests/native/fuzz_tvl1.cpp"]
    subprocess.run([COMPILER, *FLAGS, *sources, *objects, "-o", program, "-pthread"], cwd=ROOT, check=True)
    return program


# building it takes half a minute
@pytest.mark.slow
def test_random_inputs_under_sanitizers(driver: Path) -> None:
    run = subprocess.run([driver, "10000", "0"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout == "10000 inputs\n"
