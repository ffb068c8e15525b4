"""Layers to use in any model: the fused ops as modules, and what carries weights over from other people's layers.

Shape legend: B batch, T time, C D channels, H W image, M memory tokens. They are built on the
functions of `avfast.kernels`, whose docstrings have the formulas. `from_reference` takes the layers that such code
usually has and copies their weights; `to_reference` gives them back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from avfast.kernels import backward_warp, condense, conv3x3, convlstm_gates, modulate, recall

State = tuple[Tensor, Tensor]
"""(hidden, cell), each (B,D,H,W)."""
Projection = nn.Linear | nn.Conv2d
"""A linear map per position: a linear layer, or a convolution 1x1."""


class BackwardWarp(nn.Module):
    """out(p) = image(p + flow(p)): image (B,C,H,W), flow (B,2,H,W) in pixels, x then y. `avfast.backward_warp`."""

    def __init__(self, padding: str = "border") -> None:
        super().__init__()
        self.padding = padding

    def forward(self, image: Tensor, flow: Tensor) -> Tensor:
        return backward_warp(image, flow, padding=self.padding)

    def extra_repr(self) -> str:
        return f"padding={self.padding!r}"


class ConvLSTMCell(nn.Conv2d):
    """ConvLSTM cell without peepholes (Shi et al. 2015): a convolution over input and hidden state, then one fused op.

    forward(x (B,C,H,W), state or None for zeros) -> (hidden, cell). The cell state keeps the weights' dtype under
    autocast. The module is its convolution: input channels first, then hidden ones; outputs are the gates i, f, o, g.

    Weights start with variance 2 over the fan-in of the input half, the forget gate's bias at 1, the other biases at 0:
    after four layers of 128 channels the hidden state then differs between clips by 0.043, with PyTorch's own start by
    0.00016."""

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int = 3, *, bias: bool = True) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}, expected an odd number: the state keeps its size")
        self.input_channels, self.hidden_channels = in_channels, hidden_channels
        super().__init__(
            in_channels + hidden_channels, 4 * hidden_channels, kernel_size, padding=kernel_size // 2, bias=bias
        )

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(2 / (self.kernel_size[0] ** 2 * self.input_channels)) ** 0.5)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()[self.hidden_channels : 2 * self.hidden_channels] = 1

    def forward(self, x: Tensor, state: State | None = None) -> State:  # type: ignore[override]
        hidden, cell = self.zero_state(x) if state is None else state
        stacked = torch.cat((x, hidden), dim=1)
        if self.kernel_size == (3, 3):
            gates = conv3x3(stacked, self.weight, self.bias)
        else:
            gates = super().forward(stacked)
        return convlstm_gates(gates, cell)

    def zero_state(self, x: Tensor) -> State:
        """The state before the first step, for inputs like x (B,C,H,W). The cell has the weights' dtype."""
        shape = x.shape[0], self.hidden_channels, *x.shape[2:]
        return x.new_zeros(shape), x.new_zeros(shape, dtype=self.weight.dtype)

    @classmethod
    def from_reference(cls, conv: nn.Conv2d, *, order: str = "ifog") -> ConvLSTMCell:
        """A cell with the weights of another implementation's convolution. conv: from concat(x, hidden), C + D
        channels, to the four gates, 4 D channels, at the same height and width. order: the order of its gates: i input,
        f forget, o output, g candidate. Raises ValueError for another convolution or order."""
        hidden, kernel = conv.out_channels // 4, conv.kernel_size[0]
        fits = conv.out_channels == 4 * hidden < 4 * conv.in_channels and conv.groups == 1
        if not fits or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding != (kernel // 2, kernel // 2):
            raise ValueError(f"conv is {conv}, expected one from C + D to 4 D channels that keeps the size")
        cell = cls(conv.in_channels - hidden, hidden, kernel, bias=conv.bias is not None)
        cell.to(conv.weight.device, conv.weight.dtype).load_state_dict(_reordered(conv, order, "ifog"))
        return cell

    def to_reference(self, *, order: str = "ifog") -> nn.Conv2d:
        """The cell's weights as a convolution from concat(x, hidden) to the gates in the given order."""
        kernel = self.kernel_size[0]
        conv = nn.Conv2d(self.in_channels, self.out_channels, kernel, padding=kernel // 2, bias=self.bias is not None)
        conv.to(self.weight.device, self.weight.dtype).load_state_dict(_reordered(self, "ifog", order))
        return conv


def _reordered(conv: nn.Conv2d, order: str, wanted: str) -> dict[str, Tensor]:
    """A convolution's weights with its gates in another order."""
    for letters in (order, wanted):
        if sorted(letters) != sorted("ifog"):
            raise ValueError(f"order is {letters!r}, expected the letters i, f, o and g, each once")
    gates = [order.index(gate) for gate in wanted]
    weights = {"weight": conv.weight, "bias": conv.bias}
    return {name: torch.cat([x.chunk(4)[i] for i in gates]) for name, x in weights.items() if x is not None}


class ConvLSTM(nn.Module):
    """Stacked ConvLSTM cells: forward(x (B,C,H,W), states) -> (top hidden (B,D,H,W), states), one step. states: None
    for zeros, or one (hidden, cell) per layer. A recurrence on the CPU is faster inside `with
    avfast.kernels.shared_weights():`, which transforms the weights of its convolutions once for all steps: for 19 steps
    of 32x128x3x3, forward and backward, half the time that is taken where a layer's inputs are convolved in one call
    and only its hidden state step by step (one core with AVX-512)."""

    def __init__(self, in_channels: int, hidden_channels: Sequence[int], kernel_size: int = 3) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            ConvLSTMCell(a, b, kernel_size) for a, b in pairwise([in_channels, *hidden_channels])
        )

    def forward(self, x: Tensor, states: list[State] | None = None) -> tuple[Tensor, list[State]]:
        new = []
        for i, cell in enumerate(self.cells):
            x, memory = cell(x, None if states is None else states[i])
            new.append((x, memory))
        return x, new


class Condense(nn.Module):
    """Eq. 1 over every prefix: memory (B,T,C) -> condensed rows (B,T,C). Single head, q k v = 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels)

    def forward(self, memory: Tensor) -> Tensor:
        return condense(memory, self.qkv.weight, self.qkv.bias)

    @classmethod
    def from_reference(cls, query: Projection, key: Projection, value: Projection) -> Condense:
        """A layer with the weights of three linear layers or 1x1 convolutions C -> C."""
        module = cls(value.weight.shape[0]).to(value.weight.device, value.weight.dtype)
        weights, biases = zip(*map(_weight_and_bias, (query, key, value)), strict=True)
        module.qkv.load_state_dict({"weight": torch.cat(weights), "bias": torch.cat(biases)})
        return module

    def to_reference(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The weights as three linear layers C -> C: query, key, value."""
        query, key, value = map(_linear, self.qkv.weight.chunk(3), self.qkv.bias.chunk(3))
        return query, key, value


class Recall(nn.Module):
    """Eq. 2: a feature map (B,C,H,W) recalls from a memory. `project(memory (B,M,C))` gives the keys and values of
    every token once, before a recurrence; `forward` recalls from any slice of them. With `single` the memory is always
    one token: the softmax over one key is identically 1, its query and key have exactly zero gradient, and they are not
    created."""

    def __init__(self, channels: int, *, single: bool) -> None:
        super().__init__()
        self.query = None if single else nn.Conv2d(channels, channels, 1)
        self.key = None if single else nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)

    def project(self, memory: Tensor) -> tuple[Tensor | None, Tensor]:
        return (None if self.key is None else self.key(memory)), self.value(memory)

    def forward(self, feature: Tensor, key: Tensor | None, value: Tensor) -> Tensor:
        query = None if self.query is None else self.query(feature)
        return recall(feature, query, key, value)

    @classmethod
    def from_reference(cls, query: Projection | None, key: Projection | None, value: Projection) -> Recall:
        """A layer with the weights of three linear layers or 1x1 convolutions C -> C. query and key None: the memory is
        always one token, see the class."""
        module = cls(value.weight.shape[0], single=query is None or key is None)
        module.to(value.weight.device, value.weight.dtype)
        for own, layer in ((module.query, query), (module.key, key), (module.value, value)):
            if own is not None and layer is not None:
                weight, bias = _weight_and_bias(layer)
                own.load_state_dict({"weight": weight.view_as(own.weight), "bias": bias})
        return module

    def to_reference(self) -> tuple[nn.Linear | None, nn.Linear | None, nn.Linear]:
        """The weights as three linear layers C -> C: query, key, value; the first two are None with `single`."""
        query = None if self.query is None else _linear(self.query.weight, self.query.bias)
        key = None if self.key is None else _linear(self.key.weight, self.key.bias)
        return query, key, _linear(self.value.weight, self.value.bias)


