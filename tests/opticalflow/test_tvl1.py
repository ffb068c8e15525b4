"""TV-L1: against made motion and Middlebury; the parts against OpenCV; the engine against the definition."""

from __future__ import annotations

import dataclasses
import lzma
import multiprocessing
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from avfast._C import instruction_sets
from avfast.data.mmnist import MMNISTConfig, MovingMNIST
from avfast.errors import InputError
from avfast.kernels import native
from avfast.kernels import tvl1_reference as definition
from avfast.opticalflow.tvl1 import PRESETS, TVL1Params, tvl1_flow

MIDDLEBURY = Path(__file__).parents[3] / "shared" / "data" / "middlebury"
ROOT = Path(__file__).parents[2]
EVERY = pytest.mark.parametrize("preset", list(PRESETS))
# OpenCV's black around the image makes false edges, which this preset has too
OURS = pytest.mark.parametrize("preset", [name for name in PRESETS if name != "opencv"])


def scene(height: int, width: int, dx: float = 0.0, dy: float = 0.0, phase: float = 0.0) -> torch.Tensor:
    """A smooth texture (H,W) in [0,1] that has moved by (dx, dy) pixels; a formula, so nothing is interpolated."""
    y, x = torch.meshgrid(torch.arange(height) - float(dy), torch.arange(width) - float(dx), indexing="ij")
    waves = (
        torch.sin(0.55 * x + 0.2 * y + phase) + torch.sin(0.13 * x - 0.47 * y) + torch.sin(0.06 * x * 0.9 + 0.21 * y)
    )
    return 0.5 + waves / 7


