"""Encoders and decoders of MME and CAR (paper sections 3.1, 3.2 and appendix C; what the paper leaves open is settled
here). The layers that other models could use too are in `avfast.modules`.

Shape legend: B batch, T time, C image channels, H W image, h w = H/16 W/16, F S spectrogram, D = 128 feature channels.
Convolutions followed by BatchNorm carry no bias: BatchNorm subtracts it, so the functions are the same."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avfast.errors import InputError
from avfast.kernels import patch_conv, strided_conv, strided_conv_transpose

FEATURES = 128
SLOPE = 0.2


class BatchNorm(nn.Module):
    """BatchNorm with statistics per time step, whatever the number of steps that one call holds.

    forward(x, steps): x (B*steps, C, ...) with time inside the batch axis, b * steps + t. In training each step is
    normalised by its own batch statistics (time is folded into channels, so one call on T steps equals T calls on
    one); the running statistics move once per optimiser step, by the mean over the step's calls: `commit`. In
    evaluation, and in training once it is `frozen`, it is the usual affine map by the running statistics."""

    frozen = False
    running_mean: Tensor
    running_var: Tensor
    sums: Tensor
    calls: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        # sums over the calls since the last commit: mean, unbiased variance, number of steps
        self.register_buffer("sums", torch.zeros(2, channels), persistent=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        if self.frozen or not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        folded = x.reshape(-1, steps * x.shape[1], *x.shape[2:])
        if folded.numel() == folded.shape[1]:
            raise ValueError(f"x has shape {tuple(x.shape)} for {steps} steps: one value per channel has no variance")
        # momentum 1 writes this call's statistics, so they cost no pass of their own
        statistics = torch.zeros(2, steps * self.weight.shape[0], dtype=self.running_mean.dtype, device=x.device)
        mean, var = statistics
        weight, bias = (self.weight, self.bias) if steps == 1 else (self.weight.repeat(steps), self.bias.repeat(steps))
        out = F.batch_norm(folded, mean, var, weight, bias, True, 1.0, self.eps)
        with torch.no_grad():
            self.sums += statistics.view(2, steps, -1).sum(1)
            self.calls += steps
        return out.view(x.shape)

    @torch.no_grad()
    def commit(self, momentum: float | None = None) -> None:
        """Move the running statistics towards the mean over the calls since the last commit, and start anew."""
        if self.calls > 0:
            momentum = self.momentum if momentum is None else momentum
            mean, var = self.sums / self.calls
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var, momentum)
        self.discard()

    def discard(self) -> None:
        """Forget the calls since the last commit."""
        self.sums.zero_()
        self.calls.zero_()


def batch_norms(module: nn.Module) -> list[BatchNorm]:
    """Every BatchNorm in a module that is in training mode."""
    return [m for m in module.modules() if isinstance(m, BatchNorm) and m.training]


class PatchConv(nn.Conv2d):
    """A convolution computed by `patch_conv`: for one input channel, or few outputs per image."""

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = ((int(pair[0]), int(pair[1])) for pair in (self.stride, self.padding))
        return patch_conv(x, self.weight, self.bias, stride=stride, padding=padding)


class StridedConv(nn.Conv2d):
    """A convolution 4x4 with stride 2, computed by `strided_conv`."""

    def __init__(self, c_in: int, c_out: int, padding: int = 1) -> None:
        super().__init__(c_in, c_out, 4, 2, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return strided_conv(x, self.weight, self.bias, padding=int(self.padding[0]))


class StridedConvTranspose(nn.ConvTranspose2d):
    """Its transpose, padding 1."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(c_in, c_out, 4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return strided_conv_transpose(x, self.weight, self.bias)


def _channels_last(x: Tensor) -> Tensor:
    """On the CPU, where convolutions are faster between maps of the layout that `strided_conv` gives."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class ConvBlock(nn.Module):
    """Convolution (or transposed convolution), BatchNorm, activation; `steps` as in `BatchNorm`."""

    def __init__(self, conv: nn.Module, channels: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.activation = conv, BatchNorm(channels), activation

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        return self.activation(self.norm(self.conv(x), steps))


def _activation(last: bool) -> nn.Module:
    return nn.Tanh() if last else nn.LeakyReLU(SLOPE)


class MotionEncoder(nn.Module):
    """E_m: flow (B,T,2,H,W) in pixels and frames (B,T,C,H,W) -> (B,T,D,h,w). Four convolutions 4x4, stride 2, pad 1."""

    def __init__(self, image_channels: int) -> None:
        super().__init__()
        channels = (2 + image_channels, 64, 64, 128, FEATURES)
        self.blocks = nn.ModuleList(
            ConvBlock(StridedConv(c_in, c_out), c_out, _activation(i == 3))
            for i, (c_in, c_out) in enumerate(pairwise(channels))
        )

    def forward(self, flow: Tensor, frames: Tensor) -> Tensor:
        b, steps = flow.shape[:2]
        x = _channels_last(torch.cat((flow, frames), dim=2).flatten(0, 1))
        for block in self.blocks:
            x = block(x, steps)
        return x.view(b, steps, *x.shape[1:])


class MotionDecoder(nn.Module):
    """D_m: hidden state (B,D,h,w) -> flow (B,2,H,W) in pixels; `steps` as in `BatchNorm`. Four transposed convolutions
    4x4, stride 2, pad 1.

    The last layer stays fp32 under autocast: rounding the flow to bf16 alone costs 11 % of the paper's AEPE."""

    def __init__(self) -> None:
        super().__init__()
        channels = (FEATURES, 128, 64, 64)
        self.blocks = nn.ModuleList(
            ConvBlock(StridedConvTranspose(c_in, c_out), c_out, _activation(False))
            for c_in, c_out in pairwise(channels)
        )
        self.last = nn.ConvTranspose2d(channels[-1], 2, 4, 2, 1)

    def forward(self, x: Tensor, steps: int = 1) -> Tensor:
        for block in self.blocks:
            x = block(x, steps)
        with torch.autocast(x.device.type, enabled=False):
            return self.last(x.to(self.last.weight.dtype))


