"""Settings dataclasses as dictionaries and YAML files, and the one conversion that YAML and flags share."""

from __future__ import annotations

import difflib
import math
import numbers
import os
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from avfast.errors import InputError

Config = TypeVar("Config")
Choices = Mapping[str, Mapping[str, type]]
"""{field: {name: settings class}}: the classes of which one field of a config may hold an instance."""


class Range(NamedTuple):
    """The values that a numeric setting may have, as an annotation: Annotated[int, Range(1)]. Infinities and NaN are
    never among them."""

    low: float
    high: float = math.inf
    excludes_low: bool = False

    def __contains__(self, value: Any) -> bool:
        return math.isfinite(value) and self.low <= value <= self.high and not (self.excludes_low and value == self.low)

    def __str__(self) -> str:
        low = f"above {self.low}" if self.excludes_low else f"at least {self.low}"
        return low if self.high == math.inf else f"{low} and at most {self.high}"


Count = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, excludes_low=True)]
Share = Annotated[float, Range(0, 1)]
Side = Annotated[int, Range(1, 16_384)]
FrameRate = Annotated[float, Range(0, 1000, excludes_low=True)]
Seed = Annotated[int, Range(0, 2**63 - 1)]

_EXPECTED = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dictionaries and lists, ready for YAML or JSON. Settings whose class has an attribute `name`
    have it as their first key."""
    name = _class_name(config)
    values: dict[str, Any] = {} if name is None else {"name": name}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            value = to_dict(value)
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def from_dict(default: Config, values: Mapping[str, Any], where: str, choices: Choices | None = None) -> Config:
    """Replace fields of a config by values of a dictionary; nested settings are tables. A table may hold `name: NAME`,
    which says whose settings it holds: one of `choices` for that field, or without choices the name that the settings
    already have. Raises InputError, which begins with `where`, for an unknown key or name and for a value of another
    type."""
    hints = setting_types(default)
    changes: dict[str, Any] = {}
    for key, value in values.items():
        key = str(key).replace("-", "_")
        if key not in hints:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(key, hints)}")
        current = getattr(default, key)
        if not is_dataclass(current):
            changes[key] = convert(hints[key], value, f"{where}: {key}")
            continue
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {key} is {value!r}, expected a table")
        own_name = _class_name(current)
        classes = (choices or {}).get(key) or (own_name and {own_name: type(current)})
        if classes and "name" in value:
            current = choose(current, value["name"], classes, f"{where}: {key}: name")
            value = {k: v for k, v in value.items() if k != "name"}
        changes[key] = from_dict(current, value, where)
    return replace(default, **changes)  # type: ignore[type-var]


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with these values of its fields, and of those of nested settings."""
    nested = {name: value for name, value in vars(config).items() if is_dataclass(value)}
    changes = {name: values[name] for name in vars(config).keys() & values.keys()}
    return replace(config, **changes, **{name: with_values(value, values) for name, value in nested.items()})  # type: ignore[type-var]


def choose(current: Any, name: Any, classes: Mapping[str, type], where: str) -> Any:
    """The settings called `name`: `current` if they are of that class already, else that class's defaults. Raises
    InputError, which begins with `where`, for an unknown name."""
    check_name(name, classes, where)
    return current if type(current) is classes[name] else classes[name]()


def check_name(name: Any, known: Iterable[str], where: str) -> None:
    """Raise InputError, which begins with `where` and suggests the most similar name, unless the name is known."""
    known = list(known)
    if name not in known:
        raise InputError(f"{where} is {name!r}{did_you_mean(str(name), known)}, expected one of {', '.join(known)}")


def setting_types(config: Any) -> dict[str, Any]:
    """{field: annotated type} of a config's own fields; class attributes are no fields."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    return {field.name: hints[field.name] for field in fields(config)}


def check_values(config: Any) -> None:
    """Raise InputError, which names the flag, for a value that is not of its field's type or outside its range, in
    nested settings too. Values from files and flags are right already; those set in Python may not be."""
    for name, kind in setting_types(config).items():
        value = getattr(config, name)
        value = tuple(value) if isinstance(value, list) else value
        if is_dataclass(value):
            check_values(value)
        elif convert(kind, value, name.replace("_", "-")) != value:
            raise InputError(f"{name.replace('_', '-')} is {value!r}, expected {_expected(kind)}")


def convert(kind: Any, value: Any, where: str) -> Any:
    """A value from YAML or the text of a flag as the annotated type: Literal, T | None, tuple, bool, int, float, str.
    Text becomes a number where the type is one: YAML itself reads 1e-4 as text. Raises InputError, which begins with
    `where`, for a value that does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = convert(arguments[0], value, where)
        for mark in arguments[1:]:
            if isinstance(mark, Range) and value not in mark:
                raise InputError(f"{where} is {value}, expected {mark}")
        return value
    if origin in (typing.Union, types.UnionType):
        optional = next(a for a in arguments if a is not type(None))
        return None if value in (None, "None") else convert(optional, value, where)
    if origin is Literal:
        for choice in arguments:
            if str(value) == str(choice) and type(value) in (type(choice), str):
                return choice
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    elif type(value) is kind or (kind is str and isinstance(value, os.PathLike)):
        return value
    elif (kind in (int, float) and type(value) in (int, str)) or (
        kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool)
    ):
        with suppress(ValueError):
            return kind(value)
    near = did_you_mean(value, map(str, arguments)) if origin is Literal and isinstance(value, str) else ""
    raise InputError(f"{where} is {value!r}{near}, expected {_expected(kind)}")


def _expected(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _expected(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _expected(next(a for a in arguments if a is not type(None)))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{count}, each {_expected(arguments[0])}"
    return _EXPECTED[kind]


def load_config(path: str | Path, default: Config, choices: Choices | None = None) -> Config:
    """Read a YAML file over a default config, as `from_dict` does. A config class whose files looked otherwise before
    has a static method `upgraded(values)`, which brings the content of older files into the present form. Raises
    InputError when the file is missing, is not YAML, or does not fit."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise InputError(f"config file {path} holds {type(values).__name__}, expected keys and values")
    upgrade = getattr(type(default), "upgraded", None)
    return from_dict(default, values if upgrade is None else upgrade(values), f"config file {path}", choices)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """ " (did you mean 'X'?)" with the known word that is most like this one; empty if none is."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _class_name(config: Any) -> str | None:
    """The class attribute `name` of settings; None if they have none, or a field of that name."""
    name = getattr(type(config), "name", None)
    return name if isinstance(name, str) and "name" not in {field.name for field in fields(config)} else None
