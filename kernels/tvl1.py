"""TV-L1 optical flow: the definition in plain PyTorch, and the compiled engine (csrc/tvl1.cpp) that reproduces it.

Energy, for images a and b and the flow u = (u1, u2) on a's grid (Zach, Pock and Bischof, DAGM 2007):

    sum over pixels of  |grad u1| + |grad u2| + lambda |b(p + u(p)) - a(p)|

Coarse to fine over a pyramid (step 1/2, area average, as long as the shorter side keeps 16 pixels). Per level and warp,
b and its derivatives are warped bicubically and the brightness difference is linearised around the flow so far:
rho(u) = rho_c + ix u1 + iy u2. A fixed number of primal-dual iterations, then one median filter of the flow. Where the
warped point leaves the image the data term is off.

Shapes: N pairs, H W pixels; flow in pixels, x then y. Grey levels 0..255. Every step is elementwise and in the compiled
engine's order, so that the two differ by rounding at most.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry

if TYPE_CHECKING:
    from avfast.flow import TVL1Params

MIN_SIDE = 16


def tvl1_flow_reference(a: Tensor, b: Tensor, params: TVL1Params) -> Tensor:
    """TV-L1 flow from a to b: a(p) ~ b(p + flow(p)).

    a, b: (N,H,W) float32, grey levels 0..255. Returns (N,2,H,W) float32, pixels, x then y.
    Source: Zach, Pock and Bischof (DAGM 2007); solver "chambolle-pock": Chambolle and Pock (JMIV 2011), algorithm 1.
    """
    n, height, width = a.shape
    if a.numel() == 0:
        return a.new_zeros(n, 2, height, width)
    pyramid = [(_smooth(a, params.presmooth), _smooth(b, params.presmooth))]
    while min((s + 1) // 2 for s in pyramid[-1][0].shape[1:]) >= MIN_SIDE:
        pyramid.append((_shrink(pyramid[-1][0]), _shrink(pyramid[-1][1])))
    flow = a.new_zeros(n, 2, *pyramid[-1][0].shape[1:])
    for level_a, level_b in reversed(pyramid):
        flow = _solve_level(level_a, level_b, _enlarge(flow, *level_a.shape[1:]), params)
    return flow


def _solve_level(a: Tensor, b: Tensor, flow: Tensor, params: TVL1Params) -> Tensor:
    dx = 0.5 * (_shift(b, 2, 1) - _shift(b, 2, -1))
    dy = 0.5 * (_shift(b, 1, 1) - _shift(b, 1, -1))
    fields = torch.stack([b, dx, dy], 1)
    iterate = _zach if params.solver == "zach" else _chambolle_pock
    # the dual of (grad u1, grad u2): N, flow component, derivative, H, W
    dual = flow.new_zeros(flow.shape[0], 2, 2, *flow.shape[2:])
    for _ in range(params.warps):
        grad, rho_c, inv_grad = _linearise(a, fields, flow)
        for _ in range(params.iterations):
            flow, dual = iterate(flow, dual, grad, rho_c, inv_grad, params)
        flow = _median(flow, params.median)
    return flow


def _zach(
    u: Tensor, dual: Tensor, grad: Tensor, rho_c: Tensor, inv_grad: Tensor, params: TVL1Params
) -> tuple[Tensor, Tensor]:
    """v = threshold(u), u = v + theta div p, then Chambolle's step of the dual, kept as theta p."""
    rho = rho_c + grad[:, 0] * u[:, 0] + grad[:, 1] * u[:, 1]
    limit = (_float32(params.lambda_) * _float32(params.theta)).item()
    u = u + (-rho * inv_grad).clamp(-limit, limit)[:, None] * grad + _divergence(dual)
    g = _gradient(u)
    norm = _norm(g)
    scale = 1 / (1 + (_float32(params.tau) / _float32(params.theta)) * norm)
    return u, (dual + params.tau * g) * scale[:, :, None]


