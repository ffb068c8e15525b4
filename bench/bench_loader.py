"""Random windows out of a prepared data set: memory maps against the same arrays in HDF5.

Both give the same batch, as stored: frames uint8, flow float16, waveform int16. HDF5 is h5py's, contiguous and without
compression, its fastest for windows. The files are in the page cache, as they are after a first epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from avfast.data.store import ClipStore, write_store

h5py = pytest.importorskip("h5py")

CLIPS, FRAMES, SIDE, SAMPLES, BATCH = 60, 90, 64, 735, 32
SPECTROGRAM = {"sample_rate": 22_050, "samples_per_frame": SAMPLES, "n_fft": 88, "hop": 44, "scale": 16.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    """Clips of the length of AudioSet-Drums, of noise: 160 MB."""
    rng = np.random.default_rng(0)

    def chunks() -> Any:
        for _ in range(0, CLIPS, 10):
            yield {
                "frames": rng.integers(0, 256, (10, FRAMES, 3, SIDE, SIDE), np.uint8),
                "waveform": rng.integers(-9000, 9000, (10, FRAMES * SAMPLES)).astype(np.int16),
                "flow": rng.standard_normal((10, FRAMES, 2, SIDE, SIDE), np.float32).astype(np.float16),
            }

    folder = tmp_path_factory.mktemp("loader") / "set"
    return write_store(folder, CLIPS, chunks(), {"spectrogram": SPECTROGRAM, "flow": {"preset": "fast"}})


@pytest.fixture(scope="module")
def hdf5(store: ClipStore) -> Any:
    with h5py.File(store.folder / "set.h5", "w") as file:
        for name in ("frames", "waveform", "flow"):
            file[name] = getattr(store, name)
    return h5py.File(store.folder / "set.h5")


@pytest.mark.parametrize("length", [30, 45])
def bench_windows(length: int, store: ClipStore, hdf5: Any, compare: Callable[..., dict[str, Any]]) -> None:
    rng = np.random.default_rng(1)
    keys = [(rng.integers(CLIPS, size=BATCH), rng.integers(FRAMES - length + 1, size=BATCH)) for _ in range(4)]

    def from_hdf5(clips: np.ndarray, starts: np.ndarray) -> list[torch.Tensor]:
        def take(name: str, unit: int = 1) -> torch.Tensor:
            data = hdf5[name]
            return torch.from_numpy(
                np.stack([data[c, s * unit : (s + length) * unit] for c, s in zip(clips, starts, strict=True)])
            )

        return [take("frames"), take("flow"), take("waveform", SAMPLES)]

    for key in keys:
        ours, theirs = store.gather(*key, length), from_hdf5(*key)
        for a, b in zip((ours["frames"], ours["flow"], ours["waveform"]), theirs, strict=True):
            assert torch.equal(a, b)
    size = sum(part.nbytes for part in theirs)
    cached = store.cached("ram")
    row = compare(
        f"loader: {BATCH} windows of {length} frames",
        lambda: [store.gather(*key, length) for key in keys],
        {
            "hdf5": lambda: [from_hdf5(*key) for key in keys],
            "ram": lambda: [cached.gather(*key, length) for key in keys],
        },
        rounds=9,
    )
    row["windows_per_s"] = len(keys) * BATCH / row["ours_s"]
    row["gb_per_s"] = len(keys) * size / row["ours_s"] / 1e9


def bench_converted(store: ClipStore, compare: Callable[..., dict[str, Any]]) -> None:
    """What gathering costs beside the conversion to float and the spectrograms."""
    clips, starts = np.arange(BATCH), np.arange(BATCH)
    windows = store.gather(clips, starts, 45)
    row = compare(
        "loader: a whole batch of 45 frames",
        lambda: store.batch(clips, starts, 45),
        {"gather": lambda: store.gather(clips, starts, 45), "convert": lambda: store.convert(windows)},
        rounds=9,
    )
    row["windows_per_s"] = BATCH / row["ours_s"]
