"""Settings dataclasses as command lines: every command is `parse(SomeConfig, ...)`, then a function of its result.
argparse splits the command line into flags and their words, `files.settings.convert` turns words into values (so flags
and YAML files take the same values and answer with the same messages), and tyro draws the page of --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, make_dataclass, replace
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

import tyro

from avfast.errors import InputError
from avfast.files import settings
from avfast.files.settings import Choices, Config

FlagChoices = Mapping[str, Choices]
"""{flag: {field: {name: settings class}}}."""
Recipes = Callable[[Any], Mapping[str, Mapping[str, Any]]]
"""What recipes there are for a config: {name: {field, in nested settings too: value}}."""


def parse(
    kind: type[Config],
    *,
    prog: str,
    argv: list[str] | None = None,
    presets: Mapping[str, Config] | None = None,
    default: Config | None = None,
    choices: FlagChoices | None = None,
    recipes: Recipes | None = None,
) -> Config:
    """Build a config from a command line: `--preset NAME`, then `--config FILE` (repeatable), then `--recipe NAME`,
    which sets several fields at once, then flags, which must not contradict the recipe.

    Each field is a flag; fields of nested settings carry no prefix. Which settings a field holds is read from the
    default instance, not from the annotation. With `default` neither preset nor files are read, only flags.

    With choices {"dataset": {"data": {"circles": Circles}}} the flag `--dataset NAME` chooses the class whose settings
    stand in the field `data`, as `name: NAME` in a YAML table `data` does. A flag may choose for several fields.
    `--print-config` prints the result as YAML, `--help` every flag; both raise SystemExit(0). Raises InputError (one
    line) for an unknown flag, with the nearest known one, a bad value, or a flag given twice."""
    argv = [_with_hyphens(word) for word in (sys.argv[1:] if argv is None else argv)]
    presets, choices = presets or {}, choices or {}
    # these are read first: they decide which other flags there are
    first = _Parser(prog)
    actions = [
        first.add_argument("-h", "--help", action="store_true"),
        first.add_argument("--print-config", action=_Once, nargs=0, const=True),
        first.add_argument("--config", action="append"),
    ]
    choosing = [*(["preset"] if presets else []), *(["recipe"] if recipes else []), *choices]
    actions += [first.add_argument(f"--{flag}", action=_Once) for flag in choosing]
    known = vars(first.parse_known_args(argv)[0])
    names = {flag: known[flag][1] for flag in choosing if flag in known}

    if default is None:
        preset = names.get("preset", next(iter(presets), ""))
        if presets:
            settings.check_name(preset, presets, "preset")
        default = _with_chosen(presets[preset] if presets else kind(), names, choices)
        of_fields = {field: classes for flag in choices.values() for field, classes in flag.items()}
        for path in known.get("config", []):
            default = settings.load_config(path, default, of_fields)
    # again, because a file may have chosen otherwise: flags win
    default = _with_chosen(default, names, choices)
    known_recipes = recipes(default) if recipes else {}
    if "recipe" in names:
        if not known_recipes:
            raise InputError(f"recipe is {names['recipe']!r}, but what is chosen has no recipes")
        settings.check_name(names["recipe"], known_recipes, "recipe")
        default = settings.with_values(default, known_recipes[names["recipe"]])
    parser = _Parser(prog, [first])
    try:
        actions += _add_arguments(parser, default)
    except argparse.ArgumentError as error:
        # the settings of somebody's own model have a field with the name of another setting or flag
        name = str(error.argument_name).lstrip("-").replace("-", "_")
        owners = [type(part).__name__ for part in vars(default).values() if is_dataclass(part) and hasattr(part, name)]
        field = f"the field {name} of {' or '.join(owners)}"
        raise InputError(f"{error.argument_name} is two flags: rename {field}") from None
    if "help" in known:
        _print_help(default, prog, names.get("preset"), presets, choices, known_recipes)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        word = unknown[0].partition("=")[0]
        flags = [flag for action in actions for flag in action.option_strings]
        raise InputError(f"unknown argument {word!r}{settings.did_you_mean(word, flags)}")
    config = _with_words(default, vars(namespace))
    recipe = names.get("recipe", "")
    for name, value in known_recipes[recipe].items() if recipe else ():
        if config != settings.with_values(config, {name: value}):
            flag, words = vars(namespace)[name]
            raise InputError(f"{flag} is {words}, but --recipe {recipe} has {value}: leave one of them out")
    if "print_config" in namespace:
        import yaml

        print(yaml.safe_dump(settings.to_dict(config), sort_keys=False), end="")
        raise SystemExit(0)
    return config


def _with_chosen(config: Any, names: Mapping[str, str], choices: FlagChoices) -> Any:
    for flag in choices.keys() & names.keys():
        for field, classes in choices[flag].items():
            config = replace(config, **{field: settings.choose(getattr(config, field), names[flag], classes, flag)})
    return config


def _with_hyphens(word: str) -> str:
    """--batch_size=4 as --batch-size=4."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


