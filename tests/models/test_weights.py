"""The models that come with the package predict, from the package alone."""

from __future__ import annotations

import pytest
import torch

from avfast import from_pretrained
from avfast.models.registry import WEIGHTS
from avfast.scoring.metrics import VideoMetrics
from avfast.scoring.predictors import black
from avfast.training.runs import load_run_config, resolve_checkpoint

NAMES = sorted(path.name for path in WEIGHTS.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_beats_an_empty_frame_at_every_horizon(name: str, tmp_path) -> None:
    config = load_run_config(resolve_checkpoint(name))
    # drawn digits, which it has never seen
    store = type(config.data)(val_clips=24, train_clips=1, test_clips=1).load(
        "val", cache=tmp_path, flow_preset=config.flow_preset, quiet=True
    )
    k, length = config.context_frames, config.context_frames + config.eval_frames
    batch = store.batch(list(range(24)), [0] * 24, length)
    rollout = from_pretrained(name).predict(batch.frames[:, :k], batch.flow[:, :k], batch.audio)
    scores = []
    for frames in (rollout.frames, black(batch, k).frames):
        metrics = VideoMetrics(config.eval_frames)
        metrics.update(frames, batch.frames[:, k:])
        scores.append(metrics.compute())
    model, empty = scores
    assert all(a > b for a, b in zip(model.ssim, empty.ssim, strict=True))
    assert all(a > b for a, b in zip(model.psnr, empty.psnr, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_its_folder_is_whole_and_small(name: str) -> None:
    files = {
        path.relative_to(WEIGHTS / name).as_posix(): path for path in (WEIGHTS / name).rglob("*") if path.is_file()
    }
    best = "checkpoints/best"
    assert set(files) == {"README.md", "config.yaml", "data.json", f"{best}/config.json", f"{best}/model.safetensors"}
    assert sum(path.stat().st_size for path in files.values()) < 25e6
    assert from_pretrained(name).state_dict()["mme.decoder.last.weight"].dtype == torch.float32
