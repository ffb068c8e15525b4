"""`avfast evaluate`: scores of arrays and of runs against loops over clips, files, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from avfast import evaluate as program
from avfast import from_pretrained
from avfast.data.mmnist import MMNISTConfig
from avfast.errors import InputError
from avfast.evaluate import EvaluateConfig, evaluate
from avfast.models import registry
from avfast.models.avmodel import AVModel, ModelConfig
from avfast.scoring.metrics import VideoMetrics
from avfast.scoring.predictors import reference_predictors
from avfast.training.config import TrainConfig

K, P, H, W = 2, 3, 16, 20
REFERENCES = [*reference_predictors(torch.zeros(1, 1, 1)), "physics, seen", "physics, seen and heard"]


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
def runs(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """Two untrained runs (MME alone, MME + CAR) on a tiny data set, and one on another data set."""
    folder = tmp_path_factory.mktemp("runs")
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
        make_run(folder / name, config)
    return folder


def test_scoring_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["--checkpoint", str(runs / "motion"), str(runs / "full"), "--batch-size", "2", "--clips", "5"])
    out = runs / "motion" / "eval"
    assert f"tables and pictures: {out}" in capsys.readouterr().out
    document = json.loads((out / "results.json").read_text())
    assert list(document["models"]) == ["motion/best", "full/best"] and document["clips"] == 5
    assert list(document["references"]) == REFERENCES
    assert document["regenerated"] and document["context_frames"] == K and document["data_seed"] == 0
    assert document["training_seeds"] == {"motion/best": 3, "full/best": 4}
    # both have the same kind of motion, but weights of their own
    assert all(len(r["aepe"]) == P for r in document["models"].values())
    table = (out / "table.md").read_text()
    assert "; data seed 0; training seeds 3 (motion/best), 4 (full/best);" in table
    rows = document["models"] | document["references"]
    assert all(len(r["position_error"]) == P for r in rows.values()) and "Position ↓ Fr 5" in table
    assert rows["physics, seen and heard"]["mean_position_error"] < 0.5 < rows["black"]["mean_position_error"]
    assert "zero flow" in table and "Not comparable with the published row" in table and "Fr 5" in table
    pictures = {f"sample_{m}_best_{i}.png" for m in ("motion", "full") for i in (1, 2)}
    pictures |= {f"samples_{m}_best.gif" for m in ("motion", "full")} | {"curves.png"}
    assert {p.name for p in out.iterdir()} == pictures | {"table.md", "table.csv", "results.json"}
    for name in pictures:
        assert Image.open(out / name).size[0] > 100


def test_models_that_come_with_avfast_are_scored_on_the_data_of_the_others(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # the run on other data is the one that is shipped
    (tmp_path / "weights").mkdir()
    shutil.copytree(runs / "other", tmp_path / "weights" / "small")
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path / "weights")
    monkeypatch.chdir(tmp_path)
    document = evaluate(EvaluateConfig(checkpoint=("small", str(runs / "motion")), data_cache=str(runs / "data")))
    assert list(document["models"]) == ["small/best", "motion/best"] and document["data_seed"] == 0
    assert document["out"] == "eval" and Path("eval", "table.md").exists()
    alone = evaluate(EvaluateConfig(checkpoint=("small",), data_cache=str(runs / "data"), out="alone"))
    assert alone["data_seed"] == 1

    model, expected = from_pretrained("small"), AVModel.from_pretrained(runs / "other" / "checkpoints" / "best")
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    with pytest.raises(InputError, match="name is 'smal', expected a checkpoint folder or one of small$"):
        from_pretrained("smal")
    # a folder of the user's is what a name means
    shutil.copytree(runs / "full" / "checkpoints" / "best", tmp_path / "small")
    assert from_pretrained("small").settings == ModelConfig(unet_width=4)


def test_scoring_with_other_sound(runs: Path) -> None:
    """Each row against a loop over single clips, with the sound exchanged here."""
    kinds = ("silent", "own", "shuffled", "shifted")
    config = EvaluateConfig(checkpoint=(str(runs / "full"),), samples=1, audio=kinds, shift=2, clips=4, batch_size=3)
    document = evaluate(config)
    names = ["full/best, silent sound", "full/best", "full/best, shuffled sound", "full/best, sound shifted by 2"]
    assert list(document["models"]) == names and document["sound"].keys() == set(kinds)
    assert list(document["references"]) == REFERENCES
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


def test_references_hear_the_clips_own_sound(runs: Path) -> None:
    checkpoint, scores = str(runs / "motion"), str(runs / "heard")
    own, silent = (
        evaluate(EvaluateConfig(checkpoint=(checkpoint,), samples=0, audio=(kind,), out=scores))
        for kind in ("own", "silent")
    )
    assert own["references"] == silent["references"] and list(silent["models"]) == ["motion/best, silent sound"]


def test_two_digits_have_no_position(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    data = MMNISTConfig(num_digits=2, clip_frames=4, train_clips=2, val_clips=1, test_clips=2)
    lengths = {"context_frames": 2, "pred_frames": 2, "eval_frames": 2, "batch_size": 2}
    model = ModelConfig(refinement="none", convlstm_layers=1)
    run = make_run(tmp_path / "run", TrainConfig(data=data, model=model, **lengths, data_cache=str(tmp_path / "data")))
    document = evaluate(EvaluateConfig(checkpoint=(str(run),), samples=0))
    assert list(document["references"]) == REFERENCES[:-2] and "Position" not in document["markdown"]
    assert all(r["position_error"] is None for r in document["references"].values())
    assert "position" not in (Path(document["out"]) / "table.csv").read_text()


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
