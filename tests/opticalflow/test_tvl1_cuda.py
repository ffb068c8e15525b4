"""The CUDA engine of TV-L1: held to its registers, run on the CPU thread by thread, and on a GPU if there is one."""

from __future__ import annotations

import ctypes
import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from avfast.opticalflow.tvl1 import PRESETS, TVL1Params, tvl1_flow

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "tvl1_cuda.json"
SETUP = runpy.run_path(str(ROOT / "setup.py"))
NVCC = shutil.which("nvcc")
COMPILER = shutil.which("c++") or shutil.which("g++")

VARIANTS = {
    "fast": PRESETS["fast"],
    "chambolle-pock": PRESETS["chambolle-pock"],
    "median5": TVL1Params(median=5, warps=2, iterations=7),
    "no-median": TVL1Params(median=1, scale_step=0.8, warps=3, iterations=13),
    "smoothed": TVL1Params(solver="chambolle-pock", tau=0.35, presmooth=0.8, warps=2, iterations=6, scales=2),
}


def moved_waves(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth texture (N,1,H,W), moved by another 1 to 2 px in every pair."""
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")

    def waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 0.5 + ((0.55 * x + 0.2 * y).sin() + (0.13 * x - 0.47 * y).sin() + (0.054 * x + 0.21 * y).sin()) / 7

    still = torch.stack([waves(x + 9 * i, y) for i in range(n)])
    moved = torch.stack([waves(x + 9 * i - 1.5 + 0.4 * i, y + 1) for i in range(n)])
    return moved[:, None], still[:, None]


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_registers_and_stack_of_every_kernel(tmp_path: Path) -> None:
    """Against tests/golden/tvl1_cuda.json, which is kept per release of nvcc; no kernel may spill."""
    command = [str(NVCC), *SETUP["CUDA_FLAGS"], "-Xptxas", "-v", "-cubin"]
    release = re.search(
        r"release (\d+\.\d+)", subprocess.run([str(NVCC), "--version"], capture_output=True, text=True).stdout
    )
    assert release
    found: dict[str, dict[str, list[int]]] = {}
    for arch in ("sm_80", "sm_90"):
        run = subprocess.run(
            [*command, f"-arch={arch}", "csrc/tvl1/cuda/flow_cuda.cu", "-o", str(tmp_path / "o.cubin")],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        blocks = re.findall(
            r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
            r".*?Used (\d+) registers",
            run.stderr,
            re.DOTALL,
        )
        kernels = {}
        for name, stack, stores, loads, registers in blocks:
            kernel = re.search(r"\d+([a-z_]+_kernel)(I\w+?E)?", name)
            assert kernel, name
            variant = re.search(r"Zach|ChambollePock|Li\d", kernel[2] or "")
            assert (int(stack), int(stores), int(loads)) == (0, 0, 0), f"{name} on {arch} spills"
            kernels[kernel[1] + (f"<{variant[0]}>" if variant else "")] = int(registers)
        found[arch] = dict(sorted(kernels.items()))
    golden = json.loads(GOLDEN.read_text())
    if release[1] in golden:
        assert found == golden[release[1]]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "tvl1.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wno-unknown-pragmas"]
    subprocess.run([COMPILER, *flags, "tests/native/tvl1_on_host.cpp", "-o", library], cwd=ROOT, check=True)
    return ctypes.CDLL(str(library))


def flow_on_host(library: ctypes.CDLL, a: torch.Tensor, b: torch.Tensor, p: TVL1Params, seed: int = 0) -> torch.Tensor:
    a, b = (255 * x.squeeze(1).contiguous() for x in (a, b))
    flow = torch.full((len(a), 2, *a.shape[1:]), float("nan"))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (a, b, flow))
    numbers = {"zach": 0, "chambolle-pock": 1, "avfast": 0, "opencv": 1}
    for name, value in vars(p).items():
        library.set_param(name.encode(), ctypes.c_double(numbers.get(value, value)))
    library.tvl1_on_host(*pointers, ctypes.c_int64(len(a)), *a.shape[1:], ctypes.c_uint(seed))
    return flow


# whole in a thread block, up to 64x64; in a cluster of three, up to 96x96; in several tiles, whose edges are not the
# image's
@pytest.mark.parametrize(
    "size",
    [(1, 1), (17, 65), (48, 48), (64, 64), (5, 300), (70, 59), (96, 96), (50, 128), (33, 104), (66, 130), (97, 131)],
)
@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_kernels_on_the_cpu_equal_the_cpu_engine(
    on_host: ctypes.CDLL, size: tuple[int, int], params: TVL1Params
) -> None:
    a, b = moved_waves(4 if size == (70, 59) else 2, *size)
    assert torch.equal(flow_on_host(on_host, a, b, params), tvl1_flow(a, b, preset=params))


@pytest.mark.parametrize("size", [(33, 47), (70, 59), (66, 130)])
def test_kernels_do_not_depend_on_the_order_of_threads(on_host: ctypes.CDLL, size: tuple[int, int]) -> None:
    a, b = moved_waves(1, *size)
    params = TVL1Params(warps=2, iterations=6)
    expected = flow_on_host(on_host, a, b, params)
    for seed in range(1, 4):
        assert torch.equal(flow_on_host(on_host, a, b, params, seed), expected)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@GPU
@pytest.mark.parametrize(
    "size", [(1, 1), (17, 65), (48, 48), (64, 64), (70, 59), (96, 96), (50, 128), (66, 130), (480, 640)]
)
@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_gpu_equals_the_cpu_engine(size: tuple[int, int], params: TVL1Params) -> None:
    a, b = moved_waves(2, *size)
    flow = tvl1_flow(a.cuda(), b.cuda(), preset=params, backend="cpp")
    assert flow.is_cuda
    assert torch.equal(flow.cpu(), tvl1_flow(a, b, preset=params))


@GPU
@pytest.mark.parametrize("size", [(48, 48), (96, 96), (96, 131)])
def test_gpu_in_a_cuda_graph(size: tuple[int, int]) -> None:
    a, b = (x.cuda() for x in moved_waves(3, *size))
    expected = tvl1_flow(a, b)
    static_a, static_b = torch.zeros_like(a), torch.zeros_like(b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flow = tvl1_flow(static_a, static_b)
    static_a.copy_(a)
    static_b.copy_(b)
    graph.replay()
    assert torch.equal(flow, expected)


@GPU
def test_gpu_chunks_and_presets_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (x.cuda() for x in moved_waves(5, 70, 90))
    expected = tvl1_flow(a, b)
    monkeypatch.setattr("avfast.kernels.tvl1._SCRATCH_FLOATS", 1)
    assert torch.equal(tvl1_flow(a, b), expected)
    assert torch.equal(tvl1_flow(a, b, preset="opencv").cpu(), tvl1_flow(a.cpu(), b.cpu(), preset="opencv"))
