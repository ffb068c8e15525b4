"""`avfast export`: parity of whole rollouts, what the files say, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rollouts import rollout_inputs

from avfast import export as export_module
from avfast.data.mmnist import MMNISTConfig
from avfast.errors import InputError
from avfast.models.avmodel import AVModel
from avfast.training.config import TrainConfig

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from avfast.export import TOLERANCE, ExportConfig, ExportPredictor, export, export_model, verify  # noqa: E402

MakeModel = Callable[..., AVModel]


def largest_difference(folder: Path, model: AVModel, batch: int, size: int) -> float:
    """Of the frames of a 30-step rollout."""
    arrays = rollout_inputs(batch, size, model.settings.image_channels)
    expected = model.predict(*map(torch.from_numpy, arrays)).frames.numpy()
    found = ExportPredictor(folder).rollout(*arrays).frames
    assert found.shape == expected.shape == (batch, 30, model.settings.image_channels, size, size)
    # a rollout that ends in one colour would hide every difference
    assert expected[:, -1].std() > 0.01
    return float(np.abs(found - expected).max())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [48, 64])
def test_rollout_parity(exported: tuple[Path, AVModel], batch: int, size: int):
    assert largest_difference(*exported, batch, size) <= 1e-4


def test_half_precision(random_model: MakeModel, tmp_path: Path):
    model = random_model(motion="v", refinement="none")
    export_model(model, tmp_path / "model", config=ExportConfig(precision="fp16", rollout=False))
    assert largest_difference(tmp_path / "model", model, 3, 48) <= 2e-2
    step = onnx.load(tmp_path / "model" / "step.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in (*step.graph.input, *step.graph.output)}
    half = onnx.TensorProto.FLOAT16
    assert {name for name, kind in types.items() if kind == half} == {"hidden", "next_hidden"}
    # all weights but those of D_m's last layer
    kept = [w for w in step.graph.initializer if w.data_type == onnx.TensorProto.FLOAT and np.prod(w.dims) > 1000]
    assert [tuple(w.dims) for w in kept] == [(64, 2, 4, 4)]


def test_files_say_what_they_are(exported: tuple[Path, AVModel]):
    folder, model = exported
    assert {p.name for p in folder.iterdir()} == {"audio.onnx", "context.onnx", "observe.onnx", "step.onnx"}
    for path in folder.iterdir():
        graph = onnx.load(path)
        assert [o.version for o in graph.opset_import if o.domain == ""] == [18]
        assert not [n for n in graph.graph.node if n.op_type == "BatchNormalization"]
        about = json.loads({p.key: p.value for p in graph.metadata_props}["avfast"])
        assert about["config"]["motion"] == "mme" and about["graph"] == path.stem and len(about["hash"]) == 64
        assert about["spectrogram"]["sample_rate"] == 4400 and about["flow"]["solver"] == "chambolle-pock"
        for values, ports in ((graph.graph.input, about["inputs"]), (graph.graph.output, about["outputs"])):
            assert [value.name for value in values] == [port["name"] for port in ports]
            assert all(port["meaning"] for port in ports)
            shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values]
            assert shapes == [port["shape"] for port in ports]


def test_real_clips_are_compared_where_they_have_been_built(exported: tuple[Path, AVModel], tmp_path: Path):
    data = MMNISTConfig(train_clips=2, val_clips=1, test_clips=2, clip_frames=8)
    run = TrainConfig(data=data, pred_frames=3, eval_frames=3, data_cache=str(tmp_path))
    assert run.built_split("test") is None and list(tmp_path.iterdir()) == []
    store = run.load_split("test", quiet=True)
    found = run.built_split("test")
    assert found is not None and found.folder == store.folder
    differences = verify(*exported, run=run)
    assert differences["real clips, frames"] <= 1e-4 and differences["real clips, flow"] <= 1e-4


def test_another_model_is_told_apart(exported: tuple[Path, AVModel], random_model: MakeModel):
    other = random_model()
    with torch.no_grad():
        other.car.unet.last.bias += 0.01
    assert max(verify(exported[0], other).values()) > 1e-3


def test_a_mismatch_fails_and_leaves_nothing(random_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export_module, "trace", lambda graph, sizes: None)
    monkeypatch.setattr(export_module, "_write", lambda kind, graph, program, path, about: path.write_text(graph.name))
    for difference in (3e-4, float("nan")):
        monkeypatch.setattr(export_module, "verify", lambda *_, d=difference, **__: {"frames": d, "flow": 0.0})
        with pytest.raises(
            InputError, match=r"differ from PyTorch in frames by .*, expected at most 0.0001: not written"
        ):
            export_model(random_model(), tmp_path / "model")
        assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export_module, "verify", lambda *_, **__: {"frames": 9e-5})
    assert export_model(random_model(), tmp_path / "model") == {"frames": 9e-5}
    with pytest.raises(InputError, match="model, which exists already"):
        export_model(random_model(), tmp_path / "model")


def test_bad_requests_are_one_clear_line(random_model: MakeModel, make_run: Callable[..., Path], tmp_path: Path):
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="RUN is missing"):
        export(ExportConfig(out=out))
    with pytest.raises(InputError, match="neither a checkpoint"):
        export(ExportConfig(run=str(tmp_path), out=out))
    with pytest.raises(InputError, match="unroll is 0"):
        export(ExportConfig(run=str(tmp_path), out=out, unroll=0))
    make_run(tmp_path / "run", TrainConfig(), model=random_model(refinement="none"), links=("best-mme",))
    with pytest.raises(InputError, match="is of stage mme only, its run has the stages mme, car: train them"):
        export(ExportConfig(run=str(tmp_path / "run"), out=out))
    assert not Path(out).exists()


@pytest.mark.slow
@pytest.mark.parametrize("motion", ["v", "v+recall", "mme"])
@pytest.mark.parametrize("refinement", ["none", "unet", "unet+context", "car"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_variant(random_model: MakeModel, motion: str, refinement: str, precision: str, tmp_path: Path):
    model = random_model(motion=motion, refinement=refinement)
    export_model(model, tmp_path / "model", config=ExportConfig(precision=precision, rollout=False))  # type: ignore[arg-type]
    for size in (48, 64, 96):
        for batch in (1, 3):
            assert largest_difference(tmp_path / "model", model, batch, size) <= TOLERANCE[precision]


@pytest.mark.parametrize("refinement", [pytest.param("none", marks=pytest.mark.slow), "car"])
def test_composed_rendering(random_model: MakeModel, refinement: str, tmp_path: Path):
    model = random_model(refinement=refinement, rendering="composed")
    differences = export_model(model, tmp_path / "model")
    assert max(differences.values()) <= TOLERANCE["fp32"] and any("rollout" in name for name in differences)
    assert largest_difference(tmp_path / "model", model, 2, 64) <= TOLERANCE["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("unroll", [None, 4])
@pytest.mark.parametrize("motion", ["v", "v+recall", "mme"])
def test_whole_rollout_in_one_graph(random_model: MakeModel, motion: str, unroll: int | None, tmp_path: Path):
    model = random_model(motion=motion, refinement="none" if motion == "v" else "car")
    differences = export_model(model, tmp_path / "model", config=ExportConfig(unroll=unroll))
    assert any("rollout" in name for name in differences)
    ops = {node.op_type for node in onnx.load(tmp_path / "model" / "rollout.onnx").graph.node}
    assert ("Scan" in ops) == (unroll is None)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_torch_formats(random_model: MakeModel, format: str, tmp_path: Path):
    model = random_model(refinement="unet")
    export_model(model, tmp_path / "model", config=ExportConfig(format=format, rollout=False))  # type: ignore[arg-type]
    assert largest_difference(tmp_path / "model", model, 3, 64) <= TOLERANCE["fp32"]
