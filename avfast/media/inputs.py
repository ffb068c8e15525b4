"""The inputs of a command, that is videos, folders, lists and globs, as items with names of their own. An item is one
film: a video file, or the images of one folder. Its name is a relative path under which its results are stored. A tree
of inputs becomes the same tree of names. No two items have the same name, and no name is a folder above another one."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from avfast.errors import InputError
from avfast.files.atomic import replacing

VIDEO_SUFFIXES = frozenset(
    ".3gp .asf .avi .f4v .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .mxf .ogv .ts .vob .webm .wmv".split()
)
IMAGE_SUFFIXES = frozenset(".bmp .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
LIST_SUFFIX = ".txt"
FAILED = "failed.json"


@dataclass(frozen=True)
class Item:
    """One film: the path of a video, or of a folder of images with their file names, () for all images there. Its name
    is the relative path of its results, parts joined by `/`."""

    name: str
    path: Path
    images: tuple[str, ...] | None = None

    def files(self) -> list[Path]:
        """The video, or the images in their order: numbers within names count as numbers, so frame2 is before frame10.
        Raises OSError for a folder that cannot be read."""
        if self.images is None:
            return [self.path]
        names = self.images or [n for n in os.listdir(self.path) if _has_suffix(n, IMAGE_SUFFIXES)]
        return [self.path / name for name in sorted(names, key=_natural_order)]

    def source(self) -> dict[str, Any]:
        """What identifies the content: path, number of files, bytes, newest modification time, and a digest of the
        files' names, sizes and times, which stays the same where the folder above is moved. Raises OSError for a file
        that is not there."""
        files = self.files()
        found = [file.stat() for file in files]
        text = "".join(f"{f.name}\0{s.st_size}\0{s.st_mtime_ns}\n" for f, s in zip(files, found, strict=True))
        return {
            "path": str(self.path.absolute()),
            "files": len(files),
            "bytes": sum(status.st_size for status in found),
            "mtime_ns": max((status.st_mtime_ns for status in found), default=0),
            "digest": hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16],
        }

    def reason(self, error: Exception) -> str:
        """An error's message in one line, without the item's path in front."""
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return text.removeprefix(f"{self.path}: ")


def find_items(inputs: Sequence[str], marker: str) -> tuple[list[Item], dict[str, str]]:
    """The items that inputs mean, in order and each once; and for every input without any item the reason.

    - a video file: named after the file without its suffix;
    - a folder: all videos below it, and every folder of images (one item each) that holds no video, named by their path
      below it; hidden files and folders, and folders with a file `marker` in them (results, no inputs), are left out;
    - a glob: what it matches, named by the path below its fixed part; images of one folder are one item;
    - image files, also from the shell: those of one folder are one item, named after the folder;
    - a .txt file: a line each of the above, relative to the current folder, `#` begins a comment; a relative path to a
      video is its name.

    Two that would get one name keep their suffixes, and where that does not help get a digest of their absolute path.
    """
    found: list[Item] = []
    images: dict[Path, tuple[str, list[str]]] = {}
    failed: dict[str, str] = {}

    def add(text: str, listed: bool = False) -> None:
        try:
            root, paths = _paths(text)
        except OSError as error:
            failed[text] = error.strerror or str(error)
            return
        before = len(found) + sum(len(names) for _, names in images.values())
        for path in paths:
            if path.is_dir():
                found.extend(_find_below(path, path if root is None else root, marker))
            elif _has_suffix(path.name, IMAGE_SUFFIXES):
                name = _relative(path.parent, path.parent if root is None else root)
                images.setdefault(path.parent, (name, []))[1].append(path.name)
            else:
                below = root if root is not None else Path() if listed and _stays_below(path) else path.parent
                found.append(Item(_relative(path.with_suffix(""), below), path))
        if before == len(found) + sum(len(names) for _, names in images.values()):
            failed[text] = "no video and no image in it" if root is None else "it matches no video and no image"

    for text in inputs:
        if _has_suffix(text, {LIST_SUFFIX}) and Path(text).is_file():
            for line in Path(text).read_text(errors="surrogateescape").splitlines():
                if line := re.sub(r"(^|\s)#.*", "", line).strip():
                    add(line, listed=True)
        else:
            add(text)
    found += [Item(name, path, tuple(dict.fromkeys(names))) for path, (name, names) in images.items()]
    once = {(item.path.absolute(), item.images): item for item in reversed(found)}
    return _unique_names(list(reversed(once.values()))), failed


def list_failures(unusable: dict[str, str], items: Sequence[Item], failed: dict[str, str]) -> list[dict[str, str]]:
    """What a command could not do, as its summary says it: {"input", "reason"} of every input without any item, and of
    every item that failed (reasons by its name)."""
    listed = [{"input": text, "reason": reason} for text, reason in unusable.items()]
    return listed + [{"input": str(i.path), "reason": failed[i.name]} for i in items if i.name in failed]


def write_failures(out: Path, failed: list[dict[str, str]], some_done: bool) -> None:
    """Write what `list_failures` gives to failed.json in `out`, or remove the file of an earlier run where nothing
    failed. Raises InputError with the first reason where nothing was done."""
    if not failed:
        (out / FAILED).unlink(missing_ok=True)
    elif out.is_dir():
        with replacing(out / FAILED) as temporary:
            temporary.write_text(json.dumps(failed, indent=2) + "\n")
    if failed and not some_done:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise InputError(f"nothing could be done: {failed[0]['input']}: {failed[0]['reason']}{more}")


def _paths(text: str) -> tuple[Path | None, list[Path]]:
    """What an input stands for: itself, or the matches of a glob with its fixed part. Raises OSError without either."""
    path = Path(text)
    if os.path.lexists(path) or not glob.has_magic(text):
        path.stat()
        return None, [path]
    parts = list(path.parts)
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:fixed]), [Path(match) for match in sorted(glob.glob(text, recursive=True), key=_natural_order)]


def _find_below(folder: Path, root: Path, marker: str) -> Iterator[Item]:
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        # a link to a folder above would never end
        real = os.path.realpath(current)
        if real in seen or marker in files:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted((f for f in folders if not f.startswith(".")), key=_natural_order)
        here = Path(current)
        videos = sorted((f for f in files if _has_suffix(f, VIDEO_SUFFIXES)), key=_natural_order)
        for file in videos:
            yield Item(_relative((here / file).with_suffix(""), root), here / file)
        # images beside videos are covers
        if not videos and any(_has_suffix(f, IMAGE_SUFFIXES) for f in files):
            yield Item(_relative(here, root), here, ())


def _unique_names(items: list[Item]) -> list[Item]:
    def suffixed(item: Item) -> Item:
        return replace(item, name=item.name + item.path.suffix) if item.images is None else item

    def hashed(item: Item) -> Item:
        key = "\0".join([str(item.path.absolute()), *(item.images or ())])
        return replace(item, name=f"{item.name}-{hashlib.sha256(os.fsencode(key)).hexdigest()[:8]}")

    for change in (suffixed, hashed):
        names = [item.name for item in items]
        above = {str(parent) for name in names for parent in Path(name).parents}
        counts = Counter(names)
        items = [change(item) if counts[item.name] > 1 or item.name in above else item for item in items]
    return items


def _relative(path: Path, root: Path) -> str:
    # the root itself is called by its own name
    return path.relative_to(root).as_posix() if path != root else path.absolute().name


def _stays_below(path: Path) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def _has_suffix(name: str, suffixes: frozenset[str] | set[str]) -> bool:
    return not os.path.basename(name).startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