def noise_pairs(n: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Low-pass noise (N,1,H,W) and its shift by (2, -1) pixels."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    coarse = torch.rand(n, 1, height // 4 + 3, width // 4 + 3, generator=generator)
    image = torch.nn.functional.interpolate(coarse, size=(height + 4, width + 4), mode="bicubic").clamp(0, 1)
    return image[..., 2:-2, 2:-2], image[..., 1:-3, 4:]


@OURS
@pytest.mark.parametrize(("dx", "dy"), [(0.0, 0.0), (1.0, -2.0), (0.4, 0.3), (-4.0, 3.0)])
def test_recovers_a_known_translation(preset: str, dx: float, dy: float) -> None:
    """a is b moved by (dx, dy): the content of a at p lay at p - (dx, dy) in b."""
    flow = tvl1_flow(scene(60, 70, dx, dy), scene(60, 70), preset=preset)
    error = (flow + torch.tensor([dx, dy])[:, None, None])[:, 6:-6, 6:-6].norm(dim=0)
    # the cubic kernel is not exact between pixels: 0.053 px in the mean for (0.4, 0.3), below 0.006 for whole steps
    assert error.mean() < (0.01 if dx == round(dx) else 0.06)
    assert error.quantile(0.99) < 0.1


@OURS
def test_lowers_the_energy_it_is_made_to_minimise(preset: str) -> None:
    """|grad u| + lambda |b(p + u) - a| falls well below that of no motion and of the true motion's negative."""
    a, b = noise_pairs(1, 48, 64)
    flow = tvl1_flow(a, b, preset=preset)

    def energy(u: torch.Tensor) -> float:
        y, x = np.mgrid[:48, :64].astype(np.float32)
        warped = cv2.remap(b[0, 0].numpy(), x + u[0].numpy(), y + u[1].numpy(), cv2.INTER_LINEAR, None, 1)
        total_variation = u.diff(dim=1).abs().sum() + u.diff(dim=2).abs().sum()
        return float(total_variation + PRESETS[preset].lambda_ * 255 * np.abs(warped - a[0, 0].numpy()).sum())

    assert energy(flow[0]) < 0.25 * min(energy(torch.zeros(2, 48, 64)), energy(-flow[0]))


@pytest.mark.skipif(not MIDDLEBURY.exists(), reason="the Middlebury pairs are not there")
def test_middlebury_end_point_error() -> None:
    """OpenCV's default reaches 1.05 px, with a full pyramid 0.255."""
    errors: dict[str, list[float]] = {"fast": [], "quality": []}
    for name in ("RubberWhale", "Venus", "Grove2", "Urban2"):
        folder = MIDDLEBURY / name
        a, b = (cv2.imread(str(folder / f), cv2.IMREAD_GRAYSCALE) for f in ("frame10.png", "frame11.png"))
        words = np.frombuffer(lzma.decompress((folder / "flow10.flo.xz").read_bytes()), "<f4")
        truth = words[3:].reshape(*a.shape, 2).transpose(2, 0, 1)
        known = (np.abs(truth) <= 1e9).all(0)
        for preset, found in errors.items():
            difference = (tvl1_flow(a, b, preset=preset).numpy() - truth)[:, known]
            found.append(float(np.hypot(*difference).mean()))
    assert np.mean(errors["fast"]) <= 0.28, errors
    assert np.mean(errors["quality"]) <= 0.255, errors


def test_chambolle_pock_leaves_less_warp_error_on_a_digit_on_black() -> None:
    """The reason for that preset: most of the picture is without any gradient, and the shape moves as a whole."""
    b = np.zeros((48, 48), np.uint8)
    cv2.polylines(b, [np.array([[16, 14], [28, 14], [20, 34]])], False, 255, 3, cv2.LINE_AA)
    a = np.roll(b, (3, -2), (0, 1))

    def warp_error(preset: str) -> float:
        u = tvl1_flow(a, b, preset=preset).numpy()
        y, x = np.mgrid[:48, :48].astype(np.float32)
        return float(np.abs(cv2.remap(b, x + u[0], y + u[1], cv2.INTER_LINEAR).astype(float) - a).mean())

    still = float(np.abs(a.astype(float) - b).mean())
    assert warp_error("chambolle-pock") < 0.1 * still
    assert warp_error("chambolle-pock") < 0.5 * warp_error("fast")


VARIANTS = {
    **PRESETS,
    "opencv-fixed": TVL1Params(scheme="opencv", scale_step=0.8, outer_iterations=2, iterations=5, median=3),
    "median5": TVL1Params(median=5, warps=2),
    "step0.8": TVL1Params(scale_step=0.8, scales=3, warps=2),
    "no-median": TVL1Params(solver="chambolle-pock", median=1, iterations=7),
}


@pytest.mark.parametrize("size", [(1, 1), (1, 63), (17, 65), (48, 48), (63, 64)])
@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_engine_equals_the_definition(size: tuple[int, int], params: TVL1Params) -> None:
    """Bit for bit: every operation of both is exactly rounded and in the same order."""
    a, b = noise_pairs(2, *size)
    native = tvl1_flow(a, b, preset=params, backend="cpp")
    assert native.isfinite().all()
    assert torch.equal(native, tvl1_flow(a, b, preset=params, backend="reference"))


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_same_bits_on_every_instruction_set(params: TVL1Params, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise_pairs(2, 50, 77)
    flows = []
    for isa in instruction_sets():
        monkeypatch.setenv("AVFAST_ISA", isa)
        flows.append(tvl1_flow(a, b, preset=params, backend="cpp"))
    assert all(torch.equal(flow, flows[0]) for flow in flows)


def test_instruction_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVFAST_ISA", "sse9")
    with pytest.raises(ValueError, match=r"AVFAST_ISA is 'sse9', expected one of .*baseline on this CPU"):
        tvl1_flow(IMAGE, IMAGE, backend="cpp")


@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_same_bits_when_threads_share_the_rows_of_a_pair(params: TVL1Params) -> None:
    """Fewer pairs than threads, large enough to be shared out; 5 threads on 2 pairs leave one without work."""
    a, b = noise_pairs(2, 131, 190)
    expected = tvl1_flow(a, b, preset=params, threads=1)
    for threads in (2, 3, 5, 64):
        assert torch.equal(tvl1_flow(a, b, preset=params, threads=threads), expected)
        assert torch.equal(tvl1_flow(a[:1], b[:1], preset=params, threads=threads), expected[:1])


def opencv_flow(a: np.ndarray, b: np.ndarray, **settings: float) -> np.ndarray:
    if not hasattr(cv2, "optflow"):
        pytest.skip("this OpenCV is built without its contrib part")
    solver = cv2.optflow.DualTVL1OpticalFlow_create()
    for name, value in settings.items():
        getattr(solver, f"set{name}")(value)
    return solver.calc(a, b, None).transpose(2, 0, 1)


# what OpenCV does by default, and with fixed work: epsilon 0, 30 iterations, no median (protocol A)
OPENCV_MODES = pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        (
            {"Epsilon": 0.0, "OuterIterations": 1, "MedianFiltering": 1},
            {"epsilon": 0.0, "outer_iterations": 1, "median": 1},
        ),
        ({"Epsilon": 0.0, "OuterIterations": 2}, {"epsilon": 0.0, "outer_iterations": 2}),
    ],
    ids=["default", "fixed", "fixed-median"],
)


