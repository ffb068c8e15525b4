"""Reference predictors against formulas written out here, and the scorer against loops over clips."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from avfast.models.base import Rollout
from avfast.scoring.predictors import reference_predictors, score

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
