"""Frame and flow metrics under a named protocol: SSIM, PSNR and end-point error, batched, on any device.

The same pair of images has several "SSIMs": window, covariance, border and data range differ between libraries. So each
setting is a frozen `MetricProtocol` in `PROTOCOLS`, and every number carries the name of its protocol.

All arithmetic is float64, whatever the input's type, because a window's variance is a difference of two nearly equal
numbers: both functions agree with scikit-image in float64 to 1e-12, where float32 sums are off by 1e-5 on a flat bright
frame."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import Accelerator

PSNR_CAP = 60.0
"""dB. An exact frame has an infinite PSNR, and one of them would swallow the mean."""
K1, K2 = 0.01, 0.03

ProtocolName = Literal["paper", "standard"]


@dataclass(frozen=True)
class MetricProtocol:
    """Every choice that changes a number. SSIM: Wang et al. 2004, mean over the area where the window fits whole."""

    window: tuple[float, ...]
    """The separable window's weights along one axis; they sum to 1."""
    sample_covariance: bool
    """Divide the window's covariances by n - 1 instead of n."""
    data_range: float
    """SSIM's dynamic range L."""
    psnr_per_channel: bool
    """One PSNR per channel, capped, then averaged; else one over all channels jointly."""
    words: str
    """The protocol in one sentence, for the footer of a table."""


def _gaussian(size: int, sigma: float) -> tuple[float, ...]:
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    return tuple(w / math.fsum(weights) for w in weights)


PROTOCOLS: dict[str, MetricProtocol] = {
    "paper": MetricProtocol(
        window=(1 / 7,) * 7,
        sample_covariance=True,
        data_range=2.0,
        psnr_per_channel=True,
        words=(
            "SSIM: 7x7 uniform window, sample covariance, valid area, data range 2 (inferred, the paper does not state "
            "it), averaged over channels; PSNR: peak 1, per channel and frame, capped at 60 dB, then averaged"
        ),
    ),
    "standard": MetricProtocol(
        window=_gaussian(11, 1.5),
        sample_covariance=False,
        data_range=1.0,
        psnr_per_channel=False,
        words=(
            "SSIM: 11x11 Gaussian window of sigma 1.5, valid area, data range 1, averaged over channels; "
            "PSNR: peak 1, over all channels of a frame jointly, capped at 60 dB, then averaged"
        ),
    ),
}


