"""Reference predictors against formulas written out here, the tables against their numbers, the command end to end."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from avfast import __version__
from avfast import evaluate as program
from avfast.data.mmnist import MMNISTConfig
from avfast.errors import InputError
from avfast.evaluate import EvaluateConfig, evaluate
from avfast.files.settings import to_dict
from avfast.models.avmodel import ModelConfig
from avfast.models.base import Rollout
from avfast.scoring.metrics import MetricResult
from avfast.scoring.predictors import reference_predictors, score
from avfast.scoring.tables import TableInfo, default_frames, format_tables
from avfast.training.config import TrainConfig

K, P, H, W = 2, 3, 16, 20


class Clips(NamedTuple):
    frames: Tensor
    audio: Tensor
    flow: Tensor


def clips(count: int = 3, seed: int = 0) -> Clips:
    g = torch.Generator().manual_seed(seed)
    frames = torch.rand(count, K + P, 1, H, W, generator=g, dtype=torch.float64)
    flow = torch.randint(-2, 3, (count, K + P, 2, H, W), generator=g).double()
    flow[:, 0] = 0
    return Clips(frames, torch.zeros(count, K + P, 1, 4, 4), flow)


def shifted(image: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Backward warp of (H,W) by a whole-pixel flow (2,H,W), the edge repeated."""
    out = np.empty_like(image)
    for y in range(H):
        for x in range(W):
            source = y + int(flow[1, y, x]), x + int(flow[0, y, x])
            out[y, x] = image[min(max(source[0], 0), H - 1), min(max(source[1], 0), W - 1)]
    return out


def test_still_predictors() -> None:
    batch, mean = clips(), torch.full((1, H, W), 0.25)
    out = {name: predict(batch, K) for name, predict in reference_predictors(mean).items()}
    seen = batch.frames.numpy()[:, :K]
    for t in range(P):
        np.testing.assert_array_equal(out["black"].frames[:, t], 0)
        np.testing.assert_array_equal(out["repeat last frame"].frames[:, t], seen[:, -1])
        np.testing.assert_allclose(out["mean of the seen"].frames[:, t], seen.sum(1) / K, rtol=1e-15)
        np.testing.assert_array_equal(out["training-set mean image"].frames[:, t], 0.25)
    assert not out["repeat last frame"].flow.any()
    with_flow = {name for name, prediction in out.items() if prediction.flow is not None}
    assert with_flow == {"repeat last frame", "copy-last-flow"}


@pytest.mark.parametrize(("name", "oracle"), [("copy-last-flow", False), ("oracle-flow", True)])
def test_warping_predictors(name: str, oracle: bool) -> None:
    batch = clips()
    out = reference_predictors(torch.zeros(1, H, W))[name](batch, K)
    for b in range(len(batch.frames)):
        image = batch.frames[b, K - 1, 0].numpy()
        for t in range(P):
            flow = batch.flow[b, K + t if oracle else K - 1].numpy()
            image = shifted(image, flow)
            np.testing.assert_allclose(out.frames[b, t, 0], image, rtol=0, atol=1e-12)
            if not oracle:
                np.testing.assert_array_equal(out.flow[b, t], flow)


def test_no_predictor_looks_ahead() -> None:
    batch = clips()
    other = Clips(batch.frames.clone(), batch.audio, batch.flow.clone())
    other.frames[:, K:], other.flow[:, K:] = 0.5, 9.0
    predictors = reference_predictors(torch.zeros(1, H, W))
    for name in predictors.keys() - {"oracle-flow"}:
        torch.testing.assert_close(predictors[name](batch, K), predictors[name](other, K), rtol=0, atol=0)


def test_score_is_the_mean_over_all_clips() -> None:
    batches = [clips(3), clips(2, seed=1)]
    results = score(batches, reference_predictors(torch.zeros(1, H, W)), K)
    frames, flow = (torch.cat([getattr(b, name) for b in batches]).numpy() for name in ("frames", "flow"))
    assert {r.clips for r in results.values()} == {5}
    for t in range(P):
        pairs = [(clip[K - 1, 0], clip[K + t, 0]) for clip in frames]
        ssim = [structural_similarity(a, b, win_size=7, data_range=2) for a, b in pairs]
        psnr = [peak_signal_noise_ratio(b, a, data_range=1) for a, b in pairs]
        np.testing.assert_allclose(results["repeat last frame"].ssim[t], np.mean(ssim), rtol=1e-10)
        np.testing.assert_allclose(results["repeat last frame"].psnr[t], np.mean(psnr), rtol=1e-10)
        zero = np.hypot(flow[:, K + t, 0], flow[:, K + t, 1])
        np.testing.assert_allclose(results["repeat last frame"].aepe[t], zero.mean(), rtol=1e-10)
        copied = np.hypot(*np.moveaxis(flow[:, K + t] - flow[:, K - 1], 1, 0))
        np.testing.assert_allclose(results["copy-last-flow"].aepe[t], copied.mean(), rtol=1e-10)
    assert results["black"].aepe is None and results["oracle-flow"].aepe is None


