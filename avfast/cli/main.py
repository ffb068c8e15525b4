"""The program `avfast SUBCOMMAND ...`, which does the same as `python -m avfast.SUBCOMMAND ...`."""

from __future__ import annotations

import importlib
import sys

from avfast import __version__
from avfast.cli.command import run_command
from avfast.files.settings import did_you_mean

SUBCOMMANDS = {
    "train": "train both stages of the model, on the built-in data set or on prepared videos",
    "evaluate": "score runs, or anyone's predictions, as the paper's tables do",
    "prepare": "turn a folder of videos with sound into a data set",
    "predict": "the future of videos from their first frames and their sound: films, pictures, arrays",
    "report": "a run as one web page: curves, tables, pictures and films",
    "export": "write a trained model as ONNX, checked against PyTorch, for deployment",
    "flow": "TV-L1 flow of videos and image folders, into files",
    "env": "what this machine will use, and why",
}


def main(argv: list[str] | None = None) -> int:
    """Run `avfast SUBCOMMAND ...`. Returns 0, or raises SystemExit as `run_command` does."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(_usage(), file=sys.stderr)
        raise SystemExit(2)
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"avfast {__version__}")
        return 0
    if name not in SUBCOMMANDS:
        expected = f"one of {', '.join(SUBCOMMANDS)}{did_you_mean(name, SUBCOMMANDS, 0.4)}"
        print(f"avfast: error: unknown subcommand {name!r}, expected {expected}", file=sys.stderr)
        raise SystemExit(2)
    # imported within, so that an interrupt during the seconds that it takes is one line too
    return run_command(lambda words: importlib.import_module(f"avfast.{name}").main(words), rest)


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items())
    return (
        "usage: avfast SUBCOMMAND [ARGUMENT ...]   (the same as python -m avfast.SUBCOMMAND)\n\n"
        f"{table}\n\navfast SUBCOMMAND --help lists its arguments; avfast --version prints the version."
    )
