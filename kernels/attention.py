"""Condense and Recall (Eq. 1 and 2): single-head attention without the factor 1/sqrt(C).

Shapes: memory B T C, feature map B C H W, recalled memory B M C.

Condense of every prefix is one causal attention over T. Both ops are attention over few rows, for which PyTorch has
fast kernels, so most backends are an order of its ops:

    sdpa     PyTorch's scaled_dot_product_attention
    torch    the order of products and sums that suits a CPU (fp32 and fp64)
    triton   recall without a gradient: a program per 16 positions, 4 B H W M C flops and 3 B H W C values

Condense has no kernel of its own. One was written (projections, attention and residual in one pass); on an H200, in a
CUDA graph, PyTorch's attention took 0.2 to 0.5 times as long in fp32 (B = 16 and 128, T = 5 to 128) and 0.4 to 1.05
times in bf16, with the backward pass 0.3 to 0.8 and 0.3 to 1.03 times. A backward kernel of recall lost likewise.

Condense on the CPU folds the projections of queries and keys into one: with S = softmax over the prefix

    q_t . (W_k x_s + b_k) = (W_k^T q_t) . x_s + a constant of row t, which the softmax does not see
    sum_s S_ts (W_v x_s + b_v) = W_v (sum_s S_ts x_s) + b_v, since the weights of a row sum to 1

so no keys and no values are formed, and what a row attends to is the memory itself.

Recall over one token is a softmax over one key, which is identically 1: it adds the value at every position and never
looks at query and key. Triton on an H200 takes 0.4 to 0.5 times as long as the definition in bf16, 0.8 to 0.9 in fp32
up to 2048 positions; it loses beyond, and with 512 tokens. Its products of fp32 are fp32 (`ieee`: no tensor cores);
those of half types are TF32, whose 10 bits of mantissa hold every bf16 and fp16 value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, native, reference, registry, triton_utils
from .triton_utils import jit, tl, triton


@jit
def _tile(ptr, strides, b, row, column, rows, columns, COMPUTE: tl.constexpr):
    """Rows and columns of matrix b of a stack with strides (matrix, row, column), 0 where the matrix ends."""
    at = ptr + b * strides[0] + row[:, None] * strides[1] + column[None] * strides[2]
    return tl.load(at, (row[:, None] < rows) & (column[None] < columns), 0).to(COMPUTE)


@jit
def _store(ptr, strides, b, row, column, rows, columns, value):
    at = ptr + b * strides[0] + row[:, None] * strides[1] + column[None] * strides[2]
    tl.store(at, value, (row[:, None] < rows) & (column[None] < columns))


@jit
def _dot(a, b, PRECISION: tl.constexpr, COMPUTE: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=COMPUTE)


@jit
def _attend(
    query, key_ptr, key_strides, value_ptr, value_strides, b, channel, tokens, channels,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """softmax(query key^T) value over all tokens, one block of tokens after the other. All sums shrink where a row's
    largest score grows (online softmax)."""
    largest = tl.full([query.shape[0]], float("-inf"), COMPUTE)
    total = tl.zeros([query.shape[0]], COMPUTE)
    out = tl.zeros(query.shape, COMPUTE)
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        key = _tile(key_ptr, key_strides, b, token, channel, tokens, channels, COMPUTE)
        value = _tile(value_ptr, value_strides, b, token, channel, tokens, channels, COMPUTE)
        scores = tl.where(token[None] < tokens, _dot(query, tl.trans(key), PRECISION, COMPUTE), float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        shrink = tl.exp(before - largest)
        weights = tl.exp(scores - largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + _dot(weights, value, PRECISION, COMPUTE)
    return out / total[:, None]


@jit
def _recall_fwd_kernel(
    feature_ptr, query_ptr, key_ptr, value_ptr, out_ptr,
    feature_strides, query_strides, key_strides, value_strides, out_strides, rows, tokens, channels,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    row = start + tl.arange(0, BLOCK).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    query = _tile(query_ptr, query_strides, b, row, channel, rows, channels, COMPUTE)
    recalled = _attend(
        query, key_ptr, key_strides, value_ptr, value_strides, b, channel, tokens, channels, BLOCK, PRECISION, COMPUTE
    )
    feature = _tile(feature_ptr, feature_strides, b, row, channel, rows, channels, COMPUTE)
    _store(out_ptr, out_strides, b, row, channel, rows, channels, feature + recalled)


_BLOCK = 16
"""Rows and tokens of a program."""
_MAX_ROW_BYTES = 512
"""Bytes of a row in the compute type: of 16 longer rows a program would spill registers (tests/golden)."""
_MAX_STEPS_AT_ONCE = 128
"""Up to so many steps condense on the CPU keeps the scores of all of them in memory."""


def _rows(feature: Tensor) -> Tensor:
    """(B,C,H,W) -> (B, H W, C), no copy where it lies contiguous or channels-last."""
    return feature.flatten(2).mT


def _forward(feature: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = _forward_fake(feature, query, key, value)
    rows = _rows(query)
    b, positions, c = rows.shape
    tensors = _rows(feature), rows, key, value, _rows(out)
    grid, sizes = (b, triton.cdiv(positions, _BLOCK)), (positions, key.shape[1], c)
    precision = "tf32" if query.dtype.itemsize == 2 else "ieee"
    types = {"PRECISION": precision, "COMPUTE": triton_utils.TYPES[native.compute_type(query, key, value)]}
    constants = {"CHANNELS": max(16, triton.next_power_of_2(c)), "BLOCK": _BLOCK, **types}
    triton_utils.launch(_recall_fwd_kernel, grid, *tensors, *(t.stride() for t in tensors), *sizes, **constants)
    return out


def _forward_fake(feature: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return registry.empty_as(feature, feature, torch.promote_types(feature.dtype, value.dtype))


_RECALL_TRITON = registry.torch_op("_recall", _forward, _forward_fake, reference=reference.recall)


def _condense_sdpa(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    q, k, v = F.linear(memory, weight, bias).chunk(3, dim=-1)
    attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True, scale=1.0)
    return memory + attended[:, 0]


def _condense_torch(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """With the two projections folded into one: on 2 cores 1.2 to 1.5 times as fast as with three (16 to 128 sequences
    of 20 to 128)."""
    w_q, w_k, w_v = weight.chunk(3)
    b_q, _, b_v = bias.chunk(3)
    query = F.linear(memory, w_k.T @ w_q, b_q @ w_k)
    t = memory.shape[1]
    if t <= _MAX_STEPS_AT_ONCE:
        future = memory.new_full((t, t), float("-inf")).triu_(1)
        mean = torch.baddbmm(future, query, memory.mT).softmax(dim=-1) @ memory
    else:
        row = memory[:, None]
        mean = F.scaled_dot_product_attention(query[:, None], row, row, is_causal=True, scale=1.0)[:, 0]
    return memory + F.linear(mean, w_v, b_v)


def _recall_triton(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    if query is None or key is None or value.shape[1] == 1:
        return reference.recall(feature, query, key, value)
    return _RECALL_TRITON(feature, query, key, value)


def _recall_sdpa(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    if query is None or key is None or value.shape[1] == 1:
        return reference.recall(feature, query, key, value)
    q, k, v = (_contiguous_head(t) for t in (_rows(query), key, value))
    recalled = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return feature + recalled[:, 0].mT.reshape(feature.shape)


def _contiguous_head(rows: Tensor) -> Tensor:
    """(B,N,C) -> (B,1,N,C), contiguous, with the strides of a contiguous tensor also where N is 1: PyTorch's fused
    kernels refuse other strides, or leave them to the slow definition. contiguous() would keep a stride of a dimension
    of 1 as it is."""
    return rows.clone(memory_format=torch.contiguous_format)[:, None]


def _recall_torch(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    """With the positions along the rows, as the maps lie: nothing is transposed, and the last product adds. On 2 cores
    it is 1.4 to 2 times as fast as the definition up to 64 tokens and 1.1 times at 200; over maps of 3x3 it would take
    1.5 to 2.5 times as long."""
    few = value.shape[1] <= 256 and feature.shape[2] * feature.shape[3] >= 12
    if query is None or key is None or value.shape[1] == 1 or not few or not feature.is_contiguous():
        return reference.recall(feature, query, key, value)
    weights = (key @ query.flatten(2)).softmax(dim=1)
    return torch.baddbmm(feature.flatten(2), value.mT, weights).view(feature.shape)


def _torch_unsupported(first: Tensor, *others: Tensor | None) -> str | None:
    if any(t is not None and t.dtype != first.dtype for t in others):
        return "its tensors are of different types"
    # the product of two weights would be rounded to a half type
    half = first.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu")
    return "half types, or autocast to them" if half else None


def _condense_suits_torch(memory: Tensor, _weight: Tensor, _bias: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    # with fewer rows the product of the weights counts: 16 sequences of 20 (C = 128) take as long either way
    b, t, c = memory.shape
    return b * t >= 4 * c


def _many_scores(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    """Whether PyTorch's fused attention is faster than the definition. On 2 cores it takes 1 to 1.6 times as long up to
    4 million scores and 0.6 to 0.8 times from 8 million on; with a gradient 1.1 to 1.3 times up to 5 million, 0.7 to
    1.1 from 8 million."""
    b, _, h, w = feature.shape
    scores = b * h * w * value.shape[1]
    if not feature.is_cpu:
        return scores > 1 << 26
    return scores > (1 << 23 if registry.needs_gradient(feature, query, key, value) else 1 << 22)


def _recall_suits_triton(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    if query is None or key is None or torch.compiler.is_compiling():
        return False
    b, _, h, w = feature.shape
    return value.shape[1] <= 64 and (feature.dtype.itemsize == 2 or b * h * w <= 2048)


def _recall_triton_unsupported(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> str | None:
    # one token is an addition, of any size and with any gradient
    if value.shape[1] == 1:
        return None
    if registry.needs_gradient(feature, query, key, value):
        return "the kernel has no gradient"
    channels = feature.shape[1]
    compute = native.compute_type(*(t for t in (feature, query, key, value) if t is not None))
    if channels * compute.itemsize > _MAX_ROW_BYTES:
        return f"it has {channels} channels, the kernel takes {_MAX_ROW_BYTES // compute.itemsize} of {compute}"
    return None


_CONDENSE = registry.define(
    "condense",
    reference.condense,
    torch=registry.Backend(
        _condense_torch,
        registry.cpu_only,
        _torch_unsupported,
        suits=_condense_suits_torch,
        condition="not compiled, 4 C rows or more",
    ),
    sdpa=registry.Backend(_condense_sdpa),
)
_RECALL = registry.define(
    "recall",
    reference.recall,
    torch=registry.Backend(
        _recall_torch,
        registry.cpu_only,
        _torch_unsupported,
        # a compiled program's sizes are not asked: it would then hold for these sizes only
        suits=lambda *given: not torch.compiler.is_compiling() and not _many_scores(*given),
        condition="not compiled, up to 2^22 scores, 2^23 with a gradient",
    ),
    triton=triton_utils.backend(
        _recall_triton,
        unsupported=_recall_triton_unsupported,
        suits=_recall_suits_triton,
        condition="up to 64 tokens without a gradient, half types or up to 2048 positions",
    ),
    sdpa=registry.Backend(
        _recall_sdpa,
        suits=lambda *given: torch.compiler.is_compiling() or _many_scores(*given),
        condition="compiled, or more than 2^22 scores on the CPU, 2^23 with a gradient, 2^26 on a GPU",
    ),
)


def condense(memory: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None) -> Tensor:
    """Condense every prefix of a motion memory into one vector.

    memory (B,T,C); weight (3C,C) and bias (3C): the q, k, v projections stacked in that order. Returns (B,T,C): row t
    is x_t + softmax(q_t K^T) V over the rows up to and including t. Raises ValueError on a wrong shape or dtype.
    Source: paper, Eq. 1."""
    checks.tensors(memory=(memory, "B T C"), weight=(weight, "3C C"), bias=(bias, "3C"))
    return _CONDENSE(memory, weight, bias, backend=backend)


def recall(
    feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor, *, backend: str | None = None
) -> Tensor:
    """Let every position of a feature map recall from a memory.

    feature (B,C,H,W); query (B,C,H,W) its projection; key and value (B,M,C) the memory's. Returns
    feature + softmax(query key^T) value, (B,C,H,W). With M = 1 query and key have no influence and may be None. Raises
    ValueError on a wrong shape or dtype, an empty memory, or a missing query or key with M > 1. Source: paper, Eq. 2.
    """
    maps = {"feature": (feature, "B C H W"), "query": (query, "B C H W ?")}
    checks.tensors(**maps, value=(value, "B M C"), key=(key, "B M C ?"))
    m = value.shape[1]
    if m == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}, expected at least one memory token")
    if m > 1 and (query is None or key is None):
        raise ValueError(f"query and key are needed for a memory of {m} tokens; only with one token may they be None")
    return _RECALL(feature, query, key, value, backend=backend)
