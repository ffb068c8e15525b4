"""`avfast env` prints what this machine will use, and why: see `avfast.machine.environment`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from avfast.cli.command import run_command
from avfast.machine.environment import environment


def _machine(report: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, native, cuda = report["cpu"], report["native"], report["cuda"]
    if native["available"]:
        sets = ", ".join(native["instruction_sets"])
        with_cuda = "with" if native["with_cuda"] else "without"
        extension = f"loads, built {with_cuda} CUDA; instruction sets, best first: {sets}"
    else:
        extension = f"missing: {native['reason']}"
    devices = {name: found if isinstance(found, str) else "; ".join(found) for name, found in cuda.items()}
    return [
        ("avfast", f"{report['avfast']}, commit {report['commit'] or 'unknown'}"),
        ("python", report["python"]),
        ("os", report["os"]),
        ("cpu", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable, {cpu['memory_gib']} GiB"),
        ("instruction sets", " ".join(cpu["instruction_sets"]) or "none of AVX2, AVX-512 known"),
        ("CUDA (PyTorch)", devices["torch"]),
        ("CUDA (avfast._C)", devices["native"]),
        ("avfast._C", extension),
    ]


def _backends(report: dict[str, Any]) -> list[tuple[str, str]]:
    if isinstance(report["backends"], str):
        return [("ops", report["backends"])]
    # the CUDA rows matter only to people with a GPU; the JSON always has them
    devices = {"cpu"} if isinstance(report["cuda"]["torch"], str) else {"cpu", "cuda"}
    lines = []
    for row in report["backends"]:
        if row["device"] in devices:
            others = [f"not {name}: {why}" for name, why in row["others"].items()]
            lines.append((f"{row['op']} ({row['device']})", ", ".join([row["runs"], *others])))
    return lines


def _print(sections: dict[str, list[tuple[str, str]]]) -> None:
    """Sections of lines (name, text), without the empty ones: tables on a terminal, otherwise indented lines."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        console = Console()
        terminal = console.is_terminal
    except ImportError:
        terminal = False
    for title, lines in sections.items():
        if terminal and lines:
            table = Table(title=title, title_justify="left", show_header=False)
            for name, text in lines:
                # as Text, because rich would read brackets in a path or a reason as markup
                table.add_row(Text(name), Text(text))
            console.print(table)
        elif lines:
            print(f"{title}:")
            for name, text in lines:
                print(f"  {name}: {text}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="avfast env", description="What this machine will use, and why.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON, as a run's env.json holds it")
    arguments = parser.parse_args(argv)
    report = environment()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    packages, variables = list(report["packages"].items()), list(report["variables"].items())
    _print({"machine": _machine(report), "packages": packages, "backends": _backends(report), "variables": variables})
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
