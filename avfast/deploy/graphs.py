"""The paper's model cut into the graphs that `avfast.export` writes and `avfast.runtime` runs.

    audio     new sound windows, keys and values so far -> audio vectors, condensed rows, all keys and values
    observe   given frames and their flow, state -> state after them (E_m and the ConvLSTMs, no decoder)
    context   V_K -> z1..z4
    step      one step t of MME and CAR: (F_t, V_t), state, memory up to A_{t+1} -> F_{t+1}, V_{t+1}, state
    rollout   K frames, their flow and the sound of T frames -> frames and flow K+1..T

The first four compute nothing twice and suit a stream as well as a whole clip; `rollout` is all of them in one graph,
its recurrences as `scan` loops, or unrolled. Each calls the model's own steps (`models.mme`, `models.car`). BatchNorm
is folded into the convolutions. In half precision the convolutions and the hidden state are float16; images, flow,
warp, the ConvLSTM's cell, attention and D_m's last layer stay float32 (`folding.half_precision`).

Shape legend: B batch, C image channels, h w the feature maps' size, H W = 16h 16w, F S spectrogram, D = 128 feature
channels, L ConvLSTM layers, N new frames or windows, P earlier windows, M memory tokens, K given frames of T in all."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# PyTorch's loop that an exported program keeps has no public name yet
from torch._higher_order_ops import scan
from torch.export import Dim, ExportedProgram

from avfast.deploy.folding import fold_batch_norms, half_precision
from avfast.deploy.operators import DECOMPOSITIONS
from avfast.errors import InputError
from avfast.models.avmodel import AVModel
from avfast.models.base import VideoModel
from avfast.models.networks import FEATURES
from avfast.modules import State


class TensorSpec(NamedTuple):
    """An input or output of a graph."""

    name: str
    shape: tuple[int | str, ...]
    """Sizes, or names of the shape legend for sizes that may differ from call to call ("16h": 16 times h)."""
    meaning: str
    half: bool = False
    """float16 in a graph of half precision; float32 always where it is False."""


MEMORY = {
    "condensed": TensorSpec("condensed", ("B", FEATURES), "row t + 1 of audio's condensed"),
    "key": TensorSpec("key", ("B", "M", FEATURES), "keys of A_1..A_{t+1}"),
    "value": TensorSpec("value", ("B", "M", FEATURES), "values of A_1..A_{t+1}"),
}
"""What a step recalls from, by the names of `VisualMotion.memory_names`. With a dimension M it is all tokens so far."""


class Graph(nn.Module):
    """One graph: `forward` takes the tensors of `inputs` in order and gives those of `outputs`."""

    name: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    def __init__(self, model: AVModel) -> None:
        super().__init__()
        self.model, self.mme, self.settings = model, model.mme, model.settings

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """What torch.export calls the sizes that may differ from call to call, per input."""
        names = sorted({_dimension(size)[1] for spec in self.inputs for size in spec.shape if isinstance(size, str)})
        # torch.export wants T stated as it finds it: K and T - K at least 2. In ONNX nothing holds it to that
        dims = {name: Dim(name, min=4) if name == "T" else Dim(name) for name in names}
        shapes = []
        for spec in self.inputs:
            parsed = {i: _dimension(size) for i, size in enumerate(spec.shape) if isinstance(size, str)}
            shapes.append({i: dims[name] if times == 1 else times * dims[name] for i, (times, name) in parsed.items()})
        return tuple(shapes)

    def example(self, **sizes: int) -> tuple[Tensor, ...]:
        """Random inputs of the given sizes, in [0, 1]; flow, state and memory in [-1, 1]."""
        tensors = []
        for spec in self.inputs:
            x = torch.rand([size if isinstance(size, int) else _size(size, sizes) for size in spec.shape])
            if spec.name not in ("frames", "frame", "image", "previous", "windows", "audio"):
                x = 2 * x - 1
            tensors.append(x.to(self.dtype) if spec.half else x)
        return tuple(tensors)

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float16, the type of what is `half`."""
        return self.mme.lstm.cells[0].weight.dtype  # type: ignore[return-value]

    def _state(self, prefix: str, when: str) -> list[TensorSpec]:
        shape = ("B", self.settings.convlstm_layers, FEATURES, "h", "w")
        return [
            TensorSpec(f"{prefix}hidden", shape, f"hidden state of every ConvLSTM layer {when}", half=True),
            TensorSpec(f"{prefix}cell", shape, f"its cell state {when}"),
        ]