def test_a_perfect_model() -> None:
    truth = lambda batch, k: Rollout(batch.frames[:, k:], batch.flow[:, k:])  # noqa: E731
    result = score([clips()], {"truth": truth}, K)["truth"]
    np.testing.assert_allclose(result.ssim, 1, rtol=1e-12)
    assert result.psnr == [60.0] * P and result.aepe == [0.0] * P and result.capped_share == 1.0


def test_score_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="nothing was scored"):
        score([], reference_predictors(torch.zeros(1, H, W)), K)
    short = lambda batch, k: Rollout(batch.frames[:, k + 1 :], None)  # noqa: E731
    with pytest.raises(ValueError, match=r"pred_frames has shape \(3, 2, 1, 16, 20\)"):
        score([clips()], {"short": short}, K)


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


def save(folder: Path, **arrays: np.ndarray) -> dict[str, str]:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return {name: str(folder / f"{name}.npy") for name in arrays}


def test_scoring_arrays(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (5, P, H, W), dtype=np.uint8)
    pred = (true / 255 * 0.8).astype(np.float32)
    paths = save(tmp_path, pred=pred, true=true)
    config = EvaluateConfig(**paths, context_frames=5, batch_size=2, out=str(tmp_path / "scores"))
    document = evaluate(config)
    ours = document["models"]["pred"]
    assert ours["clips"] == 5 and ours["aepe"] is None and document["frames"] == [6, 7, 8]
    for t in range(P):
        pairs = [(a.astype(np.float64), b / 255) for a, b in zip(pred[:, t], true[:, t], strict=True)]
        ssim = [structural_similarity(a, b, win_size=7, data_range=2) for a, b in pairs]
        # true frames as float32: 255 has no exact inverse
        np.testing.assert_allclose(ours["ssim"][t], np.mean(ssim), rtol=1e-5)
        psnr = [peak_signal_noise_ratio(b, a, data_range=1) for a, b in pairs]
        np.testing.assert_allclose(ours["psnr"][t], np.mean(psnr), rtol=1e-5)
    out = Path(document["out"])
    names = ["curves.png", "results.json", "sample_1.png", "sample_2.png", "table.csv", "table.md"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert json.loads((out / "results.json").read_text())["models"]["pred"] == ours
    assert (out / "table.md").read_text() == document["markdown"] and "Fr 8" in document["markdown"]
    # what is there is never overwritten, and (N,P,1,H,W) is the same data
    paths = save(tmp_path, pred=pred[:, :, None], true=true[:, :, None])
    again = evaluate(EvaluateConfig(**paths, batch_size=2, out=config.out))
    assert again["out"] == str(tmp_path / "scores-2") and again["models"]["pred"] == ours


GOOD = np.full((2, P, H, W), 0.5, np.float32)


@pytest.mark.parametrize(
    ("pred", "true", "message"),
    [
        (GOOD, GOOD[:, :2], r"pred has shape \(2, 3, 16, 20\), true \(2, 2, 16, 20\), expected the same"),
        (GOOD, GOOD[:, :, None], "expected the same"),
        (GOOD[0], GOOD[0], r"pred has shape \(3, 16, 20\), expected \(N, P, C, H, W\) or \(N, P, H, W\)"),
        (GOOD.astype(int), GOOD, "pred holds int64, expected float in"),
        (GOOD, GOOD * 255, r"true holds 127.5 in clip 0, frame 0 \(from 0\), expected \[0, 1\]"),
        (np.where(np.arange(P).reshape(P, 1, 1) == 1, np.nan, GOOD), GOOD, "pred holds nan in clip 0, frame 1"),
        (GOOD[..., :6, :], GOOD[..., :6, :], "expected clips of frames of 7x7 pixels or more"),
        (GOOD[:0], GOOD[:0], r"pred has shape \(0, 3, 16, 20\)"),
        (np.array([[[["a"]]]]), GOOD, "pred holds <U1"),
        (np.array([None]), GOOD, "pred is .*pred.npy, which cannot be read as a .npy array"),
    ],
)
def test_arrays_that_do_not_fit(pred: np.ndarray, true: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        evaluate(EvaluateConfig(**save(tmp_path, pred=pred, true=true), out=str(tmp_path / "scores")))
    assert "\n" not in str(caught.value) and not (tmp_path / "scores").exists()


def test_files_that_are_no_arrays(tmp_path: Path) -> None:
    true = save(tmp_path, true=GOOD)["true"]
    (tmp_path / "cut.npy").write_bytes((tmp_path / "true.npy").read_bytes()[:-100])
    (tmp_path / "text.npy").write_text("no")
    np.savez(tmp_path / "many.npz", GOOD)
    for name, message in (("cut.npy", "cannot be read"), ("text.npy", "cannot be read"), ("many.npz", "an archive")):
        with pytest.raises(InputError, match=message):
            evaluate(EvaluateConfig(pred=str(tmp_path / name), true=true))
    with pytest.raises(FileNotFoundError, match="none.npy"):
        evaluate(EvaluateConfig(pred=str(tmp_path / "none.npy"), true=true))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvaluateConfig(), "either --checkpoint PATH or --pred"),
        (EvaluateConfig(checkpoint=("a",), pred="p", true="t"), "either --checkpoint"),
        (EvaluateConfig(pred="p"), "--pred and --true go together"),
        (EvaluateConfig(checkpoint=("a",), context_frames=5), "context-frames goes with --pred"),
        (EvaluateConfig(checkpoint=("a",), batch_size=0), "batch-size is 0, expected at least 1"),
        (EvaluateConfig(checkpoint=("a",), clips=0), "clips is 0"),
        (EvaluateConfig(checkpoint=("a",), audio=("own", "own")), "audio is own own, expected every kind once"),
        (EvaluateConfig(checkpoint=("a",), audio=()), "audio is empty"),
        (EvaluateConfig(pred="p", true="t", audio=("silent",)), "audio goes with --checkpoint only"),
        (EvaluateConfig(checkpoint=("a",), device="tpu"), "device is 'tpu'"),
        (EvaluateConfig(checkpoint=("nowhere",)), "nowhere"),
    ],
)
def test_settings_that_do_not_fit(config: EvaluateConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two untrained runs (MME alone, MME + CAR) on a tiny data set, and one on another data set."""
    import yaml

    from avfast.models.avmodel import AVModel

    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    for seed, (name, refinement, data_seed) in enumerate(
        (("motion", "none", 0), ("full", "car", 0), ("other", "none", 1)), start=3
    ):
        data = MMNISTConfig(clip_frames=6, train_clips=8, val_clips=2, test_clips=5, data_seed=data_seed)
        model = ModelConfig(refinement=refinement, unet_width=4)
        config = TrainConfig(
            data=data,
            model=model,
            context_frames=K,
            pred_frames=P,
            eval_frames=P,
            seed=seed,
            data_cache=str(folder / "data"),
        )
        AVModel(model).save_pretrained(folder / name / "checkpoints" / "best")
        (folder / name / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    return folder


def test_scoring_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["--checkpoint", str(runs / "motion"), str(runs / "full"), "--batch-size", "2", "--clips", "5"])
    out = runs / "motion" / "eval"
    assert f"tables and pictures: {out}" in capsys.readouterr().out
    document = json.loads((out / "results.json").read_text())
    assert list(document["models"]) == ["motion/best", "full/best"] and document["clips"] == 5
    assert list(document["references"]) == list(reference_predictors(torch.zeros(1, 1, 1)))
    assert document["regenerated"] and document["context_frames"] == K and document["data_seed"] == 0
    assert document["training_seeds"] == {"motion/best": 3, "full/best": 4}
    # both have the same kind of motion, but weights of their own
    assert all(len(r["aepe"]) == P for r in document["models"].values())
    table = (out / "table.md").read_text()
    assert "; data seed 0; training seeds 3 (motion/best), 4 (full/best);" in table
    assert "zero flow" in table and "Not comparable with the published row" in table and "Fr 5" in table
    pictures = {f"sample_{m}_best_{i}.png" for m in ("motion", "full") for i in (1, 2)}
    pictures |= {f"samples_{m}_best.gif" for m in ("motion", "full")} | {"curves.png"}
    assert {p.name for p in out.iterdir()} == pictures | {"table.md", "table.csv", "results.json"}
    for name in pictures:
        assert Image.open(out / name).size[0] > 100


def test_scoring_with_other_sound(runs: Path) -> None:
    """Each row against a loop over single clips, with the sound exchanged here."""
    from avfast.models.avmodel import AVModel
    from avfast.scoring.metrics import VideoMetrics

    kinds = ("silent", "own", "shuffled", "shifted")
    config = EvaluateConfig(checkpoint=(str(runs / "full"),), samples=1, audio=kinds, shift=2, clips=4, batch_size=3)
    document = evaluate(config)
    names = ["full/best, silent sound", "full/best", "full/best, shuffled sound", "full/best, sound shifted by 2"]
    assert list(document["models"]) == names and document["sound"].keys() == set(kinds)
    assert list(document["references"]) == list(reference_predictors(torch.zeros(1, 1, 1)))
    assert document["training_seeds"] == dict.fromkeys(names, 4)
    for words in ("2 frames later and wrapped around (shifted)", "silence (silent)", "half the set further on (shuff"):
        assert words in document["markdown"]
    data = MMNISTConfig(clip_frames=6, train_clips=8, val_clips=2, test_clips=5)
    store = data.load("test", cache=runs / "data", flow_preset=TrainConfig().flow_preset)
    model = AVModel.from_pretrained(runs / "full" / "checkpoints" / "best")
    metrics = {name: VideoMetrics(P) for name in names}
    for i in range(4):
        batch = store.batch([i], [0], K + P)
        sounds = {
            names[0]: torch.zeros_like(batch.audio),
            names[1]: batch.audio,
            names[2]: store.batch([(2, 3, 0, 1)[i]], [0], K + P).audio,
            names[3]: batch.audio[:, [3, 4, 0, 1, 2]],
        }
        for name, audio in sounds.items():
            frames, flow = model.predict(batch.frames[:, :K], batch.flow[:, :K], audio)
            metrics[name].update(frames, batch.frames[:, K:], flow, batch.flow[:, K:])
    scores = {name: m.compute() for name, m in metrics.items()}
    assert len({tuple(r.aepe) for r in scores.values()}) == 4
    for name, result in scores.items():
        np.testing.assert_allclose(document["models"][name]["ssim"], result.ssim, rtol=1e-6)
        # a hundredth of what another sound changes
        np.testing.assert_allclose(document["models"][name]["aepe"], result.aepe, rtol=1e-6)
    out = Path(document["out"])
    stems = ("full_best_silent_sound", "full_best", "full_best_shuffled_sound", "full_best_sound_shifted_by_2")
    assert {p.name for p in out.glob("sample*")} == {
        f"{prefix}_{stem}{ending}" for stem in stems for prefix, ending in (("sample", "_1.png"), ("samples", ".gif"))
    }
    assert "silence (silent)" in (runs / "full" / "report.html").read_text()


def test_runs_are_scored_on_windows_from_the_first_frame(runs: Path) -> None:

    checkpoint = runs / "motion" / "checkpoints" / "best"
    document = evaluate(EvaluateConfig(checkpoint=(str(checkpoint),), samples=0, frames=(4,), batch_size=3))
    config = TrainConfig()
    data = MMNISTConfig(clip_frames=6, train_clips=8, val_clips=2, test_clips=5)
    frames = data.load("test", cache=runs / "data", flow_preset=config.flow_preset).frames[:, :, 0] / 255
    for t in range(P):
        want = np.mean([peak_signal_noise_ratio(c[K + t], np.zeros_like(c[0]), data_range=1) for c in frames])
        np.testing.assert_allclose(document["references"]["black"]["psnr"][t], want, rtol=1e-5)
    assert "Fr 4" in document["markdown"] and "Fr 3" not in document["markdown"]


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("motion", "other"), {}, "has data MMNISTConfig.*one table needs one data set"),
        (("motion", "motion/checkpoints/best"), {}, "gives a second row motion/best"),
        (("motion",), {"clips": 6}, "clips is 6, more than the 5 there are"),
        (("motion",), {"frames": (2,)}, "frames holds 2, expected numbers of predicted frames, 3 to 5"),
    ],
)
def test_runs_that_do_not_fit(runs: Path, names: tuple[str, ...], changes: dict, message: str) -> None:
    paths = tuple(str(runs / name) for name in names)
    with pytest.raises(InputError, match=message):
        evaluate(EvaluateConfig(checkpoint=paths, out=str(runs / "scores"), **changes))
    assert not (runs / "scores").exists()
