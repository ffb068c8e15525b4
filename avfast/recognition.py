"""What `avfast.patch` recognises: modules whose own code computes what a fused op computes, and how it takes over.

A module is recognised by what it computes, not by its name: its own code and the op's reference get the same random
numbers, and must give the same outputs and gradients in training and in evaluation. All is tried under `unchanged`."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from avfast.kernels import backward_warp, convlstm_gates, reference


@dataclass(frozen=True)
class _FusedCell:
    """A ConvLSTM cell, called with x and (hidden, cell) or with x, hidden and cell. It calls its own convolution, with
    the hooks and parametrisations that this has; the op computes the rest."""

    names: tuple[str, ...]
    """Names of the arguments that a fused call has: these, by place or by name, and no others."""
    conv: str
    """Name of the convolution in the module."""
    order: str
    """The order of the gates in the convolution's output."""
    takes: ClassVar = "x and (hidden, cell), or the three, alone"

    def __str__(self) -> str:
        return f"a fused ConvLSTM cell (gates {', '.join(self.order)})"

    def tensors(self, x: Any, *state: Any) -> tuple[Tensor, ...] | None:
        """The tensors for `compute`, or None if it cannot compute this call."""
        if len(state) == 1 and isinstance(state[0], (tuple, list)):
            (state,) = state
        fits = len(state) == 2 and _are_maps(x, *state) and state[0].shape == state[1].shape
        return (x, *state) if fits else None

    def compute(self, module: nn.Module, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        gates = getattr(module, self.conv)(torch.cat((x, hidden), dim=1))
        # under autocast the gates are half and the cell may be not: both results have the wider type, as in PyTorch
        cell = cell.to(torch.promote_types(gates.dtype, cell.dtype))
        hidden, cell = convlstm_gates(_reordered(gates, self.order), cell)
        return hidden.to(cell.dtype), cell


@dataclass(frozen=True)
class _FusedWarp:
    """A flow warp, called with an image (B,C,H,W) and a flow (B,2,H,W) in pixels. In half types the module's own code
    rounds its coordinates, which the op does not."""

    names: tuple[str, ...]
    padding: str
    takes: ClassVar = "an image and a flow of float32 or float64 alone"

    def __str__(self) -> str:
        return f"a fused backward warp (padding {self.padding})"

    def tensors(self, image: Any, flow: Any) -> tuple[Tensor, ...] | None:
        fits = _are_maps(image, flow) and flow.shape == (len(image), 2, *image.shape[2:])
        full = fits and image.dtype == flow.dtype and flow.dtype in (torch.float32, torch.float64)
        return (image, flow) if full else None

    def compute(self, module: nn.Module, image: Tensor, flow: Tensor) -> Tensor:
        return backward_warp(image, flow, padding=self.padding)


Fused = _FusedCell | _FusedWarp


def _are_maps(*values: Any) -> bool:
    return all(isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point() for t in values)


def arguments(fused: Fused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """The tensors of a call that the op can compute, or None."""
    by_name = fused.names[len(args) :]
    if len(args) > len(fused.names) or kwargs.keys() != set(by_name):
        return None
    return fused.tensors(*args, *[kwargs[name] for name in by_name])


@functools.cache
def subclass(base: Any, fused: Fused) -> Any:
    """The class of a module of class `base` after the swap."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = arguments(fused, args, kwargs)
        return base.forward(self, *args, **kwargs) if tensors is None else fused.compute(self, *tensors)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # the class cannot be imported by its name: copies and pickles make it anew
        return _empty, (base, fused), *base.__reduce_ex__(self, protocol)[2:]

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "__reduce_ex__": reduce})


def _empty(base: Any, fused: Fused) -> nn.Module:
    cls = subclass(base, fused)
    return cls.__new__(cls)


@torch.inference_mode(False)
def recognise(module: nn.Module, device: torch.device) -> Fused | str:
    """The fused op that computes what the module does, why a candidate is left, or "" for no candidate."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted code cannot be looked into"
    cls: Any = type(module)
    # the subclasses that earlier calls made are of avfast
    if cls.__module__.split(".")[0] in ("torch", "avfast"):
        return ""
    try:
        parameters = inspect.signature(cls.forward).parameters.values()
    except (TypeError, ValueError):
        return ""
    names: tuple[str, ...] = ()
    for parameter in list(parameters)[1:]:
        # arguments that a signature like (x, *state) does not name are given by place
        names += ("", "", "") if parameter.kind is parameter.VAR_POSITIONAL else (parameter.name,)
    convs = [name for name, child in module.named_children() if isinstance(child, nn.Conv2d)]
    has_weights = any(True for _ in module.parameters())
    if len(names) < 2 or len(convs) > 1 or bool(convs) != has_weights:
        return ""
    with unchanged(module):
        found = _recognise_cell(module, names, *convs) if convs else _recognise_warp(module, names, device)
    if isinstance(found, str):
        return found
    if "forward" in vars(module):
        return "its forward is set on the object, where a class cannot replace it"
    if any(_is_hooked(part) for name, part in module.named_modules() if name.split(".")[0] not in ("", *convs)):
        return "hooks of modules inside it would not be called"
    try:
        subclass(cls, found)
    except Exception as error:
        return f"its class refuses a subclass ({error})"
    return found


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks wait for its forward or backward pass. PyTorch has no function that tells."""
    return any("ward" in name and name.endswith("_hooks") and value for name, value in vars(module).items())


def _recognise_cell(module: nn.Module, names: tuple[str, ...], conv_name: str) -> Fused | str:
    conv: Any = getattr(module, conv_name)
    hidden = conv.out_channels // 4
    if conv.out_channels != 4 * hidden or not 0 < hidden < conv.in_channels:
        return ""
    channels = (conv.in_channels - hidden, hidden, hidden, 4 * hidden)
    inputs = [torch.randn(2, c, 5, 6).to(conv.weight) for c in channels]
    noise = _noise(module, conv_name)

    def own(packed: bool, x: Tensor, hidden: Tensor, cell: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        stacked: list[Tensor] = []

        # random gates tell the orders apart whatever the weights are: those of a convolution of zeros are all the same
        def replace(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            stacked.append(args[0])
            return gates

        with conv.register_forward_hook(replace):
            state = ((hidden, cell),) if packed else (hidden, cell)
            output = torch.func.functional_call(module, noise, (x, *state))
        if type(output) is not tuple:
            raise TypeError("expected (hidden, cell)")
        return *output, *stacked

    def fused(order: str, x: Tensor, hidden: Tensor, cell: Tensor, gates: Tensor) -> tuple[Tensor, ...]:
        return *reference.convlstm_gates(_reordered(gates, order), cell), torch.cat((x, hidden), dim=1)

    text = "one convolution with four parts, but it does not map x and (hidden, cell) to such a tuple, with gradients"
    for count in (2, 3)[: len(names) - 1]:
        expected = _probe_own(module, partial(own, count == 2), inputs)
        for order in map("".join, itertools.permutations("ifog")):
            if _same(_probe(partial(fused, order), inputs), *expected):
                return _FusedCell(names[:count], conv_name, order)
        if None not in expected:
            text = "a ConvLSTM cell, but it computes something else (peepholes, a norm, another activation, dropout?)"
    return text


def _reordered(gates: Tensor, order: str) -> Tensor:
    """Gates (B,4D,H,W) of that order in the order i, f, o, g."""
    parts = gates.chunk(4, dim=1)
    return gates if order == "ifog" else torch.cat([parts[order.index(gate)] for gate in "ifog"], dim=1)


def _recognise_warp(module: nn.Module, names: tuple[str, ...], device: torch.device) -> Fused | str:
    image = torch.rand(2, 3, 9, 11, device=device)
    # not near integers, where a rounding error decides which pixels are read
    flow = torch.randint(-3, 3, (2, 2, 9, 11), device=device) + 0.1 + 0.8 * torch.rand(2, 2, 9, 11, device=device)
    noise = _noise(module)

    def own(image: Tensor, flow: Tensor) -> tuple[Tensor]:
        return (torch.func.functional_call(module, noise, (image, flow)),)

    def fused(padding: str, image: Tensor, flow: Tensor) -> tuple[Tensor]:
        return (reference.backward_warp(image, flow, padding),)

    expected = _probe_own(module, own, [image, flow])
    for padding in ("border", "zeros"):
        if _same(_probe(partial(fused, padding), [image, flow]), *expected):
            return _FusedWarp(names[:2], padding)
    return ""


def _noise(module: nn.Module, but: str = "") -> dict[str, Tensor]:
    """Random numbers for all weights and buffers but those of the child `but`: the fused op reads none of them, and
    what is 0 or 1 at the start, as peepholes and norms are, must not look as if it did nothing."""
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    return {n: torch.rand(t.shape).to(t) for n, t in tensors if n.split(".")[0] != but and t.is_floating_point()}


def _probe(compute: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor] | None:
    """The tensors that `compute` returns, the inputs as it leaves them, and their gradients. None if it does not take
    these inputs, or returns something else."""
    with torch.enable_grad():
        try:
            leaves = [t.detach().requires_grad_() for t in inputs]
            given = [t.clone() for t in leaves]
            found = [*compute(*given), *given]
            if not all(t.is_floating_point() for t in found):
                return None
            # the leaves themselves too: each then has a gradient
            loss = torch.stack([t.square().sum() for t in (*found, *leaves)]).sum()
            return [*found, *torch.autograd.grad(loss, leaves)]
        except Exception:
            return None


def _probe_own(
    module: nn.Module, compute: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor]
) -> list[list[Tensor] | None]:
    """`_probe` of a module's own code in training and in evaluation."""
    found = []
    for training in (True, False):
        for part in module.modules():
            part.training = training
        found.append(_probe(compute, inputs))
    return found


def precision(tensor: Tensor) -> float:
    """Relative difference below which two computations are the same: 1e-4, or 8 units of the type's precision."""
    return max(1e-4, 8 * torch.finfo(tensor.dtype).eps)


def _same(found: list[Tensor] | None, *expected: list[Tensor] | None) -> bool:
    """Whether all computed the same, none of them nothing."""

    def close(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, precision(b), precision(b) / 10)

    return found is not None and all(
        other is not None and len(other) == len(found) and all(map(close, found, other)) for other in expected
    )


@contextmanager
def unchanged(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """Whatever happens inside, afterwards the model's modules have their classes and attributes, their dictionaries and
    lists their entries, tensors their values and PyTorch its random states, to the bit."""
    modules = {module: type(module) for module in model.modules()}
    values = [v for module in modules for v in (vars(module), *vars(module).values())]
    containers = [(c, c.copy()) for c in values if type(c) in (dict, OrderedDict, list)]
    entries = itertools.chain(
        model.parameters(),
        model.buffers(),
        tensors_in(inputs),
        *(c.values() if isinstance(c, dict) else c for c, _ in containers),
    )
    found = [t for t in entries if isinstance(t, Tensor) and t.layout == torch.strided and not t.is_quantized]
    tensors = {t: t.detach().clone() for t in found}
    with torch.random.fork_rng(sorted({t.device.index for t in tensors if t.is_cuda})):
        try:
            yield
        finally:
            for container, copy in containers:
                container.clear()
                add = container.update if isinstance(container, dict) else container.extend
                add(copy)
            for module, cls in modules.items():
                if type(module) is not cls:
                    module.__class__ = cls
            with torch.no_grad():
                for tensor, value in tensors.items():
                    # a write that changes nothing would still tell autograd that what it saved has changed
                    if not torch.equal(_bits(tensor), _bits(value)):
                        tensor.copy_(value)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(part)
