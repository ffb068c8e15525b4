with_cuda: bool

def cuda_devices() -> list[str]: ...
def tvl1_flow(
    a: int,
    b: int,
    flow: int,
    pairs: int,
    height: int,
    width: int,
    *,
    chambolle_pock: bool,
    tau: float,
    lambda_: float,
    theta: float,
    warps: int,
    iterations: int,
    median: int,
    presmooth: float,
    threads: int,
) -> None: ...
