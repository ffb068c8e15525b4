"""Backward warp (Eq. 4): out(p) = image(p + flow(p)), bilinear, in pixels.

Shapes: image B C H W, flow B 2 H W (x then y). Coordinates are pixel centres: flow 0 is the identity, an integer flow a
shift. Bytes moved: image and output once, flow once = (2 C + 2) H W B values.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, reference, registry

_OP = registry.define("backward_warp", reference.backward_warp)


def backward_warp(image: Tensor, flow: Tensor, *, padding: str = "border", backend: str | None = None) -> Tensor:
    """Warp an image (B,C,H,W) by a backward flow (B,2,H,W) in pixels, x then y: out(p) = image(p + flow(p)).

    padding: "border" repeats the edge pixel, "zeros" surrounds the image with zeros. Returns (B,C,H,W) in image's
    dtype; differentiable in both arguments (the flow's gradient at kinks: `reference.backward_warp`). A NaN flow gives
    NaN at its pixel. Raises ValueError on a wrong shape, dtype or padding, or a backend that cannot run it.
    Source: paper, Eq. 4.
    """
    checks.shape("image", image, "B C H W")
    b, _, h, w = image.shape
    checks.shape("flow", flow, "B 2 H W", **{"B": b, "2": 2, "H": h, "W": w})
    checks.same_device(image=image, flow=flow)
    checks.choice("padding", padding, ("border", "zeros"))
    return _OP(image, flow, padding, backend=backend)
