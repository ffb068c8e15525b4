"""Writing without losing what is there: files appear whole or not at all, folders are never written over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when the block ends well and removed when it does not."""
    path = Path(path)
    # the suffix stays last: writers choose the format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def new_folder(path: str | Path) -> Path:
    """Make a folder of that name, or with -2, -3 ... appended where it exists already, and return it.

    Raises OSError when it cannot be made.
    """
    path = Path(path)
    folder, number = path, 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            # a parent that is a file exists too, but no number helps there
            if not path.parent.is_dir():
                raise
            number += 1
            folder = path.with_name(f"{path.name}-{number}")
