"""SSIM, PSNR and end-point error against scikit-image, torchmetrics and numpy; the streaming sums against one pass."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as tm_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as tm_ssim

from avfast.scoring.metrics import PROTOCOLS, PSNR_CAP, VideoMetrics, end_point_error, position_error, psnr, ssim

# scikit-image and we both compute in float64
EXACT = dict(rtol=1e-10, atol=1e-10)
# torchmetrics rounds its window and its logarithm's arguments to float32
SINGLE = dict(rtol=1e-5, atol=1e-5)
SIZES = [(1, 48, 48), (3, 31, 45), (1, 11, 63), (3, 64, 17)]
SKIMAGE = {
    "paper": dict(win_size=7, data_range=2),
    "standard": dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1),
}


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A frame with structure (blurred noise, a hard black half) and a disturbed copy that stays in [0,1]."""
    g = torch.Generator().manual_seed(seed)
    true = torch.rand(shape, generator=g, dtype=torch.float64)
    true = (true + true.roll(1, -1) + true.roll(1, -2)) / 3
    true[..., : shape[-1] // 2] *= torch.rand((), generator=g) > 2
    pred = (true + 0.2 * torch.randn(shape, generator=g, dtype=torch.float64)).clamp(0, 1)
    return pred, true


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("size", SIZES)
def test_ssim_equals_scikit_image(protocol: str, size: tuple[int, int, int]) -> None:
    pred, true = pair(2, 3, *size)
    got = ssim(pred, true, protocol)
    assert got.shape == (2, 3) and got.dtype == torch.float64
    for b in range(2):
        for t in range(3):
            planes = zip(pred[b, t].numpy(), true[b, t].numpy(), strict=True)
            want = np.mean([structural_similarity(x, y, **SKIMAGE[protocol]) for x, y in planes])
            np.testing.assert_allclose(got[b, t].item(), want, **EXACT)


@pytest.mark.parametrize("size", SIZES)
def test_data_range_is_the_only_thing_between_one_and_two(
    size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROTOCOLS, "paper", dataclasses.replace(PROTOCOLS["paper"], data_range=1.0))
    pred, true = pair(1, *size)
    want = np.mean(
        [
            structural_similarity(x.numpy(), y.numpy(), win_size=7, data_range=1)
            for x, y in zip(pred[0], true[0], strict=True)
        ]
    )
    np.testing.assert_allclose(ssim(pred, true)[0].item(), want, **EXACT)


@pytest.mark.parametrize("size", SIZES[:2])
def test_standard_equals_torchmetrics(size: tuple[int, int, int]) -> None:
    pred, true = pair(4, *size)
    # torchmetrics reflects the frame at its border and keeps the 5 px there
    _, full = tm_ssim(pred, true, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True)
    want = full[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(ssim(pred, true, "standard"), want, **SINGLE)
    want = tm_psnr(pred, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
    torch.testing.assert_close(psnr(pred, true, "standard"), want, **SINGLE)


@pytest.mark.parametrize("size", SIZES)
def test_psnr_equals_scikit_image(size: tuple[int, int, int]) -> None:
    pred, true = pair(2, *size)
    for b in range(2):
        x, y = pred[b].numpy(), true[b].numpy()
        channels = [peak_signal_noise_ratio(c, d, data_range=1) for c, d in zip(y, x, strict=True)]
        np.testing.assert_allclose(psnr(pred, true, "paper")[b].item(), np.mean(channels), **EXACT)
        joint = peak_signal_noise_ratio(y, x, data_range=1)
        np.testing.assert_allclose(psnr(pred, true, "standard")[b].item(), joint, **EXACT)


def test_float32_input_is_summed_in_float64() -> None:
    g = torch.Generator().manual_seed(0)
    true = (0.95 + 0.004 * torch.randn(1, 1, 64, 64, generator=g)).clamp(0, 1)
    pred = (true + 0.004 * torch.randn(true.shape, generator=g)).clamp(0, 1)
    for protocol, settings in SKIMAGE.items():
        want = structural_similarity(pred[0, 0].double().numpy(), true[0, 0].double().numpy(), **settings)
        np.testing.assert_allclose(ssim(pred, true, protocol)[0].item(), want, **EXACT)


def test_many_large_frames_equal_one_at_a_time() -> None:
    # more pixels than one slab holds
    pred, true = pair(9, 1, 512, 520)
    want = torch.cat([ssim(pred[i : i + 1], true[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(ssim(pred, true), want, **EXACT)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identical_and_nearly_identical_frames(protocol: str) -> None:
    _, true = pair(2, 3, 16, 16)
    torch.testing.assert_close(ssim(true, true, protocol), torch.ones(2, dtype=torch.float64))
    assert psnr(true, true, protocol).tolist() == [PSNR_CAP, PSNR_CAP]
    # one channel exact, the others off by 0.1 (20 dB): capped per channel in `paper`, not at all in `standard`
    flat = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64)
    off = flat.clone()
    off[:, 1:] += 0.1
    want = (60 + 20 + 20) / 3 if protocol == "paper" else -10 * np.log10(0.01 * 2 / 3)
    np.testing.assert_allclose(psnr(off, flat, protocol)[0].item(), want, **EXACT)


def test_frames_are_clamped_not_quantised() -> None:
    true = torch.zeros(1, 1, 16, 16)
    assert psnr(true - 0.3, true).item() == PSNR_CAP
    np.testing.assert_allclose(psnr(true + 0.001 + 1e-4, true).item(), -20 * np.log10(0.0011), rtol=1e-6)
    assert psnr(true + 7.0, true).item() == 0.0


def test_end_point_error() -> None:
    true = torch.zeros(2, 3, 2, 5, 7)
    pred = true.clone()
    pred[0, 1, 0], pred[0, 1, 1] = 3.0, -4.0
    pred[1, 2, 0, 0, 0] = 35.0
    torch.testing.assert_close(end_point_error(pred, true), torch.tensor([[0.0, 5, 0], [0, 0, 1]], dtype=torch.float64))


def block(x: int, y: int, width: int, height: int, value: float = 1.0) -> torch.Tensor:
    """A frame (1,20,30) with a rectangle, whose centre of mass is x + (width - 1) / 2, y + (height - 1) / 2."""
    frame = torch.zeros(1, 20, 30)
    frame[0, y : y + height, x : x + width] = value
    return frame


def test_position_error() -> None:
    black, true = torch.zeros(1, 20, 30), block(4, 2, 3, 5)
    # neither size nor brightness moves the centre; a black frame counts as the middle, 14.5, 9.5
    pred = torch.stack([true, block(7, 6, 3, 5), block(3, 0, 5, 9, 0.3), block(4, 2, 4, 5), black])
    want = [0, 5, 0, 0.5, np.hypot(14.5 - 5, 9.5 - 4)]
    np.testing.assert_allclose(position_error(pred, true.expand_as(pred)), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(position_error(true.expand_as(pred), pred), want, rtol=1e-6, atol=1e-6)
    assert position_error(black, black).item() == 0
    # channels add up: a red rectangle twice as bright as a green one 6 px further on lies 2 px off
    colours = torch.cat([block(4, 2, 3, 5), block(10, 2, 3, 5, 0.5), black])
    np.testing.assert_allclose(position_error(colours, true.expand(3, -1, -1)).item(), 2, rtol=1e-6)


def test_position_error_of_clips() -> None:
    true = block(4, 2, 3, 5).expand(2, 3, 1, 20, 30)
    pred = true.clone()
    pred[0, 1], pred[1, 1], pred[1, 2] = block(7, 6, 3, 5), block(4, 5, 3, 5), float("nan")
    one, other = VideoMetrics(3, one_object=True), VideoMetrics(3, one_object=True)
    one.update(pred[:1], true[:1])
    other.update(pred[1:], true[1:])
    result = one.reduce(Processes(other.state)).compute()
    np.testing.assert_allclose(result.position_error, [0, (5 + 3) / 2, np.nan], rtol=1e-6)
    assert one.compute().mean_position_error == pytest.approx(5 / 3)
    assert one.compute().as_dict()["mean_position_error"] == one.compute().mean_position_error
    without = VideoMetrics(3)
    without.update(pred, true)
    assert without.compute().position_error is None and without.compute().as_dict()["mean_position_error"] is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ssim(torch.rand(1, 6, 48), torch.rand(1, 6, 48)), "pred is 6x48 pixels.*7x7"),
        (lambda: ssim(torch.rand(1, 48, 10), torch.rand(1, 48, 10), "standard"), "pred is 48x10 pixels.*11x11"),
        (lambda: ssim(torch.rand(1, 16, 16), torch.rand(1, 16, 17)), r"\(1, 16, 16\), true \(1, 16, 17\)"),
        (lambda: psnr(torch.rand(16, 16), torch.rand(16, 16)), r"pred has shape \(16, 16\)"),
        (lambda: psnr(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8)), "true torch.uint8"),
        (lambda: psnr(torch.rand(1, 8, 8), torch.rand(1, 8, 8), "ours"), "protocol 'ours' is unknown.*paper, standard"),
        (lambda: end_point_error(torch.rand(3, 8, 8), torch.rand(3, 8, 8)), r"pred_flow has shape \(3, 8, 8\)"),
        (lambda: VideoMetrics(0), "pred_frames is 0"),
        (lambda: VideoMetrics(4).compute(), "no clip was scored"),
        (lambda: VideoMetrics(4).update(torch.rand(1, 3, 1, 8, 8), torch.rand(1, 3, 1, 8, 8)), r"expected \(B, 4, C"),
        (
            lambda: VideoMetrics(1).update(*[torch.rand(1, 1, 1, 8, 8)] * 2, pred_flow=torch.rand(1, 1, 2, 8, 8)),
            "pred_flow and true_flow",
        ),
    ],
)
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def clips(count: int, frames: int = 4, channels: int = 3) -> list[torch.Tensor]:
    pred, true = pair(count, frames, channels, 16, 19, seed=3)
    pred[0, 1] = true[0, 1]
    pred[1, 2, 0] = true[1, 2, 0]
    g = torch.Generator().manual_seed(4)
    flows = torch.randn(2, count, frames, 2, 16, 19, generator=g, dtype=torch.float64)
    return [pred, true, *flows]


def test_streaming_equals_one_pass_and_keeps_no_clip() -> None:
    data = clips(7)
    metrics = VideoMetrics(4)
    size = metrics.state.shape
    for start in (0, 3, 5):
        metrics.update(*(x[start : {0: 3, 3: 5, 5: 7}[start]] for x in data))
    tensors = [v for v in vars(metrics).values() if isinstance(v, torch.Tensor)]
    assert len(tensors) == 1 and metrics.state.shape == size and metrics.state.untyped_storage().nbytes() == 8 * 4 * 8

    result = metrics.compute()
    pred, true, pred_flow, true_flow = data
    assert result.clips == 7 and result.protocol == "paper"
    np.testing.assert_allclose(result.ssim, ssim(pred, true).mean(0), **EXACT)
    np.testing.assert_allclose(result.psnr, psnr(pred, true).mean(0), **EXACT)
    np.testing.assert_allclose(result.aepe, (pred_flow - true_flow).norm(dim=2).mean((0, 2, 3)), **EXACT)
    np.testing.assert_allclose(result.pooled_psnr, -10 * np.log10((pred - true).square().mean().item()), **EXACT)
    # 3 channels of clip 0, frame 1 and 1 channel of clip 1, frame 2, of 7 x 4 x 3
    np.testing.assert_allclose(result.capped_share, 4 / 84, **EXACT)
    np.testing.assert_allclose(result.mean_ssim, np.mean(result.ssim), **EXACT)
    np.testing.assert_allclose(result.mean_psnr, np.mean(result.psnr), **EXACT)
    np.testing.assert_allclose(result.mean_aepe, np.mean(result.aepe), **EXACT)


class Processes:
    """Stands for `accelerate.Accelerator` in one of several processes: `reduce` adds the other ones' tensors."""

    device = torch.device("cpu")

    def __init__(self, *others: torch.Tensor) -> None:
        self.others = others

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "sum"
        return sum(self.others, start=tensor.clone())


def test_two_processes_equal_one_even_when_one_has_no_clip() -> None:
    data = clips(6)
    one, first, second, idle = (VideoMetrics(4, "standard") for _ in range(4))
    one.update(*data)
    first.update(*(x[:1] for x in data))
    second.update(*(x[1:] for x in data))
    total = first.reduce(Processes(second.state, idle.state))
    torch.testing.assert_close(total.state, one.state, rtol=1e-14, atol=0)
    # counts are whole numbers and must not be off at all; the share itself is unchanged by a second call
    assert total.compute().clips == 6 and first.compute().clips == 1
    assert first.reduce(Processes(second.state)).compute() == total.compute()


def test_without_flow_there_is_no_aepe() -> None:
    pred, true, _, _ = clips(2)
    metrics = VideoMetrics(4)
    metrics.update(pred, true)
    result = metrics.compute()
    assert result.aepe is None and result.mean_aepe is None and result.as_dict()["mean_aepe"] is None


def test_no_graph_is_kept() -> None:
    pred, true, pred_flow, true_flow = clips(2)
    metrics = VideoMetrics(4)
    metrics.update(pred.requires_grad_(), true, pred_flow.requires_grad_(), true_flow)
    assert not metrics.state.requires_grad


def test_nan_is_not_hidden() -> None:
    pred, true, _, _ = clips(2)
    pred[1, 3, 0, 8, 8] = float("nan")
    metrics = VideoMetrics(4)
    metrics.update(pred, true)
    result = metrics.compute()
    assert np.isnan([result.ssim[3], result.psnr[3], result.pooled_psnr]).all() and np.isfinite(result.ssim[:3]).all()
