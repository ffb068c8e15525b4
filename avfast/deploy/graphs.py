"""The model cut into the five graphs that `avfast.export` writes and `avfast.runtime` runs.

    audio     new sound windows, keys and values so far -> audio vectors, condensed rows, all keys and values
    observe   given frames and their flow, state -> state after them (E_m and the ConvLSTMs, no decoder)
    context   V_K -> z1..z4
    step      one step t of MME and CAR: (F_t, V_t), state, memory up to A_{t+1} -> F_{t+1}, V_{t+1}, state
    rollout   K frames, their flow and the sound of T frames -> frames and flow K+1..T

The first four compute nothing twice and suit a stream as well as a whole clip; `rollout` is all of them in one graph,
its recurrences as `scan` loops, or unrolled. BatchNorm is folded into the convolutions. In half precision the
convolutions and the hidden state are float16; images, flow, warp, the ConvLSTM's cell, attention and D_m's last layer
stay float32.

Shape legend: B batch, C image channels, h w the feature maps' size, H W = 16h 16w, F S spectrogram, D = 128 feature
channels, L ConvLSTM layers, N new frames or windows, P earlier windows, M memory tokens, K given frames of T in all.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_map_only

from avfast.kernels import backward_warp, recall
from avfast.kernels.registry import DECOMPOSITIONS
from avfast.kernels.winograd.strided import Kept
from avfast.models.avmodel import AVModel
from avfast.models.networks import FEATURES, ConvBlock


class Port(NamedTuple):
    """An input or output of a graph."""

    name: str
    shape: tuple[int | str, ...]
    """Sizes, or names of the shape legend for sizes that may differ from call to call ("16h": 16 times h)."""
    meaning: str
    half: bool = False
    """float16 in a graph of half precision; float32 always where it is False."""


class Graph(nn.Module):
    """One graph: `forward` takes the tensors of `inputs` in order and gives those of `outputs`."""

    name: str
    inputs: list[Port]
    outputs: list[Port]

    def __init__(self, model: AVModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.mme = model.mme

    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """What torch.export calls the sizes that may differ from call to call, per input."""
        names = sorted({_dimension(size)[1] for port in self.inputs for size in port.shape if isinstance(size, str)})
        # torch.export wants T stated as it finds it: K and T - K at least 2. In ONNX nothing holds it to that
        dims = {name: Dim(name, min=4) if name == "T" else Dim(name) for name in names}
        shapes = []
        for port in self.inputs:
            parsed = {i: _dimension(size) for i, size in enumerate(port.shape) if isinstance(size, str)}
            shapes.append({i: dims[name] if times == 1 else times * dims[name] for i, (times, name) in parsed.items()})
        return tuple(shapes)

    def example(self, **sizes: int) -> tuple[Tensor, ...]:
        """Random inputs of the given sizes, in [0, 1]; flow, state and memory in [-1, 1]."""
        tensors = []
        for port in self.inputs:
            x = torch.rand([size if isinstance(size, int) else _size(size, sizes) for size in port.shape])
            if port.name not in ("frames", "frame", "image", "previous", "windows", "audio"):
                x = 2 * x - 1
            tensors.append(x.to(self.dtype) if port.half else x)
        return tuple(tensors)

    @property
    def dtype(self) -> torch.dtype:
        """float32 or float16, the type of ports that are `half`."""
        return self.mme.lstm.cells[0].weight.dtype  # type: ignore[return-value]

    def _memory(self) -> list[Port]:
        """The memory that step t recalls from, as inputs."""
        if self.config.motion == "mme":
            return [Port("condensed", ("B", FEATURES), "row t + 1 of audio's condensed")]
        if self.config.motion == "v+recall":
            shape = ("B", "M", FEATURES)
            return [Port("key", shape, "keys of A_1..A_{t+1}"), Port("value", shape, "their values")]
        return []

    def _state(self, prefix: str, when: str) -> list[Port]:
        shape = ("B", self.config.convlstm_layers, FEATURES, "h", "w")
        return [
            Port(f"{prefix}hidden", shape, f"hidden state of every ConvLSTM layer {when}", half=True),
            Port(f"{prefix}cell", shape, f"its cell state {when}"),
        ]

    def _lstm(self, feature: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step: feature (B,D,h,w), state (B,L,D,h,w) twice -> (top hidden, hidden, cell)."""
        top, states = self.mme.lstm(feature, list(zip(hidden.unbind(1), cell.unbind(1), strict=True)))
        hiddens, cells = zip(*states, strict=True)
        return top, torch.stack(hiddens, dim=1), torch.stack(cells, dim=1)

    def _move(
        self, image: Tensor, flow: Tensor, hidden: Tensor, cell: Tensor, memory: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step t of MME: V_t, F_t and the state -> the same at t + 1."""
        feature = memory(self.mme.encoder(flow[:, None], image[:, None])[:, 0])
        top, hidden, cell = self._lstm(feature, hidden, cell)
        flow = self.mme.decoder(top)
        return backward_warp(image, flow), flow, hidden, cell

    def _project(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of audio vectors, for recall by attention."""
        key, value = self.mme.recall.project(vectors)
        assert key is not None
        return key, value

    def _recall_rows(self, feature: Tensor, rows: Tensor) -> Tensor:
        """Recall from one condensed row each: feature (B,D,h,w), rows (B,D)."""
        return recall(feature.float(), None, None, self.mme.recall.value(rows)[:, None]).to(feature.dtype)

    def _recall_tokens(self, feature: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None) -> Tensor:
        """Recall by attention, in float32: feature (B,N,D,h,w), key and value (B,M,D), visible (N,M), None for all."""
        b, n, d, h, w = feature.shape
        assert self.mme.recall.query is not None
        query = self.mme.recall.query(feature.flatten(0, 1).float())
        query = query.unflatten(0, (b, n)).flatten(3).mT
        mask = None if visible is None else visible[:, None]
        recalled = attention(query, key[:, None], value[:, None], mask)
        return feature + recalled.mT.unflatten(3, (h, w)).to(feature.dtype)


class AudioGraph(Graph):
    """E_a on new windows, and the memory that grows by them. There is none for the variant `v`."""

    name = "audio"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        past = ("B", "P", FEATURES)
        self.inputs = [
            Port("windows", ("B", "N", 1, *self.config.audio_shape), "spectrograms of the next N frames, in [0, 1]"),
            Port("past_key", past, "`key` of the call before; P = 0 at the first"),
            Port("past_value", past, "`value` of the call before"),
        ]
        new = ("B", "N", FEATURES)
        self.outputs = [Port("vectors", new, "E_a's vectors, one per window")]
        if self.config.motion == "mme":
            self.outputs.append(Port("condensed", new, "the memory up to each window, condensed into one row (Eq. 1)"))
        grown = ("B", "P+N", FEATURES)
        self.outputs += [Port("key", grown, "keys of all windows so far"), Port("value", grown, "values likewise")]

    def forward(self, windows: Tensor, past_key: Tensor, past_value: Tensor) -> tuple[Tensor, ...]:
        vectors = self.mme.audio_encoder(windows)
        if self.config.motion == "v+recall":
            key, value = self._project(vectors)
            return vectors, torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        query, key, value = self.mme.condense.qkv(vectors).chunk(3, dim=-1)
        key, value = torch.cat((past_key, key), 1), torch.cat((past_value, value), 1)
        tokens = torch.arange(key.shape[1], device=key.device)
        visible = tokens <= tokens[past_key.shape[1] :, None]
        return vectors, vectors + attention(query, key, value, visible), key, value


class ObserveGraph(Graph):
    """The state after given frames: E_m on all of them in one call, then the ConvLSTMs step by step."""

    name = "observe"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        self.inputs = [
            Port("frames", ("B", "N", self.config.image_channels, "16h", "16w"), "given frames, in [0, 1]"),
            Port("flow", ("B", "N", 2, "16h", "16w"), "their backward flow in pixels, x then y; 0 for a first frame"),
            *self._state("", "before them, zeros at the start"),
        ]
        if self.config.motion == "mme":
            self.inputs.append(Port("condensed", ("B", "N", FEATURES), "rows t + 1 of audio's condensed for frames t"))
        else:
            self.inputs += self._memory()
        self.outputs = self._state("next_", "after the last frame")

    def forward(
        self, frames: Tensor, flow: Tensor, hidden: Tensor, cell: Tensor, *memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        features = self.recalled(self.mme.encoder(flow, frames), *memory)

        def step(state: list[Tensor], feature: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            top, hidden, cell = self._lstm(feature, *state)
            return [hidden, cell], []

        (hidden, cell), _ = scan(step, [hidden, cell], features.transpose(0, 1))
        return hidden, cell

    def recalled(self, features: Tensor, *memory: Tensor) -> Tensor:
        """Features (B,N,D,h,w) with what each recalls; the last frame's memory ends with the last token."""
        b, n = features.shape[:2]
        if self.config.motion == "mme":
            (rows,) = memory
            return self._recall_rows(features.flatten(0, 1), rows.flatten(0, 1)).unflatten(0, (b, n))
        if self.config.motion == "v+recall":
            key, value = memory
            tokens = torch.arange(key.shape[1], device=key.device)
            ends = torch.arange(n, device=key.device) + (key.shape[1] - n)
            return self._recall_tokens(features, key, value, tokens <= ends[:, None])
        return features


class ContextGraph(Graph):
    """The context encoder. There is none for refinement `none` and `unet`."""

    name = "context"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        self.inputs = [Port("frame", ("B", self.config.image_channels, "16h", "16w"), "V_K, in [0, 1]")]
        self.outputs = context_ports(model)

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        assert self.model.car is not None
        return tuple(self.model.car.context_encoder(frame))


class StepGraph(Graph):
    """Step t of MME, and of CAR where there is one."""

    name = "step"

    def __init__(self, model: AVModel) -> None:
        super().__init__(model)
        config = self.config
        image, flow = ("B", config.image_channels, "16h", "16w"), ("B", 2, "16h", "16w")
        self.inputs = [
            Port("image", image, "MME's V_t: given for t <= K, else the step before's next_image"),
            Port("flow", flow, "F_t in pixels, x then y: given for t <= K, else the step before's next_flow"),
            *self._state("", "before the step"),
            *self._memory(),
        ]
        if model.car is not None:
            self.inputs.append(Port("previous", image, "V_K for t = K, else the step before's prediction"))
            if hears(model):
                self.inputs.append(Port("vector", ("B", FEATURES), "row t of audio's vectors"))
            self.inputs += context_ports(model)
        self.outputs = [
            Port("prediction", image, "frame t + 1, in [0, 1]"),
            Port("next_flow", flow, "F_{t+1} in pixels, x then y"),
            Port("next_image", image, "V_t warped by it, unrefined"),
            *self._state("next_", "after the step"),
        ]

    def forward(self, image: Tensor, flow: Tensor, hidden: Tensor, cell: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        count = len(self._memory())
        memory, rest = rest[:count], rest[count:]

        def recalled(feature: Tensor) -> Tensor:
            if self.config.motion == "mme":
                return self._recall_rows(feature, *memory)
            return self._recall_tokens(feature[:, None], *memory)[:, 0] if memory else feature

        image, flow, hidden, cell = self._move(image, flow, hidden, cell, recalled)
        if self.model.car is None:
            return image.clamp(0, 1), flow, image, hidden, cell
        previous, *contexts = rest
        vector = contexts.pop(0) if hears(self.model) else None
        prediction = self.model.car.step(previous, flow, vector, contexts or None, self.mme.encoder).clamp(0, 1)
        return prediction, flow, image, hidden, cell


class RolloutGraph(Graph):
    """Everything in one graph. `unroll` = (K, P): steps written out one by one for exactly K given and P predicted
    frames, for hosts without loops; None: `scan` loops for any numbers of both."""

    name = "rollout"

    def __init__(self, model: AVModel, unroll: tuple[int, int] | None = None) -> None:
        super().__init__(model)
        self.unroll = unroll
        given, total = ("K", "T") if unroll is None else (unroll[0], sum(unroll))
        image = (self.config.image_channels, "16h", "16w")
        self.inputs = [
            Port("frames", ("B", given, *image), "the K given frames, in [0, 1]"),
            Port("flow", ("B", given, 2, "16h", "16w"), "their backward flow in pixels, x then y; flow[:, 0] = 0"),
            Port("audio", ("B", total, 1, *self.config.audio_shape), "spectrograms of all T frames, in [0, 1]; T > K"),
        ]
        steps = "T-K" if unroll is None else unroll[1]
        self.outputs = [
            Port("predicted_frames", ("B", steps, *image), "frames K+1..T, in [0, 1]"),
            Port("predicted_flow", ("B", steps, 2, "16h", "16w"), "their backward flow in pixels, x then y"),
        ]
        self.observe = ObserveGraph(model)

    def forward(self, frames: Tensor, flow: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        given, total = frames.shape[1], audio.shape[1]
        vectors: Tensor | None = None
        memory: tuple[Tensor, ...] = ()
        if self.config.motion != "v":
            vectors = self.mme.audio_encoder(audio)
            memory = (self.mme.condense(vectors),) if self.config.motion == "mme" else self._project(vectors)
        car = self.model.car
        contexts = car.context_encoder(frames[:, -1]) if car is not None and car.variant != "unet" else None

        features = self.mme.encoder(flow, frames)
        if memory:
            rows = [m[:, 1 : given + 1] if self.config.motion == "mme" else m[:, : given + 1] for m in memory]
            features = self.observe.recalled(features, *rows)
        state = (*features.shape[:1], self.config.convlstm_layers, *features.shape[2:])
        hidden = torch.zeros(state, dtype=features.dtype, device=features.device)
        cell = torch.zeros(state, device=features.device)

        # per step: its number, up to which recall by attention sees; the condensed row; A_t's vector
        per_step = [torch.arange(given, total, device=frames.device)]
        if self.config.motion == "mme":
            per_step.append(memory[0][:, given:].transpose(0, 1))
        if vectors is not None and hears(self.model):
            per_step.append(vectors[:, given - 1 : -1].transpose(0, 1))

        def observe(state: list[Tensor], item: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            feature, real = item
            _, hidden, cell = self._lstm(feature, *state)
            return [hidden * real.to(hidden.dtype), cell * real], []

        def predict(carry: list[Tensor], item: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            image, flow, hidden, cell, previous = carry
            number, *rows = item

            def recalled(feature: Tensor) -> Tensor:
                if not memory:
                    return feature
                if self.config.motion == "mme":
                    return self._recall_rows(feature, rows[0])
                visible = torch.arange(memory[0].shape[1], device=feature.device) <= number
                key, value = memory
                return self._recall_tokens(feature[:, None], key, value, visible[None])[:, 0]

            image, flow, hidden, cell = self._move(image, flow, hidden, cell, recalled)
            if car is None:
                previous = image.clamp(0, 1)
            else:
                vector = rows[-1] if hears(self.model) else None
                previous = car.step(previous, flow, vector, contexts, self.mme.encoder).clamp(0, 1)
            # a scan's outputs may not share memory
            return [image, flow, hidden, cell, previous], [previous.clone(), flow.clone()]

        loop = scan if self.unroll is None else _unrolled
        # frame K belongs to the first predicted step. Its feature stands first here, and is forgotten: onnxruntime
        # refuses a loop of no rounds, which K = 1 would be
        rounds = (torch.arange(given, device=frames.device) > 0).float()
        (hidden, cell), _ = loop(observe, [hidden, cell], [features.roll(1, 1).transpose(0, 1), rounds])
        # a scan carries tensors whose strides never change, too
        last, motion = frames[:, -1].contiguous(), flow[:, -1].contiguous()
        start = [last, motion, hidden, cell, last.clone()]
        _, (predicted, flows) = loop(predict, start, per_step)
        return predicted.transpose(0, 1), flows.transpose(0, 1)


def hears(model: AVModel) -> bool:
    """Whether CAR takes the audio vectors of single frames."""
    return model.config.refinement == "car" and model.config.motion != "v"


def context_ports(model: AVModel) -> list[Port]:
    """z1..z4, or none where the refinement has no context."""
    if model.config.refinement not in ("unet+context", "car"):
        return []
    width, sizes = model.config.unet_width, ("16", "8", "4", "2")
    shapes = [("B", width << i, f"{s}h", f"{s}w") for i, s in enumerate(sizes)]
    return [Port(f"z{i}", shape, "context feature of V_K", half=True) for i, shape in enumerate(shapes, start=1)]


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> Tensor:
    """softmax(query key^T) value without 1/sqrt(D); where `visible` is False a key has no weight."""
    scores = query @ key.mT
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1) @ value


def border_warp(image: Tensor, flow: Tensor) -> Tensor:
    """`kernels.reference.backward_warp` with padding "border" in values, without a gradient, image and flow in float32:
    74 ONNX nodes where the definition, much of which is about gradients, becomes 109.

    A gather of four pixels, not ONNX's GridSample (29 nodes): in onnxruntime on one CPU thread the gather takes 0.35 to
    0.61 times as long (1 and 16 images of 48, 64 and 96 pixels, 1 of 256) and equals the definition bit for bit, while
    GridSample, whose coordinates are a share of the image, is off by 4e-6 at 48 and 3e-5 at 256 pixels.
    """
    c, h, w = image.shape[1:]
    x = (flow[:, 0] + torch.arange(w, dtype=flow.dtype, device=flow.device)).clamp(0, w - 1)
    y = (flow[:, 1] + torch.arange(h, dtype=flow.dtype, device=flow.device)[:, None]).clamp(0, h - 1)
    left, top = x.floor().clamp(max=w - 2), y.floor().clamp(max=h - 2)
    right_share, lower_share = (x - left)[:, None], (y - top)[:, None]
    # clamped again because NaN, which the shares keep, becomes any integer
    corner = (top * w + left).long().clamp(0, (h - 1) * w - 2).flatten(1)[:, None].expand(-1, c, -1)
    pixels = image.flatten(2)
    upper_left, upper_right, lower_left, lower_right = (
        pixels.gather(2, corner + step).view(image.shape) for step in (0, 1, w, w + 1)
    )
    upper = (1 - lower_share) * (1 - right_share) * upper_left + (1 - lower_share) * right_share * upper_right
    return upper + lower_share * (1 - right_share) * lower_left + lower_share * right_share * lower_right


def trace(graph: Graph, sizes: dict[str, int]) -> ExportedProgram:
    """A graph as a program of PyTorch's own ops alone, for any sizes. `sizes`: those of the example it is traced on."""
    shapes = list(graph.dynamic_shapes())
    named = len([p for p in inspect.signature(graph.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD])
    # arguments after a `*` are one tuple
    dynamic = (*shapes[:named], *([tuple(shapes[named:])] if shapes[named:] else []))
    # with gradients torch's scan would keep what a backward pass wants, and that cannot be exported
    with torch.no_grad():
        program = torch.export.export(graph, graph.example(**sizes), dynamic_shapes=dynamic, strict=False)
        plain = {torch.ops.avfast._backward_warp.default: lambda image, flow, *_: border_warp(image, flow)}
        return program.run_decompositions({**torch.export.default_decompositions(), **DECOMPOSITIONS, **plain})


def make_graphs(
    model: AVModel, dtype: torch.dtype = torch.float32, unroll: tuple[int, int] | None = None
) -> list[Graph]:
    """The graphs that a model needs. They share one copy of it, with BatchNorm folded, in the given precision."""
    model = _typed(fold_batch_norms(model), dtype)
    kinds: list[Graph] = [] if model.config.motion == "v" else [AudioGraph(model)]
    if context_ports(model):
        kinds.append(ContextGraph(model))
    return [*kinds, ObserveGraph(model), StepGraph(model), RolloutGraph(model, unroll)]


class _Folded(nn.Module):
    """A ConvBlock whose BatchNorm has become part of the convolution."""

    def __init__(self, block: ConvBlock) -> None:
        super().__init__()
        self.activation, norm = block.activation, block.norm
        self.conv = copy.deepcopy(block.conv)
        assert isinstance(self.conv, nn.Conv2d | nn.ConvTranspose2d) and self.conv.bias is None
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        # a transposed convolution has its output channels second
        along = (1, -1, 1, 1) if isinstance(self.conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
        weight = self.conv.weight.double() * scale.view(along)
        self.conv.weight = nn.Parameter(weight.float())
        self.conv.bias = nn.Parameter((norm.bias.double() - norm.running_mean.double() * scale).float())

    def forward(self, x: Tensor, steps: int = 1, kept: Kept | None = None) -> Tensor:
        return self.activation(self.conv(x))


def fold_batch_norms(model: AVModel) -> AVModel:
    """A copy of a model, in evaluation mode and without gradients, whose convolutions do what BatchNorm did."""
    model = copy.deepcopy(model).eval().cpu()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ConvBlock):
                setattr(module, name, _Folded(child))
    return model.requires_grad_(False)


class _Typed(nn.Module):
    """A module that runs in one type and answers in another, whatever type its inputs have."""

    def __init__(self, module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
        super().__init__()
        self.module, self.outside = module.to(inside), outside
        self.inside = inside

    def forward(self, *arguments: Any) -> Any:
        result = self.module(*tree_map_only(Tensor, lambda x: x.to(self.inside), arguments))
        return tree_map_only(Tensor, lambda x: x.to(self.outside), result)


def _typed(model: AVModel, dtype: torch.dtype) -> AVModel:
    if dtype == torch.float32:
        return model
    mme, car = model.mme, model.car
    mme.encoder = _Typed(mme.encoder, dtype, dtype)  # type: ignore[assignment]
    mme.lstm.to(dtype)
    mme.decoder.blocks.to(dtype)
    if mme.variant != "v":
        mme.audio_encoder = _Typed(mme.audio_encoder, dtype, torch.float32)  # type: ignore[assignment]
    if car is not None:
        if car.variant == "car":
            car.affine.to(dtype)
        if car.variant != "unet":
            car.context_encoder = _Typed(car.context_encoder, dtype, dtype)  # type: ignore[assignment]
        car.unet = _Typed(car.unet, dtype, torch.float32)  # type: ignore[assignment]
    return model


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
