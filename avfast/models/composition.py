"""Flow over several frames, composed of the flows between neighbours.

Shape legend: B batch, P predicted frames, C channels, H W image; frame K is the last given one."""

from __future__ import annotations

import torch
from torch import Tensor

from avfast.kernels import backward_warp


def extend_path(path: Tensor, flow: Tensor) -> Tensor:
    """The flow from frame t back to frame K, and F_{t+1}, both (B,2,H,W) in pixels -> the flow from t+1 back to K."""
    return flow + backward_warp(path, flow)


def composed_flow(flow: Tensor) -> Tensor:
    """Flows F_{K+1}..F_T (B,P,2,H,W) between neighbours -> the flows from frames K+1..T back to frame K."""
    paths = [flow[:, 0]]
    for t in range(1, flow.shape[1]):
        paths.append(extend_path(paths[-1], flow[:, t]))
    return torch.stack(paths, dim=1)


def warp_once(frame: Tensor, flow: Tensor) -> Tensor:
    """frame V_K (B,C,H,W) and F_{K+1}..F_T (B,P,2,H,W) -> V_K warped by the composed flows (B,P,C,H,W)."""
    steps = flow.shape[1]
    paths = composed_flow(flow).flatten(0, 1)
    return backward_warp(frame.repeat_interleave(steps, dim=0), paths).unflatten(0, (-1, steps))
