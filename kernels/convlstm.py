"""ConvLSTM state update: c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c'), s the logistic function, no peepholes.

Shapes: gates B 4C H W in the order i, f, o, g; cell B C H W. Bytes moved, in values per element of the state: forward
7 (gates, cell; new cell, hidden), backward 12 (gates, cell, two gradients; gradients of gates and cell): the
activations are computed anew. Contiguous and channels-last gates are taken as they lie, and the outputs lie likewise.
Memory is [rows, 4, area] in both cases: rows B, area C H W, or rows B H W, area C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, native, reference, registry, triton_utils
from .triton_utils import jit, tl


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _tanh(x):
    # within 1.2e-7 absolutely; libdevice's has no interpreter
    return 2 * _sigmoid(2 * x) - 1


@jit
def _load_state(gates_ptr, cell_ptr, total, area, BLOCK: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr):
    """A block of elements: (offset of the state, of gate i, inside, activated i, f, o, g, cell)."""
    offset = tl.program_id(0).to(OFFSET) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < total
    first = offset + 3 * area * (offset // area)
    i = _sigmoid(tl.load(gates_ptr + first, inside, 0).to(COMPUTE))
    f = _sigmoid(tl.load(gates_ptr + first + area, inside, 0).to(COMPUTE))
    o = _sigmoid(tl.load(gates_ptr + first + 2 * area, inside, 0).to(COMPUTE))
    g = _tanh(tl.load(gates_ptr + first + 3 * area, inside, 0).to(COMPUTE))
    cell = tl.load(cell_ptr + offset, inside, 0).to(COMPUTE)
    return offset, first, inside, i, f, o, g, cell


@jit
def _gates_fwd_kernel(
    gates_ptr, cell_ptr, hidden_ptr, new_cell_ptr, total, area, BLOCK: tl.constexpr, OFFSET: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    offset, _, inside, i, f, o, g, cell = _load_state(gates_ptr, cell_ptr, total, area, BLOCK, OFFSET, COMPUTE)
    new_cell = f * cell + i * g
    tl.store(new_cell_ptr + offset, new_cell, inside)
    tl.store(hidden_ptr + offset, o * _tanh(new_cell), inside)


@jit
def _gates_bwd_kernel(
    gates_ptr, cell_ptr, grad_hidden_ptr, grad_new_cell_ptr, grad_gates_ptr, grad_cell_ptr, total, area,
    BLOCK: tl.constexpr, OFFSET: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    offset, first, inside, i, f, o, g, cell = _load_state(gates_ptr, cell_ptr, total, area, BLOCK, OFFSET, COMPUTE)
    out = _tanh(f * cell + i * g)
    dh = tl.load(grad_hidden_ptr + offset, inside, 0).to(COMPUTE)
    dc = tl.load(grad_new_cell_ptr + offset, inside, 0).to(COMPUTE) + dh * o * (1 - out * out)
    tl.store(grad_gates_ptr + first, dc * g * i * (1 - i), inside)
    tl.store(grad_gates_ptr + first + area, dc * cell * f * (1 - f), inside)
    tl.store(grad_gates_ptr + first + 2 * area, dh * out * o * (1 - o), inside)
    tl.store(grad_gates_ptr + first + 3 * area, dc * i * (1 - g * g), inside)
    tl.store(grad_cell_ptr + offset, dc * f, inside)


def _launch(kernel: Any, cpp: str, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], backend: str) -> None:
    """Run one direction over [rows, 4, area] memory. `inputs` begin with gates and cell; all are brought into the
    layout of the outputs."""
    b, c, h, w = inputs[1].shape
    if outputs[0].is_contiguous():
        rows, area = b, c * h * w
        inputs = tuple(t.contiguous() for t in inputs)
    else:
        rows, area = b * h * w, c
        inputs = tuple(t.contiguous(memory_format=torch.channels_last) for t in inputs)
    total = rows * area
    if total == 0:
        return
    compute = native.compute_type(*inputs[:2])
    if backend == "cpp":
        names = ("gates", "cell", "grad_hidden", "grad_new_cell")
        given = dict(zip(names, inputs, strict=False))
        wanted = ("hidden", "new_cell") if cpp == "gates_forward" else ("grad_gates", "grad_cell")
        native.call(cpp, compute, given, dict(zip(wanted, outputs, strict=True)), rows=rows, area=area)
        return
    triton_utils.launch(kernel, _plan, (*inputs, *outputs), (total, area), (triton_utils.TYPES[compute],))


def _plan(total: int, area: int, compute: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    block = triton_utils.block(total, 256)
    constants = {"BLOCK": block, "OFFSET": triton_utils.offsets(4 * total + block), "COMPUTE": compute}
    return triton_utils.grid(total, block), constants


def _forward(gates: Tensor, cell: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    outputs = _forward_fake(gates, cell, backend)
    _launch(_gates_fwd_kernel, "gates_forward", (gates, cell), outputs, backend)
    return outputs


def _forward_fake(gates: Tensor, cell: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return registry.empty_as(gates, cell, gates.dtype), registry.empty_as(gates, cell)


def _backward(
    gates: Tensor, cell: Tensor, grad_hidden: Tensor, grad_new_cell: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    outputs = _backward_fake(gates, cell, grad_hidden, grad_new_cell, backend)
    _launch(_gates_bwd_kernel, "gates_backward", (gates, cell, grad_hidden, grad_new_cell), outputs, backend)
    return outputs


def _backward_fake(
    gates: Tensor, cell: Tensor, grad_hidden: Tensor, grad_new_cell: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return registry.empty_as(gates, gates), registry.empty_as(gates, cell)


_FORWARD = registry.torch_op(
    "_convlstm_gates(Tensor gates, Tensor cell, str backend) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    reference=reference.convlstm_gates,
)
_BACKWARD = registry.torch_op(
    "_convlstm_gates_backward(Tensor gates, Tensor cell, Tensor grad_hidden, Tensor grad_new_cell, str backend)"
    " -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _ConvLSTMGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gates, cell)
        ctx.backend = backend
        return _FORWARD(gates, cell, backend)

    @staticmethod
    @registry.once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_new_cell: Tensor) -> tuple[Tensor, Tensor, None]:
        gates, cell = ctx.saved_tensors
        return *_BACKWARD(gates, cell, grad_hidden, grad_new_cell, ctx.backend), None


def _fused(backend: str, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    if not registry.wants_gradient(gates, cell):
        return _FORWARD(gates, cell, backend)
    return _ConvLSTMGates.apply(gates, cell, backend)


_OP = registry.define_fused("convlstm_gates", reference.convlstm_gates, _fused)


def convlstm_gates(gates: Tensor, cell: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Update a ConvLSTM's state from its gates before activation.

    gates (B,4C,H,W): the convolution's output, order i, f, o, g. cell (B,C,H,W): may be fp32 beside half gates. Returns
    (hidden in the gates' dtype, new cell in the cell's dtype), both (B,C,H,W). Raises ValueError on a wrong shape or
    dtype. Source: Shi et al. 2015, without peepholes; paper, Eq. 3.
    """
    checks.shape("cell", cell, "B C H W")
    b, c, h, w = cell.shape
    checks.exactly("gates", gates, "B 4C H W", (b, 4 * c, h, w))
    checks.same_device(gates=gates, cell=cell)
    return _OP(gates, cell, backend=backend)