def _chambolle_pock(
    u: Tensor, dual: Tensor, grad: Tensor, rho_c: Tensor, inv_grad: Tensor, params: TVL1Params
) -> tuple[Tensor, Tensor]:
    """u' = prox(u + tau div p), then the projected step of the dual at 2 u' - u, kept as tau p; tau sigma = 1/8."""
    w = u + _divergence(dual)
    rho = rho_c + grad[:, 0] * w[:, 0] + grad[:, 1] * w[:, 1]
    limit = (_float32(params.lambda_) * _float32(params.tau)).item()
    new = w + (-rho * inv_grad).clamp(-limit, limit)[:, None] * grad
    q = dual + 0.125 * _gradient(new + (new - u))
    norm = (1 / _float32(params.tau)) * _norm(q)
    return new, q * (1 / norm.clamp(min=1))[:, :, None]


def _float32(value: float) -> Tensor:
    """A 0-d tensor, so that constants are combined in float32 as the compiled engine does."""
    return torch.tensor(value, dtype=torch.float32)


def _shift(x: Tensor, dim: int, by: int) -> Tensor:
    """x(i + by) along `dim`, the border repeated."""
    index = (torch.arange(x.shape[dim], device=x.device) + by).clamp(0, x.shape[dim] - 1)
    return x.index_select(dim, index)


def _gradient(u: Tensor) -> Tensor:
    """Forward differences (N,2,H,W) -> (N,2,2,H,W), 0 past the last column and row."""
    return torch.stack([_shift(u, 3, 1) - u, _shift(u, 2, 1) - u], 2)


def _divergence(q: Tensor) -> Tensor:
    """Backward differences (N,2,2,H,W) -> (N,2,H,W), 0 before the first column and row."""
    x, y = q[:, :, 0], q[:, :, 1]
    return (x - F.pad(x, (1, 0))[..., :-1]) + (y - F.pad(y, (0, 0, 1, 0))[..., :-1, :])


def _norm(g: Tensor) -> Tensor:
    """Length of the derivative vectors, (N,2,2,H,W) -> (N,2,H,W)."""
    # exactly rounded, as the compiled engine's: PyTorch's own float32 root on a CPU is 1 ulp off for 17 % of values
    return (g[:, :, 0] * g[:, :, 0] + g[:, :, 1] * g[:, :, 1]).double().sqrt().float()


