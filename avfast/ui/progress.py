"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Context manager around long work: `update(done, total, text)` as often as wanted, `note(line)` for a line above.

    On a terminal a rich bar with time left; else a plain line at most every 20 seconds; nothing at all with `quiet`.
    """

    _PLAIN_SECONDS = 20.0

    def __init__(self, description: str, total: int | None = None, done: int = 0, quiet: bool = False) -> None:
        self.description, self.quiet = description, quiet
        self._total, self._first = total, done
        self._bar: Any = None
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.description, total=self._total, completed=self._first, text="")
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, text: str = "") -> None:
        """`done` of `total` is finished."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if self.quiet or (done < total and now - self._printed < self._PLAIN_SECONDS):
            return
        self._printed = now
        work = max(done - self._first, 1)
        left = (now - self._began) / work * (total - done)
        print(f"{self.description}: {done}/{total}  {text}  {left:.0f} s left".replace("    ", "  "), flush=True)

    def note(self, line: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        elif not self.quiet:
            print(line, flush=True)
