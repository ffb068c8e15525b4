"""The fused ops on several threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from avfast.kernels import backward_warp, convlstm_gates, flow_loss, modulate, native

pytestmark = pytest.mark.skipif(native.NOT_BUILT is not None, reason=str(native.NOT_BUILT))


def random(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# large enough to be shared out, in parts that begin inside rows, channels and features
OPS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "warp": (lambda i, f: backward_warp(i, f, backend="cpp"), [random(3, 2, 90, 101), random(3, 2, 90, 101, seed=1)]),
    "gates": (
        lambda g, c: torch.cat(convlstm_gates(g, c, backend="cpp")),
        [random(5, 28, 40, 41), random(5, 7, 40, 41, seed=1)],
    ),
    "loss": (
        lambda p: flow_loss(p, random(3, 4, 2, 50, 51, seed=1), random(3, 4, 3, 50, 51, seed=2), backend="cpp"),
        [random(3, 4, 2, 50, 51)],
    ),
    "modulate": (
        lambda x, g, b, *before: modulate(x, g, b, before=before, backend="cpp"),
        [random(3, 7, 30, 40), random(3, 7), random(3, 7, seed=1), random(3, 2, 30, 40), random(3, 5, 30, 40)],
    ),
}


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_number_of_threads(op: str, threads_restored: None) -> None:
    call, given = OPS[op]

    def results(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        inputs = [tensor.clone().requires_grad_() for tensor in given]
        out = call(*inputs)
        weights = torch.arange(1.0, out.numel() + 1).view_as(out)
        return [out.detach(), *torch.autograd.grad(out, inputs, weights)]

    expected = results(1)
    for threads in (2, 5):
        for found, wanted in zip(results(threads), expected, strict=True):
            assert torch.equal(found, wanted)


_FORKS = """
import os, torch
from avfast.kernels import convlstm_gates
torch.set_num_threads(2)
gates, cell = torch.randn(5, 28, 60, 61), torch.randn(5, 7, 60, 61)
# both PyTorch's threads and ours are at work before the fork
expected = convlstm_gates(gates.sin(), cell, backend="cpp")[0].numpy().tobytes()
gates = gates.sin()
child = os.fork()
if child == 0:
    # of PyTorch's own ops none may run here: GNU's OpenMP would wait for threads that a forked child does not have
    os._exit(convlstm_gates(gates, cell, backend="cpp")[0].numpy().tobytes() != expected)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_computes_the_same_bits() -> None:
    # a child that hangs is ended with its parent's group
    process = subprocess.Popen([sys.executable, "-c", _FORKS], start_new_session=True)
    try:
        assert process.wait(60) == 0
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
