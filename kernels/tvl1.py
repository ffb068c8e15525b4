"""TV-L1 optical flow as an op: the compiled engine (csrc/tvl1), or its definition in plain PyTorch (`tvl1_reference`).

The engine runs on the CPU, and on CUDA devices with the same bits; scheme `opencv` and early stopping run on the CPU
alone. Shapes: N pairs, H W pixels; flow in pixels, x then y. Grey levels 0..255."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import native, registry
from .tvl1_reference import TVL1Params, tvl1_flow_reference

_SCRATCH_FLOATS = 2**28
_NAMES = [field.name for field in fields(TVL1Params)]


def _native(a: Tensor, b: Tensor, params: TVL1Params, threads: int) -> Tensor:
    engine = native.engine()
    own = engine.TVL1Params(**vars(params))
    if a.is_cuda and engine.with_cuda and params.scheme == "avfast" and params.epsilon == 0:
        return _native_cuda(engine, a.float().contiguous(), b.float().contiguous(), own)
    flow = _native_cpu(engine, a.cpu().contiguous(), b.cpu().contiguous(), own, threads)
    return flow.to(a.device)


def _native_cpu(engine: Any, a: Tensor, b: Tensor, params: Any, threads: int) -> Tensor:
    n, height, width = a.shape
    flow = a.new_empty((n, 2, height, width), dtype=torch.float32)
    engine.tvl1_flow(
        a=a.data_ptr(), b=b.data_ptr(), flow=flow.data_ptr(), pairs=n, height=height, width=width, params=params,
        uint8=a.dtype == torch.uint8, threads=threads,
    )  # fmt: skip
    return flow


def _native_cuda(engine: Any, a: Tensor, b: Tensor, params: Any) -> Tensor:
    n, height, width = a.shape
    flow = a.new_empty(n, 2, height, width)
    size = {"height": height, "width": width, "params": params}
    floats = engine.tvl1_cuda_scratch(pairs=1, **size)
    # pairs that fit a thread block need no scratch memory; of others as many at a time as 1 GiB holds
    chunk = max(1, _SCRATCH_FLOATS // floats) if floats else max(1, n)
    scratch = a.new_empty(floats * min(chunk, n))
    with torch.cuda.device(a.device):
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, n, chunk):
            part = slice(first, first + chunk)
            addresses = {"a": a[part].data_ptr(), "b": b[part].data_ptr(), "flow": flow[part].data_ptr()}
            pairs = len(a[part])
            engine.tvl1_flow_cuda(**addresses, pairs=pairs, **size, scratch=scratch.data_ptr(), stream=stream)
    return flow


def _reference(a: Tensor, b: Tensor, params: TVL1Params, threads: int) -> Tensor:
    # PyTorch has its own number of threads
    return tvl1_flow_reference(a.float(), b.float(), params)


# the engine works where the images are, so it supports every device
_OP = registry.define("tvl1_flow", _reference, cpp=registry.Backend(_native, lambda device: native.NOT_BUILT))


def _run(a: Tensor, b: Tensor, *params: Any, threads: int, backend: str | None) -> Tensor:
    return _OP(a, b, TVL1Params(*params), threads or torch.get_num_threads(), backend=backend)


def _fake(a: Tensor, b: Tensor, *params: Any, threads: int, backend: str | None) -> Tensor:
    return a.new_empty(a.shape[0], 2, a.shape[1], a.shape[2], dtype=torch.float32)


# str, float and int are called the same in a schema
_PARAMS = ", ".join(f"{type(field.default).__name__} {field.name}" for field in fields(TVL1Params))
_SCHEMA = f"(Tensor a, Tensor b, {_PARAMS}, *, int threads, str? backend) -> Tensor"
_FLOW = registry.torch_op("tvl1_flow", _run, _fake, schema=_SCHEMA)


def tvl1_op(a: Tensor, b: Tensor, params: TVL1Params, threads: int, backend: str | None) -> Tensor:
    """Flow (...,2,H,W) on a's device of grey images a, b (...,H,W), both uint8 or both float32 in 0..255, as the torch
    op avfast::tvl1_flow: one node in a compiled or exported program. threads 0: torch.get_num_threads(). The arguments
    are not checked; `avfast.tvl1_flow` does that."""
    # by name: PyTorch 2.11's compiler cannot read a frozen dataclass's __dict__
    values = [getattr(params, name) for name in _NAMES]
    *batch, height, width = a.shape
    if len(batch) != 1:
        a, b = a.reshape(-1, height, width), b.reshape(-1, height, width)
    flow = _FLOW(a, b, *values, threads=threads, backend=backend)
    return flow if len(batch) == 1 else flow.reshape(*batch, 2, height, width)
