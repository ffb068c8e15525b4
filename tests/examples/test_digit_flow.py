"""The table of TV-L1 presets on digits of known motion."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "digit_flow.py"


def test_the_training_preset_finds_the_digits_motion() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--clips", "6"], capture_output=True, text=True, check=True)
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith("  ")][1:]
    errors = {(canvas, row[0]): float(row[1]) for canvas, row in zip([48] * 4 + [64] * 4, rows, strict=True)}
    assert errors[48, "training"] < 0.1 and errors[64, "training"] < 0.1
    assert errors[48, "training"] < errors[48, "chambolle-pock"] < errors[48, "fast"]
