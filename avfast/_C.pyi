with_cuda: bool

def cuda_devices() -> list[str]: ...
def has_environment(name: str) -> bool: ...
def instruction_sets() -> list[str]: ...

class TVL1Params:
    def __init__(
        self,
        *,
        chambolle_pock: bool,
        opencv: bool,
        tau: float,
        lambda_: float,
        theta: float,
        scale_step: float,
        scales: int,
        warps: int,
        coarse_warps: int,
        outer_iterations: int,
        iterations: int,
        epsilon: float,
        median: int,
        presmooth: float,
    ) -> None: ...

def tvl1_flow(
    a: int, b: int, flow: int, pairs: int, height: int, width: int, params: TVL1Params, threads: int
) -> None: ...
def tvl1_cuda_scratch(pairs: int, height: int, width: int, params: TVL1Params) -> int: ...
def tvl1_flow_cuda(
    a: int, b: int, flow: int, pairs: int, height: int, width: int, params: TVL1Params, scratch: int, stream: int
) -> None: ...
