"""Condense and Recall (Eq. 1 and 2): single-head attention without the factor 1/sqrt(C).

Shapes: memory B T C, feature map B C H W, recalled memory B M C. Condense of every prefix is one causal attention over
T. Recall over one token is a softmax over one key, identically 1: it adds the value at every position, one pass that
leaves nothing to fuse. Beyond that both run PyTorch's own scaled_dot_product_attention, which never holds the scores in
memory: (T, T) and (H W, M) values where the definition does.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import checks, reference, registry


def _condense_sdpa(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    q, k, v = F.linear(memory, weight, bias).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True, scale=1.0)
    return memory + attended[:, 0]


def _recall_sdpa(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    if query is None or key is None or value.shape[1] == 1:
        return reference.recall(feature, query, key, value)
    positions = query.flatten(2).mT[:, None]
    recalled = F.scaled_dot_product_attention(positions, key[:, None], value[:, None], scale=1.0)
    return feature + recalled[:, 0].mT.reshape(feature.shape)


def _never(*_arguments: object) -> None:
    return None


_SDPA = registry.Backend(_condense_sdpa, _never, _never)
_CONDENSE = registry.define("condense", reference.condense, sdpa=_SDPA)
_RECALL = registry.define("recall", reference.recall, sdpa=_SDPA._replace(function=_recall_sdpa))


def condense(memory: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Condense every prefix of a motion memory into one vector.

    memory (B,T,C); weight (3C,C) and bias (3C): the q, k, v projections stacked in that order. Returns (B,T,C): row t
    is x_t + softmax(q_t K^T) V over the rows up to and including t. Raises ValueError on a wrong shape or dtype.
    Source: paper, Eq. 1.
    """
    checks.shape("memory", memory, "B T C")
    c = memory.shape[-1]
    checks.shape("weight", weight, "3C C", **{"3C": 3 * c, "C": c})
    checks.shape("bias", bias, "3C", **{"3C": 3 * c})
    checks.same_device(memory=memory, weight=weight, bias=bias)
    return _CONDENSE(memory, weight, bias, backend=backend)


def recall(
    feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor, *, backend: str | None = None
) -> Tensor:
    """Let every position of a feature map recall from a memory.

    feature (B,C,H,W); query (B,C,H,W) its projection; key and value (B,M,C) the memory's. Returns
    feature + softmax(query key^T) value, (B,C,H,W). With M = 1 query and key have no influence and may be None. Raises
    ValueError on a wrong shape or dtype, an empty memory, or a missing query or key with M > 1. Source: paper, Eq. 2.
    """
    checks.shape("feature", feature, "B C H W")
    b, c, h, w = feature.shape
    checks.shape("value", value, "B M C", B=b, C=c)
    m = value.shape[1]
    if m == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}, expected at least one memory token")
    if m > 1 and (query is None or key is None):
        raise ValueError(f"query and key are needed for a memory of {m} tokens; only with one token may they be None")
    if query is not None:
        checks.shape("query", query, "B C H W", B=b, C=c, H=h, W=w)
    if key is not None:
        checks.shape("key", key, "B M C", B=b, M=m, C=c)
    checks.same_device(feature=feature, query=query, key=key, value=value)
    return _RECALL(feature, query, key, value, backend=backend)
