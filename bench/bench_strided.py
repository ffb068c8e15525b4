"""Strided convolutions of the motion model at 48x48 and of its audio encoder against PyTorch's, on the CPU.

Weights are transformed once for `calls` calls, as in a forward pass over a clip. The limit is the arithmetic of the
products: kernels/winograd/tiles.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from avfast.kernels import shared_weights, strided_conv, strided_conv_transpose

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on CUDA both are cuDNN's")
# transposed, input, channels out, calls with the same weights
LAYERS = [
    (False, (320, 64, 20, 18), 128, 1),
    (False, (320, 128, 10, 9), 256, 1),
    (False, (16, 64, 24, 24), 64, 14),
    (False, (16, 64, 12, 12), 128, 14),
    (False, (16, 128, 6, 6), 128, 14),
    (True, (16, 128, 3, 3), 128, 15),
    (True, (16, 128, 6, 6), 64, 15),
    (True, (16, 64, 12, 12), 64, 15),
]


@pytest.mark.parametrize(("transposed", "shape", "channels", "calls"), LAYERS, ids=str)
def bench_strided_conv(
    transposed: bool, shape: tuple[int, int, int, int], channels: int, calls: int, contest: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    b, c, h, w = shape
    x = torch.randn(shape).requires_grad_()
    weight = (0.05 * torch.randn((c, channels, 4, 4) if transposed else (channels, c, 4, 4))).requires_grad_()

    def ours(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        call = strided_conv_transpose if transposed else strided_conv
        with shared_weights():
            return tuple(call(x, weight) for _ in range(calls))

    def framework(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        call = F.conv_transpose2d if transposed else F.conv2d
        return tuple(call(x, weight, stride=2, padding=1) for _ in range(calls))

    outputs = b * channels * (h * w * 4 if transposed else (h // 2) * (w // 2))
    contest(
        f"strided conv: {'transposed ' if transposed else ''}{shape} to {channels}, {calls} calls",
        {"ours": ours, "conv2d": framework},
        [x, weight],
        forward=calls * (x.numel() + outputs),
        backward=calls * (2 * x.numel() + outputs),
        rounds=9,
    )
