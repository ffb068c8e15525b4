"""Condense and Recall (Eq. 1 and 2): single-head attention without the factor 1/sqrt(C).

Shapes: memory B T C, feature map B C H W, recalled memory B M C. No kernel holds the scores in memory, (T, T) and
(H W, M) values.

Condense of every prefix is one causal attention over T. Its forward kernel is one pass: projections, attention and
residual, a program per 16 rows of a sequence. No key or value is ever formed, because with S = softmax over the prefix

    q_t . (W_k x_s + b_k) = (W_k^T q_t) . x_s + a constant of row t, which the softmax does not see
    sum_s S_ts (W_v x_s + b_v) = W_v (sum_s S_ts x_s) + b_v, since the weights of a row sum to 1

so every row projects for itself alone, and what it attends to is the memory. Values moved: 2 B T C + 3 C^2; flops:
6 B T C^2 + 2 B T^2 C, as many as with keys and values, which would move 8 B T C more in two launches more. At B = 16,
T = 20, C = 128 that is 33 MFLOP and 0.5 MB, a matter of latency: one launch counts, and 32 programs at work where one a
sequence would be 16. Any T runs, on request: products of fp32 without tensor cores are what it waits for, and on an
H200, in a CUDA graph, PyTorch's scaled_dot_product_attention takes 0.2 to 0.5 times as long in fp32 (B = 16 and 128,
T = 5 to 128), and in bf16 0.4 to 1.05 times; with the backward pass 0.3 to 0.8 and 0.3 to 1.03 times.

Backward, PyTorch multiplies and the kernels attend: one product for q, k and v, two kernels for their gradients
(9 B T^2 C flops, 11 B T C values), two products for those of memory and weight (each product 6 B T C^2 flops). In a
kernel the weight's gradient, 3 C^2 = 49,152 values, would be summed over programs, 25 MB of partial sums at B = 128,
T = 20, six times the 3.9 MB that the product reads; and the memory's needs the gradients of queries and keys together,
which come row by row from one kernel and token by token from the other. That one takes the rows in their order: no
atomics, the same bits every time.

Recall over one token is a softmax over one key, identically 1: it adds the value at every position, PyTorch's own
addition, which never looks at query and key. Over M tokens it is a program per 16 positions: 4 B H W M C flops and
3 B H W C values forward, 18 B H W M C and, up to 16 tokens, 5 B H W C values backward, by the same two kernels. Feature
maps are taken as they lie, contiguous or channels-last. On an H200 forward takes 0.4 to 0.5 times as long as the
definition in bf16, 0.8 to 0.9 in fp32 up to 2048 positions, and longer beyond, with 512 tokens, or with the backward
pass: then the definition is the choice, up to 2^26 scores.

Where these kernels are not the choice PyTorch's own ops are: `torch_attention.py`.

Products of fp32 are fp32 (`ieee`: no tensor cores); those of half types are TF32, whose 10 bits of mantissa hold every
bf16 and fp16 value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, native, reference, registry, torch_attention, triton_utils
from .torch_attention import rows_of
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
def _masked(scores, row, token, tokens, CAUSAL: tl.constexpr):
    """-inf where a row does not see a token."""
    seen = token[None] < tokens
    if CAUSAL:
        seen &= token[None] <= row[:, None]
    return tl.where(seen, scores, float("-inf"))


@jit
def _product(
    a_ptr, a_strides, b_ptr, b_strides, b, row, token, rows, tokens, channels, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """a b^T, [rows, tokens], over a part of the channels after the other: without tensor cores an operand that the
    compiler keeps over a loop takes as many registers as it has channels, and two such are too many."""
    out = tl.zeros([row.shape[0], token.shape[0]], COMPUTE)
    for first in range(0, CHANNELS, BLOCK):
        part = first + tl.arange(0, BLOCK).to(tl.int64)
        a_part = _tile(a_ptr, a_strides, b, row, part, rows, channels, COMPUTE)
        b_part = _tile(b_ptr, b_strides, b, token, part, tokens, channels, COMPUTE)
        out += _dot(a_part, tl.trans(b_part), PRECISION, COMPUTE)
    return out


@jit
def _attend(
    query, key_ptr, key_strides, value_ptr, value_strides, b, row, channel, end, tokens, channels,
    CAUSAL: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """(softmax(query key^T) value over the tokens before `end`, logarithm of the sum of exp(score)), a block of tokens
    after the other: all sums shrink where a row's largest score grows."""
    largest = tl.full([query.shape[0]], float("-inf"), COMPUTE)
    total = tl.zeros([query.shape[0]], COMPUTE)
    out = tl.zeros(query.shape, COMPUTE)
    for first in range(0, end, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        key = _tile(key_ptr, key_strides, b, token, channel, tokens, channels, COMPUTE)
        value = _tile(value_ptr, value_strides, b, token, channel, tokens, channels, COMPUTE)
        scores = _masked(_dot(query, tl.trans(key), PRECISION, COMPUTE), row, token, tokens, CAUSAL)
        before = largest
        largest = tl.maximum(before, tl.max(scores, 1))
        shrink = tl.exp(before - largest)
        weights = tl.exp(scores - largest[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + _dot(weights, value, PRECISION, COMPUTE)
    return out / total[:, None], largest + tl.log(total)


@jit
def _condense_fwd_kernel(
    memory_ptr, weight_ptr, bias_ptr, out_ptr, memory_strides, out_strides, steps, channels, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    row = start + tl.arange(0, BLOCK).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    # weight (3, C, C): q, k, v
    weight_strides = (channels * channels, channels, 1)
    own = _tile(memory_ptr, memory_strides, b, row, channel, steps, channels, COMPUTE)
    query = tl.zeros([BLOCK, CHANNELS], COMPUTE)
    for first in range(0, CHANNELS, BLOCK):
        part = first + tl.arange(0, BLOCK).to(tl.int64)
        w_q = _tile(weight_ptr, weight_strides, 0, part, channel, channels, channels, COMPUTE)
        w_k = _tile(weight_ptr, weight_strides, 1, part, channel, channels, channels, COMPUTE)
        b_q = tl.load(bias_ptr + part, part < channels, 0).to(COMPUTE)
        query += _dot(_dot(own, tl.trans(w_q), PRECISION, COMPUTE) + b_q[None], w_k, PRECISION, COMPUTE)
    end = tl.minimum(start + BLOCK, steps)
    mean, _ = _attend(
        query, memory_ptr, memory_strides, memory_ptr, memory_strides, b, row, channel, end, steps, channels,
        True, BLOCK, PRECISION, COMPUTE,
    )  # fmt: skip
    for first in range(0, CHANNELS, BLOCK):
        part = first + tl.arange(0, BLOCK).to(tl.int64)
        w_v = _tile(weight_ptr, weight_strides, 2, part, channel, channels, channels, COMPUTE)
        b_v = tl.load(bias_ptr + 2 * channels + part, part < channels, 0).to(COMPUTE)
        out = _tile(memory_ptr, memory_strides, b, row, part, steps, channels, COMPUTE)
        out += _dot(mean, tl.trans(w_v), PRECISION, COMPUTE) + b_v[None]
        _store(out_ptr, out_strides, b, row, part, steps, channels, out)


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
    recalled, _ = _attend(
        query, key_ptr, key_strides, value_ptr, value_strides, b, row, channel, tokens, tokens, channels,
        False, BLOCK, PRECISION, COMPUTE,
    )  # fmt: skip
    feature = _tile(feature_ptr, feature_strides, b, row, channel, rows, channels, COMPUTE)
    _store(out_ptr, out_strides, b, row, channel, rows, channels, feature + recalled)


@jit
def _weights(
    query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides, grad_ptr, grad_strides,
    level, slope, b, row, token, rows, tokens, channels,
    CAUSAL: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """What rows take of tokens, [rows, tokens], computed anew from `level`, and the gradients of the scores."""
    scores = _product(
        query_ptr, query_strides, key_ptr, key_strides, b, row, token, rows, tokens, channels,
        CHANNELS, BLOCK, PRECISION, COMPUTE,
    )  # fmt: skip
    by_weight = _product(
        grad_ptr, grad_strides, value_ptr, value_strides, b, row, token, rows, tokens, channels,
        CHANNELS, BLOCK, PRECISION, COMPUTE,
    )  # fmt: skip
    weights = tl.exp(_masked(scores, row, token, tokens, CAUSAL) - level[:, None])
    return weights, weights * (by_weight - slope[:, None])


@jit
def _attention_bwd_query_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, grad_query_ptr, level_ptr, slope_ptr,
    query_strides, key_strides, value_strides, grad_strides, grad_query_strides, rows, tokens, channels,
    CAUSAL: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and what the keys' kernel needs of each row: the logarithm of its sum of exp(score)
    (level) and the mean of its weights' gradients (slope)."""
    b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    row = start + tl.arange(0, BLOCK).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    query = _tile(query_ptr, query_strides, b, row, channel, rows, channels, COMPUTE)
    end = tokens
    if CAUSAL:
        end = tl.minimum(start + BLOCK, tokens)
    out, level = _attend(
        query, key_ptr, key_strides, value_ptr, value_strides, b, row, channel, end, tokens, channels,
        CAUSAL, BLOCK, PRECISION, COMPUTE,
    )  # fmt: skip
    grad = _tile(grad_ptr, grad_strides, b, row, channel, rows, channels, COMPUTE)
    slope = tl.sum(grad * out, 1)
    tl.store(level_ptr + b * rows + row, level, row < rows)
    tl.store(slope_ptr + b * rows + row, slope, row < rows)
    grad_query = tl.zeros([BLOCK, CHANNELS], COMPUTE)
    for first in range(0, end, BLOCK):
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        _, by_score = _weights(
            query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides, grad_ptr, grad_strides,
            level, slope, b, row, token, rows, tokens, channels, CAUSAL, CHANNELS, BLOCK, PRECISION, COMPUTE,
        )  # fmt: skip
        key = _tile(key_ptr, key_strides, b, token, channel, tokens, channels, COMPUTE)
        grad_query += _dot(by_score, key, PRECISION, COMPUTE)
    _store(grad_query_ptr, grad_query_strides, b, row, channel, rows, channels, grad_query)


@jit
def _attention_bwd_key_kernel(
    query_ptr, key_ptr, value_ptr, grad_ptr, level_ptr, slope_ptr, grad_key_ptr, grad_value_ptr,
    query_strides, key_strides, value_strides, grad_strides, grad_key_strides, grad_value_strides,
    rows, tokens, channels,
    CAUSAL: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values, summed over all rows that see it, in their order."""
    b, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    token = start + tl.arange(0, BLOCK).to(tl.int64)
    channel = tl.arange(0, CHANNELS).to(tl.int64)
    grad_key = tl.zeros([BLOCK, CHANNELS], COMPUTE)
    grad_value = tl.zeros([BLOCK, CHANNELS], COMPUTE)
    begin = 0
    if CAUSAL:
        # row t sees the tokens up to t
        begin = start
    for first in range(begin, rows, BLOCK):
        row = first + tl.arange(0, BLOCK).to(tl.int64)
        level = tl.load(level_ptr + b * rows + row, row < rows, 0).to(COMPUTE)
        slope = tl.load(slope_ptr + b * rows + row, row < rows, 0).to(COMPUTE)
        weights, by_score = _weights(
            query_ptr, query_strides, key_ptr, key_strides, value_ptr, value_strides, grad_ptr, grad_strides,
            level, slope, b, row, token, rows, tokens, channels, CAUSAL, CHANNELS, BLOCK, PRECISION, COMPUTE,
        )  # fmt: skip
        # beyond the last row a weight is 1, but query and gradient are 0
        query = _tile(query_ptr, query_strides, b, row, channel, rows, channels, COMPUTE)
        grad = _tile(grad_ptr, grad_strides, b, row, channel, rows, channels, COMPUTE)
        grad_value += _dot(tl.trans(weights), grad, PRECISION, COMPUTE)
        grad_key += _dot(tl.trans(by_score), query, PRECISION, COMPUTE)
    _store(grad_key_ptr, grad_key_strides, b, token, channel, tokens, channels, grad_key)
    _store(grad_value_ptr, grad_value_strides, b, token, channel, tokens, channels, grad_value)


_BLOCK = 16
"""Rows and tokens of a program."""
_LARGEST_ROW = 512
"""Bytes of a row in the compute type: of 16 longer rows a program would spill registers (tests/golden)."""


def _unsupported(first: Tensor, *others: Tensor | None) -> str | None:
    missing = triton_utils.unsupported(first)
    if missing is not None:
        return missing
    channels = first.shape[-1 if first.dim() == 3 else 1]
    compute = native.compute_type(first, *(t for t in others if t is not None))
    if channels * compute.itemsize > _LARGEST_ROW:
        return f"it has {channels} channels, the kernels take {_LARGEST_ROW // compute.itemsize} of {compute}"
    return None


def _recall_unsupported(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> str | None:
    # one token is an addition, of any size
    return triton_utils.unsupported(feature) if value.shape[1] == 1 else _unsupported(feature, query, key, value)


def _launch(
    kernel: Any, size: int, tensors: tuple[Tensor, ...], *sizes: int, types: tuple[Tensor, ...], **constants: Any
) -> None:
    """Run a kernel over blocks of `size` rows or tokens in every matrix of the batch. Matrices (batch, row, column)
    bring their strides; the last of `sizes` are the columns; the first of `types` decides the precision of products."""
    half = types[0].dtype.itemsize == 2
    compute = triton_utils.TYPES[native.compute_type(*types)]
    numbers = *(t.stride() for t in tensors if t.dim() == 3), *sizes
    facts = tensors[0].shape[0], size, half, compute, tuple(constants.items())
    triton_utils.launch(kernel, _plan, tensors, numbers, facts)


def _plan(*given: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    *_, columns, batch, size, half, compute, constants = given
    return (batch, triton.cdiv(size, _BLOCK)), {
        "CHANNELS": max(16, triton.next_power_of_2(columns)),
        "BLOCK": _BLOCK,
        "PRECISION": "tf32" if half else "ieee",
        "COMPUTE": compute,
        **dict(constants),
    }


def _attention_backward(inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], *, causal: bool) -> None:
    """Gradients of softmax(query key^T) value: inputs query, key, value and the incoming gradient, outputs the
    gradients of the first three, all (batch, rows or tokens, C)."""
    query, key = inputs[:2]
    (b, rows, c), tokens = query.shape, key.shape[1]
    level, slope = query.new_empty((2, b, rows), dtype=native.compute_type(*inputs))
    by_query, *by_tokens = outputs
    # without `maxnreg` ptxas spills 8 bytes of the queries' kernel for bf16 on sm_90, at 168 registers
    for kernel, size, tensors, options in (
        (_attention_bwd_query_kernel, rows, (*inputs, by_query, level, slope), {"maxnreg": 255}),
        (_attention_bwd_key_kernel, tokens, (*inputs, level, slope, *by_tokens), {"num_warps": 8}),
    ):
        _launch(kernel, size, tensors, rows, tokens, c, types=inputs, CAUSAL=causal, num_stages=1, **options)


def _condense_forward(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = _condense_forward_fake(memory, weight, bias)
    steps, c = memory.shape[1:]
    given = memory, weight.contiguous(), bias.contiguous()
    _launch(_condense_fwd_kernel, steps, (*given, out), steps, c, types=given)
    return out


def _condense_forward_fake(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return memory.new_empty(memory.shape)


def _condense_backward(memory: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # under autocast a half memory comes with fp32 weights; the products are in the memory's type then
    w, b = weight.to(memory.dtype), bias.to(memory.dtype)
    projected = F.linear(memory, w, b)
    by_projected = torch.empty_like(projected)
    inputs = *projected.chunk(3, dim=-1), grad
    _attention_backward(inputs, by_projected.chunk(3, dim=-1), causal=True)
    rows = by_projected.flatten(0, 1)
    grad_memory = torch.addmm(grad.flatten(0, 1), rows, w).view(memory.shape)
    grad_weight = rows.T @ memory.flatten(0, 1)
    return grad_memory, grad_weight.to(weight.dtype), rows.sum(0).to(bias.dtype)


def _condense_backward_fake(
    memory: Tensor, weight: Tensor, bias: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return memory.new_empty(memory.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _recall_forward(feature: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    out = _recall_forward_fake(feature, query, key, value)
    given = rows_of(query), key, value
    _, positions, c = given[0].shape
    tensors = rows_of(feature), *given, rows_of(out)
    _launch(_recall_fwd_kernel, positions, tensors, positions, key.shape[1], c, types=given)
    return out


def _recall_forward_fake(feature: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return registry.empty_as(feature, feature, torch.promote_types(feature.dtype, value.dtype))


def _recall_backward(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outputs = by_query, by_key, by_value = _recall_backward_fake(query, key, value, grad)
    _attention_backward(
        (rows_of(query), key, value, rows_of(grad)), (rows_of(by_query), by_key, by_value), causal=False
    )
    return outputs


def _recall_backward_fake(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    by_query = registry.empty_as(query, query)
    return by_query, key.new_empty(key.shape), value.new_empty(value.shape)


_CONDENSE_FORWARD = registry.torch_op(
    "_condense(Tensor memory, Tensor weight, Tensor bias) -> Tensor",
    _condense_forward,
    _condense_forward_fake,
    reference=reference.condense,
)
_CONDENSE_BACKWARD = registry.torch_op(
    "_condense_backward(Tensor memory, Tensor weight, Tensor bias, Tensor grad) -> (Tensor, Tensor, Tensor)",
    _condense_backward,
    _condense_backward_fake,
)
_RECALL_FORWARD = registry.torch_op(
    "_recall(Tensor feature, Tensor query, Tensor key, Tensor value) -> Tensor",
    _recall_forward,
    _recall_forward_fake,
    reference=reference.recall,
)
_RECALL_BACKWARD = registry.torch_op(
    "_recall_backward(Tensor query, Tensor key, Tensor value, Tensor grad) -> (Tensor, Tensor, Tensor)",
    _recall_backward,
    _recall_backward_fake,
)


class _Condense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(memory, weight, bias)
        return _CONDENSE_FORWARD(memory, weight, bias)

    @staticmethod
    @registry.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _CONDENSE_BACKWARD(*ctx.saved_tensors, grad)


class _Recall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.dtype = feature.dtype
        return _RECALL_FORWARD(feature, query, key, value)

    @staticmethod
    @registry.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return grad.to(ctx.dtype), *_RECALL_BACKWARD(*ctx.saved_tensors, grad)


def _recall_triton(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    if query is None or key is None or value.shape[1] == 1:
        return reference.recall(feature, query, key, value)
    return _Recall.apply(feature, query, key, value)


_INTERPRETED = "Triton's interpreter is for tests" if triton_utils.INTERPRETED else None
_SLOWER = "PyTorch's attention takes 0.2 to 1.05 times as long on an H200"
_TRITON = registry.Backend(_Condense.apply, _unsupported, triton_utils.unavailable, _INTERPRETED or _SLOWER)


def _recall_by_triton(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    if query is None or key is None or torch.compiler.is_compiling():
        return False
    b, _, h, w = feature.shape
    small = value.shape[1] <= 64 and (feature.dtype.itemsize == 2 or b * h * w <= 2048)
    return small and not registry.wants_gradient(feature, query, key, value)


_CONDENSE = registry.define(
    "condense",
    reference.condense,
    torch=torch_attention.CONDENSE,
    triton=_TRITON,
    sdpa=torch_attention.CONDENSE_SDPA,
)
_RECALL = registry.define(
    "recall",
    reference.recall,
    torch=torch_attention.RECALL,
    triton=registry.Backend(
        _recall_triton,
        _recall_unsupported,
        triton_utils.unavailable,
        _INTERPRETED,
        ("up to 64 tokens without a gradient, half types or up to 2048 positions", _recall_by_triton),
    ),
    sdpa=torch_attention.RECALL_SDPA,
)


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
    if not _recall_fits(feature, query, key, value):
        _check_recall(feature, query, key, value)
    return _RECALL(feature, query, key, value, backend=backend)


def _recall_fits(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> bool:
    """Whether the checks have nothing to say of many tokens, at a quarter of their 15 us: a small map takes 100."""
    for tensor in (feature, query, key, value):
        if type(tensor) is not Tensor or not tensor.is_floating_point() or tensor.device != feature.device:
            return False
    assert query is not None and key is not None
    size, tokens = feature.shape, value.shape
    fits = len(size) == 4 and len(tokens) == 3 and query.shape == size and key.shape == tokens
    return fits and tokens[1] > 1 and tokens[0] == size[0] and tokens[2] == size[1]


def _check_recall(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> None:
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
