"""Motion-conditioned affine of a context feature (Eq. 7): gamma * z + beta per channel.

Shapes: context B C H W, gamma and beta B C. Bytes moved: context and output once = 2 C H W B values.
"""

from __future__ import annotations

from torch import Tensor

from . import checks, reference, registry

_OP = registry.define("modulate", reference.modulate)


def modulate(context: Tensor, gamma: Tensor, beta: Tensor, *, backend: str | None = None) -> Tensor:
    """Scale and shift each channel: context (B,C,H,W), gamma and beta (B,C) -> gamma * context + beta (B,C,H,W).

    Raises ValueError on a wrong shape or dtype. Source: paper, Eq. 7.
    """
    checks.shape("context", context, "B C H W")
    b, c = context.shape[:2]
    checks.shape("gamma", gamma, "B C", B=b, C=c)
    checks.shape("beta", beta, "B C", B=b, C=c)
    checks.same_device(context=context, gamma=gamma, beta=beta)
    return _OP(context, gamma, beta, backend=backend)
