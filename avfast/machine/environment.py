"""What this machine is and what avfast uses on it: printed by `avfast env`, and `env.json` in every run folder. Nothing
here raises: what cannot be found out is reported with the reason, and a missing package is part of the report."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from avfast import __version__

# these decide which variant of the native code can run (x86-64-v3 and v4)
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_VARIABLES = ("AVFAST_", "OMP_", "GOMP_")
# all of these install a module cv2: the one installed last overwrites the files of the others
_OPENCV = ("opencv-contrib-python-headless", "opencv-contrib-python", "opencv-python-headless", "opencv-python")
_OVERWRITTEN = f"and overwrite each other's cv2: uninstall them all, then install {_OPENCV[0]}"


def environment() -> dict[str, Any]:
    """Describe this machine as nested dictionaries and lists that JSON can hold. Imports PyTorch and asks it for CUDA
    devices. Never raises."""
    opencv = [name for name in _OPENCV if _installed(name)]
    packages = {name: _package(name, name) for name in ("torch", "triton", "numpy", "av")}
    native, native_devices = _native()
    packages["cv2"] = _package(opencv[0] if opencv else _OPENCV[0], "cv2")
    return {
        "avfast": __version__,
        "commit": commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "os": platform.platform(),
        "cpu": _cpu(),
        "packages": packages,
        "cuda": {"torch": _torch_devices(), "native": native_devices},
        "native": native,
        "backends": _backends(),
        "variables": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
        "warnings": [f"{' and '.join(opencv)} are installed {_OVERWRITTEN}"] if len(opencv) > 1 else [],
    }


def commit() -> str | None:
    """The checkout's commit: 12 digits, with `-dirty` where tracked files differ from it. None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    # an installed package may lie inside the checkout of another project
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _installed(distribution: str) -> str | None:
    """The version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _package(distribution: str, module: str) -> str:
    """The version of a module, or why it cannot be imported: an installed one may lack a shared library."""
    version = _installed(distribution)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        return f"{version}, import fails: {_reason(error)}" if version else f"not installed ({_reason(error)})"
    return str(getattr(found, "__version__", None) or version or "unknown")


def _cpu() -> dict[str, Any]:
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.exists() else ""
    name, flags = (re.search(rf"^{key}\s*: (.*)$", text, re.MULTILINE) for key in ("model name", "flags"))
    known = flags[1].split() if flags else []
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "instruction_sets": [flag for flag in _INSTRUCTION_SETS if flag in known],
        "cores": os.cpu_count(),
        # a container or a batch system can restrict a process to some of the cores
        "usable_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def _torch_devices() -> list[str] | str:
    """CUDA devices as PyTorch sees them, or why there are none."""
    try:
        import torch

        if torch.version.cuda is None:
            return "none: PyTorch is a build without CUDA"
        if not torch.cuda.is_available():
            return f"none: PyTorch is built for CUDA {torch.version.cuda}, but finds no device or driver"
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB" for p in found]
    except Exception as error:
        return f"unknown: {_reason(error)}"


def _native() -> tuple[dict[str, Any], list[str] | str]:
    """How the extension avfast._C was built and its instruction sets, best first, or why it does not load. And the CUDA
    devices as it sees them, or why there are none."""
    native: dict[str, Any] = {"available": False, "with_cuda": False, "instruction_sets": [], "reason": None}
    try:
        module = importlib.import_module("avfast._C")
        built = {"available": True, "with_cuda": bool(module.with_cuda), "instruction_sets": module.instruction_sets()}
    except Exception as error:
        return native | {"reason": _reason(error)}, "none: avfast._C is missing"
    if not module.with_cuda:
        return native | built, "none: built without CUDA"
    try:
        return native | built, module.cuda_devices() or "none: no device or driver"
    except Exception as error:
        return native | built, f"unknown: {_reason(error)}"


def _backends() -> list[dict[str, Any]] | str:
    """For every op and kind of device the backend that runs and why the others do not, or why this is unknown."""
    try:
        from avfast.kernels import load_all, registry

        load_all()
        rows = registry.explain()
    except Exception as error:
        return f"unknown: {_reason(error)}"
    return [{"op": op, "device": device, "runs": runs, "others": others} for op, device, runs, others in rows]
