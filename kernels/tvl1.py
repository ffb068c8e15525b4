"""TV-L1 optical flow: the definition in plain PyTorch, and the compiled engine (csrc/tvl1.cpp) that reproduces it.

Energy, for images a and b and the flow u = (u1, u2) on a's grid (Zach, Pock and Bischof, DAGM 2007):

    sum over pixels of  |grad u1| + |grad u2| + lambda |b(p + u(p)) - a(p)|

Coarse to fine over a pyramid, as long as the shorter side keeps 16 pixels. Per level and warp, b and its derivatives
are warped bicubically and the brightness difference is linearised around the flow so far: rho(u) = rho_c + ix u1 +
iy u2. Primal-dual iterations follow, and a median filter of the flow. Two schemes differ in what surrounds this:

              pyramid          warped point outside the image   median                      number of iterations
    avfast    area average     data term off                    after a warp's iterations   fixed
    opencv    bilinear         black there                      before every round          until still, or fixed

Shapes: N pairs, H W pixels; flow in pixels, x then y. Grey levels 0..255. Every step is elementwise and in the compiled
engine's order, so that the two differ by rounding at most.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native, registry

if TYPE_CHECKING:
    from avfast.opticalflow.tvl1 import TVL1Params

MIN_SIDE = 16
_SCRATCH_FLOATS = 2**28


def tvl1_flow_reference(a: Tensor, b: Tensor, params: TVL1Params) -> Tensor:
    """TV-L1 flow from a to b: a(p) ~ b(p + flow(p)).

    a, b: (N,H,W) float32, grey levels 0..255. Returns (N,2,H,W) float32, pixels, x then y.
    Source: Zach, Pock and Bischof (DAGM 2007); solver "chambolle-pock": Chambolle and Pock (JMIV 2011), algorithm 1.
    """
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
    still = params.epsilon**2 * a[0].numel()
    # the dual of (grad u1, grad u2): N, flow component, derivative, H, W
    dual = flow.new_zeros(flow.shape[0], 2, 2, *flow.shape[2:])
    for _ in range(warps):
        grad, rho_c, inv_grad = _linearise(a, fields, flow, opencv)
        moving = True
        for _ in range(params.outer_iterations):
            if opencv and moving:
                flow = _median(flow, params.median)
            for _ in range(params.iterations if moving else 0):
                before = flow
                flow, dual = iterate(flow, dual, grad, rho_c, inv_grad, params)
                moving = params.epsilon == 0 or bool((flow - before).square().double().sum() > still)
                if not moving:
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


def _native(a: Tensor, b: Tensor, params: TVL1Params, threads: int) -> Tensor:
    engine, own = _engine(params)
    if a.is_cuda and engine.with_cuda and params.scheme == "avfast" and params.epsilon == 0:
        return _native_cuda(engine, a.float().contiguous(), b.float().contiguous(), own)
    return _native_cpu(engine, a.cpu().contiguous(), b.cpu().contiguous(), own, threads).to(a.device)


def _native_cpu(engine: Any, a: Tensor, b: Tensor, own: Any, threads: int) -> Tensor:
    """(...,H,W) -> (...,2,H,W)"""
    *batch, height, width = a.shape
    flow = a.new_empty((*batch, 2, height, width), dtype=torch.float32)
    addresses = a.data_ptr(), b.data_ptr(), flow.data_ptr()
    engine.tvl1_flow(*addresses, math.prod(batch), height, width, own, threads, a.dtype is torch.uint8)
    return flow


@cache
def _engine(params: TVL1Params) -> tuple[Any, Any]:
    """The extension module, and the parameters as its own type: 10 us to make."""
    engine = native.engine()
    fields = dict(vars(params))
    chambolle_pock, opencv = fields.pop("solver") == "chambolle-pock", fields.pop("scheme") == "opencv"
    return engine, engine.TVL1Params(chambolle_pock=chambolle_pock, opencv=opencv, **fields)


def _native_cuda(engine: Any, a: Tensor, b: Tensor, own: Any) -> Tensor:
    flow = a.new_empty(len(a), 2, *a.shape[1:])
    one = engine.tvl1_cuda_scratch(1, *a.shape[1:], own)
    # pairs that fit a thread block need no scratch memory; of others as many at a time as 1 GiB holds
    chunk = max(1, _SCRATCH_FLOATS // one) if one else max(1, len(a))
    scratch = a.new_empty(one * min(chunk, len(a)))
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, len(a), chunk):
            part = slice(first, first + chunk)
            addresses = (x[part].data_ptr() for x in (a, b, flow))
            count = len(a[part])
            engine.tvl1_flow_cuda(*addresses, count, *a.shape[1:], own, scratch.data_ptr(), stream)
    return flow


def _not_built(*_arguments: object) -> str | None:
    return native.NOT_BUILT


def _reference(a: Tensor, b: Tensor, params: TVL1Params, threads: int) -> Tensor:
    # PyTorch has its own number of threads
    return tvl1_flow_reference(a.float(), b.float(), params)


# the compiled engine works where the images are; scheme opencv and early stopping are the CPU's alone
_OP = registry.define("tvl1_flow", _reference, cpp=registry.Backend(_native, _not_built, _not_built))


def _run(a: Tensor, b: Tensor, *fields: object, threads: int, backend: str | None) -> Tensor:
    return _OP(a, b, _params(*fields), threads or torch.get_num_threads(), backend=backend)


@cache
def _params(*fields: object) -> TVL1Params:
    return import_module("avfast.opticalflow.tvl1").TVL1Params(*fields)


def _fake(a: Tensor, b: Tensor, *fields: object, threads: int, backend: str | None) -> Tensor:
    return a.new_empty(a.shape[0], 2, a.shape[1], a.shape[2], dtype=torch.float32)


_FLOW = registry.torch_op(
    "tvl1_flow(Tensor a, Tensor b, str solver, str scheme, float tau, float lambda_, float theta, float scale_step, "
    "int scales, int warps, int coarse_warps, int outer_iterations, int iterations, float epsilon, int median, "
    "float presmooth, *, int threads, str? backend) -> Tensor",
    _run,
    _fake,
)


def tvl1_op(a: Tensor, b: Tensor, params: TVL1Params, threads: int, backend: str | None) -> Tensor:
    """Flow (...,2,H,W) on a's device of grey images a, b (...,H,W), both uint8 or both float32 in 0..255, as the torch
    op avfast::tvl1_flow: one node in a compiled or exported program. threads 0: torch.get_num_threads().
    `avfast.tvl1_flow` checks."""
    if backend is None and native.plain(a, b, dtype=a.dtype):
        engine, own = _engine(params)
        return _native_cpu(engine, a, b, own, threads or torch.get_num_threads())
    p = params
    # by name: PyTorch 2.11's compiler cannot read a frozen dataclass's __dict__
    pyramid = p.solver, p.scheme, p.tau, p.lambda_, p.theta, p.scale_step, p.scales
    level = p.warps, p.coarse_warps, p.outer_iterations, p.iterations, p.epsilon, p.median, p.presmooth
    *batch, height, width = a.shape
    if len(batch) != 1:
        a, b = a.reshape(-1, height, width), b.reshape(-1, height, width)
    flow = _FLOW(a, b, *pyramid, *level, threads=threads, backend=backend)
    return flow if len(batch) == 1 else flow.reshape(*batch, 2, height, width)