class AudioEncoder(nn.Module):
    """E_a: spectrogram windows (B,T,1,F,S) -> audio vectors (B,T,D), one call over all B*T windows.

    Five convolutions, channels 64, 128, 256, 512, D, kernels 4, 4, 4, 4, 2. Strides and paddings are those that bring
    23x21 and 45x17 to 1x1; any other shape takes the first kind's and adaptive average pooling to 2x2 before the last.
    Its BatchNorm statistics are those of the one call."""

    # spectrogram shape -> (stride, padding) of the first two convolutions; the next two halve, the last keeps
    _STRIDES = {
        (23, 21): [((1, 1), (0, 0)), ((2, 2), (1, 1))],
        (45, 17): [((2, 1), (0, 0)), ((2, 1), (2, 0))],
    }

    def __init__(self, audio_shape: tuple[int, int]) -> None:
        super().__init__()
        if min(audio_shape) < 11:
            raise InputError(f"audio_shape is {audio_shape[0]}x{audio_shape[1]}, expected at least 11x11")
        first, second = self._STRIDES.get(audio_shape, self._STRIDES[23, 21])
        halving = ((2, 2), (1, 1))
        geometry = [(4, *first), (4, *second), (4, *halving), (4, *halving), (2, (1, 1), (0, 0))]
        channels = (1, 64, 128, 256, 512, FEATURES)
        self.blocks = nn.ModuleList()
        for i, (kernel, stride, padding) in enumerate(geometry):
            c_in, c_out = channels[i : i + 2]
            if stride == (2, 2) and i < 3:
                conv: nn.Module = StridedConv(c_in, c_out, padding[0])
            else:
                # the first has one channel, the last two have at most four outputs
                kind = PatchConv if i in (0, 3, 4) else nn.Conv2d
                conv = kind(c_in, c_out, kernel, stride, padding, bias=False)
            self.blocks.append(ConvBlock(conv, c_out, _activation(i == 4)))
        self.pool = nn.Identity() if audio_shape in self._STRIDES else nn.AdaptiveAvgPool2d(2)

    def forward(self, audio: Tensor) -> Tensor:
        x = audio.flatten(0, 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.blocks[-1](self.pool(x)).view(*audio.shape[:2], FEATURES)


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm and ReLU: (B,c_in,H,W) -> (B,c_out,H,W)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(ConvBlock(nn.Conv2d(c, c_out, 3, padding=1, bias=False), c_out, nn.ReLU()) for c in (c_in, c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class ContextEncoder(nn.Module):
    """E_c: the last given frame (B,C,H,W) -> z^1..z^4, channels w, 2w, 4w, 8w at H, H/2, H/4, H/8."""

    def __init__(self, image_channels: int, width: int) -> None:
        super().__init__()
        channels = (image_channels, width, 2 * width, 4 * width, 8 * width)
        self.levels = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(channels))

    def forward(self, frame: Tensor) -> list[Tensor]:
        features = []
        for i, level in enumerate(self.levels):
            frame = level(frame if i == 0 else F.max_pool2d(frame, 2))
            features.append(frame)
        return features


class UNet(nn.Module):
    """Refinement U-Net: warped frame (B,C,H,W) -> residual (B,C,H,W).

    Five levels of width w, 2w, 4w, 8w, 16w; each of the four decoder levels takes concat(upsampled, skip, z^i) where
    there are contexts, z^i adapted to a motion vector (B,M) where there is an `affine`. The last 1x1 convolution
    starts at zero, so training starts from the warped frame."""

    def __init__(self, image_channels: int, width: int, *, with_context: bool) -> None:
        super().__init__()
        channels = [width << i for i in range(5)]
        parts = 3 if with_context else 2
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise([image_channels, *channels]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * c, c, 2, 2) for c in channels[:4])
        self.decode = nn.ModuleList(DoubleConv(parts * c, c) for c in channels[:4])
        self.last = nn.Conv2d(width, image_channels, 1)
        with torch.no_grad():
            for parameter in self.last.parameters():
                parameter.zero_()

    def forward(
        self,
        frame: Tensor,
        contexts: list[Tensor] | None = None,
        affine: nn.ModuleList | None = None,
        motion: Tensor | None = None,
    ) -> Tensor:
        skips = []
        x = frame
        for i, level in enumerate(self.down):
            x = level(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for i in reversed(range(4)):
            parts = [self.up[i](x), skips[i]]
            if contexts is not None and affine is not None:
                joined = affine[i](contexts[i], motion, before=parts)
            else:
                joined = torch.cat(parts if contexts is None else [*parts, contexts[i]], dim=1)
            x = self.decode[i](joined)
        return self.last(x)