def assert_parity(a: np.ndarray, b: np.ndarray, settings: dict, changes: dict) -> None:
    """OpenCV's own rule: at least 95 % of the pixels within 0.1 px."""
    params = dataclasses.replace(PRESETS["opencv"], **changes)
    apart = np.abs(tvl1_flow(a, b, preset=params).numpy() - opencv_flow(a, b, **settings)).max(0)
    assert (apart <= 0.1).mean() >= 0.95, f"{100 * (apart <= 0.1).mean():.2f} % within 0.1 px"


@OPENCV_MODES
def test_opencv_preset_equals_opencv_on_moving_digits(settings: dict, changes: dict) -> None:
    frames = MovingMNIST(MMNISTConfig(test_clips=4), "test").clips(0, 4).frames[:, :, 0]
    for clip in frames:
        assert_parity(clip[4], clip[3], settings, changes)


@OPENCV_MODES
@pytest.mark.parametrize("name", ["RubberWhale", "Venus", "Grove2", "Urban2"])
@pytest.mark.skipif(not MIDDLEBURY.exists(), reason="the Middlebury pairs are not there")
def test_opencv_preset_equals_opencv_on_middlebury(name: str, settings: dict, changes: dict) -> None:
    """At a third of the size, where OpenCV takes a second; at full size in `make check`."""
    a, b = (cv2.imread(str(MIDDLEBURY / name / f), cv2.IMREAD_GRAYSCALE) for f in ("frame10.png", "frame11.png"))
    a, b = (cv2.resize(image, None, fx=1 / 3, fy=1 / 3, interpolation=cv2.INTER_AREA) for image in (a, b))
    assert_parity(a, b, settings, changes)


@pytest.mark.slow
@OPENCV_MODES
@pytest.mark.parametrize("name", ["RubberWhale", "Venus", "Grove2", "Urban2"])
@pytest.mark.skipif(not MIDDLEBURY.exists(), reason="the Middlebury pairs are not there")
def test_opencv_preset_equals_opencv_at_full_size(name: str, settings: dict, changes: dict) -> None:
    a, b = (cv2.imread(str(MIDDLEBURY / name / f), cv2.IMREAD_GRAYSCALE) for f in ("frame10.png", "frame11.png"))
    assert_parity(a, b, settings, changes)


@pytest.mark.filterwarnings("ignore:TorchScript is deprecated")
def test_is_one_node_of_compiled_and_exported_programs() -> None:
    a, b = noise_pairs(2, 20, 24)
    args = (a[:, 0] * 255, b[:, 0] * 255, *vars(PRESETS["fast"]).values())
    torch.library.opcheck(torch.ops.avfast.tvl1_flow, args, {"threads": 1, "backend": None})

    class Flow(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return 2 * tvl1_flow(a, b)

    expected = 2 * tvl1_flow(a, b)
    compiled = torch.compile(Flow(), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b), expected)
    grey = [(255 * x).round().to(torch.uint8) for x in (a, b)]
    assert torch.equal(compiled(*grey), 2 * tvl1_flow(*grey))
    assert torch.equal(compiled(*(x[0, 0] for x in grey)), 2 * tvl1_flow(*grey)[0])
    program = torch.export.export(Flow(), (a, b))
    assert torch.equal(program.module()(a, b), expected)
    assert sum("tvl1_flow" in str(node.target) for node in program.graph.nodes) == 1


