"""`avfast.patch(model, *inputs)`: let fused ops compute the ConvLSTM cells and flow warps of another project's model.

A module is recognised by what it computes, not by its name: its own code and the op's reference get the same random
numbers and must give the same outputs and gradients. It stays the object that it is, with its parameters, buffers,
hooks and attributes. Only its class changes, to a subclass whose `forward` takes the calls that the op can compute and
leaves all others to the module's own code. Everything is tried under `_unchanged`, so that no failure leaves a trace.
Candidates that fail, and grid_sample calls elsewhere, are listed."""

from __future__ import annotations

import functools
import inspect
import itertools
import statistics
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from avfast.kernels import backward_warp, convlstm_gates, reference


@dataclass
class PatchReport:
    """What `patch` did, and how outputs and times compare."""

    swapped: dict[str, str] = field(default_factory=dict)
    """{name of a module that a fused op computes now: which}."""
    left: dict[str, str] = field(default_factory=dict)
    """{name of a candidate that was left as it is: why}."""
    difference: float = 0.0
    """Largest difference of an output, before and after."""
    speedup: float = 1.0
    """Time before / after, median over the paired runs."""

    def __str__(self) -> str:
        lines = [f"{name}: now {what}" for name, what in self.swapped.items()] or ["nothing was recognised"]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join([*lines, f"{self.speedup:.2f}x as fast, largest difference {self.difference:.1e}"])


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


_Fused = _FusedCell | _FusedWarp


def _are_maps(*values: Any) -> bool:
    return all(isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point() for t in values)


