"""The parts of TV-L1's definition against OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from avfast.kernels import tvl1_reference as definition
from avfast.opticalflow.tvl1 import PRESETS


def test_parts_of_the_definition_equal_opencv() -> None:
    """Area average, enlargement, median, Gaussian and bicubic warp, on an odd size."""
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(1, 37, 50, generator=generator)
    grey = image[0].numpy()

    def check(ours: torch.Tensor, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3, rtol=0)

    fast, opencv = PRESETS["fast"], PRESETS["opencv"]
    check(definition._shrink(image, 19, 25, fast)[0], cv2.resize(grey, (25, 19), interpolation=cv2.INTER_AREA))
    check(definition._shrink(image, 30, 40, fast)[0], cv2.resize(grey, (40, 30), interpolation=cv2.INTER_AREA))
    check(definition._shrink(image, 30, 40, opencv)[0], cv2.resize(grey, None, fx=0.8, fy=0.8))
    flow = image[:, None].expand(1, 2, 37, 50)
    larger = cv2.resize(grey, (99, 74), interpolation=cv2.INTER_LINEAR)
    enlarged = definition._enlarge(flow, 74, 99, fast)[0]
    check(enlarged[0], larger * 99 / 50)
    check(enlarged[1], larger * 74 / 37)
    for side in (3, 5):
        check(definition._median(flow, side)[0, 0], cv2.medianBlur(grey, side))
    check(definition._smooth(image, 0.8)[0], cv2.GaussianBlur(grey, (7, 7), 0.8, borderType=cv2.BORDER_REPLICATE))
    # steps of 1/32 px: OpenCV 4 rounds the coordinates to them
    x = torch.randint(0, 49 * 32, (1, 37, 50), generator=generator) / 32
    y = torch.randint(0, 36 * 32, (1, 37, 50), generator=generator) / 32
    remapped = cv2.remap(grey, x[0].numpy(), y[0].numpy(), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    check(definition._bicubic(image[:, None], x, y, "border")[0, 0], remapped)
    remapped = cv2.remap(grey, x[0].numpy() - 2, y[0].numpy() + 2, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
    check(definition._bicubic(image[:, None], x - 2, y + 2, "zeros")[0, 0], remapped)


def test_divergence_is_minus_the_adjoint_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 2, 5, 7, generator=generator, dtype=torch.float64)
    # what lies past the last column or row is no part of the dual: the gradient is 0 there
    q = torch.randn(1, 2, 2, 5, 7, generator=generator, dtype=torch.float64)
    q[:, :, 0, :, -1] = 0
    q[:, :, 1, -1] = 0
    torch.testing.assert_close((definition._gradient(u) * q).sum(), -(u * definition._divergence(q)).sum())
