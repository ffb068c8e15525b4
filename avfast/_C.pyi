from collections.abc import Callable

with_cuda: bool

def cuda_devices() -> list[str]: ...
def instruction_sets() -> list[str]: ...

# the fused ops: csrc/fused/ops.def names their arguments; each has `fp64: bool` as well
def __getattr__(name: str) -> Callable[..., None]: ...

class TVL1Params:
    # the fields of avfast.opticalflow.tvl1.TVL1Params, all with defaults
    def __init__(self, **kwargs: str | float) -> None: ...
    def __getattr__(self, name: str) -> str | float: ...

def tvl1_flow(
    *, a: int, b: int, flow: int, pairs: int, height: int, width: int, params: TVL1Params, uint8: bool, threads: int
) -> None: ...

# these two are there where the extension was built with CUDA
def tvl1_cuda_scratch(*, pairs: int, height: int, width: int, params: TVL1Params) -> int: ...
def tvl1_flow_cuda(
    *,
    a: int,
    b: int,
    flow: int,
    pairs: int,
    height: int,
    width: int,
    params: TVL1Params,
    scratch: int,
    stream: int,
) -> None: ...