def _linearise(a: Tensor, fields: Tensor, flow: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Warp (b, b_x, b_y) by the flow; returns grad (N,2,H,W), rho_c and 1/|grad|^2 (0 for no gradient), (N,H,W)."""
    height, width = a.shape[1:]
    x = torch.arange(width, device=a.device) + flow[:, 0]
    y = torch.arange(height, device=a.device)[:, None] + flow[:, 1]
    cx, cy = x.clamp(0, width - 1), y.clamp(0, height - 1)
    inside = ((x == cx) & (y == cy)).to(a.dtype)
    warped, warped_x, warped_y = _bicubic(fields, cx, cy).unbind(1)
    ix, iy = warped_x * inside, warped_y * inside
    squared = ix * ix + iy * iy
    rho_c = (warped - a) * inside - ix * flow[:, 0] - iy * flow[:, 1]
    inv_grad = torch.where(squared > 1e-9, 1 / squared, 0.0)
    return torch.stack([ix, iy], 1), rho_c, inv_grad


def _bicubic(fields: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """fields (N,C,H,W) at the points x, y (N,H,W) inside the image: cubic convolution, a = -0.75, border repeated."""
    n, channels, height, width = fields.shape
    x0, y0 = x.floor(), y.floor()
    weights_x, weights_y = _cubic_weights(x - x0), _cubic_weights(y - y0)
    flat = fields.flatten(2)
    total = torch.zeros_like(fields)
    for j in range(4):
        rows = (y0.long() + j - 1).clamp(0, height - 1) * width
        line = torch.zeros_like(fields)
        for i in range(4):
            index = rows + (x0.long() + i - 1).clamp(0, width - 1)
            tap = flat.gather(2, index.reshape(n, 1, -1).expand(-1, channels, -1)).view_as(fields)
            line = line + weights_x[i][:, None] * tap
        total = total + weights_y[j][:, None] * line
    return total


def _cubic_weights(t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the taps -1, 0, 1, 2 for a point t in [0, 1) past tap 0 (Keys 1981)."""
    return (
        ((-0.75 * t + 1.5) * t - 0.75) * t,
        (1.25 * t - 2.25) * t * t + 1.0,
        ((-1.25 * t + 1.5) * t + 0.75) * t,
        (0.75 * t - 0.75) * t * t,
    )


def _median(flow: Tensor, side: int) -> Tensor:
    """Median over side x side pixels of each flow component, the border repeated."""
    if side == 1:
        return flow
    reach = side // 2
    padded = F.pad(flow, (reach,) * 4, mode="replicate")
    return padded.unfold(2, side, 1).unfold(3, side, 1).flatten(4).median(4).values


def _smooth(image: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian over 3 sigma each way, the border repeated; first along x."""
    if sigma == 0:
        return image
    sigma = _float32(sigma).item()
    radius = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * k * k / (sigma * sigma)) for k in range(-radius, radius + 1)]
    for dim in (2, 1):
        total = torch.zeros_like(image)
        for k, weight in enumerate(weights):
            total = total + weight / sum(weights) * _shift(image, dim, k - radius)
        image = total
    return image


def _shrink(image: Tensor) -> Tensor:
    """Half size, rounded up: every new pixel is the mean of the area it covers, at most 3 x 3 pixels; first along x."""
    for dim in (2, 1):
        size = image.shape[dim]
        half = (size + 1) // 2
        begin = torch.arange(half, device=image.device) * size
        total = torch.zeros((), device=image.device)
        for k in range(3):
            # in units of 1/half of a pixel everything is an integer
            source = begin // half + k
            overlap = torch.minimum(begin + size, (source + 1) * half) - torch.maximum(begin, source * half)
            weight = overlap.clamp(min=0).float() / size
            tap = image.index_select(dim, source.clamp(max=size - 1))
            total = total + (weight if dim == 2 else weight[:, None]) * tap
        image = total
    return image


def _enlarge(flow: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, pixel centres at half integers; the values grow with the image."""
    n, _, from_height, from_width = flow.shape
    for dim, old, new in ((3, from_width, width), (2, from_height, height)):
        position = (torch.arange(new, device=flow.device) + 0.5) * (_float32(old) / _float32(new)) - 0.5
        position = position.clamp(0, old - 1)
        first = position.long()
        weight = position - first
        low, high = flow.index_select(dim, first), flow.index_select(dim, (first + 1).clamp(max=old - 1))
        flow = low + (weight if dim == 3 else weight[:, None]) * (high - low)
    scale = torch.tensor([width / from_width, height / from_height], dtype=flow.dtype, device=flow.device)
    return scale[:, None, None] * flow


def _reference(a: Tensor, b: Tensor, params: TVL1Params, threads: int) -> Tensor:
    # PyTorch has its own number of threads
    return tvl1_flow_reference(a, b, params)


def _native(a: Tensor, b: Tensor, params: TVL1Params, threads: int) -> Tensor:
    engine = import_module("avfast._C")
    # held by name until the engine returns: it is given bare addresses
    cpu_a, cpu_b = a.cpu().contiguous(), b.cpu().contiguous()
    flow = torch.empty(len(a), 2, *a.shape[1:])
    engine.tvl1_flow(
        cpu_a.data_ptr(),
        cpu_b.data_ptr(),
        flow.data_ptr(),
        *a.shape,
        chambolle_pock=params.solver == "chambolle-pock",
        tau=params.tau,
        lambda_=params.lambda_,
        theta=params.theta,
        warps=params.warps,
        iterations=params.iterations,
        median=params.median,
        presmooth=params.presmooth,
        threads=threads,
    )
    return flow.to(a.device)


def _not_built(*_arguments: object) -> str | None:
    try:
        import_module("avfast._C")
    except ImportError as error:
        return f"avfast._C was not built ({error}): pip install -e ."
    return None


tvl1_op = registry.define("tvl1_flow", _reference, cpp=registry.Backend(_native, _not_built, _not_built))
"""(a, b (N,H,W) float32 grey levels 0..255, params, threads) -> flow (N,2,H,W) on a's device: `avfast.tvl1_flow` checks
its arguments. The compiled engine works on the CPU, wherever the images are."""
