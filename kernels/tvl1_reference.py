"""TV-L1 optical flow: its parameters and its definition in plain PyTorch.

Energy, for images a and b and the flow u = (u1, u2) on a's grid (Zach, Pock and Bischof, DAGM 2007):

    sum over pixels of  |grad u1| + |grad u2| + lambda |b(p + u(p)) - a(p)|

Coarse to fine over a pyramid, as long as the shorter side keeps 16 pixels. Per level and warp, b and its derivatives
are warped bicubically and the brightness difference is linearised around the flow so far: rho(u) = rho_c + ix u1 +
iy u2. Primal-dual iterations follow, and a median filter of the flow. Two schemes differ in what surrounds this:

              pyramid          warped point outside the image   median                      number of iterations
    avfast    area average     data term off                    after a warp's iterations   fixed
    opencv    bilinear         black there                      before every round          until converged, or fixed

Shapes: N pairs, H W pixels; flow in pixels, x then y. Grey levels 0..255. Every step is elementwise and in the compiled
engine's order, so that the two differ by rounding at most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from avfast.errors import InputError

MIN_SIDE = 16


@dataclass(frozen=True)
class TVL1Params:
    """Parameters of TV-L1. Raises InputError for a value out of range."""

    solver: Literal["zach", "chambolle-pock"] = "zach"
    """`zach`: relaxed by theta, as published and as in OpenCV; `chambolle-pock`: primal-dual on the energy itself."""
    scheme: Literal["avfast", "opencv"] = "avfast"
    """What surrounds the solver. `avfast`: pyramid by area average, no data term where a point leaves the image, median
    after a warp's iterations. `opencv`: bilinear pyramid, black around the image, median before them."""
    tau: float = 0.25
    """Step: of the dual (zach; at most 0.25 is known to converge), of the primal (chambolle-pock; any)."""
    lambda_: float = 0.15
    """Weight of the data term for grey levels 0..255; smaller is smoother."""
    theta: float = 0.3
    """Coupling of zach's relaxation; chambolle-pock does not use it."""
    scale_step: float = 0.5
    """Size of a pyramid level as a share of the next finer one, 0.5 to 0.95."""
    scales: int = 100
    """Largest number of pyramid levels; the shorter side never falls below 16 pixels."""
    warps: int = 5
    """Linearisations per pyramid level."""
    coarse_warps: int = 0
    """The same for all levels but the finest, and for an only one; 0: as many as `warps`. Coarse levels are small and
    find the large motions: 8 of them and 2 of the finest take 0.6 of the time of 5 of each and err as little."""
    outer_iterations: int = 1
    """Rounds of iterations per warp; in scheme `opencv` each begins with the median filter."""
    iterations: int = 20
    """Iterations per round."""
    epsilon: float = 0.0
    """A warp ends when the root mean squared change of the flow in one iteration, in pixels, is not above it; 0: all
    iterations are done, always the same work whatever the content."""
    median: int = 3
    """Side of the median filter of the flow: 1 (off), 3 or 5 pixels."""
    presmooth: float = 0.0
    """Standard deviation of the Gaussian applied to both images first, in pixels; 0 is off."""

    def __post_init__(self) -> None:
        least = {"scales": 1, "warps": 1, "coarse_warps": 0, "outer_iterations": 1, "iterations": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if type(value) is not int or not smallest <= value < 1 << 31:
                raise InputError(f"{name} is {value!r}, expected a whole number of at least {smallest}")
        # far inside what fp32 holds, also squared
        ranges = {name: (1e-6, 1e6) for name in ("tau", "lambda_", "theta")}
        ranges |= {"scale_step": (0.5, 0.95), "epsilon": (0.0, 1e6), "presmooth": (0.0, 10.0)}
        for name, (lowest, highest) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not lowest <= value <= highest:
                raise InputError(f"{name} is {value!r}, expected a number from {lowest:g} to {highest:g}")
        choices = {"solver": ("zach", "chambolle-pock"), "scheme": ("avfast", "opencv"), "median": (1, 3, 5)}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if type(value) is not type(allowed[0]) or value not in allowed:
                raise InputError(f"{name} is {value!r}, expected one of {', '.join(map(str, allowed))}")


def tvl1_flow_reference(a: Tensor, b: Tensor, params: TVL1Params) -> Tensor:
    """TV-L1 flow from a to b: a(p) ~ b(p + flow(p)).

    a, b: (N,H,W) float32, grey levels 0..255. Returns (N,2,H,W) float32, pixels, x then y.
    Source: Zach, Pock and Bischof (DAGM 2007); solver "chambolle-pock": Chambolle and Pock (JMIV 2011), algorithm 1."""
    n = len(a)
    if a.numel() == 0:
        return a.new_zeros(n, 2, *a.shape[1:])
    if params.epsilon > 0 and n > 1:
        # every pair stops for itself
        return torch.cat([tvl1_flow_reference(a[i : i + 1], b[i : i + 1], params) for i in range(n)])
    pyramid = [(_smooth(a, params.presmooth), _smooth(b, params.presmooth))]
    for height, width in level_sizes(a.shape[1], a.shape[2], params)[1:]:
        finer_a, finer_b = pyramid[-1]
        pyramid.append((_shrink(finer_a, height, width, params), _shrink(finer_b, height, width, params)))
    flow = a.new_zeros(n, 2, *pyramid[-1][0].shape[1:])
    for i, (level_a, level_b) in reversed(list(enumerate(pyramid))):
        height, width = level_a.shape[1:]
        warps = warps_of(i, len(pyramid), params)
        flow = _solve_level(level_a, level_b, _enlarge(flow, height, width, params), warps, params)
    return flow


def level_sizes(height: int, width: int, params: TVL1Params) -> list[tuple[int, int]]:
    """(height, width) of every pyramid level, finest first."""
    step = _float32(params.scale_step).item()
    sizes = [(height, width)]
    while len(sizes) < params.scales:
        height, width = (math.floor(size * step + 0.5) for size in sizes[-1])
        if min(height, width) < MIN_SIDE or height == sizes[-1][0] or width == sizes[-1][1]:
            break
        sizes.append((height, width))
    return sizes


def warps_of(level: int, levels: int, params: TVL1Params) -> int:
    """Linearisations of level number `level` of `levels`, of which 0 is the finest."""
    coarse = level > 0 or levels == 1
    return params.coarse_warps if coarse and params.coarse_warps > 0 else params.warps


def _solve_level(a: Tensor, b: Tensor, flow: Tensor, warps: int, params: TVL1Params) -> Tensor:
    dx = 0.5 * (_shift(b, 2, 1) - _shift(b, 2, -1))
    dy = 0.5 * (_shift(b, 1, 1) - _shift(b, 1, -1))
    fields = torch.stack([b, dx, dy], 1)
    iterate = _zach if params.solver == "zach" else _chambolle_pock
    opencv = params.scheme == "opencv"
    limit = params.epsilon**2 * a[0].numel()
    # the dual of (grad u1, grad u2): N, flow component, derivative, H, W
    dual = flow.new_zeros(flow.shape[0], 2, 2, *flow.shape[2:])
    for _ in range(warps):
        grad, rho_c, inv_grad = _linearise(a, fields, flow, opencv)
        converged = False
        for _ in range(params.outer_iterations):
            if converged:
                break
            if opencv:
                flow = _median(flow, params.median)
            for _ in range(params.iterations):
                before = flow
                flow, dual = iterate(flow, dual, grad, rho_c, inv_grad, params)
                converged = params.epsilon > 0 and not (flow - before).square().double().sum() > limit
                if converged:
                    break
        if not opencv:
            flow = _median(flow, params.median)
    return flow


def _zach(
    u: Tensor, dual: Tensor, grad: Tensor, rho_c: Tensor, inv_grad: Tensor, params: TVL1Params
) -> tuple[Tensor, Tensor]:
    """v = threshold(u), u = v + theta div p, then Chambolle's step of the dual, kept as theta p."""
    rho = rho_c + grad[:, 0] * u[:, 0] + grad[:, 1] * u[:, 1]
    limit = (_float32(params.lambda_) * _float32(params.theta)).item()
    u = u + (rho * inv_grad).clamp(-limit, limit)[:, None] * grad + _divergence(dual)
    g = _gradient(u)
    scale = _reciprocals(1 + (_float32(params.tau) / _float32(params.theta)) * _norm(g))
    return u, (dual + params.tau * g) * scale[:, :, None]


def _chambolle_pock(
    u: Tensor, dual: Tensor, grad: Tensor, rho_c: Tensor, inv_grad: Tensor, params: TVL1Params
) -> tuple[Tensor, Tensor]:
    """u' = prox(u + tau div p), then the projected step of the dual at 2 u' - u, kept as tau p; tau sigma = 1/8."""
    w = u + _divergence(dual)
    rho = rho_c + grad[:, 0] * w[:, 0] + grad[:, 1] * w[:, 1]
    limit = (_float32(params.lambda_) * _float32(params.tau)).item()
    new = w + (rho * inv_grad).clamp(-limit, limit)[:, None] * grad
    q = dual + 0.125 * _gradient(new + (new - u))
    norm = (1 / _float32(params.tau)) * _norm(q)
    return new, q * _reciprocals(norm.clamp(min=1))[:, :, None]


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


def _reciprocals(norm: Tensor) -> Tensor:
    """1 / norm (N,2,H,W) by one division for both components."""
    both = 1 / (norm[:, 0] * norm[:, 1])
    return torch.stack([norm[:, 1] * both, norm[:, 0] * both], 1)


def _linearise(a: Tensor, fields: Tensor, flow: Tensor, opencv: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Warp (b, b_x, b_y) by the flow; returns grad (N,2,H,W), rho_c and -1/|grad|^2 (0 for no gradient), (N,H,W)."""
    height, width = a.shape[1:]
    x = torch.arange(width, device=a.device) + flow[:, 0]
    y = torch.arange(height, device=a.device)[:, None] + flow[:, 1]
    # a point 2 outside has all its taps outside
    reach = 2 if opencv else 0
    cx, cy = x.clamp(-reach, width - 1 + reach), y.clamp(-reach, height - 1 + reach)
    inside = 1.0 if opencv else ((x == cx) & (y == cy)).to(a.dtype)
    warped, warped_x, warped_y = _bicubic(fields, cx, cy, "zeros" if opencv else "border").unbind(1)
    ix, iy = warped_x * inside, warped_y * inside
    squared = ix * ix + iy * iy
    rho_c = (warped - a) * inside - ix * flow[:, 0] - iy * flow[:, 1]
    inv_grad = torch.where(squared > 1e-9, -1 / squared, 0.0)
    return torch.stack([ix, iy], 1), rho_c, inv_grad


def _bicubic(fields: Tensor, x: Tensor, y: Tensor, padding: str) -> Tensor:
    """fields (N,C,H,W) at the points x, y (N,H,W): cubic convolution, a = -0.75; down the columns first. Around the
    image the border is repeated (`border`) or all is 0 (`zeros`)."""
    n, channels, height, width = fields.shape
    x0, y0 = x.floor(), y.floor()
    weights_x, weights_y = _cubic_weights(x - x0), _cubic_weights(y - y0)
    flat = fields.flatten(2)
    total = torch.zeros_like(fields)
    for i in range(4):
        column = x0.long() + i - 1
        line = torch.zeros_like(fields)
        for j in range(4):
            row = y0.long() + j - 1
            index = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            tap = flat.gather(2, index.reshape(n, 1, -1).expand(-1, channels, -1)).view_as(fields)
            if padding == "zeros":
                tap = tap * ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
            line = line + weights_y[j][:, None] * tap
        total = total + weights_x[i][:, None] * line
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


def _shrink(image: Tensor, height: int, width: int, params: TVL1Params) -> Tensor:
    """The next coarser level: every new pixel the mean of the area it covers, or (opencv) a bilinear sample at the step
    asked for, whatever the rounded sizes; first along y."""
    for dim, new in ((1, height), (2, width)):
        if params.scheme == "opencv":
            taps = _linear_taps(image.shape[dim], new, (1 / _float32(params.scale_step)).item(), image.device)
        else:
            taps = _area_taps(image.shape[dim], new, image.device)
        image = _resample(image, dim, taps)
    return image


def _enlarge(flow: Tensor, height: int, width: int, params: TVL1Params) -> Tensor:
    """Bilinear, pixel centres at half integers, first along y; the values grow with the image."""
    from_height, from_width = flow.shape[2:]
    if (from_height, from_width) == (height, width):
        return flow
    for dim, old, new in ((2, from_height, height), (3, from_width, width)):
        flow = _resample(flow, dim, _linear_taps(old, new, (_float32(old) / _float32(new)).item(), flow.device))
    if params.scheme == "opencv":
        return (1 / _float32(params.scale_step)).item() * flow
    grow = [(1 / (_float32(old) / _float32(new))).item() for old, new in ((from_width, width), (from_height, height))]
    return torch.tensor(grow, device=flow.device)[:, None, None] * flow


def _resample(image: Tensor, dim: int, taps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One axis of a linear map: the sum over taps (index, weight) of weight * image at index."""
    shape = [-1] + [1] * (image.dim() - dim - 1)
    parts = [weight.view(shape) * image.index_select(dim, index) for index, weight in taps]
    return sum(parts[1:], parts[0])


def _area_taps(size: int, new: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Area average from `size` to `new` pixels: at most three pixels lie under each new one."""
    taps = []
    # in units of 1/new of a pixel everything is an integer
    begin = torch.arange(new, device=device) * size
    for k in range(3):
        source = begin // new + k
        overlap = torch.minimum(begin + size, (source + 1) * new) - torch.maximum(begin, source * new)
        taps.append((source.clamp(max=size - 1), overlap.clamp(min=0).float() / size))
    return taps


def _linear_taps(size: int, new: int, ratio: float, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Bilinear samples every `ratio` pixels, pixel centres at half integers, the border repeated."""
    position = ((torch.arange(new, device=device) + 0.5) * ratio - 0.5).clamp(0, size - 1)
    first = position.long()
    weight = position - first
    return [(first, 1 - weight), ((first + 1).clamp(max=size - 1), weight)]
