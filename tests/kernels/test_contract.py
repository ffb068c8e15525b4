"""What every fused op promises, op by op and backend by backend, against its definition in `kernels/reference.py`.

The oracle of the definitions themselves is test_ops.py. What an op gets from torch.empty is filled with NaN here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from tensors import normal
from torch import Tensor

from avfast.kernels import (
    backward_warp,
    condense,
    conv3x3,
    convlstm_gates,
    flow_loss,
    modulate,
    patch_conv,
    recall,
    registry,
    strided_conv,
    strided_conv_transpose,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """An op, and the arguments that `make(batch, height, width)` draws for it as fp64 tensors on the CPU."""

    call: Callable[..., Any]
    make: Callable[[int, int, int], list[Tensor]]
    differentiable: tuple[bool, ...]


def off_kinks(flow: Tensor) -> Tensor:
    """Coordinates 0.05 px away from integers, where the interpolation has a kink."""
    return flow.floor() + 0.05 + 0.9 * (flow - flow.floor())


def apart(flow: Tensor) -> Tensor:
    """Neighbours differ, by 0.2 at least, so that no absolute difference has its kink there."""
    y, x = (torch.arange(n, dtype=flow.dtype) for n in flow.shape[-2:])
    return 0.1 * flow.clamp(-1, 1) + (0.4 * (x % 2) + 0.8 * (y[:, None] % 2))


WARP = [lambda b, h, w: [normal(b, 3, h, w), off_kinks(2 * normal(b, 2, h, w, seed=1))], (True, True)]

CASES = {
    "backward_warp border": Case(lambda *a, **k: backward_warp(*a, padding="border", **k), *WARP),
    "backward_warp zeros": Case(lambda *a, **k: backward_warp(*a, padding="zeros", **k), *WARP),
    "convlstm_gates": Case(
        convlstm_gates, lambda b, h, w: [2 * normal(b, 12, h, w), normal(b, 3, h, w, seed=1)], (True, True)
    ),
    "flow_loss": Case(
        lambda *a, **k: flow_loss(*a, smooth_weight=0.3, **k),
        lambda b, h, w: [
            apart(normal(b, 2, 2, h, w)),
            normal(b, 2, 2, h, w, seed=1),
            normal(b, 2, 3, h, w, seed=2).sigmoid(),
        ],
        (True, False, False),
    ),
    "modulate": Case(
        modulate, lambda b, h, w: [normal(b, 3, h, w), normal(b, 3, seed=1), normal(b, 3, seed=2)], (True, True, True)
    ),
    "modulate behind others": Case(
        lambda x, y, *a, **k: modulate(*a, before=(x, y), **k),
        lambda b, h, w: [
            *(normal(b, c, h, w, seed=c) for c in (2, 1, 3)),
            normal(b, 3, seed=4),
            normal(b, 3, seed=5),
        ],
        (True,) * 5,
    ),
    "modulate behind three": Case(
        lambda x, y, z, *a, **k: modulate(*a, before=(x, y, z), **k),
        lambda b, h, w: [
            *(normal(b, c, h, w, seed=c) for c in (2, 1, 4, 3)),
            normal(b, 3, seed=5),
            normal(b, 3, seed=6),
        ],
        (True,) * 6,
    ),
    "modulate behind one": Case(
        lambda x, *a, **k: modulate(*a, before=(x,), **k),
        lambda b, h, w: [*(normal(b, c, h, w, seed=c) for c in (2, 3)), normal(b, 3, seed=4), normal(b, 3, seed=5)],
        (True,) * 4,
    ),
    "condense": Case(
        condense,
        lambda b, h, w: [0.5 * normal(b, h, 8), 0.3 * normal(24, 8, seed=1), 0.1 * normal(24, seed=2)],
        (True, True, True),
    ),
    "recall one": Case(
        lambda feature, value, **k: recall(feature, None, None, value, **k),
        lambda b, h, w: [normal(b, 4, h, w), normal(b, 1, 4, seed=1)],
        (True, True),
    ),
    "recall many": Case(
        recall,
        lambda b, h, w: [
            *(normal(b, 4, h, w, seed=i) for i in range(2)),
            *(normal(b, 5, 4, seed=i) for i in range(2, 4)),
        ],
        (True,) * 4,
    ),
    "recall without a gradient": Case(
        recall,
        lambda b, h, w: [
            *(normal(b, 4, h, w, seed=i) for i in range(2)),
            *(normal(b, 5, 4, seed=i) for i in range(2, 4)),
        ],
        (False,) * 4,
    ),
    "strided_conv": Case(
        strided_conv,
        lambda b, h, w: [normal(b, 3, h + 1, w + 1), 0.3 * normal(5, 3, 4, 4, seed=1)],
        (True, True),
    ),
    "conv3x3": Case(
        conv3x3,
        lambda b, h, w: [normal(b, 3, h, w), 0.3 * normal(5, 3, 3, 3, seed=1), normal(5, seed=2)],
        (True, True, True),
    ),
    "patch_conv": Case(
        lambda *a, **k: patch_conv(*a, stride=(2, 1), padding=(1, 2), **k),
        lambda b, h, w: [normal(b, 3, h, w), 0.3 * normal(5, 3, 3, 2, seed=1), normal(5, seed=2)],
        (True, True, True),
    ),
    "strided_conv transposed": Case(
        strided_conv_transpose,
        lambda b, h, w: [normal(b, 3, h, w), 0.3 * normal(3, 5, 4, 4, seed=1)],
        (True, True),
    ),
}


def op_of(name: str) -> registry.Op:
    name = name.split()[0]
    return registry.OPS["conv2d" if name in ("strided_conv", "conv3x3") else name]


def implementations() -> list[Any]:
    """(case, backend) for every backend but the reference that runs on this machine's device."""
    found = []
    for name in CASES:
        op = op_of(name)
        for backend, how in op.backends.items():
            without_gradient = not any(CASES[name].differentiable)
            # the kernel of recall has no gradient
            suited = without_gradient == (op.name == "recall" and backend == "triton") or name == "recall one"
            if backend != "reference" and how.unavailable(DEVICE) is None and suited:
                found.append(pytest.param(name, backend, id=f"{name.replace(' ', '-')}-{backend}"))
    return found


