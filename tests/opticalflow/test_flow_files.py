"""Flow in files: .flo against OpenCV's reader and writer, 8 bits and back."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from avfast.errors import InputError
from avfast.opticalflow.flow_files import bytes_to_flow, flow_to_bytes, read_flo, write_flo


def test_eight_bits_and_back() -> None:
    flow = np.concatenate([np.linspace(-25, 25, 1001), [0.0]]).astype(np.float32)
    levels = flow_to_bytes(flow, 20)
    assert (levels[0], levels[1000], levels[1001]) == (0, 255, 128)
    back = bytes_to_flow(levels, 20)
    inside = np.abs(flow) <= 20
    assert np.abs(back - flow)[inside].max() <= 20 / 255 * 1.0001 and set(np.abs(back[~inside])) == {20.0}
    np.testing.assert_array_equal(flow_to_bytes(back, 20), levels)


def test_flo_files(tmp_path: Path) -> None:
    flow = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    write_flo(tmp_path / "a.flo", flow)
    assert (tmp_path / "a.flo").stat().st_size == 12 + 8 * 15
    np.testing.assert_array_equal(cv2.readOpticalFlow(str(tmp_path / "a.flo")).transpose(2, 0, 1), flow)
    cv2.writeOpticalFlow(str(tmp_path / "b.flo"), flow.transpose(1, 2, 0))
    np.testing.assert_array_equal(read_flo(tmp_path / "b.flo"), flow)
    (tmp_path / "cut.flo").write_bytes((tmp_path / "a.flo").read_bytes()[:-1])
    (tmp_path / "text.flo").write_text("no")
    (tmp_path / "text.flo.xz").write_text("no")
    for name, reason in (("cut.flo", "too few"), ("text.flo", "not a .flo"), ("text.flo.xz", "cannot be decompressed")):
        with pytest.raises(InputError, match=reason):
            read_flo(tmp_path / name)
    with pytest.raises(ValueError, match=r"\(5, 3\), expected \(2, H, W\)"):
        write_flo(tmp_path / "c.flo", flow[0].T)