def test_parts_of_the_definition_equal_opencv() -> None:
    """Area average, enlargement, median, Gaussian and bicubic warp, on an odd size."""
    generator = torch.Generator().manual_seed(0)
    image = 255 * torch.rand(1, 37, 50, generator=generator)
    grey = image[0].numpy()

    def check(ours: torch.Tensor, theirs: np.ndarray) -> None:
        np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-3, rtol=0)

    fast, opencv = PRESETS["fast"], PRESETS["opencv"]
    check(definition._shrink(image, 19, 25, fast)[0], cv2.resize(grey, (25, 19), interpolation=cv2.INTER_AREA))
    check(definition._shrink(image, 30, 40, fast)[0], cv2.resize(grey, (40, 30), interpolation=cv2.INTER_AREA))
    check(definition._shrink(image, 30, 40, opencv)[0], cv2.resize(grey, None, fx=0.8, fy=0.8))
    flow = image[:, None].expand(1, 2, 37, 50)
    larger = cv2.resize(grey, (99, 74), interpolation=cv2.INTER_LINEAR)
    enlarged = definition._enlarge(flow, 74, 99, fast)[0]
    check(enlarged[0], larger * 99 / 50)
    check(enlarged[1], larger * 74 / 37)
    for side in (3, 5):
        check(definition._median(flow, side)[0, 0], cv2.medianBlur(grey, side))
    check(definition._smooth(image, 0.8)[0], cv2.GaussianBlur(grey, (7, 7), 0.8, borderType=cv2.BORDER_REPLICATE))
    # steps of 1/32 px: OpenCV 4 rounds the coordinates to them
    x = torch.randint(0, 49 * 32, (1, 37, 50), generator=generator) / 32
    y = torch.randint(0, 36 * 32, (1, 37, 50), generator=generator) / 32
    remapped = cv2.remap(grey, x[0].numpy(), y[0].numpy(), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    check(definition._bicubic(image[:, None], x, y, "border")[0, 0], remapped)
    remapped = cv2.remap(grey, x[0].numpy() - 2, y[0].numpy() + 2, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)
    check(definition._bicubic(image[:, None], x - 2, y + 2, "zeros")[0, 0], remapped)


def test_divergence_is_minus_the_adjoint_of_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, 2, 5, 7, generator=generator, dtype=torch.float64)
    # what lies past the last column or row is no part of the dual: the gradient is 0 there
    q = torch.randn(1, 2, 2, 5, 7, generator=generator, dtype=torch.float64)
    q[:, :, 0, :, -1] = 0
    q[:, :, 1, -1] = 0
    torch.testing.assert_close((definition._gradient(u) * q).sum(), -(u * definition._divergence(q)).sum())


