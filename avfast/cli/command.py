"""How every command ends: `run_command` turns an error into one line and an exit status.

0 done; 2 a mistake in what was asked, or a file that cannot be read or written (one line on stderr); 3 done except for
some inputs, which are listed with the reason (flow, prepare, predict); 130 interrupted. Any other error is a bug in
avfast and keeps its traceback. AVFAST_DEBUG=1 always shows the traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from avfast.errors import InputError

EXIT_SOME_FAILED = 3


def run_command(command: Callable[[list[str] | None], None], argv: list[str] | None = None) -> int:
    """Call `command(argv)` (None: the process's own arguments) and return 0, or raise SystemExit with a status of the
    module's docstring."""
    try:
        command(argv)
        # a closed pipe is noticed only when the buffer is written
        sys.stdout.flush()
    except BrokenPipeError:
        # `avfast env | head`: without this the interpreter flushes again at exit and prints an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (InputError, OSError) as error:
        _stop(f"error: {_one_line(error)}", status=2)
    except KeyboardInterrupt:
        _stop("interrupted", status=130)
    return 0


def _stop(message: str, status: int) -> NoReturn:
    if os.environ.get("AVFAST_DEBUG") == "1":
        traceback.print_exc()
    print(f"avfast: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])
    return " ".join(str(error).split("\n")) or type(error).__name__


def print_failures(failed: list[dict[str, str]], what: str = "failed") -> None:
    """Print a line for each input that failed ({"input", "reason"}). Raises SystemExit(3) if there is one."""
    for failure in failed:
        print(f"{what}: {failure['input']}: {failure['reason']}")
    if failed:
        raise SystemExit(EXIT_SOME_FAILED)
