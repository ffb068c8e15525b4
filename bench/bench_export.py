"""One step of a deployed model, and a clip of 5 given and 15 predicted frames: onnxruntime against PyTorch, eager and
compiled, batch 1 and 16 at 48x48. Export and compilation are not timed; a row has clips per second beside the times."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from avfast.models.avmodel import AVModel, ModelConfig

pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
from avfast.deploy.graphs import make_graphs  # noqa: E402
from avfast.export import ExportConfig, export_model  # noqa: E402
from avfast.runtime import Predictor  # noqa: E402

WIDTH = 16
THREADS = 2
GIVEN, TOTAL = 5, 20


@pytest.fixture(scope="module")
def model() -> AVModel:
    torch.manual_seed(0)
    return AVModel(ModelConfig(unet_width=WIDTH)).eval()


@pytest.fixture(scope="module")
def folder(model: AVModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "model"
    export_model(model, out, config=ExportConfig(rollout=False))
    return out


@pytest.fixture(
    params=[d for d in ("cpu", "cuda") if d == "cpu" or "CUDAExecutionProvider" in ort.get_available_providers()]
)
def predictor(folder: Path, request: pytest.FixtureRequest) -> Predictor:
    return Predictor(folder, device=request.param, threads=THREADS)


@pytest.mark.parametrize("batch", [1, 16])
def bench_step(model: AVModel, predictor: Predictor, batch: int, compare: Callable) -> None:
    torch.set_num_threads(THREADS)
    (graph,) = [g for g in make_graphs(model) if g.name == "step"]
    torch.manual_seed(0)
    values = graph.example(B=batch, M=6, h=3, w=3)
    feed = {port.name: value.numpy() for port, value in zip(graph.inputs, values, strict=True)}
    run = predictor.graphs["step"]
    compiled = torch.compile(graph, dynamic=False)
    with torch.no_grad():
        for ours, eager, fast in zip(run(feed).values(), graph(*values), compiled(*values), strict=True):
            np.testing.assert_allclose(np.asarray(ours), eager, atol=1e-4)
            np.testing.assert_allclose(fast, eager, atol=1e-4)
        row = compare(
            f"export: step, batch {batch}, width {WIDTH}, onnxruntime on {predictor.device}",
            lambda: run(feed),
            {"eager": lambda: graph(*values), "compiled": lambda: compiled(*values)},
            rounds=30,
        )
    row["steps_per_s"] = batch / row["ours_s"]


@pytest.mark.parametrize("batch", [1, 16])
def bench_clip(model: AVModel, predictor: Predictor, batch: int, compare: Callable) -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    frames, flow = torch.rand(batch, GIVEN, 1, 48, 48), torch.randn(batch, GIVEN, 2, 48, 48)
    sound = torch.rand(batch, TOTAL, 1, 23, 21)
    arrays = [x.numpy() for x in (frames, flow, sound)]
    np.testing.assert_allclose(predictor.rollout(*arrays).frames, model.predict(frames, flow, sound).frames, atol=1e-4)
    row = compare(
        f"export: clip of {GIVEN} + {TOTAL - GIVEN}, batch {batch}, width {WIDTH}, onnxruntime on {predictor.device}",
        lambda: predictor.rollout(*arrays),
        {"eager": lambda: model.predict(frames, flow, sound)},
        rounds=7,
    )
    row["clips_per_s"] = batch / row["ours_s"]