def _weight_and_bias(layer: Projection) -> tuple[Tensor, Tensor]:
    """The weight as a matrix, and the bias, zeros where there is none."""
    weight = layer.weight.flatten(1)
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight.device, weight.dtype)
    layer.load_state_dict({"weight": weight.flatten(1), "bias": bias})
    return layer


class ContextModulation(nn.Module):
    """Eq. 6 and 7: context (B,C,H,W) scaled and shifted per channel as a motion vector (B,M) says, through an MLP
    M -> C -> C each, which start as the identity (gamma 1, beta 0). `before`: features (B,Ci,H,W) that the result is
    concatenated behind, without a pass of its own."""

    def __init__(self, motion_size: int, channels: int) -> None:
        super().__init__()

        def mlp(start: float) -> nn.Sequential:
            last = nn.Linear(channels, channels)
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, start)
            return nn.Sequential(nn.Linear(motion_size, channels), nn.ReLU(), last)

        self.gamma, self.beta = mlp(1.0), mlp(0.0)

    def forward(self, context: Tensor, motion: Tensor, *, before: Sequence[Tensor] = ()) -> Tensor:
        return modulate(context, self.gamma(motion), self.beta(motion), before=before)

    @classmethod
    def from_reference(cls, gamma: nn.Sequential, beta: nn.Sequential) -> ContextModulation:
        """A layer with the weights of two MLPs: Linear (M -> C), ReLU, Linear (C -> C)."""
        first, *_, last = gamma
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        module = cls(first.in_features, last.out_features).to(first.weight.device, first.weight.dtype)
        module.gamma.load_state_dict(gamma.state_dict())
        module.beta.load_state_dict(beta.state_dict())
        return module

    def to_reference(self) -> tuple[nn.Sequential, nn.Sequential]:
        """Copies of the two MLPs."""
        return copy.deepcopy(self.gamma), copy.deepcopy(self.beta)
