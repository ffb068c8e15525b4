"""The data set of a run: a split of what avfast generates, or of what `avfast prepare` has made of videos.

D/
    prepare.json                 the settings, written first
    index.json                   splits, sources, hashes, files that were not used; written last
    train/ val/ test/            a clip store each (avfast.data.store)
    contact.png                  some clips to look at
    sources/<name>/              while the set is made: the clips of one video"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from avfast.data.base import SPLITS, DataSettings, Split
from avfast.data.film_clips import ClipSettings
from avfast.data.store import DATASET_FORMAT, ClipStore, read_index
from avfast.errors import InputError

DATASET_VERSION = 1
"""Raised whenever a data set prepared before could no longer be read."""
SETTINGS, INDEX = "prepare.json", "index.json"


def read_dataset_index(folder: str | Path) -> dict[str, Any]:
    """The index of a finished data set. Raises InputError, one line, for a folder that holds none, or one that is not
    finished, damaged, or of another version."""
    folder = Path(folder)
    if not (folder / INDEX).exists() and (folder / SETTINGS).exists():
        raise InputError(f"{folder}: this data set is not finished yet: run avfast prepare again")
    index = read_index(folder, DATASET_FORMAT, DATASET_VERSION)
    missing = {"parameters", "splits", "sources", "quarantine"} - index.keys()
    if missing:
        raise InputError(f"{folder}: {INDEX} is damaged, {', '.join(sorted(missing))} are missing")
    return index


def open_split(folder: str | Path, split: Split) -> ClipStore:
    """One split of a prepared data set. Raises InputError as `read_dataset_index` does, and for an empty split."""
    folder = Path(folder)
    index = read_dataset_index(folder)
    if not index["splits"][split]["clips"]:
        raise InputError(f"{folder}: its {split} split is empty, too few videos could be used")
    return ClipStore.open(folder / split)


def verify_dataset(folder: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What is wrong with a prepared data set, a line each: files that are missing, of another size or content than the
    index says, or whose arrays do not fit. Raises InputError as `read_dataset_index` does."""
    folder = Path(folder)
    index = read_dataset_index(folder)
    wrong = []
    files = [(s, name, said) for s in SPLITS for name, said in index["splits"][s]["files"].items()]
    for done, (split, name, said) in enumerate(files, start=1):
        path = folder / split / name
        try:
            size = path.stat().st_size
            if size != said["bytes"]:
                wrong.append(f"{path}: {size} bytes, expected {said['bytes']}")
            elif file_digest(path) != said["sha256"]:
                wrong.append(f"{path}: its content has changed (SHA-256)")
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
        progress(done, len(files))
    for split in SPLITS:
        said = index["splits"][split]["clips"]
        counted = sum(source["clips"] for source in index["sources"] if source["split"] == split)
        try:
            found = len(open_split(folder, split)) if said else 0
            if (found, counted) != (said, said):
                wrong.append(f"{folder / split}: {found} clips, {counted} from its sources, expected {said}")
        except InputError as error:
            wrong.append(str(error))
    return wrong


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class ClipsConfig(DataSettings):
    """A data set that `avfast prepare` has made of somebody's videos."""

    name: ClassVar[str] = "clips"

    data: str | None = None
    """Its folder."""

    @property
    def title(self) -> str:
        return Path(self._folder()).absolute().name

    def check(self, frames: int, batch_size: int) -> None:
        self._folder()

    def load(self, split: Split, *, cache: str, flow_preset: str, quiet: bool = False) -> ClipStore:
        return open_split(self._folder(), split)

    def clip_settings(self, read_parameters: Callable[[], Mapping[str, Any]], image_channels: int) -> ClipSettings:
        parameters = read_parameters()
        if parameters["layout"] != "videos":
            raise InputError(f"the model was trained on the ready-made spectrograms of layout {parameters['layout']}")
        settings = {field.name: parameters[field.name] for field in dataclasses.fields(ClipSettings)}
        return ClipSettings(**{**settings, "size": tuple(settings["size"])})

    def in_folder(self, folder: str) -> ClipsConfig:
        return dataclasses.replace(self, data=folder)

    def _folder(self) -> str:
        if self.data is None:
            raise InputError("--data is missing, expected the folder of a data set with --dataset clips")
        return self.data
