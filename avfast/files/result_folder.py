"""Where the results of one film are stored: a folder that is hidden and locked while it is written, then put in its
place. And for `avfast flow` the marker in it that says what is finished."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from avfast.errors import InputError

MARKER = "flow.done.json"
_HIDDEN = ".avfast-"
_OURS = re.compile(r"flow(\.done\.json|\.npy|_hsv\.mp4|_(x_|y_|hsv_)?\d{5,}\.(flo|jpg|png))")


class Place:
    """The final folder of an item, and the hidden one beside it that becomes it."""

    def __init__(self, final: Path) -> None:
        self.final = final
        # not the item's own name, which may be as long as names can be
        hidden = _HIDDEN + hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]
        self.folder = final.with_name(hidden)
        self._old = final.with_name(f"{hidden}-old")
        self._lock: int | None = None

    def check(self, out: Path) -> None:
        """Raise InputError where the item could not be put there without harm to what is there."""
        for parent in self.final.relative_to(out).parents:
            if parent.name and (out / parent / MARKER).exists():
                raise InputError(f"{self.final} would lie within the results of another item, {out / parent}")
        if not os.path.lexists(self.final):
            return
        names = sorted(os.listdir(self.final)) if self.final.is_dir() else [""]
        strange = [name for name in names if not _OURS.fullmatch(name)]
        if strange or (names and MARKER not in names):
            what = f"holds {strange[0]}" if strange and strange[0] else "was there before"
            raise InputError(f"{self.final} {what}, which avfast flow has not written: choose another --out")

    def claim(self) -> bool:
        """Make the hidden folder, empty, and lock it; False where another run holds it. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.folder)
        if self._lock is None:
            return False
        for file in self.folder.iterdir():
            file.unlink()
        return True

    def publish(self) -> None:
        """Put the hidden folder into its place, instead of what was there."""
        if self.final.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            os.rename(self.final, self._old)
        os.rename(self.folder, self.final)
        shutil.rmtree(self._old, ignore_errors=True)
        self.discard()

    def discard(self) -> None:
        """Remove the hidden folder, if it is ours and still there."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What is known of a finished item, or None where none is. Raises InputError for a damaged marker."""
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text())
        if not {"source", "parameters", "formats"} <= marker.keys():
            raise ValueError("keys are missing")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove the folder to have it done again") from None
    return marker


def sweep(finals: Iterable[Path]) -> None:
    """Remove the hidden folders that killed runs have left beside these places; those of living runs are locked."""
    for parent in {final.parent for final in finals}:
        for folder in parent.glob(f"{_HIDDEN}*"):
            lock = locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)


def locked(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or the process ends, however it ends; None: it is taken."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except BlockingIOError:
        held = False
    except OSError:
        # some file systems of clusters know no locks
        held = True
    # whoever held it may have published or removed it in the meantime
    if held and folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
        return descriptor
    os.close(descriptor)
    return None
