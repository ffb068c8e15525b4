"""The graphs of an export, run by PyTorch, against the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rollouts import rollout_inputs

from avfast.deploy.graphs import make_graphs
from avfast.export import TOLERANCE
from avfast.models.avmodel import AVModel

MakeModel = Callable[..., AVModel]


@pytest.mark.parametrize("motion", ["v", "v+recall", "mme"])
@pytest.mark.parametrize("refinement", ["none", "unet", "unet+context", "car"])
@pytest.mark.parametrize("rendering", ["chained", "composed"])
# half precision of one variant has a test of its own
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["fp32", "fp16"]
)
def test_unrolled_graph_equals_the_model(
    random_model: MakeModel, motion: str, refinement: str, rendering: str, dtype: torch.dtype
):
    model = random_model(motion=motion, refinement=refinement, rendering=rendering, image_channels=3)
    graphs = {graph.name: graph for graph in make_graphs(model, dtype, unroll=(5, 3))}
    assert ("audio" in graphs) == (motion != "v")
    assert ("context" in graphs) == (refinement in ("unet+context", "car"))
    arrays = [torch.from_numpy(x) for x in rollout_inputs(1, 32, 3, total=8)]
    with torch.no_grad():
        found = graphs["rollout"](*arrays)
    limit = TOLERANCE["fp32" if dtype == torch.float32 else "fp16"]
    for ours, theirs in zip(found, model.predict(*arrays), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=limit, atol=limit)
