"""TV-L1's engine against the definition, bit for bit: instruction sets, threads, backends, exported programs."""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np
import pytest
import torch

from avfast._C import instruction_sets
from avfast.kernels import native
from avfast.opticalflow.tvl1 import PRESETS, TVL1Params, tvl1_flow

IMAGE = torch.zeros(8, 8)


def noise_pairs(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low-pass noise (N,1,H,W) and its shift by (2, -1) pixels."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    coarse = torch.rand(n, 1, height // 4 + 3, width // 4 + 3, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(height + 4, width + 4), mode="bicubic").clamp(0, 1)
    return image[..., 2:-2, 2:-2], image[..., 1:-3, 4:]


VARIANTS = {
    **PRESETS,
    "opencv-fixed": TVL1Params(scheme="opencv", scale_step=0.8, outer_iterations=2, iterations=5, median=3),
    "median5": TVL1Params(median=5, warps=2),
    "step0.8": TVL1Params(scale_step=0.8, scales=3, warps=2),
    "no-median": TVL1Params(solver="chambolle-pock", median=1, iterations=7),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 63), (17, 65), (48, 48), (63, 64)])
@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_engine_equals_the_definition(size: tuple[int, int], params: TVL1Params) -> None:
    """Bit for bit: every operation of both is exactly rounded and in the same order."""
    a, b = noise_pairs(2, *size)
    native = tvl1_flow(a, b, preset=params, backend="cpp")
    assert native.isfinite().all()
    assert torch.equal(native, tvl1_flow(a, b, preset=params, backend="reference"))


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_same_bits_on_every_instruction_set(params: TVL1Params, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise_pairs(2, 50, 77)
    flows = []
    for isa in instruction_sets():
        monkeypatch.setenv("AVFAST_ISA", isa)
        flows.append(tvl1_flow(a, b, preset=params, backend="cpp"))
    assert all(torch.equal(flow, flows[0]) for flow in flows)


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVFAST_ISA", "sse9")
    with pytest.raises(ValueError, match=r"AVFAST_ISA is 'sse9', expected one of .*baseline on this CPU"):
        tvl1_flow(IMAGE, IMAGE, backend="cpp")


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_same_bits_when_threads_share_the_rows_of_a_pair(params: TVL1Params) -> None:
    """Fewer pairs than threads, large enough to be shared out; 5 threads on 2 pairs leave one without work."""
    a, b = noise_pairs(2, 131, 190)
    expected = tvl1_flow(a, b, preset=params, threads=1)
    for threads in (2, 3, 5, 64):
        assert torch.equal(tvl1_flow(a, b, preset=params, threads=threads), expected)
        assert torch.equal(tvl1_flow(a[:1], b[:1], preset=params, threads=threads), expected[:1])


EVERY = pytest.mark.parametrize("preset", list(PRESETS))


@EVERY
def test_same_bits_for_any_number_of_threads_and_split(preset: str) -> None:
    a, b = noise_pairs(7, 33, 47)
    expected = tvl1_flow(a, b, preset=preset, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(tvl1_flow(a, b, preset=preset, threads=threads), expected)
    one_by_one = [tvl1_flow(a[i : i + 1], b[i : i + 1], preset=preset) for i in range(7)]
    assert torch.equal(torch.cat(one_by_one), expected)


@pytest.mark.filterwarnings("ignore:TorchScript is deprecated")
def test_is_one_node_of_compiled_and_exported_programs() -> None:
    a, b = noise_pairs(2, 20, 24)
    args = (a[:, 0] * 255, b[:, 0] * 255, *vars(PRESETS["fast"]).values())
    torch.library.opcheck(torch.ops.avfast.tvl1_flow, args, {"threads": 1, "backend": None})

    class Flow(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return 2 * tvl1_flow(a, b)

    expected = 2 * tvl1_flow(a, b)
    compiled = torch.compile(Flow(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b), expected)
    grey = [(255 * x).round().to(torch.uint8) for x in (a, b)]
    assert torch.equal(compiled(*grey), 2 * tvl1_flow(*grey))
    assert torch.equal(compiled(*(x[0, 0] for x in grey)), 2 * tvl1_flow(*grey)[0])
    program = torch.export.export(Flow(), (a, b))
    assert torch.equal(program.module()(a, b), expected)
    assert sum("tvl1_flow" in str(node.target) for node in program.graph.nodes) == 1


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise_pairs(1, 17, 19)
    expected = tvl1_flow(a, b, backend="reference")
    # None in sys.modules is Python's own way to say that an import must fail
    monkeypatch.setitem(sys.modules, "avfast._C", None)
    for name, value in zip(("_ENGINE", "NOT_BUILT"), native._load(), strict=True):
        monkeypatch.setattr(native, name, value)
    assert torch.equal(tvl1_flow(a, b), expected)
    with pytest.raises(ValueError, match=r"backend is 'cpp', which .*: avfast\._C was not built .*pip install"):
        tvl1_flow(a, b, backend="cpp")
    monkeypatch.setenv("AVFAST_BACKEND", "cpp")
    with pytest.raises(ValueError, match=r"avfast\._C was not built"):
        tvl1_flow(a, b)


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    stand_in = lambda a, b, p: called.append(1) or torch.zeros(1, 2, 8, 8)  # noqa: E731
    monkeypatch.setattr("avfast.kernels.tvl1.tvl1_flow_reference", stand_in)
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    tvl1_flow(IMAGE, IMAGE)
    assert called
    tvl1_flow(IMAGE, IMAGE, backend="cpp")
    assert len(called) == 1


def _flow_in_child(a: torch.Tensor, b: torch.Tensor, threads: int, queue: multiprocessing.Queue) -> None:
    queue.put(tvl1_flow(a, b, threads=threads).numpy())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("threads", [2, 5])
def test_works_in_a_forked_child(threads: int) -> None:
    """The parent has used the engine's threads, and PyTorch's."""
    torch.rand(1 << 20).exp_()
    a, b = noise_pairs(1, 131, 150)
    expected = tvl1_flow(a, b, threads=threads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_flow_in_child, args=(a, b, threads, queue))
    child.start()
    try:
        np.testing.assert_array_equal(queue.get(timeout=60), expected.numpy())
    finally:
        child.kill()
        child.join()
