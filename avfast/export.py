"""Write a trained model for deployment: `python -m avfast.export RUN --out model/`.

The folder holds one file per graph of `avfast.deploy.graphs`: ONNX (run by `avfast.runtime`), torch.export programs, or
AOTInductor packages, all of PyTorch's own ops alone. Every file says what it is: config, precision, versions, hash of
the weights, and the meaning of each input and output. Before the folder gets its name a whole rollout is run through it
and compared with PyTorch; where they differ too much nothing is left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.export import ExportedProgram

from avfast import __version__, runtime
from avfast.cli.command import run_command
from avfast.cli.parser import parse
from avfast.data.film_clips import InputSpec
from avfast.deploy.graphs import Graph, TensorSpec, make_graphs, trace
from avfast.deploy.onnx_session import METADATA, Session
from avfast.errors import InputError
from avfast.files.result_folder import hidden_folder, sweep
from avfast.files.settings import Count, check_values
from avfast.models.base import Rollout, VideoModel
from avfast.models.registry import load_model
from avfast.opticalflow.tvl1 import PRESETS
from avfast.training.config import TrainConfig
from avfast.training.runs import input_spec, load_run_config, resolve_checkpoint
from avfast.ui.progress import Progress

Format = Literal["onnx", "pt2", "aoti"]
OPSET = 18
"""At 20, GridSample's version of it kept loops from loading in onnxruntime; 18 has every operator needed here."""
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
"""Largest difference of a frame's values (in [0,1]) over a rollout, and of flow, as a share of its largest value."""
_SUFFIX = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".aoti.pt2"}
_VERIFIED_STEPS = 30


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained model as ONNX, checked against PyTorch, for avfast.runtime and for other hosts."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = ""
    """Run folder (its best checkpoint, else the last) or checkpoint folder."""
    out: str = "model"
    """Folder to write; it must not exist."""
    format: Format = "onnx"
    """`onnx`; `pt2`, torch.export programs; `aoti`, compiled by AOTInductor for this machine's CPU."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """`fp16`: convolutions and hidden state in half precision; images, flow, warp and cell state stay fp32."""
    rollout: bool = True
    """Write rollout, the whole prediction in one graph, too. avfast.runtime does not need it. As `aoti` only with
    --unroll: AOTInductor of torch 2.13 fails on loops of unknown length."""
    unroll: Count | None = None
    """Write rollout without loops, for exactly this many predicted frames and the run's context-frames."""
    motion_only: bool = False
    """Accept a checkpoint of the motion stage of a run that is to refine: its prediction is the warped frame."""


def export(config: ExportConfig) -> dict[str, float]:
    """Write the folder `out`. Returns the largest differences from PyTorch by name of what was compared. Raises
    InputError for a run without a checkpoint or with one of the motion stage only, an existing `out`, and where the
    exported graphs do not agree with PyTorch; nothing is left behind then."""
    if not config.run:
        raise InputError("RUN is missing, expected a run folder or a checkpoint")
    check_values(config)
    if config.unroll is not None and not config.rollout:
        raise InputError(f"unroll is {config.unroll} with --no-rollout, expected one of the two")
    checkpoint = resolve_checkpoint(config.run)
    model = load_model(checkpoint)
    run: TrainConfig | None = None
    # a checkpoint alone is a model too; only the settings of the sound and the flow are not known then
    with suppress(InputError):
        run = load_run_config(checkpoint)
    spec = None if run is None else input_spec(checkpoint, run)
    stages = model.stage_names(model.settings)
    if run is not None and run.stage_names != stages and not config.motion_only:
        raise InputError(
            f"{checkpoint} is of stage {stages[-1]} only, its run has the stages {', '.join(run.stage_names)}: "
            "train them all, or give --motion-only"
        )
    with Progress(f"export, {config.format} {config.precision}") as progress:
        differences = export_model(model, config.out, config=config, run=run, spec=spec, progress=progress.update)
        for name, value in differences.items():
            progress.note(f"largest difference from PyTorch, {name}: {value:.2g}")
    return differences


