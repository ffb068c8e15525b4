"""A progress bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """Shows how far a long work is, in a `with` block: on a terminal a bar with the time left, otherwise a line every
    20 seconds and at the end, with `quiet` nothing. description: what is done, in which unit ("scoring, clips"). done:
    how much an earlier run, which this one continues, has done."""

    _LINE_SECONDS = 20.0

    def __init__(self, description: str, total: int | None = None, done: int = 0, quiet: bool = False) -> None:
        self.description, self.quiet = description, quiet
        self._total, self._done_before = total, done
        self._bar: Any = None
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if not self.quiet and sys.stderr.isatty():
            from rich import progress as rich
            from rich.console import Console

            what, text = rich.TextColumn("{task.description}"), rich.TextColumn("{task.fields[text]}")
            times = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
            columns = what, rich.BarColumn(), rich.MofNCompleteColumn(), text, *times
            self._bar = rich.Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.description, total=self._total, completed=self._done_before, text="")
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, text: str = "") -> None:
        """Show that `done` of `total` is finished, with a text such as the loss."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, text=text)
            return
        now = time.monotonic()
        if self.quiet or (done < total and now - self._last_line < self._LINE_SECONDS):
            return
        self._last_line = now
        left = (now - self._start) / max(done - self._done_before, 1) * (total - done)
        print(f"{self.description}: {done}/{total}  {text}  {left:.0f} s left".replace("    ", "  "), flush=True)

    def note(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        elif not self.quiet:
            print(line, flush=True)
