"""Files that appear whole or not at all, names that are not taken yet, and reading a log whose writer may have been
killed. Whole folders: avfast.files.result_folder."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from avfast.errors import InputError


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


@contextmanager
def npy_appender(path: str | Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Write one .npy file whose length is not known before: the block gets a function `append(array)` that adds an
    array's rows behind those that are there. Raises ValueError for rows of another shape or dtype, OSError when the
    file cannot be written; the file is whole when the block has ended well."""
    dtype, shape, count = np.dtype("|u1"), (0,), 0

    def header() -> dict[str, object]:
        return {"descr": dtype.str, "fortran_order": False, "shape": (count, *shape)}

    # plain writes: a full disk is an OSError here, and a killed process when writing through a memory map
    with open(path, "wb") as file:

        def append(array: np.ndarray) -> None:
            nonlocal dtype, shape, count
            if not file.tell():
                dtype, shape = array.dtype, array.shape[1:]
                np.lib.format.write_array_header_1_0(file, header())
            if array.dtype != dtype or array.shape[1:] != shape:
                raise ValueError(f"rows of {array.dtype} {array.shape[1:]}: expected {dtype} {shape} as before")
            file.write(np.ascontiguousarray(array).data)
            count += len(array)

        yield append
        # numpy leaves room in a header for the first dimension to grow, so the length goes in where it was
        end = file.tell()
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header())
        assert end == file.tell() + dtype.itemsize * count * math.prod(shape), "the header has grown over the data"


def numbered(path: Path) -> Iterator[Path]:
    """`path`, then the same with -2, -3 ... appended, without end."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}-{number}")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. A last line that a kill cut off is left out. Raises InputError,
    naming file and line, for any other line that is not a JSON object, and OSError when the file cannot be read."""
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
