"""The tables against their numbers, as text, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace

import pytest

from avfast import __version__
from avfast.scoring.metrics import MetricResult
from avfast.scoring.tables import TableInfo, default_frames, format_tables


def test_columns_of_the_paper() -> None:
    assert default_frames(5, 20) == (6, 15, 25)
    assert default_frames(15, 30) == (16, 30, 45)
    assert default_frames(5, 1) == (6,) and default_frames(5, 2) == (6, 7) and default_frames(5, 15) == (6, 13, 20)


def result(ssim: float, psnr: float, aepe: float | None, clips: int = 7) -> MetricResult:
    flow = None if aepe is None else [aepe, aepe + 0.01, aepe + 0.02, aepe + 0.06]
    return MetricResult(
        "paper", clips, [ssim, ssim, ssim - 0.1, ssim - 0.2], [psnr, psnr, psnr, psnr - 4], 0.25, 15.5, flow
    )


MODELS = {"run-a/best": result(0.9, 20.0, 0.04), "run-b/last": result(0.8, 21.0, 0.05)}

REFERENCES = {"black": result(0.95, 30.0, None), "repeat last frame": result(0.5, 10.0, 0.01)}

INFO = TableInfo(
    context_frames=5,
    frames=(6, 9),
    source="made data",
    data_seed=3,
    training_seeds={"run-a/best": 8, "run-b/last": 9},
    commit="abc123",
    flow_preset="p",
    regenerated=True,
)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown() -> None:
    quality, footer, motion, motion_footer = format_tables(MODELS, REFERENCES, INFO).markdown.strip().split("\n\n")
    assert [cells(line) for i, line in enumerate(quality.split("\n")) if i != 1] == [
        ["Method", "SSIM ↑ Fr 6", "SSIM ↑ Fr 9", "SSIM ↑ Mean", "PSNR ↑ Fr 6", "PSNR ↑ Fr 9", "PSNR ↑ Mean"]
        + ["Capped %", "Pooled PSNR ↑"],
        ["run-a/best", "**0.9000**", "**0.7000**", "**0.8250**", "20.00", "16.00", "19.00", "25.0", "**15.50**"],
        ["run-b/last", "0.8000", "0.6000", "0.7250", "**21.00**", "**17.00**", "**20.00**", "25.0", "**15.50**"],
        ["*reference*", *[""] * 8],
        ["black", "0.9500", "0.7500", "0.8750", "30.00", "26.00", "29.00", "25.0", "15.50"],
        ["repeat last frame", "0.5000", "0.3000", "0.4250", "10.00", "6.00", "9.00", "25.0", "15.50"],
    ]
    assert len({len(line) for line in quality.split("\n")}) == 1
    assert [cells(line) for i, line in enumerate(motion.split("\n")) if i != 1] == [
        ["Method", "AEPE ↓ Fr 6", "AEPE ↓ Fr 9", "AEPE ↓ Mean"],
        ["run-a/best", "**4.00**", "**10.00**", "**6.25**"],
        ["run-b/last", "5.00", "11.00", "7.25"],
        ["*reference*", "", "", ""],
        ["zero flow", "1.00", "7.00", "3.25"],
    ]
    for text in (footer, motion_footer):
        for part in ("7 clips", "made data", "commit abc123", "`p`", "Not comparable with the published row"):
            assert part in text
        assert "; data seed 3; training seeds 8 (run-a/best), 9 (run-b/last); commit" in text
    assert "Protocol `paper`" in footer and "data range 2 (inferred" in footer and "10^-2" in motion_footer


def test_footer_of_runs_with_one_training_seed() -> None:
    info = replace(INFO, training_seeds={"run-a/best": 3, "run-b/last": 3})
    assert "; data seed 3; training seed 3; commit" in format_tables(MODELS, REFERENCES, info).markdown


def test_scores_that_are_not_finite_are_null_in_json() -> None:
    models = {"bad": result(math.nan, 20.0, math.inf), **MODELS}
    tables = format_tables(models, REFERENCES, INFO)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    document = json.loads(tables.json, parse_constant=refuse)
    assert document["models"]["bad"]["ssim"] == [None] * 4 == document["models"]["bad"]["aepe"]
    assert document["models"]["bad"]["psnr"] == [20.0, 20.0, 20.0, 16.0]
    assert document["models"]["run-a/best"] == MODELS["run-a/best"].as_dict()
    row = next(csv.DictReader(io.StringIO(tables.csv)))
    assert (row["ssim_mean"], row["aepe_px_mean"]) == ("nan", "inf")


def test_footer_of_other_data() -> None:
    info = TableInfo(context_frames=5, frames=(6,), source="p.npy")
    tables = format_tables({}, {"black": result(0.5, 10.0, None)}, info).markdown
    assert f"version {__version__}" in tables and "AEPE" not in tables and "*reference*" not in tables
    assert not re.search("seed|commit|preset|published", tables)


def test_csv_and_json_hold_every_number() -> None:
    tables = format_tables(MODELS, REFERENCES, INFO)
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(tables.csv))}
    assert list(rows) == [*MODELS, *REFERENCES]
    for name, r in (MODELS | REFERENCES).items():
        row = rows[name]
        assert row["kind"] == ("model" if name in MODELS else "reference")
        assert [float(row[f"ssim_{c}"]) for c in ("fr6", "fr9", "mean")] == [r.ssim[0], r.ssim[3], r.mean_ssim]
        assert [float(row[f"psnr_{c}"]) for c in ("fr6", "fr9", "mean")] == [r.psnr[0], r.psnr[3], r.mean_psnr]
        assert row["aepe_px_mean"] == ("" if r.aepe is None else str(r.mean_aepe))
        assert (row["clips"], row["data_seed"], row["commit"], row["protocol"]) == ("7", "3", "abc123", "paper")
    assert [row["training_seed"] for row in rows.values()] == ["8", "9", "", ""]
    document = json.loads(tables.json)
    assert document["data_seed"] == 3 and document["training_seeds"] == {"run-a/best": 8, "run-b/last": 9}
    assert document["models"]["run-a/best"] == MODELS["run-a/best"].as_dict()
    assert document["references"].keys() == REFERENCES.keys() and document["frames"] == [6, 9]


def test_position_errors() -> None:
    models = {n: replace(r, position_error=[1.0, 2.0, 3.0, 4.0 + i]) for i, (n, r) in enumerate(MODELS.items())}
    references = {n: replace(r, position_error=[0.5, 0.5, 0.5, 0.25]) for n, r in REFERENCES.items()}
    tables = format_tables(models, references, INFO)
    _, _, table, footer, *_ = tables.markdown.split("\n\n")
    assert [cells(line) for i, line in enumerate(table.split("\n")) if i != 1] == [
        ["Method", "Position ↓ Fr 6", "Position ↓ Fr 9", "Position ↓ Mean"],
        ["run-a/best", "**1.00**", "**4.00**", "**2.50**"],
        ["run-b/last", "**1.00**", "5.00", "2.75"],
        ["*reference*", "", "", ""],
        ["black", "0.50", "0.25", "0.44"],
        ["repeat last frame", "0.50", "0.25", "0.44"],
    ]
    assert "pixels" in footer and "a black frame counts as the frame's middle" in footer and "7 clips" in footer
    row = list(csv.DictReader(io.StringIO(tables.csv)))[1]
    assert [row[f"position_error_px_{c}"] for c in ("fr6", "fr9", "mean")] == ["1.0", "5.0", "2.75"]
    assert row["aepe_px_fr6"] == "0.05"
    assert json.loads(tables.json)["models"]["run-b/last"]["position_error"] == [1, 2, 3, 5]
    without = format_tables(MODELS, REFERENCES, INFO)
    assert "Position" not in without.markdown and "position" not in without.csv
    assert json.loads(without.json)["models"]["run-b/last"]["position_error"] is None


@pytest.mark.parametrize(
    ("models", "frames", "message"),
    [
        (MODELS, (5,), "frames holds 5, expected numbers from 6 to 9"),
        (MODELS, (6, 10), "frames holds 10"),
        ({"other": result(0.9, 20.0, None, clips=8)}, (6,), "one protocol, clip count and length"),
    ],
)
def test_tables_that_make_no_sense(models: dict[str, MetricResult], frames: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_tables(models, REFERENCES, TableInfo(context_frames=5, frames=frames, source=""))