IMPLEMENTATIONS = pytest.mark.parametrize(("name", "backend"), implementations())

SIZES = [(7, 9), (1, 1), (1, 63), (65, 1), (16, 17)]


def arguments(name: str, size: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    case = CASES[name]
    tensors = [t.to(DEVICE, dtype) for t in case.make(*size)]
    return [t.requires_grad_(wanted) for t, wanted in zip(tensors, case.differentiable, strict=True)]


def results(name: str, args: list[Tensor], backend: str, *, expanded: bool = False) -> list[Tensor]:
    """Outputs, then the gradients of a weighted sum of them, or with `expanded` of their plain sum, whose incoming
    gradient has stride 0."""
    out = CASES[name].call(*args, backend=backend)
    outs = list(out) if isinstance(out, tuple) else [out]
    total = sum(
        (
            o.double().sum()
            if expanded
            else (o.double() * torch.linspace(1, 2, o.numel(), device=DEVICE).view(o.shape)).sum()
        )
        for o in outs
    )
    assert isinstance(total, Tensor)
    wanted = [a for a in args if a.requires_grad]
    return [o.detach() for o in outs] + list(torch.autograd.grad(total, wanted) if wanted else [])


def assert_equal_to_reference(name: str, args: list[Tensor], backend: str, tolerance: float, **kwargs: Any) -> None:
    found, expected = (results(name, args, b, **kwargs) for b in (backend, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item())
        assert (ours - theirs).abs().max().item() <= tolerance * scale


@IMPLEMENTATIONS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_the_definition(
    name: str, backend: str, size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    assert_equal_to_reference(name, arguments(name, (2, *size), dtype), backend, tolerance)


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_types_err_at_most_twice_as_much_as_the_definition(name: str, backend: str, dtype: torch.dtype) -> None:
    args = arguments(name, (2, 7, 9), dtype)
    if backend == "torch" and name != "patch_conv":
        with pytest.raises(ValueError, match="half types"):
            results(name, args, backend)
        return
    exact = results(name, [a.detach().double().requires_grad_(a.requires_grad) for a in args], "reference")
    found, reference = (results(name, args, b) for b in (backend, "reference"))
    for ours, theirs, true in zip(found, reference, exact, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        floor = torch.finfo(dtype).eps * true.abs().max().item()
        assert (ours - true).abs().max().item() <= 2 * (theirs - true).abs().max().item() + floor


@IMPLEMENTATIONS
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "window", "expanded gradient"])
def test_layouts(name: str, backend: str, layout: str) -> None:
    args = arguments(name, (2, 7, 9), torch.float32)
    for i, a in enumerate(args):
        with torch.no_grad():
            if layout == "channels_last" and a.dim() == 4:
                a = a.contiguous(memory_format=torch.channels_last)
            elif layout == "transposed" and a.dim() > 1:
                a = a.mT.contiguous().mT
            elif layout == "window":
                # a read beside the window would show
                buffer = torch.full([n + 2 for n in a.shape], math.nan, device=DEVICE)
                window = buffer[tuple(slice(1, -1) for _ in a.shape)]
                a = window.copy_(a)
        args[i] = a.detach().requires_grad_(args[i].requires_grad)
    before = [a.detach().clone() for a in args]
    assert_equal_to_reference(name, args, backend, 1e-5, expanded=layout == "expanded gradient")
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@IMPLEMENTATIONS
def test_empty_batch(name: str, backend: str) -> None:
    args = arguments(name, (2, 4, 5), torch.float32)
    batch = len(args[0])
    args = [(a[:0] if len(a) == batch else a).detach().requires_grad_(a.requires_grad) for a in args]
    found, expected = (results(name, args, b) for b in (backend, "reference"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@IMPLEMENTATIONS
def test_gradients_by_finite_differences(name: str, backend: str) -> None:
    args = arguments(name, (2, 3, 4))
    if not any(a.requires_grad for a in args):
        pytest.skip("no gradient")
    # one random direction each under the interpreter, where a call takes 50 ms
    fast = backend == "triton" and DEVICE == "cpu"
    assert torch.autograd.gradcheck(lambda *a: CASES[name].call(*a, backend=backend), args, fast_mode=fast)


@IMPLEMENTATIONS
def test_second_derivative_is_refused(name: str, backend: str) -> None:
    """By an error: a missing term would be a wrong gradient."""
    if backend in ("sdpa", "torch") or name.startswith("recall"):
        pytest.skip("PyTorch's own ops, which decide for themselves")
    args = arguments(name, (1, 3, 4))
    out = CASES[name].call(*args, backend=backend)
    first = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(first.square().sum(), args[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@IMPLEMENTATIONS
def test_in_a_cuda_graph(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, captured once and replayed on other values."""
    monkeypatch.undo()
    static = arguments(name, (2, 16, 17), torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(name, static, backend)  # compiles, outside the capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(name, static, backend)
    fresh = [0.5 * a.detach() for a in static]
    with torch.no_grad():
        for a, value in zip(static, fresh, strict=True):
            a.copy_(value)
    graph.replay()
    found = [t.clone() for t in captured]
    expected = results(name, static, backend)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def native(name: str) -> str:
    """The backend that is a torch op of ours on this device."""
    return "cpp" if DEVICE == "cpu" and "cpp" in op_of(name).backends else "triton"


TRITON = registry.OPS["recall"].backends["triton"].unavailable(DEVICE) is None

# cases without a torch op of ours in compiled programs: one token is one addition, and PyTorch has the convolutions
# there, condense, and the gradient of recall
NO_OP = ("recall one", "recall many", "condense", "strided_conv", "strided_conv transposed", "conv3x3", "patch_conv")

REGISTERED = [name for name in CASES if name not in NO_OP and (TRITON or native(name) == "cpp")]


@pytest.mark.parametrize("name", REGISTERED)
def test_compiled_without_graph_breaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # NaN-filled fakes are no fakes
    torch.compiler.reset()  # all cases compile the same code, which PyTorch does eight times
    args = arguments(name, (2, 5, 6), torch.float32)

    def call(*args: Tensor) -> Any:
        return CASES[name].call(*args, backend=native(name))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    wanted = [a for a in args if a.requires_grad]
    for function in (call, compiled):
        out = function(*args)
        outs = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(sum(o.square().sum() for o in outs), wanted) if wanted else ()
        if function is call:
            expected = (*outs, *grads)
    assert all(torch.equal(a, b) for a, b in zip((*outs, *grads), expected, strict=True))


@pytest.mark.parametrize("name", [n for n in REGISTERED if n != "flow_loss"])
def test_exported_as_one_node_that_decomposes_into_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Module(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return CASES[name].call(*args, backend=native(name))

    args = tuple(a.detach() for a in arguments(name, (2, 5, 6), torch.float32))
    with torch.no_grad():
        program = torch.export.export(Module(), args)
        ours = {n.target for n in program.graph.nodes if "avfast" in str(n.target)}
        assert len(ours) == 1
        plain = program.run_decompositions(registry.DECOMPOSITIONS)
        assert not [n for n in plain.graph.nodes if "avfast" in str(n.target)]
        for found, expected in (
            (program, CASES[name].call(*args, backend=native(name))),
            (plain, CASES[name].call(*args, backend="reference")),
        ):
            torch.testing.assert_close(found.module()(*args), expected, rtol=1e-5, atol=1e-5)


def torch_op_calls() -> list[tuple[Any, tuple[Any, ...]]]:
    """Calls of the registered torch ops, without the backend where they take one."""
    image, flow = normal(2, 3, 5, 6).float(), normal(2, 2, 5, 6, seed=1).float()
    gates, cell = normal(2, 12, 5, 6).float(), normal(2, 3, 5, 6, seed=1).float()
    clip = normal(1, 2, 2, 5, 6).float()
    row = normal(2, 3, seed=2).float()
    memory = normal(2, 5, 3).float()
    geometry, weights = (5, 6, 4, 2, 1), normal(12, 12, 5, seed=1).float()
    maps = [t.contiguous(memory_format=torch.channels_last) for t in (image, normal(2, 5, 2, 3).float())]
    ops = torch.ops.avfast
    calls = [
        (ops._backward_warp.default, (image, flow, "border")),
        (ops._backward_warp.default, (image.contiguous(memory_format=torch.channels_last), flow, "zeros")),
        (ops._backward_warp_backward.default, (image, flow, image, "border", True, True)),
        (ops._backward_warp_backward.default, (image, flow, image.mT.contiguous().mT, "zeros", False, True)),
        (ops._convlstm_gates.default, (gates, cell)),
        (ops._convlstm_gates.default, (gates.contiguous(memory_format=torch.channels_last), cell)),
        (ops._convlstm_gates_backward.default, (gates, cell, cell, cell)),
        (ops._flow_loss.default, (clip, clip + 1, clip.sigmoid(), 0.1, True)),
        (ops._flow_loss.default, (clip, clip + 1, clip.sigmoid(), 0.1, False)),
        (ops._modulate.default, ([image, flow], image, row, row)),
        (ops._modulate_backward.default, (image, row, image)),
        (ops._recall.default, (image.contiguous(memory_format=torch.channels_last), image, memory, memory + 1)),
        (ops._winograd_conv.default, (maps[0], weights, geometry, False)),
        (ops._winograd_conv.default, (maps[1], weights, geometry, True)),
        (ops._winograd_weight_gradient.default, (maps[:1], maps[1:], weights, geometry)),
    ]
    return [(op, tuple(a.to(DEVICE) if isinstance(a, Tensor) else a for a in args)) for op, args in calls]


@pytest.mark.parametrize("index", range(len(torch_op_calls())), ids=[str(op) for op, _ in torch_op_calls()])
def test_opcheck(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own checks: schema, fake and compiled use. Gradients are the autograd.Functions', tested above."""
    monkeypatch.undo()  # NaN-filled fakes are no fakes
    op, args = torch_op_calls()[index]
    args = tuple([t.to(DEVICE) for t in a] if isinstance(a, list) else a for a in args)
    for backend in ("triton", "cpp"):
        module = registry.OPS["backward_warp"].backends[backend]
        given = (*args, backend) if op._schema.arguments[-1].name == "backend" else args
        # an op that takes none is the one's or the other's
        own = "cpp" if "winograd" in str(op) else "triton"
        if module.unavailable(DEVICE) is None and (given is not args or backend == own):
            torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
            torch.library.opcheck(op, given, test_utils="test_aot_dispatch_dynamic")
