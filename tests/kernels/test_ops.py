"""The definitions in `kernels/reference.py` against independent oracles, the public functions' checks, the dispatch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from avfast.errors import InputError
from avfast.kernels import backward_warp, condense, convlstm_gates, flow_loss, modulate, patch_conv, recall, registry


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def off_kinks(flow):
    """Flow whose coordinates stay 0.05 px away from integers, where the interpolation has a kink."""
    whole = flow.floor()
    return whole + 0.05 + 0.9 * (flow - whole)


def warp_pixel_by_pixel(image, flow, padding):
    """Bilinear sampling as a double loop with Python floats."""
    b, c, h, w = image.shape
    out = torch.empty_like(image)

    def pixel(n, k, y, x):
        if padding == "border":
            y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        return image[n, k, y, x].item() if 0 <= y < h and 0 <= x < w else 0.0

    for n in range(b):
        for k in range(c):
            for i in range(h):
                for j in range(w):
                    x, y = j + flow[n, 0, i, j].item(), i + flow[n, 1, i, j].item()
                    if padding == "border":
                        x, y = min(max(x, 0.0), w - 1.0), min(max(y, 0.0), h - 1.0)
                    x0, y0 = math.floor(x), math.floor(y)
                    out[n, k, i, j] = sum(
                        abs(1 - abs(x - xi)) * abs(1 - abs(y - yi)) * pixel(n, k, yi, xi)
                        for yi in (y0, y0 + 1)
                        for xi in (x0, x0 + 1)
                    )
    return out


@pytest.mark.parametrize("padding", ["border", "zeros"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (6, 1), (7, 9)])
def test_warp_equals_the_loop(size, padding):
    image, flow = randn(2, 2, *size), 3 * randn(2, 2, *size, seed=1)
    assert (backward_warp(image, flow, padding=padding) - warp_pixel_by_pixel(image, flow, padding)).abs().max() < 1e-12


def test_warp_identity_and_shift():
    image = randn(1, 2, 6, 8)
    assert torch.equal(backward_warp(image, torch.zeros(1, 2, 6, 8)), image)
    flow = torch.zeros(1, 2, 6, 8)
    flow[:, 0], flow[:, 1] = 2, -1
    assert torch.equal(backward_warp(image, flow)[..., 1:, :-2], image[..., :-1, 2:])


def test_warp_equals_grid_sample_off_integer_coordinates():
    image, flow = randn(2, 3, 9, 7), off_kinks(2 * randn(2, 2, 9, 7, seed=1))
    x = torch.arange(7.0, dtype=torch.float64) + flow[:, 0]
    y = torch.arange(9.0, dtype=torch.float64)[:, None] + flow[:, 1]
    grid = torch.stack((2 * x / 6 - 1, 2 * y / 8 - 1), -1)
    for padding in ("border", "zeros"):
        expected = F.grid_sample(image, grid, padding_mode=padding, align_corners=True)
        assert (backward_warp(image, flow, padding=padding) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("padding", ["border", "zeros"])
def test_warp_gradcheck(padding):
    image, flow = randn(2, 2, 5, 6), off_kinks(2 * randn(2, 2, 5, 6, seed=1))
    assert torch.autograd.gradcheck(
        lambda i, f: backward_warp(i, f, padding=padding), (image.requires_grad_(), flow.requires_grad_())
    )


def test_warp_flow_gradient_at_kinks():
    # one row 0 1 4 9 16; the flow brings every output pixel to a chosen x
    image = torch.tensor([[[[0.0, 1.0, 4.0, 9.0, 16.0]]]], dtype=torch.float64)
    at = torch.tensor([-0.5, 0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    flow = torch.zeros(1, 2, 1, 5, dtype=torch.float64)
    flow[0, 0, 0] = at - torch.arange(5)
    flow.requires_grad_()
    backward_warp(image, flow).sum().backward()
    # zero on and beyond both ends, the right-hand slope at integers inside; one row has no slope in y
    assert flow.grad[0, 0, 0].tolist() == [0.0, 0.0, 3.0, 7.0, 0.0]
    assert not flow.grad[0, 1].any()


def test_warp_with_nan_and_huge_flow_reads_only_the_image():
    # the image is a window of a larger buffer of NaN: a read outside it would show
    buffer = torch.full((1, 1, 20, 20), float("nan"))
    image = buffer[..., 5:13, 6:15]
    image.copy_(torch.rand(8, 9))
    flow = torch.zeros(1, 2, 8, 9)
    values = [1e30, -1e30, math.inf, -math.inf, 2.0**31, -(2.0**63), 1e9, -9.0]
    flow[0, 0, :, 0] = torch.tensor(values)
    flow[0, 1, :, 1] = torch.tensor(values)
    for padding in ("border", "zeros"):
        assert backward_warp(image, flow, padding=padding).isfinite().all()
    flow[0, 0, 3, 4] = math.nan
    out = backward_warp(image, flow)
    assert out.isnan().sum() == 1 and out[0, 0, 3, 4].isnan()


def test_warp_expanded_gradient_and_layouts():
    image, flow = randn(2, 3, 6, 5), off_kinks(randn(2, 2, 6, 5, seed=1))
    grads = []
    for layout in (torch.contiguous_format, torch.channels_last):
        i = image.clone(memory_format=layout).requires_grad_()
        f = flow.clone(memory_format=layout).requires_grad_()
        out = backward_warp(i, f)
        out.backward(torch.ones(1, 1, 1, 1, dtype=torch.float64).expand_as(out))
        grads.append((out, i.grad, f.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_warp_keeps_the_dtype_and_float32_coordinates(dtype):
    # 300.25 is no bf16 number: coordinates computed in bf16 would land on another pixel
    image = torch.arange(400.0).view(1, 1, 1, 400) / 400
    flow = torch.full((1, 2, 1, 400), 0.25)
    flow[:, 1] = 0
    out = backward_warp(image.to(dtype), flow)
    assert out.dtype == dtype
    exact = backward_warp(image.to(dtype).double(), flow.double())
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps


def test_condense_equals_attention_of_every_prefix():
    memory, weight, bias = randn(2, 6, 8), 0.3 * randn(24, 8, seed=1), randn(24, seed=2)
    out = condense(memory, weight, bias)
    for t in range(6):
        prefix = memory[:, : t + 1]
        q, k, v = (prefix @ weight[i * 8 : i * 8 + 8].T + bias[i * 8 : i * 8 + 8] for i in range(3))
        last = (torch.softmax(q @ k.mT, -1) @ v)[:, -1]
        assert (out[:, t] - (memory[:, t] + last)).abs().max() < 1e-12


@pytest.mark.parametrize("tokens", [1, 5])
def test_recall_equals_a_loop_over_positions(tokens):
    feature, query = randn(2, 4, 3, 2), randn(2, 4, 3, 2, seed=1)
    key, value = randn(2, tokens, 4, seed=2), randn(2, tokens, 4, seed=3)
    out = recall(feature, query, key, value)
    for b in range(2):
        for i in range(3):
            for j in range(2):
                weights = torch.softmax(key[b] @ query[b, :, i, j], 0)
                assert (out[b, :, i, j] - feature[b, :, i, j] - weights @ value[b]).abs().max() < 1e-12


def test_recall_from_one_token_needs_no_query():
    feature, query, key, value = randn(2, 4, 3, 2), randn(2, 4, 3, 2), randn(2, 1, 4), randn(2, 1, 4)
    assert torch.equal(recall(feature, query, key, value), recall(feature, None, None, value))


def test_gates_equal_torch_lstm_cell():
    # nn.LSTMCell on 1x1 maps has the same update with the order i, f, g, o
    cell_module = torch.nn.LSTMCell(3, 5).double()
    x, hidden, cell = randn(4, 3), randn(4, 5, seed=1), randn(4, 5, seed=2)
    i, f, g, o = (
        F.linear(x, cell_module.weight_ih, cell_module.bias_ih)
        + F.linear(hidden, cell_module.weight_hh, cell_module.bias_hh)
    ).chunk(4, 1)
    new_hidden, new_cell = convlstm_gates(torch.cat((i, f, o, g), 1)[..., None, None], cell[..., None, None])
    expected = cell_module(x, (hidden, cell))
    assert (new_hidden[..., 0, 0] - expected[0]).abs().max() < 1e-12
    assert (new_cell[..., 0, 0] - expected[1]).abs().max() < 1e-12


def test_gates_saturate_without_nan_and_keep_a_float32_cell():
    gates = torch.full((1, 8, 1, 1), 1e4, dtype=torch.bfloat16)
    hidden, cell = convlstm_gates(gates, torch.full((1, 2, 1, 1), 3.0))
    assert hidden.dtype == torch.bfloat16 and cell.dtype == torch.float32
    assert cell.flatten().tolist() == [4.0, 4.0] and hidden.isfinite().all()
    assert convlstm_gates(-gates, torch.full((1, 2, 1, 1), 3.0))[0].isfinite().all()


def test_modulate():
    context, gamma, beta = randn(2, 3, 4, 5), randn(2, 3, seed=1), randn(2, 3, seed=2)
    out = modulate(context, gamma, beta)
    for b in range(2):
        for c in range(3):
            assert (out[b, c] - (gamma[b, c] * context[b, c] + beta[b, c])).abs().max() < 1e-12


def test_flow_loss_equals_its_sums():
    b, p, h, w = 2, 3, 4, 5
    prediction, target, frames = randn(b, p, 2, h, w), randn(b, p, 2, h, w, seed=1), randn(b, p, 3, h, w, seed=2)
    data = smooth = 0.0
    for n in range(b):
        for t in range(p):
            for y in range(h):
                for x in range(w):
                    data += sum((prediction[n, t, k, y, x] - target[n, t, k, y, x]).item() ** 2 for k in range(2))
                    for dy, dx in ((0, 1), (1, 0)):
                        if y + dy < h and x + dx < w:
                            edge = (frames[n, t, :, y + dy, x + dx] - frames[n, t, :, y, x]).abs().mean().item()
                            step = (prediction[n, t, :, y + dy, x + dx] - prediction[n, t, :, y, x]).abs().sum().item()
                            smooth += step * math.exp(-edge)
    expected = data / (b * h * w) + 0.3 * smooth / (2 * b * h * w)
    assert abs(flow_loss(prediction, target, frames, smooth_weight=0.3).item() - expected) < 1e-10


@pytest.mark.parametrize(
    "name,function,shapes",
    [
        ("condense", condense, [(2, 4, 3), (9, 3), (9,)]),
        ("recall", recall, [(2, 3, 2, 2), (2, 3, 2, 2), (2, 4, 3), (2, 4, 3)]),
        ("convlstm_gates", convlstm_gates, [(2, 12, 2, 2), (2, 3, 2, 2)]),
        ("modulate", modulate, [(2, 3, 2, 2), (2, 3), (2, 3)]),
    ],
)
def test_gradcheck_and_empty_batch(name, function, shapes):
    inputs = [0.5 * randn(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(function, inputs)
    weights = ("condense",)
    empty = [x[:0] if name not in weights or i == 0 else x for i, x in enumerate(inputs)]
    out = function(*empty)
    assert (out[0] if isinstance(out, tuple) else out).shape[0] == 0


def test_flow_loss_gradcheck():
    prediction, target, frames = (
        randn(1, 2, 2, 4, 3).requires_grad_(),
        randn(1, 2, 2, 4, 3, seed=1),
        randn(1, 2, 1, 4, 3),
    )
    assert torch.autograd.gradcheck(lambda p: flow_loss(p, target, frames, smooth_weight=0.5), prediction)


def test_wrong_arguments_are_named():
    image, flow = torch.rand(1, 1, 4, 4), torch.zeros(1, 2, 4, 4)
    for call, message in [
        (lambda: backward_warp(image, flow[..., :3]), r"flow has shape \(1, 2, 4, 3\), expected \(1, 2, 4, 4\)"),
        (lambda: backward_warp(image[0], flow), r"image has shape \(1, 4, 4\), expected \(B, C, H, W\)"),
        (lambda: backward_warp(image.int(), flow), r"image is torch.int32, expected a floating-point tensor"),
        (
            lambda: backward_warp(image, flow, padding="reflection"),
            "padding is 'reflection', expected 'border' or 'zeros'",
        ),
        (lambda: backward_warp(image, flow, backend="metal"), "backend is 'metal', expected one of"),
        (lambda: backward_warp(image, flow.to("meta")), "different devices"),
        (
            lambda: condense(torch.rand(1, 2, 3), torch.rand(9, 4), torch.rand(9)),
            r"weight has shape \(9, 4\), expected \(9, 3\)",
        ),
        (lambda: recall(image, None, None, torch.rand(1, 2, 1)), "query and key are needed for a memory of 2 tokens"),
        (lambda: recall(image, None, None, torch.rand(1, 0, 1)), "at least one memory token"),
        (
            lambda: convlstm_gates(torch.rand(1, 3, 4, 4), image),
            r"gates has shape \(1, 3, 4, 4\), expected \(1, 4, 4, 4\)",
        ),
        (lambda: modulate(image, torch.rand(1, 2), torch.rand(1, 1)), r"gamma has shape \(1, 2\), expected \(1, 1\)"),
        (
            lambda: modulate(image, image[..., 0, 0], image[..., 0, 0], before=image),
            "before is Tensor, expected a list",
        ),
        (lambda: backward_warp(image, None), "flow is NoneType, expected a floating-point tensor"),  # type: ignore[arg-type]
        (lambda: patch_conv(image, image, stride=2), "stride is 2, expected two whole numbers of at least 1"),  # type: ignore[arg-type]
        (lambda: patch_conv(image, image, padding=(0, -1)), r"padding is \(0, -1\), expected two whole numbers of at"),
        (lambda: patch_conv(image, torch.rand(1, 1, 5, 5)), r"x has shape \(1, 1, 4, 4\), smaller with padding"),
        (
            lambda: flow_loss(flow[None], flow[None].requires_grad_(), image[None]),
            "target requires a gradient, but the op has none",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_dispatch(monkeypatch):
    calls = []

    def fast(x):
        calls.append("cpp")
        return x

    op = registry.Op(
        "probe",
        {
            "cpp": registry.Backend(fast, unsupported=lambda x: "x is too large" if x > 5 else None),
            "reference": registry.Backend(lambda x: calls.append("reference")),
        },
    )
    small, large = torch.tensor(1), torch.tensor(9)
    monkeypatch.delenv("AVFAST_BACKEND", raising=False)
    op(small), op(large), op(small, backend="reference")
    assert calls == ["cpp", "reference", "reference"]
    with pytest.raises(ValueError, match="backend is 'cpp', which cannot run this probe: x is too large"):
        op(large, backend="cpp")
    with pytest.raises(ValueError, match="probe has only cpp, reference"):
        op(small, backend="triton")
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    op(small)
    assert calls[3:] == ["reference"]
    op(small, backend="cpp")
    assert calls[4:] == ["cpp"]
    monkeypatch.setenv("AVFAST_BACKEND", "fast")
    with pytest.raises(
        InputError, match="AVFAST_BACKEND is 'fast', expected one of triton, cpp, torch, sdpa, reference"
    ):
        op(small)


def test_a_backend_for_another_device_is_refused_with_its_reason():
    op = registry.Op("probe", {"torch": registry.Backend(lambda x: x, registry.cpu_only)})
    assert op(torch.zeros(1), backend="torch") == 0
    with pytest.raises(ValueError, match="backend is 'torch', which cannot run this probe: made for the CPU"):
        op(torch.zeros(1, device="meta"), backend="torch")


def test_a_backend_runs_unasked_only_where_it_suits(monkeypatch):
    op = registry.Op(
        "probe",
        {
            "triton": registry.Backend(lambda x: "triton", suits=lambda x: x < 3, condition="x < 3"),
            "reference": registry.Backend(lambda x: "reference"),
        },
    )
    monkeypatch.delenv("AVFAST_BACKEND", raising=False)
    small, large = torch.tensor(1), torch.tensor(5)
    assert [op(small), op(large), op(large, backend="triton")] == ["triton", "reference", "triton"]
    monkeypatch.setattr(registry, "OPS", {"probe": op})
    _, _, chosen, others = registry.explain()[0]
    assert chosen == "triton" and others["reference"] == "triton is preferred where x < 3"


def test_explain_names_every_op_and_a_reason_for_every_other_backend():
    rows = registry.explain()
    ops = {"backward_warp", "condense", "recall", "convlstm_gates", "modulate", "flow_loss"}
    assert ops <= {op for op, *_ in rows}
    for op, device, chosen, reasons in rows:
        assert device in ("cpu", "cuda")
        assert {chosen, *reasons} == set(registry.OPS[op].backends) and chosen not in reasons
        assert all(reasons.values())


def test_import_kernels_from_the_checkout_is_refused(tmp_path):
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).parents[2]
    code = "import kernels"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert result.returncode == 1 and "avfast.kernels" in result.stderr


def _calls_seen(function) -> set[str]:
    """Names of avfast's torch ops that a dispatch mode sees in function()."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            seen.add(str(op))
            return op(*args, **(kwargs or {}))

    with Watching():
        function()
    return {name for name in seen if name.startswith("avfast")}


