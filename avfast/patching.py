"""`avfast.patch(model, *inputs)`: swap the ConvLSTM cells and flow warps of somebody else's model for the fused ones.

What a module does decides, not its name: a candidate is called with random inputs, and swapped only where a fused layer
gives the same. What looks like a candidate and is none, and grid_sample calls outside such modules, are listed.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from avfast.modules import BackwardWarp, ConvLSTMCell

_TOLERANCE = 1e-4


@dataclass
class PatchReport:
    """What `patch` did: swapped {module: what it is now}, left {module: why}, and how the outputs and times compare."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    difference: float = 0.0
    """Largest difference of an output, before and after."""
    speedup: float = 1.0
    """Time before / after, median over the paired runs."""

    def __str__(self) -> str:
        lines = [f"{name}: now {what}" for name, what in self.swapped.items()] or ["nothing was recognised"]
        lines += [f"{name}: left, {why}" for name, why in self.left.items()]
        return "\n".join([*lines, f"{self.speedup:.2f}x as fast, largest difference {self.difference:.1e}"])


class PatchedCell(nn.Module):
    """A ConvLSTMCell called as the cell it stands for: `cell(x, (hidden, cell))` or `cell(x, hidden, cell)`."""

    def __init__(self, cell: ConvLSTMCell) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, *state: Any) -> tuple[Tensor, Tensor]:
        hidden_and_cell = state[0] if len(state) == 1 else state
        return self.cell(x, None if hidden_and_cell is None else tuple(hidden_and_cell))


def patch(model: nn.Module, *inputs: Any, rounds: int = 5, verbose: bool = True) -> PatchReport:
    """Swap what is recognised in `model`, in place, check that its outputs for `inputs` stay the same, and time it.

    A ConvLSTM cell is a module with one convolution, called with x and (hidden, cell) and returning both; its gates may
    come in any order. A flow warp is a module without parameters, called with image and flow in pixels. Names of
    parameters change with the modules: load checkpoints first. Outputs are compared, and times taken, without gradients
    and in the mode the model is in. Raises ValueError, and puts everything back, where an output differs by more than
    1e-4 of its largest value.
    """
    report = PatchReport()
    where = {name: module for name, module in model.named_modules() if name}
    replacements: dict[str, nn.Module] = {}
    for name, module in where.items():
        if any(name.startswith(done + ".") for done in replacements) or isinstance(
            module, (ConvLSTMCell, BackwardWarp)
        ):
            continue
        found, why = _recognise(module)
        if found is not None:
            replacements[name] = found.train(module.training)
            report.swapped[name] = why
        elif why:
            report.left[name] = why
    before = _run(model, inputs)
    for name, count in _grid_samples(model, inputs).items():
        if name not in replacements:
            report.left[name or "the model itself"] = (
                f"it calls grid_sample ({count} times) and is no warp by a flow in pixels"
            )
    originals = {name: where[name] for name in replacements}
    _swap(model, replacements)
    try:
        after = _run(model, inputs)
        for old, new in zip(before, after, strict=True):
            error = (new - old).abs().max().item() if old.numel() else 0.0
            report.difference = max(report.difference, error)
            if not error <= _TOLERANCE * max(1.0, old.abs().max().item()):
                raise ValueError(f"model's output changed by {error:.1e} after the swap: nothing was swapped")
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
    """(replacement, what it is), (None, why a candidate is none) or (None, "")."""
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
    size = (2, hidden, 5, 6)
    x = _random(conv.weight, 2, conv.in_channels - hidden, 5, 6)
    state = _random(conv.weight, *size), _random(conv.weight, *size)
    expected = _try(module, (x, state)) or _try(module, (x, *state))
    if expected is None or [t.shape for t in expected] != [torch.Size(size)] * 2:
        return None, "one convolution with four parts, but not called as a ConvLSTM cell"
    for order in itertools.permutations("ifog"):
        cell = ConvLSTMCell.from_reference(conv, order="".join(order))
        if _same(cell(x, state), expected):
            return PatchedCell(cell), f"a fused ConvLSTM cell (gates {', '.join(order)})"
    return None, "called as a ConvLSTM cell, but computes something else (peepholes, a norm, another activation?)"


def _recognise_warp(module: nn.Module) -> tuple[nn.Module | None, str]:
    image = torch.rand(2, 3, 9, 11)
    # away from integers, where roundings decide which pixels are taken
    flow = torch.randint(-3, 3, (2, 2, 9, 11)) + 0.1 + 0.8 * torch.rand(2, 2, 9, 11)
    expected = _try(module, (image, flow))
    if expected is None:
        return None, ""
    for padding in ("border", "zeros"):
        warp = BackwardWarp(padding)
        if _same((warp(image, flow),), expected):
            return warp, f"a fused backward warp (padding {padding})"
    return None, ""


def _random(like: Tensor, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device)


@torch.no_grad()
def _try(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, ...] | None:
    try:
        out = module(*arguments)
    except Exception:
        # whatever it wants, it is not what a candidate would take
        return None
    outs = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    return outs if all(isinstance(t, Tensor) for t in outs) else None


def _same(found: Iterable[Tensor], expected: tuple[Tensor, ...]) -> bool:
    pairs = list(zip(found, expected, strict=False))
    return len(pairs) == len(expected) and all(
        a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs
    )


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    state = torch.get_rng_state()
    try:
        leaves = tree_leaves(model(*inputs))
    finally:
        torch.set_rng_state(state)
    return [t.detach().clone() for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def _seconds(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    began = time.perf_counter()
    out = _run(model, inputs)
    if out and out[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _swap(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, module)


def _grid_samples(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, int]:
    """How often which module itself calls grid_sample; "" is the model."""
    inside: list[str] = []
    counts: dict[str, int] = {}

    class Count(TorchFunctionMode):
        def __torch_function__(
            self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if function is F.grid_sample:
                name = inside[-1] if inside else ""
                counts[name] = counts.get(name, 0) + 1
            return function(*args, **(kwargs or {}))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            entered = module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
            left = module.register_forward_hook(lambda *_: inside.pop() and None)
            for hook in (entered, left):
                stack.callback(hook.remove)
        with Count():
            _run(model, inputs)
    return counts
