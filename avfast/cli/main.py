"""The command `avfast SUBCOMMAND ...`, which is `python -m avfast.SUBCOMMAND ...`, and how every command ends.

Exit status: 0 done, 2 a mistake in what was asked or a file that cannot be read or written (one line on stderr),
3 done but for some inputs, which are listed with the reason (flow, prepare, predict), 130 interrupted. Anything else is
a bug of ours and keeps its traceback; AVFAST_DEBUG=1 shows the traceback always.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable

from avfast import __version__
from avfast.errors import InputError

EXIT_SOME_FAILED = 3

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


def run_command(command: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call `command(argv)` (None: the process's own arguments) and turn its failures into an exit status.

    Returns 0, or raises SystemExit with the status of the module's docstring. A module's entry is
    `if __name__ == "__main__": run_command(main)`.
    """
    try:
        command(argv)
        # a reader that is gone shows only when the buffer is written out
        sys.stdout.flush()
    except BrokenPipeError:
        # `avfast env | head`: the interpreter would flush again at exit and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (InputError, OSError) as error:
        if os.environ.get("AVFAST_DEBUG") == "1":
            traceback.print_exc()
        print(f"avfast: error: {_one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if os.environ.get("AVFAST_DEBUG") == "1":
            traceback.print_exc()
        print("avfast: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    return 0


def print_failures(failed: list[dict[str, str]]) -> None:
    """A line for every input that failed, {"input", "reason"}, and then the command's end with its status, if any."""
    for failure in failed:
        print(f"failed: {failure['input']}: {failure['reason']}")
    if failed:
        raise SystemExit(EXIT_SOME_FAILED)


def main(argv: list[str] | None = None) -> int:
    """Run `avfast SUBCOMMAND ...`; returns 0 or raises SystemExit as `run_command` does."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(_usage(), file=sys.stderr)
        raise SystemExit(2)
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"avfast {__version__}")
        return 0
    if name not in SUBCOMMANDS:
        print(f"avfast: error: unknown subcommand {name!r}, expected {_expected(name)}", file=sys.stderr)
        raise SystemExit(2)
    return run_command(importlib.import_module(f"avfast.{name}").main, rest)


def _usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    table = "\n".join(f"  {name:<{width}}  {text}" for name, text in SUBCOMMANDS.items())
    return (
        "usage: avfast SUBCOMMAND [ARGUMENT ...]   (the same as python -m avfast.SUBCOMMAND)\n\n"
        f"{table}\n\navfast SUBCOMMAND --help lists its arguments; avfast --version prints the version."
    )


def _expected(name: str) -> str:
    choices = f"one of {', '.join(SUBCOMMANDS)}"
    near = difflib.get_close_matches(name, SUBCOMMANDS, n=1, cutoff=0.4)
    return f"{choices} (did you mean {near[0]!r}?)" if near else choices


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])
    return " ".join(str(error).split("\n")) or type(error).__name__
