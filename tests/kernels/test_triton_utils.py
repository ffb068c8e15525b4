"""The tiles into which kernels cut a map."""

from __future__ import annotations

import pytest


def test_tiles_cover_an_image_without_idle_threads() -> None:
    tiles = pytest.importorskip("avfast.kernels.triton_utils").tiles.__wrapped__
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("avfast.kernels.triton_utils.INTERPRETED", False)
    try:
        for sizes, grid, columns in (
            ((16, 48, 48), (3, 3, 16), 16),
            ((16, 64, 64), (1, 16, 16), 64),
            ((128, 96, 96), (3, 12, 128), 32),
            ((8, 1080, 1920), (15, 540, 8), 128),
            ((70_000, 1, 1), (70_000, 1, 1), 1),
            ((1, 1_000_000, 1), (1, 3907, 1), 1),
            ((1, 1, 1_000_000), (7813, 1, 1), 128),
            ((2, 4_000_000, 100), (25, 62_500, 2), 4),
        ):
            found, shape = tiles(*sizes)
            assert found == grid and shape["COLUMNS"] == columns and shape["ROWS"] * columns == 256
            assert shape["IMAGES"] == (0 if sizes[0] > 65_535 else 2) and max(found[1:]) <= 65_535
    finally:
        monkeypatch.undo()
