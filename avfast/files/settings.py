"""Settings dataclasses as plain dictionaries and as YAML files."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from avfast.errors import InputError

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dictionaries and lists, ready for YAML or JSON."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def from_dict(default: Config, values: Mapping[str, Any], where: str) -> Config:
    """Replace fields of a (nested) config by values of a dictionary. Raises InputError on an unknown key or a value of
    another type."""
    hints = typing.get_type_hints(type(default))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        key = str(key).replace("-", "_")
        if key not in hints:
            raise InputError(f"{where}: unknown key {key!r}{did_you_mean(key, hints)}")
        current = getattr(default, key)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise InputError(f"{where}: {key} is {value!r}, expected a table")
            changes[key] = from_dict(current, value, where)
        else:
            changes[key] = _convert(hints[key], value, f"{where}: {key}")
    return replace(default, **changes)  # type: ignore[type-var]


def _convert(kind: Any, value: Any, where: str) -> Any:
    """A value from YAML as the annotated type: Literal, T | None, tuple, bool, int, float, str."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in arguments:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(kinds) == len(value):
            return tuple(_convert(k, v, where) for k, v in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise InputError(f"{where} is {value!r}, expected {getattr(kind, '__name__', kind)}")


def load_config(path: str | Path, default: Config) -> Config:
    """Read a YAML file over a default config. Raises InputError when it is missing, not YAML, or does not fit."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"config file {path} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise InputError(f"config file {path} holds {type(values).__name__}, expected keys and values")
    return from_dict(default, values, f"config file {path}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " (did you mean 'X'?)" with the known word that is most like this one; empty where none is."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
