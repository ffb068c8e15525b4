"""The paper's equations in plain PyTorch: what the fused kernels must equal, and what runs where none is available.

Shape legend: B batch, T time, C channels, H W image, M memory tokens. Flow is in pixels, x then y. Nothing here checks
its arguments (the public functions of the op files do) and nothing imports Triton. The definitions of the convolutions
are in their op files, that of TV-L1 is in `tvl1_reference.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _gather(image: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Pixels of image (B,C,H,W) at integer coordinates x, y (B,H',W') that lie inside it: (B,C,H',W')."""
    b, c, _, w = image.shape
    index = (y * w + x).flatten(1)[:, None].expand(b, c, -1)
    return image.flatten(2).gather(2, index).view(b, c, *x.shape[1:])


def backward_warp(image: Tensor, flow: Tensor, padding: str = "border") -> Tensor:
    """Eq. 4: out(p) = image(p + flow(p)), bilinear, image (B,C,H,W), flow (B,2,H,W) -> (B,C,H,W) in image's dtype.

    `border` repeats the edge pixel, `zeros` surrounds the image with zeros. The gradient of the flow is that of the
    interpolated image, right-sided where a coordinate is an integer, and zero where a coordinate lies on or beyond the
    end of the interpolated range: [0, size-1] for `border`, [-1, size] for `zeros`. A NaN flow gives NaN at that pixel.
    """
    h, w = image.shape[-2:]
    compute = torch.promote_types(torch.promote_types(image.dtype, flow.dtype), torch.float32)
    flow = flow.to(compute)
    margin = 0 if padding == "border" else 1
    weights, taps = [], []
    for axis, size in ((0, w), (1, h)):
        shape = (1, 1, w) if axis == 0 else (1, h, 1)
        coordinate = flow[:, axis] + torch.arange(size, device=flow.device, dtype=compute).view(shape)
        low, high = -margin, size - 1 + margin
        moving = (coordinate > low) & (coordinate < high)
        # clamped before the conversion to integers: a float beyond int64 converts to anything
        coordinate = torch.where(moving, coordinate, coordinate.detach().clamp(low, high))
        first = coordinate.detach().nan_to_num(0.0).floor().clamp(max=max(high - 1, low))
        weights.append((coordinate - first)[:, None])
        taps.append((first.long(), first.long() + 1))

    out = torch.zeros((), device=image.device, dtype=compute)
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = taps[0][dx], taps[1][dy]
            value = _gather(image, x.clamp(0, w - 1), y.clamp(0, h - 1)).to(compute)
            if padding == "zeros":
                value = value * ((x >= 0) & (x < w) & (y >= 0) & (y < h))[:, None]
            wx = weights[0] if dx else 1 - weights[0]
            wy = weights[1] if dy else 1 - weights[1]
            out = out + wy * wx * value
    return out.to(image.dtype)


def convlstm_gates(gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """State update of a ConvLSTM without peepholes (Shi et al. 2015): gates (B,4C,H,W) in the order i, f, o, g and the
    cell state (B,C,H,W) -> (hidden in the gates' dtype, new cell in the cell's dtype)."""
    i, f, o, g = gates.to(torch.promote_types(gates.dtype, cell.dtype)).chunk(4, dim=1)
    new_cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * new_cell.tanh()
    return hidden.to(gates.dtype), new_cell.to(cell.dtype)


def condense(memory: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Eq. 1 for every prefix at once: memory (B,T,C), packed projections weight (3C,C), bias (3C) in the order q, k, v
    -> (B,T,C). Row t is x_t + softmax(q_t K_{1..t}^T) V_{1..t}: the last row of the attention over the first t entries
    sees exactly those entries, so condensing every prefix is one causal attention. There is no 1/sqrt(C)."""
    q, k, v = F.linear(memory, weight, bias).chunk(3, dim=-1)
    t = memory.shape[1]
    future = torch.ones(t, t, dtype=torch.bool, device=memory.device).triu(1)
    scores = (q @ k.mT).masked_fill(future, float("-inf"))
    return memory + scores.softmax(dim=-1) @ v


def recall(feature: Tensor, query: Tensor | None, key: Tensor | None, value: Tensor) -> Tensor:
    """Eq. 2: feature and query (B,C,H,W), key and value (B,M,C) -> feature + softmax(query key^T) value, no 1/sqrt(C).

    With M = 1 the softmax over one key is identically 1: the value is added at every position, and query and key may be
    None (their gradient is exactly zero)."""
    if value.shape[1] == 1:
        return feature + value.mT[..., None]
    assert query is not None and key is not None
    scores = query.flatten(2).mT @ key.mT
    return feature + (scores.softmax(dim=-1) @ value).mT.reshape(feature.shape)


def modulate(context: Tensor, gamma: Tensor, beta: Tensor, before: Sequence[Tensor] = ()) -> Tensor:
    """Eq. 7: channel-wise gamma * context + beta, context (B,C,H,W), gamma and beta (B,C), concatenated behind the
    features `before` (B,Ci,H,W)."""
    out = torch.addcmul(beta[..., None, None], gamma[..., None, None], context)
    return torch.cat((*before, out), dim=1) if before else out


def flow_loss(prediction: Tensor, target: Tensor, frames: Tensor, smooth_weight: float) -> Tensor:
    """Eq. 8 = Eq. 9 + smooth_weight * Eq. 10: flows (B,P,2,H,W) and the true frames (B,P,C,H,W) -> a scalar.

    L_flow: mean over batch and pixels of the squared length of the error, summed over the P steps. L_smooth: mean over
    batch, pixels and the two flow components of |dx f| w_x + |dy f| w_y, summed over the steps, with forward
    differences (0 in the last column or row) and w = exp(-mean over channels of |the frame's difference|)."""
    b, _, _, h, w = prediction.shape
    data_term = (prediction - target).square().sum() / (b * h * w)
    smooth_term = prediction.new_zeros(())
    for dim in (-1, -2):
        edge_weight = frames.diff(dim=dim).abs().mean(dim=2, keepdim=True).neg().exp()
        smooth_term = smooth_term + (prediction.diff(dim=dim).abs() * edge_weight).sum() / (2 * b * h * w)
    return data_term + smooth_weight * smooth_term
