"""What every benchmark shares: paired timing, and the results as a table and a JSON file.

    pytest bench/ --benchmark-only [--results FILE.json]

The file says which scripts and command wrote it, when, on which machine, and the commit of the code.

A case first checks that all contenders agree, then times them in turns, round by round, so that what else the machine
does hits all alike. A ratio is the median over the rounds of (the rival's time / ours): above 1 we are faster.

The process keeps the memory that it has had once. By default large blocks go back to the system and come as new pages,
whose first touch takes longer than the op (48 MB out of `modulate`: 28 ms instead of 5), and whose call that hits
depends on who came before.

On CUDA an op has two rows: as Python calls it, one call after the other, where small ones take what Python and the
launches take; and `in a graph`, where a CUDA graph of many calls is replayed: the GPU's own time.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import InductorError

ROWS: list[dict[str, Any]] = []
SCRIPTS: set[str] = set()
"""The files whose cases have a row, from the checkout's root."""


def _keep_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


_keep_memory()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=None, help="write all rows and the environment to this JSON file")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


@pytest.fixture
def compare(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., dict[str, Any]]]:
    """compare(case, ours, rivals, rounds=5, ours_calls=1, **facts): time `ours` and each rival in turns, record a row.

    ours_calls: how many of ours follow each other in a turn, of which the mean counts: what takes a hundredth of its
    rival's time would else be timed with the rival's data in the caches.
    The row: the case, the facts, seconds (median) of all, and for every rival the ratio.
    """
    timed: list[str] = []

    def run(
        case: str,
        ours: Callable[[], object],
        rivals: dict[str, Callable[[], object]],
        rounds: int = 5,
        ours_calls: int = 1,
        **facts: Any,
    ) -> dict[str, Any]:
        theirs: dict[str, list[float]] = {name: [] for name in rivals}

        def turn() -> None:
            for name, call in rivals.items():
                theirs[name].append(_timed(call))

        def own_turn() -> None:
            own.append(_timed(partial(_repeat, ours, ours_calls)) / ours_calls)

        _timed(ours)
        for call in rivals.values():
            _timed(call)
        own: list[float] = []
        if not timed:
            benchmark.pedantic(own_turn, setup=turn, rounds=rounds)
        else:
            # the fixture times once per test
            for _ in range(rounds if benchmark.enabled else 1):
                turn()
                own_turn()
        timed.append(case)
        row = {"case": case, **facts, "rounds": rounds, "ours_s": statistics.median(own)}
        for name, times in theirs.items():
            row[f"{name}_s"] = statistics.median(times)
            row[f"{name}_ratio"] = statistics.median(t / o for t, o in zip(times, own, strict=True))
        benchmark.extra_info.update(row)
        ROWS.append(row)
        SCRIPTS.add(request.path.relative_to(request.config.rootpath).as_posix())
        return row

    yield run
    path = request.config.getoption("--results")
    if path is not None:
        # after every case: what an interrupted run has found is kept
        _write(path, request.config)


