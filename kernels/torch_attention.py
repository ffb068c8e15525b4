"""Condense and Recall by PyTorch's own ops: its fused attention ("sdpa"), and an order of products and sums that suits
the CPU ("torch"). Shapes as in `attention.py`. Autograd has the gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, registry

# up to this many steps the scores of all of them are in memory at once
_FEW_STEPS = 128


def rows_of(feature: Tensor) -> Tensor:
    """(B,C,H,W) -> (B, H W, C), no copy where it lies contiguous or channels-last."""
    return feature.flatten(2).mT


def _condense_sdpa(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    q, k, v = F.linear(memory, weight, bias).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True, scale=1.0)
    return memory + attended[:, 0]


def _one_head(rows: Tensor) -> Tensor:
    """(B,N,C) -> (B,1,N,C) as PyTorch's fused kernels want it: rows one behind the other, with the strides that say so
    also where N is 1. Of other rows they say that there is no kernel (N = 1), or leave them to the definition."""
    b, n, c = rows.shape
    # through (B N, C): the strides of a dimension of 1 are what they were, whatever contiguous() is asked
    return rows.reshape(b * n, c).contiguous().view(b, 1, n, c)


def _recall_sdpa(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    if query is None or key is None or value.shape[1] == 1:
        return reference.recall(feature, query, key, value)
    given = _one_head(rows_of(query)), _one_head(key), _one_head(value)
    recalled = F.scaled_dot_product_attention(*given, scale=1.0)
    return feature + recalled[:, 0].mT.reshape(feature.shape)


def _condense_torch(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With the projections of queries and keys folded into one, as in the forward kernel: two products where there are
    three. On 2 cores it is 1.2 to 1.5 times as fast as with three (16 to 128 sequences of 20 to 128)."""
    w_q, w_k, w_v = weight.chunk(3)
    b_q, _, b_v = bias.chunk(3)
    query = F.linear(memory, w_k.T @ w_q, b_q @ w_k)
    t = memory.shape[1]
    if t <= _FEW_STEPS:
        future = memory.new_full((t, t), float("-inf")).triu_(1)
        mean = torch.baddbmm(future, query, memory.mT).softmax(dim=-1) @ memory
    else:
        row = memory[:, None]
        mean = F.scaled_dot_product_attention(query[:, None], row, row, is_causal=True, scale=1.0)[:, 0]
    return memory + F.linear(mean, w_v, b_v)


def _recall_torch(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    """With the positions along the rows, as the maps lie: nothing is transposed, and the last product adds. On 2 cores
    that is 1.4 to 2 times as fast as the definition up to 64 tokens, 1.1 times at 200; over maps of 3x3 it would take
    1.5 to 2.5 times as long."""
    few = value.shape[1] <= 256 and feature.shape[2] * feature.shape[3] >= 12
    if query is None or key is None or value.shape[1] == 1 or not few or not feature.is_contiguous():
        return reference.recall(feature, query, key, value)
    weights = (key @ query.flatten(2)).softmax(dim=1)
    return torch.baddbmm(feature.flatten(2), value.mT, weights).view(feature.shape)


def _torch_unavailable(device: str) -> str | None:
    return None if device == "cpu" else "made for the CPU"


def _torch_unsupported(first: Tensor, *others: Tensor | None) -> str | None:
    if not first.is_cpu:
        return _torch_unavailable("another")
    dtype = first.dtype
    for tensor in others:
        if tensor is not None and tensor.dtype is not dtype:
            return "its tensors are of different types"
    # the product of two weights would be rounded to a half type
    half = dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    return "half types, or autocast to them" if half else None


def _condense_by_torch(memory: Tensor, _weight: Tensor, _bias: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    # with fewer rows the product of the weights counts: 16 sequences of 20 (C = 128) take as long either way
    b, t, c = memory.shape
    return b * t >= 4 * c


def _many_scores(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    """Whether the fused attention is the faster one. On 2 cores it takes 1 to 1.6 times as long up to 4 million scores
    and 0.6 to 0.8 times from 8 million on; with a gradient 1.1 to 1.3 times up to 5 million, 0.7 to 1.1 from 8."""
    b, _, h, w = feature.shape
    scores = b * h * w * value.shape[1]
    if not feature.is_cpu or scores <= 1 << 22:
        return scores > 1 << 26
    return scores > 1 << 23 or not registry.wants_gradient(*(t for t in (feature, query, key, value) if t is not None))


# nothing is asked of a compiled program's sizes, which would then hold for these sizes only
def _recall_by_torch(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not _many_scores(feature, query, key, value)


def _recall_by_sdpa(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    return torch.compiler.is_compiling() or _many_scores(feature, query, key, value)


CONDENSE = registry.Backend(
    _condense_torch,
    _torch_unsupported,
    _torch_unavailable,
    where=("not compiled, 4 C rows or more", _condense_by_torch),
)
CONDENSE_SDPA = registry.Backend(_condense_sdpa, registry.never, registry.never)
RECALL = registry.Backend(
    _recall_torch,
    _torch_unsupported,
    _torch_unavailable,
    where=("not compiled, up to 2^22 scores, 2^23 with a gradient", _recall_by_torch),
)
RECALL_SDPA = registry.Backend(
    _recall_sdpa,
    registry.never,
    registry.never,
    where=("compiled, or more than 2^22 scores on the CPU, 2^23 with a gradient, 2^26 on a GPU", _recall_by_sdpa),
)
