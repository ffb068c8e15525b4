"""The second half of `avfast prepare`: the clips of all videos become one clip store per split, and the index. When
index.json is there, the data set is finished (avfast.data.prepared shows the layout). It does not depend on how often
the work was interrupted, nor on how it was shared out. A video is in one split only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from avfast import __version__
from avfast.data import sound2sight
from avfast.data.base import SPLITS, Split
from avfast.data.preparation import CLIPS_AT_A_TIME, SOURCES, PreparationSettings, identify, source_folder, write_json
from avfast.data.prepared import DATASET_VERSION, INDEX, SETTINGS, file_digest, read_dataset_index
from avfast.data.store import DATASET_FORMAT, ClipStore, write_store
from avfast.errors import InputError
from avfast.files.result_folder import lock_folder, remove_folder, sweep
from avfast.media.inputs import Item
from avfast.ui.plots import ContactRow, save_contact_sheet

CONTACT_SHEET = "contact.png"
_SHEET_ROWS = 12


def split_sources(names: list[str], val_share: float, test_share: float) -> dict[str, Split]:
    """The split of every video, by the hash of its name alone: the order of the names means nothing. Of n videos
    round(share * n) go to validation and to test, one at least if the share is not 0 and there are enough: two videos
    are one for training and one for validation, and one is for training."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    splits: dict[str, Split] = dict.fromkeys(ranked, "train")
    taken = 0
    for split, share in (("val", val_share), ("test", test_share)):
        room = len(ranked) - taken - 1
        count = min(room, max(1, round(share * len(ranked)))) if share > 0 else 0
        splits |= dict.fromkeys(ranked[taken : taken + count], split)  # type: ignore[arg-type]
        taken += count
    return splits


def join_clips(
    out: Path, items: Sequence[Item], sources: dict[str, dict[str, Any]], settings: PreparationSettings
) -> None:
    """Join the clips of all items into a store per split, and write the index; then the folders of the videos go. One
    run at a time does this, the others return at once. sources: the content of every item's source.json, by its name.
    Raises InputError where no video can be used."""
    lock = lock_folder(out)
    if lock is None:
        return
    try:
        usable = [item for item in items if not sources[item.name]["reason"]]
        if not usable:
            # nothing is left that other settings could contradict
            _remove_leftovers(out)
            (out / SETTINGS).unlink(missing_ok=True)
            raise InputError(f"nothing could be done: {items[0].path}: {sources[items[0].name]['reason']}")
        if not (out / INDEX).exists():
            index = _write_stores(out, usable, sources, settings)
            unusable = [source for source in sources.values() if source["reason"]]
            index["quarantine"] = [{key: bad[key] for key in ("name", "file", "bytes", "reason")} for bad in unusable]
            _save_contact_sheet(out, index)
            write_json(out / INDEX, index)
        _remove_leftovers(out)
    finally:
        os.close(lock)


def check_finished(out: Path, items: Sequence[Item], settings: PreparationSettings) -> None:
    """Raise InputError where a finished data set was made of other videos than these."""
    index = read_dataset_index(out)
    known = {(s["name"], s["bytes"]) for s in index["sources"] + index["quarantine"]}
    wanted = {(item.name, identify(item, settings.layout)["bytes"]) for item in items}
    for name, _ in sorted(known ^ wanted):
        raise InputError(f"{out} is finished and its videos were others or have changed ({name}): choose another --out")
    _remove_leftovers(out)


def _splits(items: Sequence[Item], settings: PreparationSettings) -> dict[str, Split]:
    """The split of every usable video; Sound2Sight's sets say themselves what is for the test."""
    if settings.layout == "videos":
        return split_sources([item.name for item in items], settings.val_share, settings.test_share)
    test: dict[str, Split] = {item.name: "test" for item in items if sound2sight.is_test(item.path)}
    return split_sources([item.name for item in items if item.name not in test], settings.val_share, 0) | test


def _write_stores(
    out: Path, items: Sequence[Item], sources: dict[str, dict[str, Any]], settings: PreparationSettings
) -> dict[str, Any]:
    """Write the stores of the splits; the index without its quarantine."""
    splits, parameters = _splits(items, settings), settings.as_dict()
    listed, stores = [], {}
    for split in SPLITS:
        chosen = [item for item in items if splits[item.name] == split]
        # a store that a killed run has left is known by the videos in it
        content = json.dumps([(item.name, sources[item.name]["sha256"]) for item in chosen])
        own = parameters | {"split": split, "content": hashlib.sha256(content.encode()).hexdigest()}
        count = 0
        for item in chosen:
            source = sources[item.name]
            keys = ("name", "file", "bytes", "sha256", "fps", "clips")
            listed.append({"split": split, "first": count, **{key: source[key] for key in keys}})
            count += source["clips"]
        folder = out / split
        if chosen and not _is_written(folder, own):
            if folder.exists():
                remove_folder(folder)
            write_store(folder, count, _read_clips([source_folder(out, item) for item in chosen]), own)
        files = sorted(folder.iterdir()) if chosen else []
        hashes = {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files}
        stores[split] = {"clips": count, "sources": len(chosen), "files": hashes}
    return {
        "format": DATASET_FORMAT,
        "version": DATASET_VERSION,
        "versions": {"avfast": __version__, "av": av.__version__},
        "parameters": parameters,
        "splits": stores,
        "sources": listed,
    }


def _is_written(folder: Path, parameters: dict[str, Any]) -> bool:
    """Whether a run that was killed later has written this store."""
    try:
        return ClipStore.open(folder).parameters == parameters
    except InputError:
        return False


def _read_clips(folders: list[Path]) -> Iterator[dict[str, np.ndarray]]:
    """The clips of videos one after another, some at a time."""
    for folder in folders:
        arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        for first in range(0, len(arrays["frames"]), CLIPS_AT_A_TIME):
            yield {name: array[first : first + CLIPS_AT_A_TIME] for name, array in arrays.items()}


def _remove_leftovers(out: Path) -> None:
    """Remove what a finished data set does not need: the folders of the videos, and what killed runs have left."""
    shutil.rmtree(out / SOURCES, ignore_errors=True)
    sweep([out / INDEX])
    # temporary files; what else is hidden is somebody else's
    for name in (SETTINGS, INDEX, CONTACT_SHEET):
        for path in out.glob(f".{Path(name).stem}.*.tmp.*"):
            path.unlink(missing_ok=True)


def _save_contact_sheet(out: Path, index: dict[str, Any]) -> None:
    """A picture of the first clip of some videos of every split."""
    sources = index["sources"]
    rows = []
    for i in sorted({round(i) for i in np.linspace(0, len(sources) - 1, _SHEET_ROWS)}):
        source = sources[i]
        store = ClipStore.open(out / source["split"])
        batch = store.batch([source["first"]], [0], store.clip_frames)
        label = f"{source['name']}: {source['split']}, {source['clips']} clips, {source['fps']:.5g} fps"
        rows.append(ContactRow(label, *(part[0].numpy() for part in (batch.frames, batch.audio, batch.flow))))
    save_contact_sheet(out / CONTACT_SHEET, rows)
