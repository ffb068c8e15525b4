"""The git commit that this code is, recorded beside results."""

from __future__ import annotations

import subprocess
from pathlib import Path


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
