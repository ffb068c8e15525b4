"""`avfast.patch(model, *inputs)`: replace the ConvLSTM cells and flow warps of another project's model by fused ones.

A module is recognised by what it computes, not by its name: a candidate is called with random inputs and replaced only
if a fused layer gives the same outputs. Candidates that fail, and grid_sample calls elsewhere, are listed."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from avfast.modules import BackwardWarp, ConvLSTMCell

_TOLERANCE = 1e-4


@dataclass
class PatchReport:
    """What `patch` did, and how outputs and times compare."""

    swapped: dict[str, str] = field(default_factory=dict)
    """{name of a replaced module: what it is now}."""
    left: dict[str, str] = field(default_factory=dict)
    """{name of a candidate that was not replaced: why}."""
    difference: float = 0.0
    """Largest difference of an output, before and after."""
    speedup: float = 1.0
    """Time before / after, median over the paired runs."""

    def __str__(self) -> str:
        lines = [f"{name}: now {what}" for name, what in self.swapped.items()] or ["nothing was recognised"]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join([*lines, f"{self.speedup:.2f}x as fast, largest difference {self.difference:.1e}"])


class PatchedCell(nn.Module):
    """A ConvLSTMCell with the signature of the cell that it replaces: `cell(x, (hidden, cell))` or
    `cell(x, hidden, cell)`."""

    def __init__(self, cell: ConvLSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *state: Any) -> tuple[Tensor, Tensor]:
        hidden_and_cell = state[0] if len(state) == 1 else state
        return self.cell(x, None if hidden_and_cell is None else tuple(hidden_and_cell))


def patch(model: nn.Module, *inputs: Any, rounds: int = 5, verbose: bool = True) -> PatchReport:
    """Replace recognised modules of `model` in place, check that `model(*inputs)` stays the same, and time both.

    A ConvLSTM cell is a module with one convolution that is called with x and (hidden, cell) and returns both; its
    gates may have any order. A flow warp is a module without parameters that is called with an image and a flow in
    pixels. Names of parameters change with the modules: load checkpoints before. Outputs are compared and times taken
    without gradients, in the mode the model is in. rounds: paired runs to time; verbose: print the report.

    Raises ValueError if an output differs by more than 1e-4 of its largest value; then, as after any error, the model
    has its own modules again."""
    report = PatchReport()
    originals: dict[str, nn.Module] = {}
    replacements: dict[str, nn.Module] = {}
    recognised: dict[nn.Module, tuple[nn.Module | None, str]] = {}
    # a module that a model uses under two names gets one replacement under both
    for name, module in model.named_modules(remove_duplicate=False):
        inside_replaced = any(name.startswith(f"{other}.") for other in replacements)
        if not name or inside_replaced or isinstance(module, (ConvLSTMCell, BackwardWarp)):
            continue
        if module not in recognised:
            recognised[module] = _recognise(module)
        replacement, text = recognised[module]
        if replacement is not None:
            originals[name], replacements[name] = module, replacement.train(module.training)
            report.swapped[name] = text
        elif text:
            report.left[name] = text
    before = _run(model, inputs)
    for name, count in _count_grid_samples(model, inputs).items():
        if name not in replacements:
            text = f"it calls grid_sample ({count} times) and is no warp by a flow in pixels"
            report.left[name or "the model itself"] = text
    _swap(model, replacements)
    try:
        report.difference = _compare(before, _run(model, inputs))
        ratios = []
        for _ in range(rounds):
            new_time = _seconds(model, inputs)
            _swap(model, originals)
            ratios.append(_seconds(model, inputs) / new_time)
            _swap(model, replacements)
        report.speedup = statistics.median(ratios) if ratios else 1.0
    except BaseException:
        _swap(model, originals)
        raise
    if verbose:
        print(report)
    return report


def _recognise(module: nn.Module) -> tuple[nn.Module | None, str]:
    """(replacement, what it is), (None, why a candidate is not replaced), or (None, "") for no candidate."""
    convolutions = [m for m in module.children() if isinstance(m, nn.Conv2d)]
    with_weights = [m for m in module.children() if any(True for _ in m.parameters())]
    own_weights = any(True for _ in module.parameters(recurse=False))
    if len(convolutions) == len(with_weights) == 1 and not own_weights:
        return _recognise_cell(module, convolutions[0])
    if not with_weights and not own_weights and type(module).__module__.split(".")[0] != "torch":
        return _recognise_warp(module)
    return None, ""


def _recognise_cell(module: nn.Module, conv: nn.Conv2d) -> tuple[nn.Module | None, str]:
    try:
        ConvLSTMCell.from_reference(conv)
    except ValueError:
        return None, ""
    hidden = conv.out_channels // 4
    channels = (conv.in_channels - hidden, hidden, hidden)
    x, *state = (torch.randn(2, c, 5, 6, dtype=conv.weight.dtype, device=conv.weight.device) for c in channels)
    expected = _try(module, (x, tuple(state))) or _try(module, (x, *state))
    if expected is None or [t.shape for t in expected] != [t.shape for t in state]:
        return None, "one convolution with four parts, but not called as a ConvLSTM cell"
    for order in itertools.permutations("ifog"):
        cell = ConvLSTMCell.from_reference(conv, order="".join(order))
        if _same(cell(x, tuple(state)), expected):
            return PatchedCell(cell), f"a fused ConvLSTM cell (gates {', '.join(order)})"
    return None, "called as a ConvLSTM cell, but computes something else (peepholes, a norm, another activation?)"


def _recognise_warp(module: nn.Module) -> tuple[nn.Module | None, str]:
    image = torch.rand(2, 3, 9, 11)
    # not near integers, where a rounding error decides which pixels are read
    flow = torch.randint(-3, 3, (2, 2, 9, 11)) + 0.1 + 0.8 * torch.rand(2, 2, 9, 11)
    expected = _try(module, (image, flow))
    if expected is None:
        return None, ""
    for padding in ("border", "zeros"):
        warp = BackwardWarp(padding)
        if _same((warp(image, flow),), expected):
            return warp, f"a fused backward warp (padding {padding})"
    return None, ""


@torch.no_grad()
def _try(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    """The tensors that a module returns, or None if it does not take these arguments or returns something else."""
    try:
        output = module(*arguments)
    except Exception:
        return None
    outputs = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    return outputs if all(isinstance(t, Tensor) for t in outputs) else None


def _same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(found, expected, strict=True)
    )


def _compare(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of an output. Raises ValueError if it is above the tolerance."""
    largest = 0.0
    for old, new in zip(before, after, strict=True):
        error = (new - old).abs().max().item() if old.numel() else 0.0
        # written so that a NaN fails
        if not error <= _TOLERANCE * max(1.0, old.abs().max().item() if old.numel() else 0.0):
            raise ValueError(f"model's output changed by {error:.1e} after the swap: nothing was swapped")
        largest = max(largest, error)
    return largest


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The floating-point tensors in the model's output. The random state is the same for every run."""
    with torch.random.fork_rng(devices=[]):
        output = model(*inputs)
    return [tensor.clone() for tensor in _tensors(output) if tensor.is_floating_point()]


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _seconds(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    start = time.perf_counter()
    output = _run(model, inputs)
    if output and output[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _swap(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)


def _count_grid_samples(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """{name of a module: how often it calls grid_sample itself}; the model's own name is ""."""
    running: list[str] = [""]
    counts: Counter[str] = Counter()

    class Count(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if function is F.grid_sample:
                counts[running[-1]] += 1
            return function(*args, **(kwargs or {}))

    def leave(*_: Any) -> None:
        running.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        with Count():
            _run(model, inputs)
    return counts
