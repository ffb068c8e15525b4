"""Any data set of the registry can be trained and scored on: one that is defined here, of frames that brighten."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from avfast.cli.parser import parse
from avfast.data.base import SPLITS, DataSettings, Split
from avfast.data.film_clips import ClipSettings
from avfast.data.registry import DATASETS
from avfast.data.store import ClipStore, write_store
from avfast.errors import InputError
from avfast.evaluate import EvaluateConfig, evaluate
from avfast.train import train
from avfast.training.config import PRESETS, TrainConfig, flag_choices
from avfast.training.runs import input_spec, load_run_config, resolve_checkpoint

FRAMES, CLIPS = 5, ClipSettings(fps=10, size=(32, 32), channels=1, sample_rate=4400, n_fft=44, hop=22)


@dataclass(frozen=True)
class Ramps(DataSettings):
    """Grey clips that brighten from frame to frame, with noise for sound."""

    name: ClassVar[str] = "ramps"
    title: ClassVar[str] = "Brightening ramps"

    brighter_by: int = 5
    """Levels from one frame to the next."""

    def check(self, frames: int, batch_size: int) -> None:
        if frames > FRAMES:
            raise InputError(f"the run wants {frames} frames, and clips of ramps have {FRAMES}")

    def load(self, split: Split, *, cache: str, flow_preset: str, quiet: bool = False) -> ClipStore:
        folder = Path(cache) / f"ramps-{split}-{self.brighter_by}"
        if folder.exists():
            return ClipStore.open(folder)
        random = np.random.default_rng(SPLITS.index(split))
        frames = random.integers(0, 99, (4, 1, 1, 32, 32)) + self.brighter_by * np.arange(FRAMES)[:, None, None, None]
        waveform = random.integers(-9000, 9000, (4, FRAMES * CLIPS.samples_per_frame))
        parameters = {"split": split, "spectrogram": asdict(CLIPS.spectrogram), "flow": {"preset": flow_preset}}
        arrays = {"frames": frames.astype(np.uint8), "waveform": waveform.astype(np.int16)}
        return write_store(folder, 4, [arrays], parameters)

    def clip_settings(self, read_parameters: Callable[[], Mapping[str, Any]], image_channels: int) -> ClipSettings:
        assert read_parameters()["split"] == "train" and image_channels == 1
        return CLIPS


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "ramps", Ramps)


def parsed(*line: str) -> TrainConfig:
    return parse(TrainConfig, prog="avfast train", argv=[*line], presets=PRESETS, choices=flag_choices())


def test_the_command_line_has_its_settings(tmp_path: Path) -> None:
    assert parsed("--dataset", "ramps").data == Ramps()
    assert parsed("--dataset", "ramps", "--brighter-by", "7").data == Ramps(7)
    (tmp_path / "a.yaml").write_text("data: {name: ramps, brighter_by: 9}")
    assert parsed("--config", str(tmp_path / "a.yaml")).data == Ramps(9)
    with pytest.raises(InputError, match="^unknown argument '--clip-frames'"):
        parsed("--dataset", "ramps", "--clip-frames", "9")
    with pytest.raises(
        InputError, match=r"^dataset is 'ramp' \(did you mean 'ramps'\?\), expected one of mmnist, clips"
    ):
        parsed("--dataset", "ramp")


def test_a_run_on_it_is_trained_and_scored(tmp_path: Path) -> None:
    config = parsed(
        *("--dataset", "ramps", "--brighter-by", "7", "--refinement", "none", "--convlstm-layers", "1"),
        *("--context-frames", "2", "--pred-frames", "3", "--eval-frames", "3", "--batch-size", "2"),
        *("--max-steps", "1", "--bn-recalibrate", "1", "--flow-preset", "fast", "--device", "cpu"),
        *("--data-cache", str(tmp_path / "data"), "--output-dir", str(tmp_path / "runs")),
    )
    folder = train(config)
    assert folder == tmp_path / "runs" / "ramps-run"
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["ramps-train-7", "ramps-val-7"]
    assert json.loads((folder / "data.json").read_text())["split"] == "train"
    checkpoint = resolve_checkpoint(folder)
    run = load_run_config(checkpoint)
    assert run == config and input_spec(checkpoint, run).clips == CLIPS

    document = evaluate(EvaluateConfig(checkpoint=(str(folder),), samples=0, device="cpu"))
    assert (tmp_path / "data" / "ramps-test-7").exists()
    assert "Brightening ramps, test split" in document["markdown"] and "data seed" not in document["markdown"]
    assert document["data_seed"] is None and not document["regenerated"]
    # frame K repeated is 7, 14, 21 levels too dark
    want = [-20 * np.log10(7 * step / 255) for step in (1, 2, 3)]
    np.testing.assert_allclose(document["references"]["repeat last frame"]["psnr"], want, rtol=1e-5)
    with pytest.raises(
        InputError, match="^data is elsewhere, but the data set ramps is generated and lies in no folder"
    ):
        evaluate(EvaluateConfig(checkpoint=(str(folder),), data="elsewhere", device="cpu"))


def test_settings_that_do_not_fit_it_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = parsed(
        "--dataset", "ramps", "--output-dir", str(tmp_path / "runs"), "--data-cache", str(tmp_path / "data")
    )
    with pytest.raises(InputError, match="^the run wants 25 frames, and clips of ramps have 5$"):
        train(config)
    assert not list(tmp_path.iterdir())
