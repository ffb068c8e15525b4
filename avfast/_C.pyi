from collections.abc import Sequence

with_cuda: bool

def cuda_devices() -> list[str]: ...
def instruction_sets() -> list[str]: ...

# the fused ops: csrc/fused/ops.def says what the addresses lead to
def gates_forward(
    *, gates: int, cell: int, hidden: int, new_cell: int, rows: int, area: int, threads: int, fp64: bool
) -> None: ...
def gates_backward(
    *, gates: int, cell: int, grad_hidden: int, grad_new_cell: int, grad_gates: int, grad_cell: int, rows: int,
    area: int, threads: int, fp64: bool,
) -> None: ...  # fmt: skip
def warp_forward(
    *, image: int, flow: int, out: int, batch: int, channels: int, height: int, width: int, zeros: bool,
    threads: int, fp64: bool,
) -> None: ...  # fmt: skip
def warp_backward(
    *, image: int, flow: int, grad_out: int, grad_image: int, grad_flow: int, batch: int, channels: int,
    height: int, width: int, zeros: bool, threads: int, fp64: bool,
) -> None: ...  # fmt: skip
def flow_loss(
    *, prediction: int, target: int, frames: int, grad: int, loss: int, images: int, channels: int, height: int,
    width: int, data_weight: float, smooth_weight: float, threads: int, fp64: bool,
) -> None: ...  # fmt: skip
def modulate_forward(
    *, before: Sequence[int], context: int, gamma: int, beta: int, out: int, before_channels: Sequence[int],
    batch: int, channels: int, area: int, threads: int, fp64: bool,
) -> None: ...  # fmt: skip
def modulate_backward(
    *, context: int, gamma: int, grad_out: int, grad_context: int, grad_gamma: int, grad_beta: int, batch: int,
    channels: int, area: int, grad_stride: int, threads: int, fp64: bool,
) -> None: ...  # fmt: skip

# row_sizes, column_sizes: the five numbers of AxisSizes in csrc/fused/ops.h
def gather_tiles(
    *, map: int, rows: int, columns: int, products: int, batch: int, channels: int, product_stride: int,
    stride: int, padding: int, row_sizes: Sequence[int], column_sizes: Sequence[int], threads: int, fp64: bool,
) -> None: ...  # fmt: skip
def scatter_tiles(
    *, products: int, rows: int, columns: int, map: int, batch: int, channels: int, product_stride: int,
    stride: int, padding: int, row_sizes: Sequence[int], column_sizes: Sequence[int], threads: int, fp64: bool,
) -> None: ...  # fmt: skip

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
    *, a: int, b: int, flow: int, pairs: int, height: int, width: int, params: TVL1Params, scratch: int, stream: int,
) -> None: ...  # fmt: skip
