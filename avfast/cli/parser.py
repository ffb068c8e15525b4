"""Settings dataclasses as command lines: every command is `parse(SomeConfig, ...)`, then a function of its result."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Mapping
from typing import Any

from avfast.errors import InputError
from avfast.files.settings import Config, did_you_mean, load_config, to_dict


def parse(
    kind: type[Config],
    *,
    prog: str,
    argv: list[str] | None = None,
    presets: Mapping[str, Config] | None = None,
    default: Config | None = None,
) -> Config:
    """Build a config from a command line: `--preset NAME`, then `--config FILE` (repeatable), then flags.

    Flags of nested configs carry no prefix. `--print-config` prints the result as YAML and exits. With `default` the
    flags alone are laid over it. Raises InputError (one line) for an unknown flag, with the nearest known one, a bad
    value, or a flag given twice.
    """
    import tyro
    import yaml

    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=prog, exit_on_error=False)
    description = (kind.__doc__ or "").strip()
    if presets:
        first.add_argument("--preset")
        description += f" --preset NAME starts from a named preset: {', '.join(presets)}."
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--print-config", action="store_true")
    description += " --config FILE reads YAML, --print-config prints the result and exits; flags win."
    try:
        known, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise InputError(str(error)) from None

    if default is None:
        default = kind()
        if presets:
            name = known.preset or next(iter(presets))
            if name not in presets:
                raise InputError(
                    f"preset is {name!r}{did_you_mean(name, presets)}, expected one of {', '.join(presets)}"
                )
            default = presets[name]
        for path in known.config:
            default = load_config(path, default)

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config, unknown = tyro.cli(
                kind,
                default=default,
                args=rest,
                prog=prog,
                description=description,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        # tyro draws a box around several lines
        text = re.sub(r"[\u2500-\u257f]+", " ", errors.getvalue())
        text = re.sub(r"For full helptext.*", "", " ".join(text.split()))
        raise InputError(re.sub(r"^Parsing error ", "", text).strip()) from None
    if unknown:
        raise InputError(f"unknown argument {unknown[0]!r}{did_you_mean(unknown[0].replace('_', '-'), _flags(kind))}")
    _refuse_repeated(argv, _flags(kind))
    if known.print_config:
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _flags(kind: Any) -> dict[str, Any]:
    """The flags of a config, nested ones too, with their types."""
    flags: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        flags |= _flags(hint) if dataclasses.is_dataclass(hint) else {f"--{name.replace('_', '-')}": hint}
    return flags


def _refuse_repeated(argv: list[str], flags: Mapping[str, Any]) -> None:
    """Raise InputError for a flag given twice, of which tyro would silently take the last. --config may repeat."""
    given: dict[str, str] = {}
    for word in argv:
        if not word.startswith("--"):
            continue
        flag = word.partition("=")[0].replace("_", "-")
        positive = flag.replace("--no-", "--", 1)
        key = positive if flags.get(positive) is bool else flag
        if key in given and key != "--config":
            earlier = f", as {given[key]} before" if given[key] != flag else ""
            values = " with all its values" if typing.get_origin(flags.get(key)) is tuple else ""
            raise InputError(f"{flag} is given twice{earlier}, expected once{values}")
        given[key] = flag