def _arguments(fused: _Fused, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """The tensors of a call that the op can compute, or None."""
    by_name = fused.names[len(args) :]
    if len(args) > len(fused.names) or kwargs.keys() != set(by_name):
        return None
    return fused.tensors(*args, *[kwargs[name] for name in by_name])


@functools.cache
def _subclass(base: Any, fused: _Fused) -> Any:
    """The class of a module of class `base` after the swap."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tensors = _arguments(fused, args, kwargs)
        return base.forward(self, *args, **kwargs) if tensors is None else fused.compute(self, *tensors)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        # the class cannot be imported by its name: copies and pickles make it anew
        return _empty, (base, fused), *base.__reduce_ex__(self, protocol)[2:]

    return type(f"Fused{base.__name__}", (base,), {"forward": forward, "__reduce_ex__": reduce})


def _empty(base: Any, fused: _Fused) -> nn.Module:
    cls = _subclass(base, fused)
    return cls.__new__(cls)


def patch(model: nn.Module, *inputs: Any, rounds: int = 5, verbose: bool = True) -> PatchReport:
    """Let fused ops compute recognised modules of `model`, check that `model(*inputs)` stays the same, and time both.

    A ConvLSTM cell is a module with one convolution that is called with x and (hidden, cell) and returns both; its
    gates may have any order. A flow warp is a module that is called with an image and a flow in pixels. Modules,
    parameters, buffers, hooks and names stay what they are, and so do optimisers and checkpoints made before; calls
    with other arguments run the module's own code. The fused ops have first derivatives only. Outputs are compared and
    times taken without gradients, in the mode the model is in. rounds: paired runs to time; verbose: print the report.

    Raises ValueError if an output differs by more than 1e-4 of its largest value (in half types by more than 8 units of
    the type's precision), and for a model with tensors that have no values. After any error the model is as before."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor) or tensor.is_meta:
            state = "not initialised" if is_lazy(tensor) else "on the device meta"
            raise ValueError(f"model's {name} is {state}, expected values: outputs are compared")
    report = PatchReport()
    # a module may have several names
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or "the model itself")
    device = next((t.device for t in _tensors([*model.parameters(), inputs])), torch.device("cpu"))
    swaps: dict[nn.Module, _Fused] = {}
    inside_scripted = {m for s in names if isinstance(s, torch.jit.ScriptModule) for m in s.modules() if m is not s}
    for module in names:
        found = _recognise(module, device)
        if isinstance(found, _Fused):
            swaps[module] = found
        elif found and module not in inside_scripted:
            report.left |= dict.fromkeys(names[module], found)
    counts, called = _observe(model, inputs, swaps)
    for module in swaps.keys() - called:
        fused = swaps.pop(module)
        text = f"{fused} could compute it, but no call of it in model(*inputs): it takes {fused.takes}"
        report.left |= dict.fromkeys(names[module], text)
    for module, count in counts.items():
        text = f"it calls grid_sample ({count} times) and is no warp by a flow in pixels"
        report.left |= {name: text for name in names[module] if name not in report.left}
    report.swapped = {name: str(fused) for module, fused in swaps.items() for name in names[module]}
    before, _ = _run(model, inputs, {})
    report.difference = _compare(before, _run(model, inputs, swaps)[0])
    ratios = [_run(model, inputs, {})[1] / _run(model, inputs, swaps)[1] for _ in range(rounds)]
    report.speedup = statistics.median(ratios) if ratios else 1.0
    if verbose:
        print(report)
    _swap(swaps)
    return report


@torch.inference_mode(False)
def _recognise(module: nn.Module, device: torch.device) -> _Fused | str:
    """The fused op that computes what the module does, why a candidate is left, or "" for no candidate."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted code cannot be looked into"
    # the subclasses that earlier calls made are of avfast
    if type(module).__module__.split(".")[0] in ("torch", "avfast"):
        return ""
    try:
        parameters = inspect.signature(type(module).forward).parameters.values()
    except (TypeError, ValueError):
        return ""
    names = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[1:]
    # arguments that a signature like (x, *state) does not name are given by place
    names += ("",) * (3 * any(p.kind is p.VAR_POSITIONAL for p in parameters))
    convs = [name for name, child in module.named_children() if isinstance(child, nn.Conv2d)]
    has_weights = any(True for _ in module.parameters())
    if len(names) < 2 or len(convs) > 1 or bool(convs) != has_weights:
        return ""
    with _unchanged(module):
        found = _recognise_cell(module, names, *convs) if convs else _recognise_warp(module, names, device)
    if isinstance(found, str):
        return found
    if "forward" in vars(module):
        return "its forward is set on the object, where a class cannot replace it"
    if any(_is_hooked(part) for name, part in module.named_modules() if name.split(".")[0] not in ("", *convs)):
        return "hooks of modules inside it would not be called"
    return found


def _is_hooked(module: nn.Module) -> bool:
    """Whether hooks wait for its forward or backward pass. PyTorch has no function that tells."""
    return any("ward" in name and name.endswith("_hooks") and value for name, value in vars(module).items())


def _recognise_cell(module: nn.Module, names: tuple[str, ...], conv_name: str) -> _Fused | str:
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


def _recognise_warp(module: nn.Module, names: tuple[str, ...], device: torch.device) -> _Fused | str:
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


def _precision(tensor: Tensor) -> float:
    """Relative difference below which two computations are the same: 1e-4, or 8 units of the type's precision."""
    return max(1e-4, 8 * torch.finfo(tensor.dtype).eps)


def _same(found: list[Tensor] | None, *expected: list[Tensor] | None) -> bool:
    """Whether all computed the same, none of them nothing."""

    def close(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, _precision(b), _precision(b) / 10)

    return found is not None and all(
        other is not None and len(other) == len(found) and all(map(close, found, other)) for other in expected
    )


def _compare(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of an output. Raises ValueError if it is above the tolerance."""
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        error = (new - old).abs().max().item() if old.numel() else 0.0
        # written so that a NaN fails
        if not error <= _precision(old) * max(1.0, old.abs().max().item() if old.numel() else 0.0):
            raise ValueError(f"model's output changed by {error:.1e} after the swap: nothing was swapped")
        largest = max(largest, error)
    return largest


@contextmanager
def _unchanged(model: nn.Module, *inputs: Any) -> Iterator[None]:
    """Whatever happens inside, afterwards the model's modules have their classes and attributes, their dictionaries and
    lists their entries, tensors their values and PyTorch its random states, to the bit."""
    modules = {module: type(module) for module in model.modules()}
    values = [v for module in modules for v in (vars(module), *vars(module).values())]
    containers = [(c, c.copy()) for c in values if type(c) in (dict, OrderedDict, list)]
    entries = itertools.chain(*(c.values() if isinstance(c, dict) else c for c, _ in containers), _tensors(inputs))
    tensors = {t: t.detach().clone() for t in entries if isinstance(t, Tensor)}
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
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)


def _swap(swaps: Mapping[nn.Module, _Fused]) -> None:
    for module, fused in swaps.items():
        cls: Any = type(module)
        module.__class__ = _subclass(cls, fused)


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...], swaps: Mapping[nn.Module, _Fused]) -> tuple[list[Tensor], float]:
    """(the floating-point tensors in the output of the model with these swaps, seconds)."""
    with _unchanged(model, inputs):
        _swap(swaps)
        start = time.perf_counter()
        output = [tensor.clone() for tensor in _tensors(model(*inputs)) if tensor.is_floating_point()]
        if output and output[0].is_cuda:
            torch.cuda.synchronize()
        return output, time.perf_counter() - start


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _observe(
    model: nn.Module, inputs: tuple[Any, ...], swaps: Mapping[nn.Module, _Fused]
) -> tuple[Counter[nn.Module], set[nn.Module]]:
    """(how often each module of the swapped model calls grid_sample itself, the modules that fused ops computed)."""
    running = [model]
    counts: Counter[nn.Module] = Counter()
    called: set[nn.Module] = set()

    class Count(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if function is F.grid_sample:
                counts[running[-1]] += 1
            return function(*args, **(kwargs or {}))

    # a hook is told of a copy of the module where DataParallel runs it on several devices
    def enter(module: nn.Module, _copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running.append(module)
        if module in swaps and _arguments(swaps[module], args, kwargs) is not None:
            called.add(module)

    def leave(*_: Any) -> None:
        running.pop()

    # compiled code would not call Python's hooks, scripted code takes none
    with _unchanged(model, inputs), torch.no_grad(), torch.compiler.set_stance("force_eager"), Count():
        _swap(swaps)
        for module in [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]:
            # attributes, which _unchanged takes away again
            module.register_forward_pre_hook(partial(enter, module), with_kwargs=True)
            module.register_forward_hook(leave)
        model(*inputs)
    return counts, called