def export_model(
    model: VideoModel,
    out: str | Path,
    *,
    config: ExportConfig = ExportConfig(),
    run: TrainConfig | None = None,
    spec: InputSpec | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> dict[str, float]:
    """`export` of a model in memory. run: what it was trained on, whose test clips it is compared on too; spec: how it
    is fed, which the runner then knows."""
    given = 5 if run is None else run.context_frames
    unroll = None if config.unroll is None else (given, config.unroll)
    dtype = torch.float16 if config.precision == "fp16" else torch.float32
    whole = config.rollout and (config.format != "aoti" or unroll is not None)
    graphs = [g for g in make_graphs(model, dtype, unroll) if whole or g.name != "rollout"]
    metadata = _metadata(model, config, spec, [g.name for g in graphs])
    # of the example alone; 0 and 1 are the sizes that torch.export would take for fixed
    sizes = {"B": 2, "N": 3, "P": 4, "M": 6, "K": 3, "T": 7, "h": 2, "w": 3}
    if Path(out).exists():
        raise InputError(f"out is {out}, which exists already: expected a new folder")
    sweep([Path(out)])
    with hidden_folder(out) as folder:
        for done, graph in enumerate(graphs):
            progress(done, len(graphs) + 1, graph.name)
            own = json.dumps({**metadata, "graph": graph.name, **_inputs_and_outputs(graph)})
            with _quiet():
                program = trace(graph, sizes)
                _write(config.format, graph, program, folder / f"{graph.name}{_SUFFIX[config.format]}", own)
        progress(len(graphs), len(graphs) + 1, "comparing with PyTorch")
        differences = verify(folder, model, given=given, unroll=config.unroll, run=run)
        limit = TOLERANCE[config.precision]
        # the negation catches NaN too
        wrong = {name: value for name, value in differences.items() if not value <= limit}
        if wrong:
            listed = ", ".join(f"{name} by {value:.3g}" for name, value in wrong.items())
            raise InputError(
                f"the exported graphs differ from PyTorch in {listed}, expected at most {limit:g}: not written"
            )
        os.rename(folder, out)
    progress(len(graphs) + 1, len(graphs) + 1, "done")
    return differences


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings back: of torchvision, which is not needed, and of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _metadata(model: VideoModel, config: ExportConfig, spec: InputSpec | None, graphs: list[str]) -> dict[str, Any]:
    """What every file of an export says of the whole."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {
        "format": runtime.FORMAT,
        "avfast": __version__,
        "torch": torch.__version__,
        "config": dataclasses.asdict(model.settings),
        "precision": config.precision,
        "hash": digest.hexdigest(),
        "graphs": graphs,
        "usage": None if spec is None else dataclasses.asdict(spec),
        "spectrogram": None if spec is None else dataclasses.asdict(spec.clips.spectrogram),
        "flow": dataclasses.asdict(PRESETS[TrainConfig().flow_preset if spec is None else spec.flow_preset]),
    }


def _inputs_and_outputs(graph: Graph) -> dict[str, Any]:
    def described(spec: TensorSpec) -> dict[str, Any]:
        dtype = "float16" if spec.half and graph.dtype == torch.float16 else "float32"
        return {"name": spec.name, "shape": spec.shape, "dtype": dtype, "meaning": spec.meaning}

    return {"inputs": [described(s) for s in graph.inputs], "outputs": [described(s) for s in graph.outputs]}


def _write(kind: Format, graph: Graph, program: ExportedProgram, path: Path, metadata: str) -> None:
    """Write a graph's program as a file of that kind, with what it says of itself."""
    if kind == "onnx":
        _write_onnx(graph, program, path, metadata)
    elif kind == "pt2":
        torch.export.save(program, path, extra_files={METADATA: metadata})
    else:
        configs = {"aot_inductor.metadata": {METADATA: metadata}}
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)


def _write_onnx(graph: Graph, program: ExportedProgram, path: Path, metadata: str) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"format onnx needs the extra `onnx` ({error}): pip install 'avfast[onnx]'") from None
    inputs, outputs = ([spec.name for spec in specs] for specs in (graph.inputs, graph.outputs))
    converted = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, verbose=False, input_names=inputs, output_names=outputs
    )
    assert converted is not None
    proto = converted.model_proto
    for values, specs in ((proto.graph.input, graph.inputs), (proto.graph.output, graph.outputs)):
        for value, spec in zip(values, specs, strict=True):
            for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True):
                if isinstance(size, str):
                    dim.dim_param = size
    # sizes within the graph are known by torch's names for them, which are gone now
    del proto.graph.value_info[:]
    proto.producer_name, proto.producer_version = "avfast", __version__
    onnx.helper.set_model_props(proto, {METADATA: metadata})
    onnx.save(proto, path)
    onnx.checker.check_model(str(path), full_check=True)