def get_protocol(name: str) -> MetricProtocol:
    """The protocol of that name; ValueError names the known ones."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown, expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


def ssim(pred: Tensor, true: Tensor, protocol: ProtocolName = "paper") -> Tensor:
    """Structural similarity of each frame: (...,C,H,W) in [0,1] (clamped to it) -> (...,) float64.

    `paper` equals scikit-image's `structural_similarity(a, b, win_size=7, data_range=2)` averaged over channels;
    `standard` its `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`. Both take the mean
    over the valid area only (3 and 5 px of border dropped); torchmetrics has the same values there, but reflects the
    frame at its border and keeps it. No gradient. ValueError: shapes that differ, a type that is not floating point,
    frames smaller than the window. Source: Wang et al. 2004, Eq. 13."""
    rules = get_protocol(protocol)
    pred, true = _checked(pred, true)
    if min(pred.shape[-2:]) < len(rules.window):
        size = len(rules.window)
        raise ValueError(f"pred is {pred.shape[-2]}x{pred.shape[-1]} pixels, protocol {protocol!r} needs {size}x{size}")
    with torch.no_grad():
        x, y = pred.flatten(0, -3), true.flatten(0, -3)
        parts = [_plane_ssim(_unit(a), _unit(b), rules) for a, b in zip(_slabs(x), _slabs(y), strict=True)]
        planes = torch.cat(parts) if parts else _unit(x).sum((1, 2))
        return planes.view(pred.shape[:-2]).mean(-1)


def psnr(pred: Tensor, true: Tensor, protocol: ProtocolName = "paper") -> Tensor:
    """Peak signal-to-noise ratio of each frame in dB, peak 1: (...,C,H,W) in [0,1] (clamped to it) -> (...,) float64.
    Capped at `PSNR_CAP`, in `paper` per channel and before the mean over channels. No gradient. ValueError: shapes that
    differ, a type that is not floating point."""
    get_protocol(protocol)
    with torch.no_grad():
        return _psnr(_channel_mse(*_checked(pred, true)), protocol)[0]


def end_point_error(pred_flow: Tensor, true_flow: Tensor) -> Tensor:
    """Mean over all pixels of the Euclidean distance of two flows, in pixels: (...,2,H,W) -> (...,) float64. The AEPE
    of the paper's Table 4 before its mean over frames and its factor 100. No gradient. ValueError: shapes that differ
    or are not (...,2,H,W), a type that is not floating point."""
    pred_flow, true_flow = _checked(pred_flow, true_flow, "pred_flow", "true_flow")
    if pred_flow.shape[-3] != 2:
        raise ValueError(f"pred_flow has shape {tuple(pred_flow.shape)}, expected (..., 2, H, W)")
    with torch.no_grad():
        return (pred_flow.double() - true_flow.double()).square().sum(-3).sqrt().mean((-2, -1))


def position_error(pred: Tensor, true: Tensor) -> Tensor:
    """Euclidean distance of two frames' centres of mass in pixels: (...,C,H,W) in [0,1] (clamped to it) -> (...,)
    float64. The mass is the intensity, summed over channels. A black frame says nothing of the place, and counts as the
    frame's middle. For one object on black. No gradient. ValueError: shapes that differ, a type that is not floating
    point."""
    pred, true = _checked(pred, true)
    with torch.no_grad():
        return (_centre_of_mass(pred) - _centre_of_mass(true)).square().sum(-1).sqrt()


@dataclass(frozen=True)
class MetricResult:
    """Scores of one predictor. Lists have one value per predicted frame, the first being frame K + 1."""

    protocol: str
    clips: int
    ssim: list[float]
    psnr: list[float]
    """dB, capped at `PSNR_CAP`."""
    capped_share: float
    """Share of the averaged PSNR values that the cap cut (per frame, in `paper` per frame and channel), in [0,1]."""
    pooled_psnr: float
    """PSNR of the squared error pooled over all clips, frames, channels and pixels: needs no cap, weighs no frame more
    than another (capped all the same where every frame is exact)."""
    aepe: list[float] | None
    """Pixels; None where the predictor has no flow."""
    position_error: list[float] | None = None
    """Pixels; None where the frames do not show one object."""

    @property
    def mean_ssim(self) -> float:
        return math.fsum(self.ssim) / len(self.ssim)

    @property
    def mean_psnr(self) -> float:
        return math.fsum(self.psnr) / len(self.psnr)

    @property
    def mean_aepe(self) -> float | None:
        return None if self.aepe is None else math.fsum(self.aepe) / len(self.aepe)

    @property
    def mean_position_error(self) -> float | None:
        return None if self.position_error is None else math.fsum(self.position_error) / len(self.position_error)

    def as_dict(self) -> dict[str, object]:
        """All fields and the means of the lists, ready for JSON."""
        means = {"mean_ssim": self.mean_ssim, "mean_psnr": self.mean_psnr, "mean_aepe": self.mean_aepe}
        return asdict(self) | means | {"mean_position_error": self.mean_position_error}


class VideoMetrics:
    """Streaming scores of predicted clips: sums and counts per frame index, so memory does not grow with the clips.
    `state` is float64 (8, P): the sums of SSIM, PSNR, capped share, squared error, clips, position error, end-point
    error, clips with flow. Sums only: the states of several processes, each with its own clips, add up to the state of
    one."""

    def __init__(self, pred_frames: int, protocol: ProtocolName = "paper", *, one_object: bool = False) -> None:
        """pred_frames: P, the number of predicted frames of each clip; one_object: frames show one object on black, so
        that its position is scored. ValueError: P < 1, unknown protocol."""
        if pred_frames < 1:
            raise ValueError(f"pred_frames is {pred_frames}, expected at least 1")
        get_protocol(protocol)
        self.protocol: ProtocolName = protocol
        self.one_object = one_object
        self.state = torch.zeros(8, pred_frames, dtype=torch.float64)

    def update(
        self, pred_frames: Tensor, true_frames: Tensor, pred_flow: Tensor | None = None, true_flow: Tensor | None = None
    ) -> None:
        """Add clips: frames (B,P,C,H,W), flow (B,P,2,H,W) in pixels or None. The state moves to their device.
        ValueError: as `ssim` and `end_point_error`, P not that of the constructor, one flow without the other."""
        p = self.state.shape[1]
        if pred_frames.ndim != 5 or pred_frames.shape[1] != p:
            raise ValueError(f"pred_frames has shape {tuple(pred_frames.shape)}, expected (B, {p}, C, H, W)")
        if (pred_flow is None) != (true_flow is None):
            raise ValueError("pred_flow and true_flow: one is None and the other is not, expected both or neither")
        batch = pred_frames.shape[0]
        scores = ssim(pred_frames, true_frames, self.protocol)
        with torch.no_grad():
            error = _channel_mse(pred_frames, true_frames)
            decibels, capped = _psnr(error, self.protocol)
            sums = [scores.sum(0), decibels.sum(0), capped.sum(0), error.mean(-1).sum(0)]
            sums.append(torch.full_like(sums[0], batch))
            off = position_error(pred_frames, true_frames).sum(0) if self.one_object else torch.zeros_like(sums[0])
            sums.append(off)
            if pred_flow is not None and true_flow is not None:
                if pred_flow.shape[:2] != (batch, p):
                    raise ValueError(f"pred_flow has shape {tuple(pred_flow.shape)}, expected ({batch}, {p}, 2, H, W)")
                sums += [end_point_error(pred_flow, true_flow).sum(0), torch.full_like(sums[0], batch)]
            else:
                sums += [torch.zeros_like(sums[0])] * 2
            self.state = self.state.to(scores.device) + torch.stack(sums)

    def reduce(self, accelerator: Accelerator) -> VideoMetrics:
        """A new accumulator holding the sum over all processes (a collective call; this one is left as it is)."""
        total = VideoMetrics(self.state.shape[1], self.protocol, one_object=self.one_object)
        total.state = accelerator.reduce(self.state.to(accelerator.device), reduction="sum")
        return total

    def compute(self) -> MetricResult:
        """The scores so far. ValueError when no clip was added."""
        ssim_sum, psnr_sum, capped, error, clips, off, epe, flow_clips = self.state.cpu()
        if clips[0] == 0:
            raise ValueError("no clip was scored: update() was never called with a clip")
        return MetricResult(
            protocol=self.protocol,
            clips=int(clips[0]),
            ssim=(ssim_sum / clips).tolist(),
            psnr=(psnr_sum / clips).tolist(),
            capped_share=(capped.sum() / clips.sum()).item(),
            pooled_psnr=_decibels(error.sum() / clips.sum()).item(),
            aepe=(epe / flow_clips).tolist() if flow_clips[0] else None,
            position_error=(off / clips).tolist() if self.one_object else None,
        )


def _checked(pred: Tensor, true: Tensor, pred_name: str = "pred", true_name: str = "true") -> tuple[Tensor, Tensor]:
    if pred.shape != true.shape or pred.ndim < 3:
        shapes = f"{pred_name} has shape {tuple(pred.shape)}, {true_name} {tuple(true.shape)}"
        raise ValueError(f"{shapes}, expected the same (..., C, H, W)")
    if not (pred.is_floating_point() and true.is_floating_point()):
        raise ValueError(f"{pred_name} is {pred.dtype}, {true_name} {true.dtype}, expected floating point")
    return pred, true


def _centre_of_mass(frames: Tensor) -> Tensor:
    """(...,C,H,W) -> (...,2) float64, x then y in pixels from the middle; the middle where there is no mass."""
    mass = _unit(frames).sum(-3)
    height, width = mass.shape[-2:]
    x, y = (torch.arange(n, device=mass.device) - (n - 1) / 2 for n in (width, height))
    moments = torch.stack([(mass.sum(-2) * x).sum(-1), (mass.sum(-1) * y).sum(-1)], -1)
    total = mass.sum((-2, -1)).unsqueeze(-1)
    return moments / torch.where(total == 0, 1.0, total)


def _unit(x: Tensor) -> Tensor:
    return x.double().clamp(0.0, 1.0)


def _slabs(planes: Tensor) -> Iterator[Tensor]:
    """Split (N,H,W) so that the ten or so float64 copies SSIM needs stay below about 200 MB."""
    step = max(1, 2**21 // max(1, planes.shape[1] * planes.shape[2]))
    return (planes[i : i + step] for i in range(0, planes.shape[0], step))


def _filter(x: Tensor, window: tuple[float, ...]) -> Tensor:
    """Separable window over the last two axes, valid area."""
    # shifted sums: conv2d in float64 takes 9 times as long on a CPU (7x7, 48x48)
    for axis in (-2, -1):
        size = x.shape[axis] - len(window) + 1
        out = torch.zeros_like(x.narrow(axis, 0, size))
        for i, weight in enumerate(window):
            out.add_(x.narrow(axis, i, size), alpha=weight)
        x = out
    return x


def _plane_ssim(x: Tensor, y: Tensor, rules: MetricProtocol) -> Tensor:
    """SSIM of planes (N,H,W) float64 -> (N,)."""
    mean_x, mean_y, xx, yy, xy = _filter(torch.stack([x, y, x * x, y * y, x * y]), rules.window)
    count = len(rules.window) ** 2
    scale = count / (count - 1) if rules.sample_covariance else 1.0
    var_x, var_y = scale * (xx - mean_x**2), scale * (yy - mean_y**2)
    covariance = scale * (xy - mean_x * mean_y)
    c1, c2 = (K1 * rules.data_range) ** 2, (K2 * rules.data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (luminance * (2 * covariance + c2) / (var_x + var_y + c2)).mean((1, 2))


def _channel_mse(pred: Tensor, true: Tensor) -> Tensor:
    """Squared error per channel, (...,C,H,W) -> (...,C)."""
    return (_unit(pred) - _unit(true)).square().mean((-2, -1))


def _decibels(error: Tensor) -> Tensor:
    # 0 - ... because log10(1) times -10 would print as -0.0
    return (0.0 - 10.0 * error.log10()).clamp(max=PSNR_CAP)


def _psnr(channel_mse: Tensor, protocol: ProtocolName) -> tuple[Tensor, Tensor]:
    """(...,C) -> PSNR (...,) and the share of its values that the cap cut (...,)."""
    joint = channel_mse if PROTOCOLS[protocol].psnr_per_channel else channel_mse.mean(-1, keepdim=True)
    values = _decibels(joint)
    return values.mean(-1), (values >= PSNR_CAP).double().mean(-1)
