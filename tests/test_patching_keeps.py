"""What avfast.patch keeps of a model: everything but how recognised modules compute."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from patched_models import Cell, Keyword, Model, contents, frames, patch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import avfast


class Tied(Model):
    """A module under two names, a convolution in two cells, and a parameter in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.tied, self.head2 = self.cell, Cell(), Cell()
        self.tied.conv = self.cell.conv
        self.head2.conv.weight = self.cell.conv.weight

    def step(self, x: Tensor, state: Any) -> Any:
        return self.head2(x, self.tied(x, self.same(x, self.cell(x, state))))


def trained(model: nn.Module) -> list[Tensor]:
    """Parameters after three steps."""
    torch.manual_seed(1)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        optimiser.zero_grad()
        model(frames()).square().mean().backward()
        optimiser.step()
    return [p.detach() for p in model.parameters()]


def spectral() -> Model:
    model = Model()
    parametrizations.spectral_norm(model.cell.conv)
    return model


def weight() -> Model:
    model = Model()
    parametrizations.weight_norm(model.cell.conv)
    return model


def old_weight() -> Model:
    model = Model()
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.cell.conv)
    return model


def partly_frozen() -> Model:
    model = Model()
    model.cell.conv.weight.requires_grad_(False)
    return model


def with_buffer() -> Model:
    model = Model()
    model.cell.register_buffer("steps", torch.arange(3.0))
    return model


MODELS: list[Callable[[], Model]] = [
    Model, Keyword, Tied, spectral, weight, old_weight, partly_frozen, with_buffer, lambda: Model().eval(),
]  # fmt: skip


@pytest.mark.parametrize("make", MODELS)
def test_keeps_every_object_and_name_and_trains_alike(make: Callable[[], Model]) -> None:
    torch.manual_seed(0)
    model = make()
    model(frames()).sum().backward()
    before, other = contents(model), copy.deepcopy(model) if make is not old_weight else None
    cells = [module for module in model.modules() if isinstance(module, Cell)]
    report = patch(model)
    assert report.left == {} and {model.get_submodule(name) for name in report.swapped} == set(cells)
    after = contents(model)
    assert [part for part in after if not isinstance(part, type)] == [p for p in before if not isinstance(p, type)]
    assert all(isinstance(cell, Cell) and type(cell).__name__ == "FusedCell" for cell in cells)
    if other is not None:
        torch.testing.assert_close(trained(model), trained(other), rtol=1e-3, atol=1e-4)


def test_an_optimiser_made_before_moves_the_weights_that_are_computed_with() -> None:
    torch.manual_seed(0)
    model, x = Model().train(), frames()
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    patch(model, x)
    before = model(x)
    before.sum().backward()
    optimiser.step()
    assert not torch.allclose(model(x), before, atol=1e-2)
    model.load_state_dict(state)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_hooks_are_called_and_heard_as_before() -> None:
    torch.manual_seed(0)
    model, x, calls = Model(), frames().requires_grad_(), []
    for module in (model.cell, model.cell.conv):
        module.register_forward_pre_hook(lambda m, args: calls.append("before"))
        module.register_forward_hook(lambda m, args, out: calls.append("after"))
        module.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append("backward"))
        module.register_state_dict_post_hook(lambda m, state, prefix, metadata: calls.append("state"))
    model.cell.conv.register_forward_hook(lambda m, args, out: 2 * out)

    def heard() -> tuple[list[str], Tensor]:
        calls.clear()
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        model.state_dict()
        return list(calls), output

    expected, output = heard()
    assert patch(model, x).swapped and len(expected) == 14
    names, new = heard()
    assert names == expected
    torch.testing.assert_close(new, output, rtol=1e-4, atol=1e-5)


