"""Build of the extension module `avfast._C`; everything else about the package is in pyproject.toml.

`AVFAST_CUDA=0` leaves CUDA out, `AVFAST_CUDA=1` demands it; without either it is built in where nvcc is found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, ExecError, LinkError

CPP_SOURCES = ["csrc/bindings.cpp", "csrc/tvl1.cpp"]
CUDA_SOURCES = ["csrc/cuda_info.cu"]
HEADERS = ["csrc/tvl1.h", "csrc/tvl1_pixel.h"]

# contraction off: the instruction sets, and later the GPU, give the same bits
CPP_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno"]
CUDA_FLAGS = [
    "-O3",
    "-std=c++17",
    "--fmad=false",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    "-Xcompiler=-fPIC",
]


def find_nvcc() -> str | None:
    """Path of nvcc, or None where CUDA is to be left out."""
    choice = os.environ.get("AVFAST_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"AVFAST_CUDA={choice!r}: expected 0 (without CUDA), 1 (with CUDA) or nothing")
    if choice == "0":
        return None
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = next((found for root in roots if (found := shutil.which("nvcc", path=f"{root}/bin"))), shutil.which("nvcc"))
    if choice == "1" and nvcc is None:
        raise SystemExit("AVFAST_CUDA=1, but nvcc is neither in CUDA_HOME/bin nor on the PATH")
    return nvcc


def cudart_folder(nvcc: str) -> str:
    """Folder of libcudart_static.a, asked of nvcc itself: the nvcc on the PATH may be a link or a script."""
    plan = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [Path(line.partition("TOP=")[2].strip()) for line in plan.splitlines() if line.startswith("#$ TOP=")]
    for top in tops:
        for library in (*top.glob("lib*/libcudart_static.a"), *top.glob("targets/*/lib/libcudart_static.a")):
            return str(library.parent)
    raise SystemExit(f"libcudart_static.a was not found beside {nvcc}; AVFAST_CUDA=0 builds without CUDA")


class BuildExt(build_ext):
    """Compiles the .cu files first, then builds the extension with their objects."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        # setuptools compares file times only, and would keep the objects of a build with the other AVFAST_CUDA
        self.force = True
        nvcc = find_nvcc()
        if nvcc is not None:
            ext.extra_objects = [self._compile_cuda(nvcc, source) for source in CUDA_SOURCES]
            ext.define_macros = [*ext.define_macros, ("AVFAST_WITH_CUDA", None)]
            ext.library_dirs = [cudart_folder(nvcc)]
            ext.libraries = ["cudart_static", "dl", "rt", "pthread"]
        try:
            super().build_extension(ext)
        except (CompileError, ExecError, LinkError) as error:
            raise SystemExit(
                f"avfast._C could not be built: {error}\n"
                "A C++17 compiler and the Python headers are needed (Debian, Ubuntu: apt install g++ python3-dev; "
                "CXX names another compiler). The compiler's own messages are above."
            ) from error

    def _compile_cuda(self, nvcc: str, source: str) -> str:
        target = Path(self.build_temp) / f"{source}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        command = [nvcc, *CUDA_FLAGS, "-c", source, "-o", str(target)]
        print(*command)
        if subprocess.run(command).returncode != 0:
            raise SystemExit(f"nvcc could not compile {source} (its messages are above); AVFAST_CUDA=0 leaves CUDA out")
        return str(target)


extension = Pybind11Extension(
    "avfast._C",
    CPP_SOURCES,
    depends=[*HEADERS, *CUDA_SOURCES],
    cxx_std=17,
    extra_compile_args=CPP_FLAGS,
    extra_link_args=["-pthread"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
