"""The gates of the ConvLSTM beyond what the contract asks of every op: inputs at which they saturate."""

from __future__ import annotations

import math

import pytest
import torch

from avfast.kernels import convlstm_gates, registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = [
    name
    for name, how in registry.OPS["convlstm_gates"].backends.items()
    if name != "reference" and how.unavailable(DEVICE) is None
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_saturate_without_nan(backend: str) -> None:
    extremes = torch.tensor([-math.inf, -1e30, -100.0, 0.0, 100.0, 1e30, math.inf], device=DEVICE)
    gates = torch.cartesian_prod(*[extremes] * 4).T.reshape(1, 4, 49, 49).requires_grad_()
    cell = torch.ones(1, 1, 49, 49, device=DEVICE, requires_grad=True)
    hidden, new_cell = convlstm_gates(gates, cell, backend=backend)
    grads = torch.autograd.grad(hidden.sum() + new_cell.sum(), (gates, cell))
    assert all(t.isfinite().all() for t in (hidden, new_cell, *grads))
    assert hidden.abs().max() <= 1 and new_cell.abs().max() <= 2
    with torch.no_grad():
        gates[0, 1, 0, 0] = math.nan
        assert convlstm_gates(gates, cell, backend=backend)[1].isnan().sum() == 1
