"""ConvLSTM state update: c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c'), s the logistic function, no peepholes.

Shapes: gates B 4C H W in the order i, f, o, g; cell B C H W. Bytes moved, in values per element of the state: forward
7 (gates, cell; new cell, hidden), backward 12 (gates, cell, two gradients; gradients of gates and cell): the
activations are computed anew. Contiguous and channels-last gates are taken as they lie, and the outputs lie likewise.
Memory is [rows, 4, area] in both cases: rows B, area C H W, or rows B H W, area C."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks, native, reference, registry, triton_utils
from .triton_utils import jit, tl, triton


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


def _run(kernel: Any, name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor], backend: str) -> None:
    """Run one direction over [rows, 4, area] memory. All inputs are brought into the layout of the outputs."""
    cell = inputs["cell"]
    b, c, h, w = cell.shape
    if cell.numel() == 0:
        return
    contiguous = next(iter(outputs.values())).is_contiguous()
    layout = torch.contiguous_format if contiguous else torch.channels_last
    rows, area = (b, c * h * w) if contiguous else (b * h * w, c)
    inputs = {key: tensor.contiguous(memory_format=layout) for key, tensor in inputs.items()}
    compute = native.compute_type(inputs["gates"], cell)
    if backend == "cpp":
        native.call(name, compute, inputs, outputs, rows=rows, area=area)
        return
    total = rows * area
    block = triton_utils.block(total, 256)
    grid, sizes = (triton.cdiv(total, block),), {"BLOCK": block, "OFFSET": triton_utils.offsets(4 * total + block)}
    tensors = *inputs.values(), *outputs.values()
    triton_utils.launch(kernel, grid, *tensors, total, area, COMPUTE=triton_utils.TYPES[compute], **sizes)


def _forward(gates: Tensor, cell: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    hidden, new_cell = _forward_fake(gates, cell)
    inputs, outputs = {"gates": gates, "cell": cell}, {"hidden": hidden, "new_cell": new_cell}
    _run(_gates_fwd_kernel, "gates_forward", inputs, outputs, backend)
    return hidden, new_cell


def _forward_fake(gates: Tensor, cell: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return registry.empty_as(gates, cell, gates.dtype), registry.empty_as(gates, cell)


def _backward(
    gates: Tensor, cell: Tensor, grad_hidden: Tensor, grad_new_cell: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    grad_gates, grad_cell = _backward_fake(gates, cell)
    inputs = {"gates": gates, "cell": cell, "grad_hidden": grad_hidden, "grad_new_cell": grad_new_cell}
    outputs = {"grad_gates": grad_gates, "grad_cell": grad_cell}
    _run(_gates_bwd_kernel, "gates_backward", inputs, outputs, backend)
    return grad_gates, grad_cell


def _backward_fake(gates: Tensor, cell: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return registry.empty_as(gates, gates), registry.empty_as(gates, cell)


_FORWARD = registry.torch_op("_convlstm_gates", _forward, _forward_fake, reference=reference.convlstm_gates)
_BACKWARD = registry.torch_op("_convlstm_gates_backward", _backward, _backward_fake)


class _ConvLSTMGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, cell: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(gates, cell)
        ctx.backend = backend
        return _FORWARD(gates, cell, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden: Tensor, grad_new_cell: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_BACKWARD(*ctx.saved_tensors, grad_hidden, grad_new_cell, ctx.backend), None


def _fused(backend: str, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    run = _ConvLSTMGates.apply if registry.needs_gradient(gates, cell) else _FORWARD
    return run(gates, cell, backend)


_OP = registry.define(
    "convlstm_gates",
    reference.convlstm_gates,
    cpp=native.backend(partial(_fused, "cpp")),
    triton=triton_utils.backend(partial(_fused, "triton")),
)


def convlstm_gates(gates: Tensor, cell: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Update a ConvLSTM's state from its gates before activation.

    gates (B,4C,H,W): the convolution's output, order i, f, o, g. cell (B,C,H,W): may be fp32 beside half gates. Returns
    (hidden in the gates' dtype, new cell in the cell's dtype), both (B,C,H,W). Raises ValueError on a wrong shape or
    dtype. Source: Shi et al. 2015, without peepholes; paper, Eq. 3."""
    checks.tensors(cell=(cell, "B C H W"), gates=(gates, "B 4C H W"))
    return _OP(gates, cell, backend=backend)
