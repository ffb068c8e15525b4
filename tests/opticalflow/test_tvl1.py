"""TV-L1 on made motion and on Middlebury; the kinds of input it takes, and what it refuses."""

from __future__ import annotations

import lzma
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from avfast.errors import InputError
from avfast.opticalflow.tvl1 import PRESETS, TVL1Params, tvl1_flow

MIDDLEBURY = Path(__file__).parents[3] / "shared" / "data" / "middlebury"

ROOT = Path(__file__).parents[2]

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
        ((IMAGE, IMAGE), {"preset": "slow"}, "preset is 'slow', expected 'fast', .*'training' or a TVL1Params"),
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


def test_imports_lightly_and_without_the_extension() -> None:
    code = (
        "import sys; sys.modules['avfast._C'] = None\n"
        "import avfast.opticalflow.tvl1\n"
        "print(*sorted({'cv2', 'av', 'triton', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == ""
