"""Predictors that need no training, models as predictors, and the scorer.

A predictor is a function of (batch, K) that sees what it likes of the batch and predicts frames K+1..T. Every table has
the reference predictors beside the models, because absolute numbers depend on the data: a black frame scores an SSIM of
0.77 on 48x48 MovingMNIST."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from avfast.data.base import FramePredictor
from avfast.data.store import Batch
from avfast.kernels import backward_warp
from avfast.models.base import Rollout, VideoModel
from avfast.scoring.metrics import MetricResult, ProtocolName, VideoMetrics

if TYPE_CHECKING:
    from accelerate import Accelerator

Predictor = Callable[[Batch, int], Rollout]
"""(batch of T frames, K) -> frames K+1..T in [0,1] and their flow, or None for a predictor without flow."""


def black(batch: Batch, k: int) -> Rollout:
    """Nothing at all."""
    return Rollout(torch.zeros_like(batch.frames[:, k:]), None)


def repeat_last(batch: Batch, k: int) -> Rollout:
    """V_K for ever, which is the warp by a zero flow."""
    return Rollout(batch.frames[:, k - 1 : k].expand_as(batch.frames[:, k:]), torch.zeros_like(batch.flow[:, k:]))


def mean_of_seen(batch: Batch, k: int) -> Rollout:
    """The mean of V_1..V_K."""
    return Rollout(batch.frames[:, :k].mean(1, keepdim=True).expand_as(batch.frames[:, k:]), None)


def copy_last_flow(batch: Batch, k: int) -> Rollout:
    """F_K, the last flow that is seen, applied to V_K again and again."""
    flow = batch.flow[:, k - 1 : k].expand_as(batch.flow[:, k:])
    return Rollout(_warp_on(batch.frames[:, k - 1], flow), flow)


def oracle_flow(batch: Batch, k: int) -> Rollout:
    """The true flow warping V_K on and on: what warping alone can reach. Its flow is the truth, so it is not scored."""
    return Rollout(_warp_on(batch.frames[:, k - 1], batch.flow[:, k:]), None)


def model_predictor(model: VideoModel) -> Predictor:
    """The model's free-running prediction from K frames, their flow and the whole sound."""

    def predict(batch: Batch, k: int) -> Rollout:
        return model.predict(batch.frames[:, :k], batch.flow[:, :k], model.sound(batch))

    return predict


def reference_predictors(
    training_mean: Tensor, frame_predictors: Mapping[str, FramePredictor] = MappingProxyType({})
) -> dict[str, Predictor]:
    """The reference rows of every table, by name, then those that the data set has of its own. training_mean: (C,H,W),
    the mean image of the training set."""

    def mean_image(batch: Batch, k: int) -> Rollout:
        return Rollout(training_mean.to(batch.frames).expand_as(batch.frames[:, k:]), None)

    def without_flow(predict: FramePredictor) -> Predictor:
        return lambda batch, k: Rollout(predict(batch, k), None)

    return {
        "black": black,
        "repeat last frame": repeat_last,
        "mean of the seen": mean_of_seen,
        "training-set mean image": mean_image,
        "copy-last-flow": copy_last_flow,
        "oracle-flow": oracle_flow,
        **{name: without_flow(predict) for name, predict in frame_predictors.items()},
    }


def _warp_on(image: Tensor, flow: Tensor) -> Tensor:
    """Warp an image (B,C,H,W) by flow (B,P,2,H,W), each result by the next flow (Eq. 4): (B,P,C,H,W)."""
    frames = []
    for step in flow.unbind(1):
        image = backward_warp(image, step, padding="border")
        frames.append(image)
    return torch.stack(frames, 1)


def score(
    batches: Iterable[Batch],
    predictors: Mapping[str, Predictor],
    context_frames: int,
    protocol: ProtocolName = "paper",
    accelerator: Accelerator | None = None,
    *,
    one_object: bool = False,
) -> dict[str, MetricResult]:
    """Score every predictor on frames K+1..T of every batch, in constant memory, with the position error where frames
    show `one_object`. With an accelerator of several
    processes each passes its own share of the batches (which may be none) and all get the scores over all of them.
    ValueError: no batch at all, T <= K, predictions of another shape than the truth."""
    metrics: dict[str, VideoMetrics] = {}
    pred_frames = 0
    with torch.inference_mode():
        for batch in batches:
            true_frames, true_flow = batch.frames[:, context_frames:], batch.flow[:, context_frames:]
            pred_frames = true_frames.shape[1]
            for name, predict in predictors.items():
                if name not in metrics:
                    metrics[name] = VideoMetrics(pred_frames, protocol, one_object=one_object)
                frames, flow = predict(batch, context_frames)
                metrics[name].update(frames, true_frames, flow, None if flow is None else true_flow)
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        # a process without a batch does not know P
        pred_frames = max(gather_object([pred_frames]))
        empty = VideoMetrics(pred_frames, protocol, one_object=one_object)
        metrics = {n: metrics.get(n, empty).reduce(accelerator) for n in predictors}
    if not metrics:
        raise ValueError("batches and predictors: at least one of each is needed, nothing was scored")
    return {name: m.compute() for name, m in metrics.items()}
