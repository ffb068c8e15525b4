"""`avfast/_C.pyi` against the compiled module, and the engine's parameters of TV-L1 against the Python class."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avfast.kernels import native
from avfast.opticalflow.tvl1 import TVL1Params

pytestmark = pytest.mark.skipif(native.NOT_BUILT is not None, reason=str(native.NOT_BUILT))
STUB = ast.parse((Path(__file__).parents[2] / "avfast" / "_C.pyi").read_text())
ONLY_WITH_CUDA = {"tvl1_cuda_scratch", "tvl1_flow_cuda"}


def stub_arguments(function: ast.FunctionDef) -> list[str]:
    """Names in order, `*` before those that are given by name only."""
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    if arguments.kwonlyargs:
        names += ["*", *(argument.arg for argument in arguments.kwonlyargs)]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def module_arguments(function: Any) -> list[str]:
    """The same, from the first line of the docstring that pybind11 writes."""
    inner = re.search(r"^\w+\((.*)\) -> ", function.__doc__)
    assert inner, function.__doc__
    # commas inside brackets belong to types
    parts = re.split(r", (?![^\[]*\])", inner[1]) if inner[1] else []
    return [part.partition(":")[0] for part in parts]


def test_stub_lists_what_the_module_has() -> None:
    engine = native.engine()
    functions = {node.name: stub_arguments(node) for node in STUB.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
    values = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
    found = {name: value for name, value in vars(engine).items() if not name.startswith("__")}
    missing = set() if engine.with_cuda else ONLY_WITH_CUDA

    assert {name for name, value in found.items() if inspect.isclass(value)} == set(classes)
    routines = {name: module_arguments(value) for name, value in found.items() if inspect.isroutine(value)}
    assert routines == {name: names for name, names in functions.items() if name not in missing}
    assert set(found) == set(routines) | set(classes) | values
    for name, node in classes.items():
        methods = {part.name: part for part in node.body if isinstance(part, ast.FunctionDef)}
        assert stub_arguments(methods["__init__"]) == module_arguments(getattr(engine, name).__init__)


def test_tvl1_parameters_have_the_same_names_and_defaults() -> None:
    engine = native.engine()
    names = {field.name for field in dataclasses.fields(TVL1Params)}
    assert {name for name in vars(engine.TVL1Params) if not name.startswith("__")} == names | {"_pybind11_conduit_v1_"}
    for params in (TVL1Params(), TVL1Params(solver="chambolle-pock", scheme="opencv", tau=0.7, median=5, warps=9)):
        own = engine.TVL1Params(**vars(params)) if params != TVL1Params() else engine.TVL1Params()
        for name, value in vars(params).items():
            expected = np.float32(value) if isinstance(value, float) else value
            assert getattr(own, name) == expected, name


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"median": 4}, ValueError, "median is 4, expected"),
        ({"scale_step": 0.4}, ValueError, "scale_step is 0.4, expected"),
        ({"tau": float("nan")}, ValueError, "tau is nan, expected"),
        ({"solver": "brox"}, ValueError, "solver is 'brox'"),
        ({"warps": 2.5}, ValueError, "warps is 2.5, which has the wrong type"),
        ({"sigma": 1.0}, TypeError, "sigma"),
    ],
)
def test_the_engine_refuses_parameters_that_it_cannot_use(
    fields: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        native.engine().TVL1Params(**fields)


def test_arguments_are_given_by_name() -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.engine().gates_forward(0, 0, 0, 0, 0, 0, False, 1)
