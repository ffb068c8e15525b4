"""Build of the extension module `avfast._C`; everything else about the package is in pyproject.toml.

`AVFAST_CUDA=0` leaves CUDA out, `AVFAST_CUDA=1` demands it; without either it is built in where nvcc is found.
"""

from __future__ import annotations

import glob
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import ninja
from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CompileError, ExecError, LinkError

HEADERS = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.def", recursive=True))
# the loops, compiled once per instruction set; which one runs is chosen at run time
ISA_SOURCES = sorted(glob.glob("csrc/*/kernels.cpp"))
CPP_SOURCES = sorted(set(glob.glob("csrc/*/*.cpp")) - set(ISA_SOURCES))
CUDA_SOURCES = sorted(glob.glob("csrc/**/*.cu", recursive=True))

# contraction off, here and below: where the source has no multiply_add, instruction sets and GPUs give the same bits
CPP_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
ISA_FLAGS = {"avx512": ["-mavx512f"], "avx2": ["-mavx2", "-mfma"], "baseline": []}
CUDA_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]
CUDA_TARGETS = [
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


def write_ninja(folder: Path, compiler: list[str], nvcc: str | None) -> list[str]:
    """Write build.ninja for everything but the binding; returns the object files it makes."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    objects: dict[str, tuple[str, str, list[str]]] = {}
    for source in CPP_SOURCES:
        objects[f"{folder}/{source}.o"] = ("cxx", source, [])
    for source in ISA_SOURCES:
        for isa, flags in ISA_FLAGS.items():
            if x86 or isa == "baseline":
                objects[f"{folder}/{source}.{isa}.o"] = ("cxx", source, [f"-DAVFAST_ISA={isa}", *flags])
    for source in CUDA_SOURCES if nvcc is not None else []:
        objects[f"{folder}/{source}.o"] = ("nvcc", source, [])
    lines = [
        f"builddir = {folder}",
        "rule cxx",
        f"  command = {shlex.join([*compiler, *CPP_FLAGS, '-fPIC'])} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {shlex.join([nvcc or 'nvcc', *CUDA_FLAGS, *CUDA_TARGETS])} $flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    for target, (rule, source, flags) in objects.items():
        lines += [f"build {target}: {rule} {source}", f"  flags = {shlex.join(flags)}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    return list(objects)


class BuildExt(build_ext):
    """Has ninja build the objects of csrc/, then builds the binding and links them."""

    def build_extension(self, ext: Pybind11Extension) -> None:
        # setuptools compares file times only, and would keep the objects of a build with the other AVFAST_CUDA
        self.force = True
        nvcc = find_nvcc()
        folder = Path(self.build_temp)
        ext.extra_objects = write_ninja(folder, shlex.split(os.environ.get("CXX", "c++")), nvcc)
        if nvcc is not None:
            ext.define_macros = [*ext.define_macros, ("AVFAST_WITH_CUDA", None)]
            ext.library_dirs = [cudart_folder(nvcc)]
            ext.libraries = ["cudart_static", "dl", "rt", "pthread"]
        try:
            self.spawn([os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(folder / "build.ninja")])
            super().build_extension(ext)
        except (CompileError, ExecError, LinkError) as error:
            raise SystemExit(
                f"avfast._C could not be built: {error}\n"
                "A C++17 compiler and the Python headers are needed (Debian, Ubuntu: apt install g++ python3-dev; "
                "CXX names another compiler). AVFAST_CUDA=0 leaves CUDA out. The compilers' own messages are above."
            ) from error


extension = Pybind11Extension(
    "avfast._C",
    ["csrc/bindings.cpp"],
    depends=HEADERS,
    cxx_std=17,
    extra_compile_args=["-O2"],
    extra_link_args=["-pthread"],
)

# tests read the flags above without building
if __name__ == "__main__":
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