@EVERY
def test_same_bits_for_any_number_of_threads_and_split(preset: str) -> None:
    a, b = noise_pairs(7, 33, 47)
    expected = tvl1_flow(a, b, preset=preset, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(tvl1_flow(a, b, preset=preset, threads=threads), expected)
    one_by_one = [tvl1_flow(a[i : i + 1], b[i : i + 1], preset=preset) for i in range(7)]
    assert torch.equal(torch.cat(one_by_one), expected)


def test_directions() -> None:
    """The texture moves 1.5 px to the right and 1 px up per frame. Clips equal pairs, with a batch and without."""
    clip = torch.stack([scene(48, 48, 1.5 * t, -1.0 * t) for t in range(4)])[:, None]
    backward, forward = tvl1_flow(clip), tvl1_flow(clip, direction="forward")
    assert backward.shape == forward.shape == (4, 2, 48, 48)
    assert not backward[0].any() and not forward[-1].any()
    inner = (..., slice(6, -6), slice(6, -6))
    step = torch.tensor([1.5, -1.0])[:, None, None]
    torch.testing.assert_close(backward[1:][inner], -step.expand(3, 2, 36, 36), atol=0.06, rtol=0)
    torch.testing.assert_close(forward[:-1][inner], step.expand(3, 2, 36, 36), atol=0.06, rtol=0)
    assert torch.equal(backward[1:], tvl1_flow(clip[1:], clip[:-1]))
    assert torch.equal(forward[:-1], tvl1_flow(clip[:-1], clip[1:]))
    batch = torch.stack([clip, clip.flip(0)])
    assert torch.equal(tvl1_flow(batch)[0], backward)
    assert torch.equal(tvl1_flow(batch)[1], tvl1_flow(clip.flip(0)))
    assert torch.equal(tvl1_flow(clip[:1]), torch.zeros(1, 2, 48, 48))


def test_kinds_of_input() -> None:
    a, b = ((255 * scene(20, 24, dx)).round().to(torch.uint8) for dx in (1.0, 0.0))
    expected = tvl1_flow(a, b)
    assert expected.shape == (2, 20, 24) and expected.dtype == torch.float32
    read_only = a.numpy().copy()
    read_only.flags.writeable = False
    for kind_a, kind_b in [
        (a.numpy(), b.numpy()),
        (read_only, b),
        (a[None], b[None]),
        (a / 255, b / 255),
        ((a / 255).numpy(), b / 255),
        (a, b / 255),
        (a.T.contiguous().T, b.T.contiguous().T),
        (np.flip(np.flip(a.numpy(), 1).copy(), 1), b),
    ]:
        assert torch.equal(tvl1_flow(kind_a, kind_b), expected)
    assert torch.equal(tvl1_flow(a[None, None], b[None, None]), expected[None])
    assert torch.equal(tvl1_flow(a[None, None, None], b[None, None, None]), expected[None, None])
    clips = torch.stack([a, b, a])[None, :, None].expand(2, 3, 1, 20, 24)
    for direction in ("backward", "forward"):
        for clip in (clips, clips[0]):
            found = tvl1_flow(clip, direction=direction)
            assert found.dtype == torch.float32
            assert torch.equal(found, tvl1_flow(clip / 255, direction=direction))
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(tvl1_flow(a, b), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        # bfloat16 keeps 8 bits, of 255 grey levels half of one is lost
        torch.testing.assert_close(tvl1_flow((a / 255).to(dtype), (b / 255).to(dtype)), expected, atol=0.1, rtol=0)
    assert tvl1_flow(torch.zeros(0, 1, 8, 9), torch.zeros(0, 1, 8, 9)).shape == (0, 2, 8, 9)


def test_colour_is_reduced_to_luma() -> None:
    rgb = torch.stack([scene(20, 24, 1.0, phase=p) for p in (0.0, 1.0, 2.0)])
    still = torch.stack([scene(20, 24, 0.0, phase=p) for p in (0.0, 1.0, 2.0)])
    grey = [cv2.cvtColor(x.permute(1, 2, 0).numpy(), cv2.COLOR_RGB2GRAY) for x in (rgb, still)]
    torch.testing.assert_close(tvl1_flow(rgb, still), tvl1_flow(*grey), atol=1e-3, rtol=0)


def test_leaves_its_input_alone() -> None:
    clip = torch.stack([scene(20, 24, t) for t in range(3)])[None, :, None]
    before = clip.clone()
    for backend in ("cpp", "reference"):
        tvl1_flow(clip, backend=backend)
        tvl1_flow(clip[0], clip[0], backend=backend)
    assert torch.equal(clip, before)


IMAGE = torch.zeros(8, 8)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((IMAGE,), {}, r"frames has shape \(8, 8\), expected \(T,C,H,W\) or \(B,T,C,H,W\) with C = 1 or 3"),
        ((torch.zeros(8, 8, 3),) * 2, {}, r"a has shape \(8, 8, 3\), expected .*\(C,H,W\).* with C = 1 or 3"),
        ((IMAGE, torch.zeros(8, 9)), {}, r"a has shape \(8, 8\) and b \(8, 9\), expected the same shape"),
        ((torch.zeros(0, 8),) * 2, {}, r"a has shape \(0, 8\), expected at least one pixel"),
        ((IMAGE, IMAGE.long()), {}, r"b is torch.int64, expected uint8 or floating point in \[0, 1\]"),
        (([[0.0]], IMAGE), {}, "a is a list, expected a torch tensor or a numpy array"),
        ((IMAGE, IMAGE + float("nan")), {}, "b holds values that are not finite"),
        ((IMAGE - float("inf"), IMAGE), {}, "a holds values that are not finite"),
        ((IMAGE + 200, IMAGE), {}, r"a holds values from 200 to 200, expected floating point in \[0, 1\]"),
        ((IMAGE.clone().requires_grad_(), IMAGE), {}, r"a requires a gradient.*a\.detach\(\)"),
        ((IMAGE, IMAGE), {"direction": "forward"}, "direction is 'forward', but applies to a clip only"),
        ((IMAGE[None, None],), {"direction": "up"}, "direction is 'up', expected 'backward' or 'forward'"),
        ((IMAGE, IMAGE), {"preset": "slow"}, "preset is 'slow', expected 'fast', .*'chambolle-pock' or a TVL1Params"),
        ((IMAGE, IMAGE), {"threads": 0}, "threads is 0, expected a whole number of at least 1"),
        ((IMAGE, IMAGE), {"backend": "cuda"}, "backend is 'cuda', expected one of triton, cpp, torch, sdpa, reference"),
    ],
)
def test_bad_input_is_named(args: tuple, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tvl1_flow(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("solver", "brox"),
        ("tau", 0.0),
        ("lambda_", -1.0),
        ("theta", float("nan")),
        ("warps", 0),
        ("coarse_warps", -1),
        ("iterations", 2.5),
        ("median", 4),
        ("scheme", "ipol"),
        ("scale_step", 0.4),
        ("scales", 0),
        ("outer_iterations", 0),
        ("epsilon", -0.01),
        ("presmooth", -0.1),
    ],
)
def test_bad_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{name} is {value!r}, expected"):
        TVL1Params(**{name: value})


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = noise_pairs(1, 17, 19)
    expected = tvl1_flow(a, b, backend="reference")
    # None in sys.modules is Python's own way to say that an import must fail
    monkeypatch.setitem(sys.modules, "avfast._C", None)
    for name, value in zip(("_ENGINE", "NOT_BUILT"), native._load(), strict=True):
        monkeypatch.setattr(native, name, value)
    assert torch.equal(tvl1_flow(a, b), expected)
    with pytest.raises(ValueError, match=r"backend is 'cpp', which .*: avfast\._C was not built .*pip install"):
        tvl1_flow(a, b, backend="cpp")
    monkeypatch.setenv("AVFAST_BACKEND", "cpp")
    with pytest.raises(ValueError, match=r"avfast\._C was not built"):
        tvl1_flow(a, b)


