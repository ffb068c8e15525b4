"""Writing without losing what is there: files appear whole or not at all, folders are never written over; and reading a
log whose writer may have been killed."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from avfast.config import InputError


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
    names = numbered(path)
    while True:
        folder = next(names)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            # a parent that is a file exists too, but no number helps there
            if not path.parent.is_dir():
                raise


def publish(unfinished: Path, path: str | Path) -> Path:
    """Give a finished folder its name, `path`, or with -2, -3 ... appended where that exists, and return it."""
    final = new_folder(path)
    # an empty folder may be replaced
    os.replace(unfinished, final)
    return final


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then the same with -2, -3 ... appended, without end."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. A last line that a kill cut off is left out.

    Raises InputError, naming file and line, for any other line that is not a JSON object, and OSError when the file
    cannot be read.
    """
    records = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            # only the last line can lack its end
            elif line.endswith(b"\n"):
                text = line[:80].decode(errors="replace").strip()
                raise InputError(f"{path}, line {number} is not a JSON object: {text!r}")
    return records
