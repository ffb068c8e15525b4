"""`avfast.patch(model, *inputs)`: let fused ops compute the ConvLSTM cells and flow warps of another project's model.

A recognised module stays the object that it is, with its parameters, buffers, hooks and attributes. Only its class
changes, to a subclass whose `forward` takes the calls that the op can compute and leaves all others to the module's own
code. Candidates that fail, and grid_sample calls elsewhere, are listed. No failure leaves a trace: every run is
`unchanged`, and the classes change when nothing is left to be tried."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from avfast.recognition import Fused, arguments, precision, recognise, subclass, tensors_in, unchanged


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


def patch(model: nn.Module, *inputs: Any, rounds: int = 5, verbose: bool = True) -> PatchReport:
    """Let fused ops compute recognised modules of `model`, check that `model(*inputs)` stays the same, and time both.

    A ConvLSTM cell is a module with one convolution that is called with x and (hidden, cell) and returns both; its
    gates may have any order. A flow warp is a module that is called with an image and a flow in pixels. Modules,
    parameters, buffers, hooks and names stay what they are, and so do optimisers and checkpoints made before; calls
    with other arguments run the module's own code. The fused ops have first derivatives only. Outputs are compared and
    times taken without gradients, in the mode the model is in. rounds: paired runs to time; verbose: print the report.

    Raises ValueError if an output differs by more than 1e-4 of its largest value (in half types by more than 8 units of
    the type's precision), and for a model with tensors on `meta`, lazy or sharded. After any error the model is as
    before."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        # what else holds the parts of a sharded model could not be put back
        if is_lazy(tensor) or tensor.is_meta or hasattr(tensor, "device_mesh"):
            kind = f"{type(tensor).__name__} on {tensor.device}"
            raise ValueError(f"model's {name} is {kind}, expected values to compute with, neither lazy nor sharded")
    report = PatchReport()
    # a module may have several names
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name or "the model itself")
    device = next((t.device for t in tensors_in([*model.parameters(), inputs])), torch.device("cpu"))
    swaps: dict[nn.Module, Fused] = {}
    inside_scripted = {m for s in names if isinstance(s, torch.jit.ScriptModule) for m in s.modules() if m is not s}
    for module in names:
        found = recognise(module, device)
        if isinstance(found, Fused):
            swaps[module] = found
        elif found and module not in inside_scripted:
            report.left |= dict.fromkeys(names[module], found)
    counts, called = _observe(model, inputs, swaps)
    for module in [m for m in swaps if m not in called]:
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


def _compare(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of an output. Raises ValueError if it is above the tolerance."""

    def largest(values: Tensor) -> float:
        return values.abs().max().item() if values.numel() else 0.0

    errors = [0.0]
    for old, new in zip(before, after, strict=True):
        # an infinity or a NaN in both is no difference, a NaN in one is a NaN
        errors.append(largest((new - old)[(new != old) & ~(new.isnan() & old.isnan())]))
        if not errors[-1] <= precision(old) * max(1.0, largest(old[old.isfinite()])):
            raise ValueError(f"model's output changed by {errors[-1]:.1e} after the swap: nothing was swapped")
    return max(errors)


def _swap(swaps: Mapping[nn.Module, Fused]) -> None:
    for module, fused in swaps.items():
        cls: Any = type(module)
        module.__class__ = subclass(cls, fused)


@torch.no_grad()
def _run(model: nn.Module, inputs: tuple[Any, ...], swaps: Mapping[nn.Module, Fused]) -> tuple[list[Tensor], float]:
    """(the floating-point tensors in the output of the model with these swaps, seconds)."""
    with unchanged(model, inputs):
        _swap(swaps)
        start = time.perf_counter()
        output = [tensor.clone() for tensor in tensors_in(model(*inputs)) if tensor.is_floating_point()]
        if output and output[0].is_cuda:
            torch.cuda.synchronize()
        return output, time.perf_counter() - start


def _observe(
    model: nn.Module, inputs: tuple[Any, ...], swaps: Mapping[nn.Module, Fused]
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
        if module in swaps and arguments(swaps[module], args, kwargs) is not None:
            called.add(module)

    def leave(*_: Any) -> None:
        running.pop()

    # compiled code would not call Python's hooks, scripted code takes none
    with unchanged(model, inputs), torch.no_grad(), torch.compiler.set_stance("force_eager"), Count():
        _swap(swaps)
        for module in [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]:
            # attributes, which unchanged takes away again
            module.register_forward_pre_hook(partial(enter, module), with_kwargs=True)
            module.register_forward_hook(leave)
        model(*inputs)
    return counts, called