@pytest.fixture(params=["forward", "forward+backward"])
def contest(request: pytest.FixtureRequest, compare: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """contest(case, calls, args, forward=values, backward=values, rounds=15, tolerance=1e-4): ours against the others,
    by direction.

    calls: {"ours": f, "eager": g, ...}, all called with `args`; values: how many values ours has to move in the forward
    and in the backward pass. All must agree, in outputs and gradients, within `tolerance` of the largest value
    (frameworks sum in other orders). A rival more is `copy`: PyTorch copying as many bytes; its ratio is the share of
    the copy bandwidth that ours reaches.
    """

    def run(
        case: str,
        calls: dict[str, Callable[..., Any]],
        args: list[torch.Tensor],
        *,
        forward: float,
        backward: float,
        rounds: int = 15,
        tolerance: float = 1e-4,
    ) -> None:
        def outputs(call: Callable[..., Any]) -> tuple[torch.Tensor, ...]:
            out = call(*args)
            return out if isinstance(out, tuple) else (out,)

        wanted = [a for a in args if a.requires_grad]
        with torch.no_grad():
            seeds = [torch.randn_like(o) for o in outputs(calls["ours"])]

        def both(call: Callable[..., Any]) -> list[torch.Tensor]:
            outs = outputs(call)
            return [*outs, *torch.autograd.grad(outs, wanted, seeds)]

        # detached: an autograd graph that lives on keeps the leaves' nodes on its stream, and no other can capture them
        expected = [t.detach() for t in both(calls["ours"])]
        able = {}
        for name, call in calls.items():
            try:
                found = [t.detach() for t in both(call)]
            except InductorError:
                # a fault of PyTorch's compiler, as 2.11's on CUDA with the loss of several channels
                continue
            able[name] = call
            for ours, theirs in zip(expected, found, strict=True):
                error = (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())
                assert error < tolerance, f"{name} differs by {error}"
        calls = able
        del expected, found, ours, theirs

        case = f"{case} {request.param}"
        if request.param == "forward":
            with torch.no_grad():
                _compare_calls(compare, case, {n: lambda c=c: c(*args) for n, c in calls.items()}, forward, rounds)
        else:
            both_ways = {n: lambda c=c: both(c) for n, c in calls.items()}
            _compare_calls(compare, case, both_ways, forward + backward, rounds)

    return run


def _compare_calls(
    compare: Callable[..., dict[str, Any]], case: str, calls: dict[str, Callable[[], Any]], values: float, rounds: int
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randn(max(1, int(values / 2)), device=device)
    target = torch.empty_like(source)
    calls = {**calls, "copy": lambda: target.copy_(source)}
    calls["ours"]()
    # enough calls per timing that the clock and the noise of one call matter little
    repeat = max(1, int(2e-3 / max(1e-6, min(_timed(calls["ours"]) for _ in range(5)))))
    repeated = {n: partial(_repeat, c, repeat) for n, c in calls.items()}
    compare(case, repeated.pop("ours"), repeated, rounds=rounds, calls=repeat, values_moved=int(values))
    if device == "cuda":
        # a replay takes the clock and the wait once for all its calls
        repeat *= 4
        graphs = {n: _graph(partial(_repeat, c, repeat)).replay for n, c in calls.items() if n != "loop"}
        ours = graphs.pop("ours")
        row = compare(f"{case} in a graph", ours, graphs, rounds=rounds, calls=repeat, values_moved=int(values))
        row["gb_per_s"] = 4e-9 * values * repeat / row["ours_s"]


@pytest.fixture
def captured() -> Callable[[Callable[[], object]], Callable[[], None]]:
    """captured(call): what replays a CUDA graph of that call."""
    return lambda call: _graph(call).replay


def _graph(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    # no node of an autograd graph may be left from the default stream
    gc.collect()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def _repeat(call: Callable[[], Any], times: int) -> None:
    # no result is kept: memory would be new, and its pages mapped, in every call
    for _ in range(times):
        call()


def _write(path: Path, config: pytest.Config) -> None:
    from avfast.files.atomic import replacing
    from avfast.machine.environment import environment

    # without the path of the interpreter, which is nobody's business
    surroundings = environment() | {"python": platform.python_version()}
    arguments = [str(argument) for argument in config.invocation_params.args]
    if "--results" in arguments:
        place = arguments.index("--results")
        del arguments[place : place + 2]
    about = {
        "script": sorted(SCRIPTS),
        "command": shlex.join(["pytest", *arguments]),
        "date": datetime.date.today().isoformat(),
        "code": surroundings["commit"],
        "older_than_code": False,
        "environment": surroundings,
        "rows": ROWS,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    for suite in dict.fromkeys(row["case"].split(":")[0] for row in ROWS):
        rows = [row for row in ROWS if row["case"].split(":")[0] == suite]
        names = list(dict.fromkeys(name for row in rows for name in row if name != "case"))
        table = [["case", *names]]
        for row in rows:
            cells = (row.get(name, "") for name in names)
            table.append([row["case"], *(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells)])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        write("")
        for line in table:
            write("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