def _layers(hidden: Tensor, cell: Tensor) -> list[State]:
    """(B,L,D,h,w) twice -> the state of every layer."""
    return list(zip(hidden.unbind(1), cell.unbind(1), strict=True))


def _stacked(states: list[State]) -> tuple[Tensor, Tensor]:
    hidden, cell = (torch.stack(parts, dim=1) for parts in zip(*states, strict=True))
    return hidden, cell


class AudioGraph(Graph):
    """E_a on new windows, and the memory that grows by them. There is none for a model without sound."""

    name = "audio"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        past = ("B", "P", FEATURES)
        self.inputs = [
            TensorSpec("windows", ("B", "N", 1, *self.settings.audio_shape), "spectrograms of N frames, in [0, 1]"),
            TensorSpec("past_key", past, "`key` of the call before; P = 0 at the first"),
            TensorSpec("past_value", past, "`value` of the call before"),
        ]
        new = ("B", "N", FEATURES)
        self.outputs = [TensorSpec("vectors", new, "E_a's vectors, one per window")]
        if "condensed" in self.mme.memory_names:
            meaning = "the memory up to each window in one row (Eq. 1), as every position recalls it (Eq. 2)"
            self.outputs.append(TensorSpec("condensed", new, meaning))
        grown = ("B", "P+N", FEATURES)
        self.outputs += [TensorSpec("key", grown, "keys of all windows so far"), TensorSpec("value", grown, "values")]

    def forward(self, windows: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        return self.mme.extend(windows, past_key, past_value)


class ObserveGraph(Graph):
    """The state after given frames: E_m on all of them in one call, then the ConvLSTMs step by step."""

    name = "observe"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        self.inputs = [
            TensorSpec("frames", ("B", "N", self.settings.image_channels, "16h", "16w"), "given frames, in [0, 1]"),
            TensorSpec("flow", ("B", "N", 2, "16h", "16w"), "backward flow in pixels, x then y; 0 for a first frame"),
            *self._state("", "before them, zeros at the start"),
        ]
        for spec in [MEMORY[name] for name in self.mme.memory_names]:
            rows = TensorSpec(spec.name, ("B", "N", *spec.shape[1:]), f"rows t + 1 of audio's {spec.name} for frames t")
            self.inputs.append(spec if "M" in spec.shape else rows)
        self.outputs = self._state("next_", "after the last frame")

    def forward(self, frames: Tensor, flow: Tensor, hidden: Tensor, cell: Tensor, *memory: Tensor) -> State:
        items = [self.mme.encoder(flow, frames).transpose(0, 1), *self.mme.loop_items(memory, frames.shape[1])]
        (hidden, cell), _ = scan(observing(self, memory), [hidden, cell], items)
        return hidden, cell


def observing(graph: Graph, memory: tuple[Tensor, ...]) -> Callable[..., Any]:
    """One round of a loop over given frames: state, (feature, memory's items) -> state."""

    def observe(state: list[Tensor], items: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        feature, *rest = items
        _, states = graph.mme.advance(feature, _layers(*state), *graph.mme.loop_memory(memory, *rest))
        return list(_stacked(states)), []

    return observe


class ContextGraph(Graph):
    """The context encoder. There is none where the refinement has no context."""

    name = "context"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        self.inputs = [TensorSpec("frame", ("B", self.settings.image_channels, "16h", "16w"), "V_K, in [0, 1]")]
        self.outputs = context_specs(model)

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        assert self.model.car is not None
        contexts = self.model.car.contexts(frame)
        assert contexts is not None
        return tuple(contexts)


class StepGraph(Graph):
    """Step t of MME, and of CAR where there is one."""

    name = "step"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        image, flow = ("B", self.settings.image_channels, "16h", "16w"), ("B", 2, "16h", "16w")
        self.inputs = [
            TensorSpec("image", image, "MME's V_t: given for t <= K, else the step before's next_image"),
            TensorSpec("flow", flow, "F_t in pixels, x then y: given for t <= K, else the step before's next_flow"),
            *self._state("", "before the step"),
            *[MEMORY[name] for name in self.mme.memory_names],
        ]
        rendering = {
            "previous": TensorSpec("previous", image, "V_K for t = K, else the step before's prediction"),
            "source": TensorSpec("source", image, "V_K, in [0, 1]"),
            "path": TensorSpec("path", flow, "0 for t = K, else the step before's next_path"),
            "age": TensorSpec("age", ("B",), "t - K"),
        }
        self.inputs += [rendering[name] for name in model.render_names]
        if model.car is not None and model.car.uses_sound:
            self.inputs.append(TensorSpec("vector", ("B", FEATURES), "row t of audio's vectors"))
        self.inputs += context_specs(model)
        self.outputs = [
            TensorSpec("prediction", image, "frame t + 1, in [0, 1]"),
            TensorSpec("next_flow", flow, "F_{t+1} in pixels, x then y"),
            TensorSpec("next_image", image, "V_t warped by it, unrefined"),
            *self._state("next_", "after the step"),
        ]
        if model.composed:
            self.outputs.append(TensorSpec("next_path", flow, "flow from frame t + 1 back to frame K, in pixels"))

    def forward(self, image: Tensor, flow: Tensor, hidden: Tensor, cell: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        car, names = self.model.car, self.model.render_names
        memory, rest = rest[: len(self.mme.memory_names)], rest[len(self.mme.memory_names) :]
        before, contexts = rest[: len(names)], list(rest[len(names) :])
        vector = contexts.pop(0) if car is not None and car.uses_sound else None
        image, flow, states = self.mme.step(image, flow, _layers(hidden, cell), *memory)
        prediction, after = self.model.render_step(before, (image, flow), vector, contexts)
        path = [after[1]] if self.model.composed else []
        return prediction, flow, image, *_stacked(states), *path


class RolloutGraph(Graph):
    """Everything in one graph. `unroll` = (K, P): steps written out one by one for exactly K given and P predicted
    frames, for hosts without loops; None: `scan` loops for any numbers of both."""

    name = "rollout"

    def __init__(self, model: AVModel, unroll: tuple[int, int] | None = None) -> None:
        super().__init__(model)
        self.unroll = unroll
        given, total = ("K", "T") if unroll is None else (unroll[0], sum(unroll))
        image = (self.settings.image_channels, "16h", "16w")
        self.inputs = [
            TensorSpec("frames", ("B", given, *image), "the K given frames, in [0, 1]"),
            TensorSpec("flow", ("B", given, 2, "16h", "16w"), "backward flow in pixels, x then y; flow[:, 0] = 0"),
            TensorSpec("audio", ("B", total, 1, *self.settings.audio_shape), "spectrograms of all T frames, in [0, 1]"),
        ]
        steps = "T-K" if unroll is None else unroll[1]
        self.outputs = [
            TensorSpec("predicted_frames", ("B", steps, *image), "frames K+1..T, in [0, 1]"),
            TensorSpec("predicted_flow", ("B", steps, 2, "16h", "16w"), "their backward flow in pixels, x then y"),
        ]

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        mme, car = self.mme, self.model.car
        given, total = frames.shape[1], audio.shape[1]
        loop = scan if self.unroll is None else _unrolled
        vectors, memory = mme.encode_sound(audio)
        contexts = [] if car is None else car.contexts(frames[:, -1]) or []

        # the last given frame belongs to the first predicted step. Its feature stands first here, and is forgotten:
        # onnxruntime refuses a loop of no rounds, which K = 1 would be
        features = mme.encoder(flow, frames).roll(1, 1)
        observed_items = [x.roll(1, 0) for x in mme.loop_items(mme.memory_until(memory, given), given)]
        is_real = (torch.arange(given, device=frames.device) > 0).float()
        state = (*features.shape[:1], self.settings.convlstm_layers, *features.shape[2:])
        hidden = torch.zeros(state, dtype=features.dtype, device=features.device)
        cell = torch.zeros(state, device=features.device)
        advance = observing(self, memory)

        def observe(state: list[Tensor], items: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            real, *rest = items
            (hidden, cell), _ = advance(state, rest)
            return [hidden * real.to(hidden.dtype), cell * real], []

        (hidden, cell), _ = loop(observe, [hidden, cell], [is_real, features.transpose(0, 1), *observed_items])

        vector_items = []
        if car is not None and car.uses_sound:
            assert vectors is not None
            vector_items = [vectors[:, given - 1 : -1].transpose(0, 1)]
        memory_items = mme.loop_items(memory, total - given)

        def predict(carry: list[Tensor], items: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            image, flow, hidden, cell, *before = carry
            vector = items[0] if vector_items else None
            step_memory = mme.loop_memory(memory, *items[len(vector_items) : -1])
            image, flow, states = mme.step(image, flow, _layers(hidden, cell), *step_memory)
            prediction, after = self.model.render_step(tuple(before), (image, flow), vector, contexts)
            # what a scan gives may not share memory with what it takes or gives elsewhere
            return [image, flow, *_stacked(states), *(x.clone() for x in after)], [prediction, flow.clone()]

        # a scan carries tensors whose strides never change, and wants one item at least
        last, motion = frames[:, -1].contiguous(), flow[:, -1].contiguous()
        start = [last, motion, hidden, cell, *(x.clone() for x in self.model.render_start(last))]
        rounds = torch.arange(given, total, device=frames.device)
        _, (predicted, flows) = loop(predict, start, [*vector_items, *memory_items, rounds])
        return predicted.transpose(0, 1), flows.transpose(0, 1)


def context_specs(model: AVModel) -> list[TensorSpec]:
    """z1..z4, or none where the refinement has no context."""
    if model.car is None or not model.car.has_context:
        return []
    width, sizes = model.settings.unet_width, ("16", "8", "4", "2")
    shapes = [("B", width << i, f"{s}h", f"{s}w") for i, s in enumerate(sizes)]
    return [TensorSpec(f"z{i}", shape, "context feature of V_K", half=True) for i, shape in enumerate(shapes, start=1)]


def trace(graph: Graph, sizes: dict[str, int]) -> ExportedProgram:
    """A graph as a program of PyTorch's own ops alone, for any sizes. `sizes`: those of the example it is traced on."""
    shapes = graph.dynamic_shapes()
    named = len([p for p in inspect.signature(graph.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD])
    # arguments after a `*` are one tuple
    dynamic = (*shapes[:named], tuple(shapes[named:])) if shapes[named:] else tuple(shapes)
    # with gradients torch's scan would keep what a backward pass wants, and that cannot be exported
    with torch.no_grad():
        program = torch.export.export(graph, graph.example(**sizes), dynamic_shapes=dynamic, strict=False)
        return program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS})


def make_graphs(
    model: VideoModel, dtype: torch.dtype = torch.float32, unroll: tuple[int, int] | None = None
) -> list[Graph]:
    """The graphs that a model needs. They share one copy of it, with BatchNorm folded, in the given precision. Raises
    InputError for a model that cannot be exported."""
    if not isinstance(model, AVModel):
        raise InputError(f"model {model.settings.name!r} cannot be exported, only {AVModel.settings_class.name!r} can")
    model = fold_batch_norms(model)
    if dtype == torch.float16:
        model = half_precision(model)
    kinds: list[Graph] = [AudioGraph(model)] if model.mme.uses_sound else []
    if context_specs(model):
        kinds.append(ContextGraph(model))
    return [*kinds, ObserveGraph(model), StepGraph(model), RolloutGraph(model, unroll)]


def _unrolled(step: Callable[..., Any], carry: list[Tensor], items: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`scan` as a plain loop."""
    collected = []
    for i in range(items[0].shape[0]):
        carry, outputs = step(carry, [x[i] for x in items])
        collected.append(outputs)
    return carry, [torch.stack(column) for column in zip(*collected, strict=True)]


def _dimension(size: str) -> tuple[int, str]:
    """ "16h" as (16, "h")."""
    times, name = re.fullmatch(r"(\d*)([A-Za-z]+)", size).groups()  # type: ignore[union-attr]
    return int(times or 1), name


def _size(size: str, sizes: dict[str, int]) -> int:
    times, name = _dimension(size)
    return times * sizes[name]