def test_imports_lightly_and_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['avfast._C'] = None\n"
        "import avfast.opticalflow.tvl1\n"
        "print(*sorted({'cv2', 'av', 'triton', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""


def test_backend_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    stand_in = lambda a, b, p: called.append(1) or torch.zeros(1, 2, 8, 8)  # noqa: E731
    monkeypatch.setattr("avfast.kernels.tvl1.tvl1_flow_reference", stand_in)
    monkeypatch.setenv("AVFAST_BACKEND", "reference")
    tvl1_flow(IMAGE, IMAGE)
    assert called
    tvl1_flow(IMAGE, IMAGE, backend="cpp")
    assert len(called) == 1


def _flow_in_child(a: torch.Tensor, b: torch.Tensor, threads: int, queue: multiprocessing.Queue) -> None:
    queue.put(tvl1_flow(a, b, threads=threads).numpy())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.parametrize("threads", [2, 5])
def test_works_in_a_forked_child(threads: int) -> None:
    """The parent has used the engine's threads, and PyTorch's."""
    torch.rand(1 << 20).exp_()
    a, b = noise_pairs(1, 131, 150)
    expected = tvl1_flow(a, b, threads=threads)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_flow_in_child, args=(a, b, threads, queue))
    child.start()
    try:
        np.testing.assert_array_equal(queue.get(timeout=60), expected.numpy())
    finally:
        child.kill()
        child.join()
