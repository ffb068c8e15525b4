"""The facts about this machine: right where they can be checked another way."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import avfast
from avfast.machine.environment import environment


def test_report_is_json_and_true():
    report = environment()
    assert json.loads(json.dumps(report)) == report
    assert report["avfast"] == avfast.__version__
    assert report["packages"]["torch"] == torch.__version__
    assert report["cpu"]["cores"] == os.cpu_count()
    assert isinstance(report["cuda"]["torch"], list) == torch.cuda.is_available()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/cpuinfo is Linux's")
def test_instruction_sets_agree_with_pytorch():
    best = torch.backends.cpu.get_cpu_capability()
    found = environment()["cpu"]["instruction_sets"]
    assert ("avx2" in found) == (best in ("AVX2", "AVX512"))
    assert ("avx512f" in found) >= (best == "AVX512")


def test_every_op_is_listed_for_both_devices():
    from avfast.kernels import registry

    rows = environment()["backends"]
    wanted = {(op, device) for op in registry.OPS for device in ("cpu", "cuda")}
    assert {(row["op"], row["device"]) for row in rows} == wanted and len(rows) == len(wanted)
    assert {"backward_warp", "tvl1_flow"} <= registry.OPS.keys()
    assert all(row["runs"] not in row["others"] for row in rows)


def test_a_forced_backend_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    report = environment()
    assert report["variables"]["AVFAST_BACKEND"] == "reference"
    assert {row["runs"] for row in report["backends"]} == {"reference"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active"), ({"GOMP_SPINCOUNT": "100"}, None)],
)
def test_threads_of_a_command_sleep_while_they_wait(given: dict[str, str], expected: str | None):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    script = "import sys; sys.argv[0] = 'bin/avfast'; import avfast.env; avfast.env.main(['--json'])"
    for words in (["-m", "avfast.env", "--json"], ["-c", script]):
        command = [sys.executable, *words]
        found = subprocess.run(command, env=clean | given, check=True, capture_output=True, text=True)
        assert json.loads(found.stdout)["variables"].get("OMP_WAIT_POLICY") == expected
    library = "import avfast.env, os; print(os.environ.get('OMP_WAIT_POLICY'))"
    found = subprocess.run([sys.executable, "-c", library], env=clean, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "None"


def test_the_extension_names_the_instruction_sets_of_this_cpu():
    report = environment()
    sets = report["native"]["instruction_sets"]
    assert sets[-1] == "baseline"
    if platform.machine() == "x86_64":
        flags = report["cpu"]["instruction_sets"]
        assert [name for name, flag in (("avx512", "avx512f"), ("avx2", "avx2")) if flag in flags] == sets[:-1]
