"""The drop-in layers: weights carried over from plain PyTorch give the plain results, and come back unchanged."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.modules import BackwardWarp, Condense, ContextModulation, ConvLSTMCell, Recall


def plain_cell(conv: nn.Conv2d, order: str, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    gates = dict(zip(order, conv(torch.cat((x, hidden), 1)).chunk(4, 1), strict=True))
    new = gates["f"].sigmoid() * cell + gates["i"].sigmoid() * gates["g"].tanh()
    return gates["o"].sigmoid() * new.tanh(), new


@pytest.mark.parametrize("order", ["".join(p) for p in itertools.permutations("ifog")])
def test_convlstm_cell_from_any_gate_order_and_back(order: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(5 + 3, 12, 5, padding=2).double()
    x, hidden, cell = (torch.randn(2, c, 6, 4, dtype=torch.float64) for c in (5, 3, 3))
    ours = ConvLSTMCell.from_reference(conv, order=order)
    torch.testing.assert_close(
        ours(x, (hidden, cell)), plain_cell(conv, order, x, hidden, cell), rtol=1e-10, atol=1e-10
    )
    zero = torch.zeros_like(cell)
    torch.testing.assert_close(ours(x), plain_cell(conv, order, x, zero, zero), rtol=1e-10, atol=1e-10)
    back = ours.to_reference(order=order)
    assert torch.equal(back.weight, conv.weight) and torch.equal(back.bias, conv.bias)


def test_convlstm_cell_refuses_what_is_no_cell() -> None:
    for conv in (nn.Conv2d(8, 10, 3, padding=1), nn.Conv2d(8, 12, 3), nn.Conv2d(3, 12, 3, padding=1)):
        with pytest.raises(ValueError, match="expected one from C . D to 4 D channels"):
            ConvLSTMCell.from_reference(conv)
    with pytest.raises(ValueError, match="order is 'ifoo'"):
        ConvLSTMCell.from_reference(nn.Conv2d(8, 12, 3, padding=1), order="ifoo")
    with pytest.raises(ValueError, match="kernel_size is 4"):
        ConvLSTMCell(3, 4, 4)


@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(6, 6, 1, bias=False)])
def test_condense_and_recall_from_projections_and_back(layer) -> None:
    torch.manual_seed(0)
    query, key, value = layers = [layer().double() for _ in range(3)]

    def project(which: nn.Module, rows: Tensor) -> Tensor:
        return F.linear(rows, which.weight.flatten(1), which.bias)

    memory = torch.randn(2, 5, 6, dtype=torch.float64)
    module = Condense.from_reference(query, key, value)
    for t in range(1, 6):
        rows = memory[:, :t]
        scores = (project(query, rows) @ project(key, rows).mT).softmax(-1)
        expected = (rows + scores @ project(value, rows))[:, -1]
        torch.testing.assert_close(module(memory)[:, t - 1], expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(module.to_reference(), layers, strict=True):
        assert torch.equal(ours.weight, theirs.weight.flatten(1))

    recall = Recall.from_reference(query, key, value)
    feature = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    positions = feature.flatten(2).mT
    scores = (project(query, positions) @ project(key, memory).mT).softmax(-1)
    expected = feature + (scores @ project(value, memory)).mT.view_as(feature)
    torch.testing.assert_close(recall(feature, *recall.project(memory)), expected, rtol=1e-10, atol=1e-10)
    single = Recall.from_reference(None, None, value)
    expected = feature + project(value, memory[:, 0])[:, :, None, None]
    torch.testing.assert_close(single(feature, *single.project(memory[:, :1])), expected, rtol=1e-10, atol=1e-10)
    assert [None if r is None else r.weight.shape for r in single.to_reference()] == [None, None, (6, 6)]
    assert torch.equal(recall.to_reference()[0].weight, query.weight.flatten(1))


def test_context_modulation_starts_as_the_identity_and_joins() -> None:
    torch.manual_seed(0)
    module = ContextModulation(7, 3)
    context, motion, skip = torch.randn(2, 3, 4, 5), torch.randn(2, 7), torch.randn(2, 2, 4, 5)
    assert torch.equal(module(context, motion), context)
    for mlp in (module.gamma, module.beta):
        nn.init.normal_(mlp[2].weight)
    other = ContextModulation.from_reference(*module.to_reference())
    joined = other(context, motion, before=[skip])
    assert torch.equal(joined[:, :2], skip)
    gamma, beta = module.gamma(motion), module.beta(motion)
    torch.testing.assert_close(joined[:, 2:], gamma[..., None, None] * context + beta[..., None, None])


def test_backward_warp_module() -> None:
    image = torch.arange(12.0).view(1, 1, 3, 4)
    flow = torch.zeros(1, 2, 3, 4)
    flow[:, 0] = 1
    assert BackwardWarp()(image, flow)[0, 0, 0].tolist() == [1, 2, 3, 3]
    assert BackwardWarp("zeros")(image, flow)[0, 0, 0].tolist() == [1, 2, 3, 0]
    assert "zeros" in repr(BackwardWarp("zeros"))
