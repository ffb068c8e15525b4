"""Folders of results that appear whole: written under a hidden name, then renamed to the final one.

The hidden folder lies beside the final one. Its writer locks it with flock, and the system frees the lock when the
writer ends, however it ends: a hidden folder whose lock is free was left by a killed run, and `sweep` removes it.

Publishing is one rename. Where a folder has the final name already, the two exchange their names in one step (Linux's
renameat2): the final name always leads to the old or to the new result, each whole. A file system that cannot exchange
names, such as NFS, needs two renames; a run that is killed between them leaves the old result within a hidden folder,
and `sweep` on the same machine gives it its name back.

Where the file system has no flock, or one that counts within one machine only (NFS), the runs of several machines must
not share a folder of `ResultFolder`s. `hidden_folder` is safe there too: its names hold the machine's."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from avfast.files.atomic import numbered

_PREFIX = ".avfast-"
_REPLACED = "replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class ResultFolder:
    """A folder of results that one run at a time writes, instead of what has its name: `claim`, then `writing`."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.folder = _hidden_path(final)
        self._lock: int | None = None

    def claim(self) -> bool:
        """Make the hidden folder, empty, and lock it; False where another run holds it. Raises OSError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        if self._lock is None:
            return False
        for file in self.folder.iterdir():
            file.unlink()
        return True

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """The claimed folder to write into: published when the block ends well, removed when it raises. An OSError
        without a file name, such as that of a full disk, gets the final name."""
        try:
            yield self.folder
            _replace(self.folder, self.final)
            # from here on a folder with the hidden name is another run's
            self._unlock()
        except OSError as error:
            error.filename = error.filename or str(self.final)
            raise
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the hidden folder where it was claimed and not published."""
        if self._lock is not None:
            _remove(self.folder)
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def hidden_folder(final: str | Path) -> Iterator[Path]:
    """A new hidden folder beside `final`, which several runs may have at once, locked within the block. The block
    renames it when it is complete (see `publish`); what it has not renamed is removed. Call `sweep([final])` before,
    once, to remove what killed runs have left."""
    lock = None
    # another run may sweep the folder away before it is locked
    while lock is None:
        folder = _hidden_path(Path(final), f"-{uuid.uuid4().hex[:8]}@{socket.gethostname()}")
        folder.mkdir(parents=True)
        lock = lock_folder(folder)
    try:
        yield folder
    finally:
        _remove(folder)
        os.close(lock)


def publish(unfinished: Path, path: str | Path) -> Path:
    """Rename a folder made by `hidden_folder` to `path`, or with -2, -3 ... appended where that exists; its new path.
    Raises OSError."""
    for final in numbered(Path(path)):
        if os.path.lexists(final):
            continue
        try:
            os.rename(unfinished, final)
            return final
        except OSError as error:
            # another process has taken the name in the meantime
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    raise AssertionError("the numbers have no end")


def remove_folder(path: Path) -> None:
    """Delete a folder under a hidden name: a run killed meanwhile leaves no half of it under `path`. Raises OSError."""
    hidden = _hidden_path(path, f"-{uuid.uuid4().hex[:8]}")
    os.rename(path, hidden)
    _remove(hidden)


def sweep(finals: Iterable[Path]) -> None:
    """Remove the hidden folders that killed runs have left beside these folders, and put back a result that such a run
    had moved away. The folders of living runs are locked and stay."""
    for parent in {final.parent for final in finals}:
        for folder in parent.glob(f"{_PREFIX}*"):
            machine = folder.name.partition("@")[2]
            if machine in ("", socket.gethostname()) and (lock := lock_folder(folder)) is not None:
                _remove(folder)
                os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed or the process ends, however it ends. None: another holds the
    lock, or the folder is not there. Where the file system has no locks, everybody gets one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    held = True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # any other error: the file system has no locks
        held = not isinstance(error, BlockingIOError)
    # who held it before may have renamed or removed it in the meantime
    if held and folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
        return descriptor
    os.close(descriptor)
    return None


def _hidden_path(final: Path, ending: str = "") -> Path:
    # a digest, because the final name may be as long as a name can be
    return final.with_name(f"{_PREFIX}{hashlib.sha256(os.fsencode(final.name)).hexdigest()[:16]}{ending}")


def _replace(hidden: Path, final: Path) -> None:
    """Give a hidden folder the final name, and remove the folder that had it."""
    if not os.path.lexists(final):
        os.rename(hidden, final)
        return
    # from the exchange on the old folder has the hidden name, where another run could claim it while it is deleted
    lock = lock_folder(final)
    try:
        if _exchange(hidden, final):
            _remove(hidden)
        else:
            # when the block ends, however it ends, `_remove` puts the old folder back where the name is free
            with hidden_folder(final) as aside:
                (aside / _REPLACED).mkdir()
                os.rename(final, aside / _REPLACED / final.name)
                os.rename(hidden, final)
    finally:
        if lock is not None:
            os.close(lock)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the C library or the file system cannot. Raises OSError."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _remove(folder: Path) -> None:
    """Remove a hidden folder, or a link with that name. A result that `_replace` has moved into it goes back first,
    unless its name is taken again."""
    if folder.is_symlink():
        folder.unlink()
        return
    for old in folder.glob(f"{_REPLACED}/*"):
        if not os.path.lexists(folder.with_name(old.name)):
            os.rename(old, folder.with_name(old.name))
    shutil.rmtree(folder, ignore_errors=True)
