"""Training loss of the motion stage (Eq. 8 to 10): squared flow error plus edge-aware smoothness.

Shapes: flows B P 2 H W in pixels, true frames B P C H W, P predicted steps. Bytes moved: both flows and the frames once
= (4 + C) H W P B values.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, reference, registry

_OP = registry.define("flow_loss", reference.flow_loss)


def flow_loss(
    prediction: Tensor, target: Tensor, frames: Tensor, *, smooth_weight: float = 0.01, backend: str | None = None
) -> Tensor:
    """Loss of the predicted flow: L_flow + smooth_weight * L_smooth, a scalar summed over the predicted steps.

    prediction and target (B,P,2,H,W) in pixels; frames (B,P,C,H,W) the true frames at the same steps. Differentiable in
    the prediction. Raises ValueError on a wrong shape or dtype, or when target or frames require a gradient.
    Source: paper, Eq. 8 to 10 (reductions: `reference.flow_loss`).
    """
    checks.shape("prediction", prediction, "B P 2 H W", **{"2": 2})
    b, p, _, h, w = prediction.shape
    checks.shape("target", target, "B P 2 H W", **{"B": b, "P": p, "2": 2, "H": h, "W": w})
    checks.shape("frames", frames, "B P C H W", B=b, P=p, H=h, W=w)
    checks.same_device(prediction=prediction, target=target, frames=frames)
    checks.no_gradient("target", target)
    checks.no_gradient("frames", frames)
    return _OP(prediction, target, frames, smooth_weight, backend=backend)