def test_every_call_is_a_torch_op_that_modes_and_transforms_see() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    gates, cell = randn(2, 12, 4, 5).float(), randn(2, 3, 4, 5, seed=1).float()
    if registry.OPS["convlstm_gates"].backends["cpp"].unavailable("cpu") is not None:
        pytest.skip("not built")
    hidden, _ = convlstm_gates(gates, cell)
    assert _calls_seen(lambda: convlstm_gates(gates, cell)) == {"avfast._convlstm_gates.default"}
    asking = gates.clone().requires_grad_()
    both = {"avfast._convlstm_gates.default", "avfast._convlstm_gates_backward.default"}
    assert _calls_seen(lambda: convlstm_gates(asking, cell)[0].sum().backward()) == both

    graph = make_fx(lambda g, c: convlstm_gates(g, c)[0])(gates, cell)
    assert "avfast._convlstm_gates.default" in {str(node.target) for node in graph.graph.nodes}
    torch.testing.assert_close(graph(2 * gates, cell), convlstm_gates(2 * gates, cell)[0])
    with torch.profiler.profile() as profile:
        convlstm_gates(gates, cell)
    assert "avfast::_convlstm_gates" in {event.key for event in profile.key_averages()}
    traced = torch.jit.trace(lambda g, c: convlstm_gates(g, c)[0], (gates, cell), check_trace=False)
    torch.testing.assert_close(traced(2 * gates, cell), convlstm_gates(2 * gates, cell)[0])
    batched = torch.vmap(lambda g: convlstm_gates(g, cell)[0])(torch.stack((gates, 2 * gates)))
    torch.testing.assert_close(batched[0], hidden)
    with torch.inference_mode():
        torch.testing.assert_close(convlstm_gates(gates.clone(), cell)[0], hidden)