def test_other_calls_run_the_module_s_own_code() -> None:
    torch.manual_seed(0)
    model, x = Model(), frames()
    other = copy.deepcopy(model)
    patch(model, x)
    hidden, cell = model.cell.first(x)
    for args, kwargs in (
        ((x,), {}),
        ((x, None), {}),
        ((x, torch.stack((hidden, cell))), {}),
        ((), {"x": x}),
        ((x, (hidden, cell[:1])), {}),
    ):
        torch.testing.assert_close(model.cell(*args, **kwargs), other.cell(*args, **kwargs), rtol=0, atol=0)
    for args, kwargs in (((), {}), ((x,), {"mask": x}), ((x, None, None), {})):
        with pytest.raises(TypeError, match="argument"):
            model.cell(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Model().to(dtype).eval(), frames(dtype)
    expected = model(x)
    assert patch(model, x).left == {} and model(x).dtype == dtype
    torch.testing.assert_close(model(x), expected, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_dtypes_under_autocast() -> None:
    model, x = Model().eval(), frames()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.cell(x, model.cell.first(x))
        assert patch(model, x).swapped
        # half a unit of bfloat16 below 1
        torch.testing.assert_close(model.cell(x, model.cell.first(x)), expected, rtol=0, atol=2**-9)


@pytest.mark.parametrize(
    "copied",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda m, protocol=p: pickle.loads(pickle.dumps(m, protocol)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
    ],
)
def test_copies_are_swapped_too_and_have_their_own_weights(copied: Callable[[nn.Module], Model]) -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), frames()
    patch(model, x)
    expected = model(x)
    other = copied(model)
    assert type(other.cell) is type(model.cell)
    assert torch.equal(other(x), expected)
    other.cell.conv = nn.Conv2d(7, 16, 3, padding=1)
    assert copied is copy.copy or (torch.equal(model(x), expected) and not torch.equal(other(x), expected))


def test_a_second_patch_finds_nothing_left_to_do() -> None:
    model, x = Model(), frames()
    patch(model, x)
    cls, report = type(model.cell), patch(model, x)
    assert type(model.cell) is cls and report.swapped == report.left == {}


def test_the_model_itself_may_be_a_cell() -> None:
    cell, x = Cell(), frames()
    assert list(patch(cell, x, cell.first(x)).swapped) == ["the model itself"]


def test_wrapped_and_compiled_models() -> None:
    torch.manual_seed(0)
    x = frames()
    compiled_cell, compiled_in_place = Model(), Model()
    compiled_cell.cell = torch.compile(Cell(), backend="eager")
    compiled_in_place.cell.compile(backend="eager")
    for model, name in (
        (torch.compile(Model(), backend="eager"), "_orig_mod.cell"),
        (compiled_cell, "cell._orig_mod"),
        (compiled_in_place, "cell"),
        (nn.DataParallel(Model()), "module.cell"),
    ):
        expected = model(x)
        assert list(patch(model, x).swapped) == [name]
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert type(model.get_submodule(name)).__name__ == "FusedCell"
    model = Keyword()
    expected = model(x)
    patch(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


class Stateful(Keyword):
    """Changes whatever a module can change in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[int] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.last = super().forward(x.add_(0.1)) + self.calls
        self.cell.hidden = 4
        return nn.functional.dropout(self.last)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_failure_leaves_a_trace_whenever_it_comes(error: type[BaseException]) -> None:
    torch.manual_seed(0)
    model, x = Stateful(), frames()
    model(x).sum().backward()
    model.last = None
    left = 0

    def fail(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise error("injected")

    model.head.register_forward_hook(fail)
    before, inputs = contents(model), x.clone()
    # observed, before, after, and two pairs of timed runs
    for run in range(1, 8):
        left = run
        with pytest.raises(error, match="injected"):
            avfast.patch(model, x, rounds=2, verbose=False)
        assert contents(model) == before and torch.equal(x, inputs)
    left = 8
    assert list(avfast.patch(model, x, rounds=2, verbose=False).swapped) == ["cell"] and left == 1
    assert torch.equal(x, inputs) and model.seen == [2] and model.calls == 1 and model.last is None


def test_no_failure_of_a_swapped_module_leaves_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(), frames()
    before = contents(model)

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("injected")

    monkeypatch.setattr("avfast.recognition.convlstm_gates", fail)
    with pytest.raises(MemoryError):
        patch(model, x)
    assert contents(model) == before
