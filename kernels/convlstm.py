"""ConvLSTM state update: c' = s(f) c + s(i) tanh(g), h' = s(o) tanh(c'), s the logistic function, no peepholes.

Shapes: gates B 4C H W in the order i, f, o, g; cell B C H W. Bytes moved: gates, cell, new cell, hidden once =
7 C H W B values.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, reference, registry

_OP = registry.define("convlstm_gates", reference.convlstm_gates)


def convlstm_gates(gates: Tensor, cell: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Update a ConvLSTM's state from its gates before activation.

    gates (B,4C,H,W): the convolution's output, order i, f, o, g. cell (B,C,H,W): may be fp32 beside half gates. Returns
    (hidden in the gates' dtype, new cell in the cell's dtype), both (B,C,H,W). Raises ValueError on a wrong shape or
    dtype. Source: Shi et al. 2015, without peepholes; paper, Eq. 3.
    """
    checks.shape("cell", cell, "B C H W")
    b, c, h, w = cell.shape
    checks.shape("gates", gates, "B 4C H W", **{"B": b, "4C": 4 * c, "H": h, "W": w})
    checks.same_device(gates=gates, cell=cell)
    return _OP(gates, cell, backend=backend)