def open_graph(folder: str | Path, name: str) -> tuple[runtime.Run, dict[str, Any]] | None:
    """One graph of an exported folder of any format, on the CPU, and what it says of itself; None where there is none.
    Raises InputError where its file cannot be loaded."""
    paths = {kind: Path(folder) / f"{name}{suffix}" for kind, suffix in _SUFFIX.items()}
    if paths["onnx"].exists():
        session = Session(paths["onnx"], ["CPUExecutionProvider"], None)
        return session, session.metadata
    call: Callable[..., Any]
    extra = {METADATA: ""}
    try:
        if paths["aoti"].exists():
            call = torch._inductor.aoti_load_package(str(paths["aoti"]))
            extra = call.get_metadata()
        elif paths["pt2"].exists():
            call = torch.export.load(paths["pt2"], extra_files=extra).module()
        else:
            return None
        metadata = json.loads(extra[METADATA])
    except Exception as error:
        # whatever torch finds wrong with a file, to the user it is one
        raise InputError(f"{name} in {folder} cannot be loaded: {' '.join(str(error).split())[:200]}") from None

    def run(feed: Mapping[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            outputs = call(*(torch.from_numpy(np.array(feed[spec["name"]])) for spec in metadata["inputs"]))
        return {spec["name"]: x.numpy() for spec, x in zip(metadata["outputs"], outputs, strict=True)}

    return run, metadata


class ExportPredictor(runtime.Predictor):
    """The runner of an exported folder of any format, on the CPU."""

    def __init__(self, folder: str | Path) -> None:
        self.device, self.note = "cpu", None
        opened = {name: found for name in runtime.GRAPHS if (found := open_graph(folder, name)) is not None}
        if "step" not in opened:
            raise InputError(f"{folder} holds no exported model: step is missing")
        self._set(opened, str(folder))


def verify(
    folder: Path, model: VideoModel, *, given: int = 5, unroll: int | None = None, run: TrainConfig | None = None
) -> dict[str, float]:
    """Largest differences between a folder's graphs and PyTorch over whole rollouts: on random inputs in two sizes that
    are not those of the export, and on real clips where the run's data set is there. Of frames in their unit, of flow
    relative to its largest value (at least 1 pixel)."""
    predictor, whole = ExportPredictor(folder), open_graph(folder, "rollout")
    cases = {
        "random 1x48x48": _random_inputs(model, 1, given, 48, 48),
        "random 2x64x32": _random_inputs(model, 2, given, 64, 32),
    }
    if run is not None and (real := _real_inputs(run, given)) is not None:
        cases["real clips"] = real
    found: dict[str, float] = {}
    for name, inputs in cases.items():
        expected = model.predict(*inputs)
        frames, flow, audio = (x.numpy() for x in inputs)
        found |= _differences(name, predictor.rollout(frames, flow, audio), expected)
        steps = unroll or expected.frames.shape[1]
        if whole is not None and given + steps <= audio.shape[1]:
            out = whole[0]({"frames": frames, "flow": flow, "audio": audio[:, : given + steps]})
            rollout = runtime.Rollout(out["predicted_frames"], out["predicted_flow"])
            found |= _differences(f"{name}, rollout", rollout, expected.first_frames(steps))
    return found


def _random_inputs(model: VideoModel, batch: int, given: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(batch, given, model.settings.image_channels, height, width, generator=generator)
    flow = 2 * torch.randn(batch, given, 2, height, width, generator=generator)
    flow[:, 0] = 0
    audio = torch.rand(batch, given + _VERIFIED_STEPS, 1, *model.settings.audio_shape, generator=generator)
    return frames, flow, audio


def _real_inputs(run: TrainConfig, given: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Two test clips, where the run's test split has been built already."""
    store = None
    # the digits may have been moved since
    with suppress(InputError):
        store = run.built_split("test")
    if store is None:
        return None
    clips = list(range(min(2, len(store))))
    batch = store.batch(clips, [0] * len(clips), store.clip_frames)
    return batch.frames[:, :given], batch.flow[:, :given], batch.audio


def _differences(name: str, found: runtime.Rollout, expected: Rollout) -> dict[str, float]:
    assert expected.flow is not None
    frames = np.abs(found.frames - expected.frames.numpy()).max()
    flow = np.abs(found.flow - expected.flow.numpy()).max() / max(1.0, expected.flow.abs().max().item())
    return {f"{name}, frames": float(frames), f"{name}, flow": float(flow)}


def main(argv: list[str] | None = None) -> None:
    config = parse(ExportConfig, prog="avfast export", argv=argv)
    began = time.monotonic()
    export(config)
    files = ", ".join(sorted(path.name for path in Path(config.out).iterdir()))
    print(f"{config.out}: {files}, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_command(main)
