"""Every committed benchmark result says which script wrote it, when, on which machine and of which code."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "bench/results").rglob("*.json"))


def check(about: dict[str, Any], root: Path) -> None:
    """Assert that a result is complete."""
    keys = {"script", "command", "date", "code", "older_than_code", "environment", "rows"}
    assert keys <= about.keys() <= keys | {"reason", "note"}
    sources = [(root / script).read_text() for script in about["script"]]
    assert sources
    # what wrote it, or where that was not kept what writes such a file now
    assert about["command"].startswith("pytest ") and not re.search(r"\s/", about["command"])
    assert datetime.date.fromisoformat(about["date"])
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", about["code"])
    assert about["older_than_code"] in (True, False) and about["older_than_code"] == ("reason" in about)
    machine = about["environment"]
    assert machine["cpu"]["name"] and machine["cpu"]["usable_cores"] >= 1 and machine["cuda"]["torch"]
    assert {"avfast", "python", "os"} <= machine.keys() and {"torch", "triton", "numpy"} <= machine["packages"].keys()
    assert "/" not in machine["python"]
    assert about["rows"]
    for row in about["rows"]:
        # the first word of a case is written, or a preset, in the script
        word = re.split(r"[: ]", row["case"])[0]
        assert any(re.search(rf"\b{word}\b", source) for source in sources), row["case"]
        assert any(name.endswith("_s") and value > 0 for name, value in row.items()), row["case"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_result_is_complete(path: Path) -> None:
    check(json.loads(path.read_text()), ROOT)


def test_benchmarks_write_complete_results(tmp_path: Path) -> None:
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "conftest.py").symlink_to(ROOT / "bench/conftest.py")
    case = "compare('sum: 10 numbers', lambda: sum(range(10)), {'list': lambda: list(range(10))})"
    (bench / "bench_sum.py").write_text(f"def bench_sum(compare):\n    {case}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npython_files = bench_*.py\npython_functions = bench_*\n")
    command = [sys.executable, "-m", "pytest", "-q", "bench", "--benchmark-disable", "--results", "out/sum.json"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    about = json.loads((tmp_path / "out/sum.json").read_text())
    check(about | {"code": about["code"] or "0" * 12}, tmp_path)
    assert about["script"] == ["bench/bench_sum.py"]
    assert about["command"] == "pytest -q bench --benchmark-disable"


def test_a_result_without_its_script_is_seen() -> None:
    about = json.loads(RESULTS[0].read_text())
    with pytest.raises(FileNotFoundError):
        check(about | {"script": ["bench/bench_gone.py"]}, ROOT)
    with pytest.raises(AssertionError):
        check(about | {"older_than_code": not about["older_than_code"]}, ROOT)
