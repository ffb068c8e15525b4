"""Operators as exporters take them against the definitions."""

from __future__ import annotations

import pytest
import torch

from avfast.deploy.operators import border_warp
from avfast.kernels import reference


@pytest.mark.parametrize("scale", [0.5, 5.0, 1e9])
def test_border_warp_equals_the_definition(scale: float):
    image, flow = torch.rand(2, 3, 16, 32), scale * torch.randn(2, 2, 16, 32)
    for moved in (flow, flow.round()):
        assert torch.equal(border_warp(image, moved), reference.backward_warp(image, moved))
    flow[0, 0, 3, 3] = float("nan")
    assert torch.equal(border_warp(image, flow).isnan(), reference.backward_warp(image, flow).isnan())
