with_cuda: bool

def cuda_devices() -> list[str]: ...
def instruction_sets() -> list[str]: ...
def tvl1_flow(
    a: int,
    b: int,
    flow: int,
    pairs: int,
    height: int,
    width: int,
    *,
    chambolle_pock: bool,
    opencv: bool,
    tau: float,
    lambda_: float,
    theta: float,
    scale_step: float,
    scales: int,
    warps: int,
    outer_iterations: int,
    iterations: int,
    epsilon: float,
    median: int,
    presmooth: float,
    threads: int,
    isa: str | None,
) -> None: ...
