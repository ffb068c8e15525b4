"""What this machine is and what avfast will use on it: `python -m avfast.env`, and `env.json` in every run folder.

Nothing here may fail: whatever cannot be found out is reported with the reason, and a missing package is part of the
report.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from avfast import __version__

# what decides between the native code's variants (x86-64-v3 and v4)
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_PACKAGES = {"torch": "torch", "triton": "triton", "numpy": "numpy", "av": "av"}
# they all install the same module, so the last one installed overwrites the others' files
_OPENCV = (
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
    "opencv-python-headless",
    "opencv-python",
)


def environment() -> dict[str, Any]:
    """Describe this machine as nested dictionaries and lists that JSON can hold.

    Keys: avfast, commit, python, os, cpu, packages, cuda, native, backends, variables, warnings. It imports PyTorch and
    asks it for CUDA devices; it never raises.
    """
    opencv = [name for name in _OPENCV if _installed(name)]
    packages = {name: _package(name, module) for name, module in _PACKAGES.items()}
    packages["cv2"] = _package(opencv[0] if opencv else _OPENCV[0], "cv2")
    native = _native()
    return {
        "avfast": __version__,
        "commit": commit(),
        "python": f"{platform.python_version()} ({sys.executable})",
        "os": platform.platform(),
        "cpu": _cpu(),
        "packages": packages,
        "cuda": {"torch": _torch_devices(), "native": native.pop("devices")},
        "native": native,
        "backends": _backends(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("AVFAST_")},
        "warnings": _opencv_warnings(opencv),
    }


def commit() -> str | None:
    """The checkout's commit, 12 digits and `-dirty` where tracked files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    # an installed package may lie inside somebody else's checkout
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _package(distribution: str, module: str) -> str:
    # metadata alone would miss the usual trouble: installed, but a shared library is absent
    version = _installed(distribution)
    try:
        found = importlib.import_module(module)
    except Exception as error:
        return f"{version}, import fails: {_reason(error)}" if version else f"not installed ({_reason(error)})"
    return str(getattr(found, "__version__", None) or version or "unknown")


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass
    try:
        # what this process may use, which a container or a batch system can restrict
        usable: int | None = len(os.sched_getaffinity(0))
    except AttributeError:
        usable = os.cpu_count()
    try:
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        memory = None
    return {
        "name": name,
        "instruction_sets": [flag for flag in _INSTRUCTION_SETS if flag in flags],
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "memory_gib": memory,
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


def _native() -> dict[str, Any]:
    """Whether `avfast._C` loads and with or without CUDA, the devices it sees, or why it does not load."""
    try:
        module = importlib.import_module("avfast._C")
        with_cuda = bool(module.with_cuda)
    except Exception as error:
        return {
            "available": False,
            "with_cuda": False,
            "instruction_sets": [],
            "reason": _reason(error),
            "devices": "none: avfast._C is missing",
        }
    devices: list[str] | str = "none: built without CUDA"
    if with_cuda:
        try:
            devices = list(module.cuda_devices()) or "none: no device or driver"
        except Exception as error:
            devices = f"unknown: {_reason(error)}"
    # best first; AVFAST_ISA asks for another
    sets = list(module.instruction_sets())
    return {
        "available": True,
        "with_cuda": with_cuda,
        "instruction_sets": sets,
        "reason": None,
        "devices": devices,
    }


def _backends() -> list[dict[str, Any]] | str:
    """For every op and kind of device the backend that runs and why the others do not, or why this is not known."""
    try:
        from avfast.kernels import load_all, registry

        load_all()
        rows = registry.explain()
    except Exception as error:
        return f"unknown: {_reason(error)}"
    return [{"op": op, "device": device, "runs": runs, "others": others} for op, device, runs, others in rows]


def _opencv_warnings(installed: list[str]) -> list[str]:
    if len(installed) < 2:
        return []
    return [
        f"{' and '.join(installed)} are installed and overwrite each other's cv2: uninstall them all, "
        f"then install {_OPENCV[0]}"
    ]


def _sections(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """The report as titled lists of (name, text), for people."""

    def listed(value: list[str] | str) -> str:
        return value if isinstance(value, str) else "; ".join(value)

    cpu, native = report["cpu"], report["native"]
    sets = ", ".join(native["instruction_sets"])
    built = f"loads, built {'with' if native['with_cuda'] else 'without'} CUDA; instruction sets, best first: {sets}"
    machine = [
        ("avfast", f"{report['avfast']}, commit {report['commit'] or 'unknown'}"),
        ("python", report["python"]),
        ("os", report["os"]),
        ("cpu", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {cpu['memory_gib']} GiB"),
        ("instruction sets", " ".join(cpu["instruction_sets"]) or "none of AVX2, AVX-512 known"),
        ("CUDA (PyTorch)", listed(report["cuda"]["torch"])),
        ("CUDA (avfast._C)", listed(report["cuda"]["native"])),
        ("avfast._C", built if native["available"] else f"missing: {native['reason']}"),
    ]
    if isinstance(report["backends"], str):
        backends = [("ops", report["backends"])]
    else:
        # what would run on a GPU is news only where there is one; the JSON has it always
        present = {"cpu"} if isinstance(report["cuda"]["torch"], str) else {"cpu", "cuda"}
        backends = [
            (
                f"{row['op']} ({row['device']})",
                ", ".join([row["runs"], *(f"not {name}: {why}" for name, why in row["others"].items())]),
            )
            for row in report["backends"]
            if row["device"] in present
        ]
    sections = [("machine", machine), ("packages", list(report["packages"].items())), ("backends", backends)]
    if report["variables"]:
        sections.append(("variables", list(report["variables"].items())))
    return sections


def _print(report: dict[str, Any]) -> None:
    sections = _sections(report)
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        terminal = console.is_terminal
    except ImportError:
        terminal = False
    if terminal:
        for title, rows in sections:
            table = Table(title=title, title_justify="left", show_header=False)
            for name, text in rows:
                # brackets in a path or a reason are text, not markup
                table.add_row(Text(name), Text(text))
            console.print(table)
    else:
        for title, rows in sections:
            print(f"{title}:")
            for name, text in rows:
                print(f"  {name}: {text}")
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="avfast env", description="What this machine will use, and why.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, as a run's env.json holds it")
    arguments = parser.parse_args(argv)
    report = environment()
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


if __name__ == "__main__":
    from avfast.cli.command import run_command

    run_command(main)