class _Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations, writes no help, and raises InputError."""

    def __init__(self, prog: str, parents: Sequence[argparse.ArgumentParser] = ()) -> None:
        super().__init__(prog, parents=parents, argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class _Once(argparse.Action):
    """Store (flag, its words), without words (flag, const); refuse a flag that is given a second time. The flag of a
    positional argument is None."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        if hasattr(namespace, self.dest):
            before, _ = getattr(namespace, self.dest)
            other_form = f", as {before} before" if before != option_string else ""
            all_values = " with all its values" if isinstance(values, list) and values else ""
            parser.error(f"{option_string} is given twice{other_form}, expected once{all_values}")
        setattr(namespace, self.dest, (option_string, self.const if self.nargs == 0 else values))


def _with_words(config: Any, given: Mapping[str, tuple[str | None, Any]]) -> Any:
    """The config with what stands on the command line, (flag, its words) by field name, in nested settings too."""
    changes = {}
    for name, hint in settings.setting_types(config).items():
        current = getattr(config, name)
        if is_dataclass(current):
            changes[name] = _with_words(current, given)
        elif name in given:
            flag, words = given[name]
            changes[name] = settings.convert(hint, words, flag or name)
    return replace(config, **changes)


def _add_arguments(parser: _Parser, config: Any) -> Iterator[argparse.Action]:
    """The flags of all fields, nested too: --x and --no-x for a bool, as many words as a tuple has, or one word."""
    for name, hint in settings.setting_types(config).items():
        flag, nested = name.replace("_", "-"), getattr(config, name)
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        length = next((get_args(a) for a in alternatives if get_origin(a) is tuple), None)
        words = None if length is None else "*" if length[-1] is Ellipsis else len(length)
        if is_dataclass(nested):
            yield from _add_arguments(parser, nested)
        elif tyro.conf.Positional in marks:
            yield parser.add_argument(name, action=_Once, nargs=words or "?")
        elif kind is bool:
            yield parser.add_argument(f"--{flag}", dest=name, action=_Once, nargs=0, const=True)
            yield parser.add_argument(f"--no-{flag}", dest=name, action=_Once, nargs=0, const=False)
        else:
            yield parser.add_argument(f"--{flag}", action=_Once, nargs=words)


def _print_help(
    config: Any,
    prog: str,
    preset: str | None,
    presets: Mapping[str, Any],
    choices: FlagChoices,
    recipes: Mapping[str, Any],
) -> NoReturn:
    """Print every flag with its present value, and end. tyro draws the page of a class, so the flags that are no fields
    become fields of a class made for the page."""
    extra: list[tuple[str, Any, Any]] = []

    def add(flag: str, kind: Any, value: Any, text: str, metavar: str | None = None) -> None:
        # a flag may be called as a field of the config
        mark = tyro.conf.arg(name=flag, help=text, metavar=metavar)
        extra.append((f"flag_{len(extra)}", Annotated[kind, mark, tyro.conf.FlagCreatePairsOff], value))

    for flag, chosen_fields in choices.items():
        field, classes = next(iter(chosen_fields.items()))
        chosen = next(name for name, kind in classes.items() if type(getattr(config, field)) is kind)
        add(flag, Literal[tuple(classes)], chosen, f"Chooses the {field} options listed below.")
    if presets:
        add("preset", Literal[tuple(presets)], preset or next(iter(presets)), "Start from these settings.")
    if recipes:
        add(
            "recipe",
            Literal[tuple(recipes)] | None,
            None,
            "Set every flag that is part of a way to train.",
        )
    add("config", str | None, None, "Read YAML files over them, each after its own --config; flags win.", "FILE")
    add("print-config", bool, False, "Print the settings as YAML and exit.")
    kind = type(config)
    page = make_dataclass(kind.__name__, extra, bases=(kind,), frozen=True)
    tyro.cli(
        page,
        default=page(**{field.name: getattr(config, field.name) for field in fields(config)}),
        args=["--help"],
        prog=prog,
        description=(kind.__doc__ or "").strip(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    raise AssertionError("tyro.cli ends with SystemExit after --help")
