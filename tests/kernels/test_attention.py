"""Condense and recall beyond what the contract asks of every op: which backend takes what, and at which sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensors import normal
from torch import Tensor

from avfast.kernels import condense, recall, registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")
TRITON = registry.OPS["recall"].backends["triton"].unavailable(DEVICE) is None


def test_condensing_every_prefix_equals_the_loop() -> None:
    args = 0.5 * normal(2, 11, 8), 0.3 * normal(24, 8, seed=1), 0.1 * normal(24, seed=2)
    memory, weight, bias = (t.to(DEVICE) for t in args)
    q, k, v = (memory @ weight.T + bias).chunk(3, -1)
    for t in range(11):
        row = memory[:, t] + torch.einsum(
            "bm,bmc->bc", torch.einsum("bc,bmc->bm", q[:, t], k[:, : t + 1]).softmax(-1), v[:, : t + 1]
        )
        torch.testing.assert_close(condense(memory, weight, bias)[:, t], row, rtol=1e-10, atol=1e-10)


def test_attention_over_several_blocks_of_everything() -> None:
    """More rows, tokens and channels than one block of a kernel has, none a multiple of it."""
    if not TRITON:
        pytest.skip("no Triton on this device")
    b, t, c = 1, 37, 35
    maps = [0.5 * normal(b, c, 5, 7, seed=i) for i in (3, 4)]
    memories = [0.5 * normal(b, t, c, seed=i) for i in (5, 6)]
    args = [a.to(DEVICE) for a in (*maps, *memories)]
    found, expected = (recall(*args, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(DEVICE != "cpu", reason="made for the CPU")
@pytest.mark.parametrize("steps", [128, 129], ids=["all scores at once", "fused attention"])
def test_condense_with_two_projections_in_one(steps: int) -> None:
    args = [0.5 * normal(2, steps, 8), 0.3 * normal(24, 8, seed=1), 0.1 * normal(24, seed=2)]
    args = [a.requires_grad_() for a in args]
    found, expected = (condense(*args, backend=b) for b in ("torch", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.linspace(1, 2, expected.numel()).view(expected.shape)
    for ours, theirs in zip(*(torch.autograd.grad((o * weights).sum(), args) for o in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(DEVICE != "cpu", reason="made for the CPU")
def test_what_pytorchs_own_ops_are_chosen_for() -> None:
    """Sizes where they were measured to be faster, types that lose nothing, and no compiled program."""
    by_torch = registry.OPS["condense"].backends["torch"]
    given = normal(4, 8, 8), normal(24, 8), normal(24)
    assert by_torch.chosen(*given) and not by_torch.chosen(given[0][:3], *given[1:])
    assert not by_torch.chosen(given[0].float(), *given[1:]) and not by_torch.chosen(*(t.half() for t in given))
    with torch.autocast("cpu"):
        assert not by_torch.chosen(*given)
    compiled = torch.compile(lambda *tensors: by_torch.chosen(*tensors), backend="eager", fullgraph=True)
    assert not compiled(*given)
    recall_by_torch = registry.OPS["recall"].backends["torch"]
    for positions, chosen in ((1 << 11, True), (1 << 12, False)):
        maps, memory = torch.zeros(1, 1, 1, positions), torch.zeros(1, 1 << 11, 1)
        assert recall_by_torch.chosen(maps, maps, memory, memory) is chosen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("size", [(2, 1, 1), (1, 1, 1), (2, 4, 5), (1, 1, 3)], ids=str)
def test_recall_gives_fused_attention_rows_that_it_takes(
    size: tuple[int, int, int], layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's kernels on CUDA ask for rows of stride C in every dimension, where there is one row too."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def watched(*given: Tensor, **options: Any) -> Tensor:
        seen.extend(given)
        return attention(*given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    b, h, w = size
    maps = [normal(b, 4, h, w, seed=i) for i in range(2)]
    args = [*(m.contiguous(memory_format=layout) for m in maps), *(normal(b, 5, 4, seed=i) for i in range(2, 4))]
    args = [a.float().to(DEVICE).requires_grad_() for a in args]
    key = args[2].mT.contiguous().mT
    recall(args[0], args[1], key, args[3], backend="sdpa")
    assert [t.stride()[1:] for t in seen] == [(t.shape[2] * t.shape[3], t.shape[3], 1) for t in seen] and len(seen) == 3


def test_what_the_recall_kernel_leaves_to_others() -> None:
    triton = registry.OPS["recall"].backends["triton"]
    assert triton.suits is not None
    for batch, tokens, dtype, wanted in (
        (16, 20, torch.float32, True),
        (512, 20, torch.float32, False),
        (512, 20, torch.bfloat16, True),
        (16, 65, torch.bfloat16, False),
    ):
        maps, memory = torch.zeros(batch, 4, 3, 3, dtype=dtype), torch.zeros(batch, tokens, 4, dtype=dtype)
        assert triton.suits(maps, maps, memory, memory) is wanted
    if not TRITON:
        pytest.skip("no Triton on this device")
    for c, dtype, most in ((129, torch.float32, 128), (129, torch.bfloat16, 128), (65, torch.float64, 64)):
        maps = torch.zeros(1, c, 2, 2, dtype=dtype, device=DEVICE)
        memory = maps.new_zeros(1, 2, c)
        with pytest.raises(ValueError, match=f"it has {c} channels, the kernel takes {most} of"):
            recall(maps, maps, memory, memory, backend="triton")
        assert torch.equal(recall(maps, maps, memory, memory), maps)
    maps, memory = torch.zeros(1, 4, 2, 2, device=DEVICE), torch.zeros(1, 2, 4, device=DEVICE).requires_grad_()
    with pytest.raises(ValueError, match="the kernel has no gradient"):
        recall(maps, maps, memory, memory, backend="triton")
    # one token is an addition, of any size and with any gradient
    feature, value = torch.zeros(1, 200, 2, 2, device=DEVICE), torch.ones(1, 1, 200, device=DEVICE, requires_grad=True)
    assert recall(feature, None, None, value, backend="triton").eq(1).all()
