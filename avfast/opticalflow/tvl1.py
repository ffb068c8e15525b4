"""TV-L1 optical flow (Zach, Pock and Bischof, DAGM 2007) of image pairs and clips.

`tvl1_flow` runs the compiled engine (csrc/tvl1, on the CPU and on CUDA devices, with the same bits), or its definition
in plain PyTorch (`avfast.kernels.tvl1_reference`) where the extension was not built. All presets but `opencv` do the
same work for every pair, whatever the content."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from avfast.errors import InputError
from avfast.kernels.tvl1 import tvl1_op
from avfast.kernels.tvl1_reference import TVL1Params

# mean end-point error in px over RubberWhale, Venus, Grove2 and Urban2: fast 0.271, quality 0.221, chambolle-pock
# 0.261, opencv 1.05 like OpenCV; on 55 crops of 64x64 fast 1.46, opencv 1.37. fast and quality were chosen on these
# four; their lambda suits clean images (with noise of 3 grey levels quality 0.274, fast 0.329; of 10, 0.601 and 0.532).
# 64 MNIST digits on black, 48x48, moved by 1.5 to 4.5 px. Mean absolute warp error in grey levels, and end-point error
# on the digit in px: fast 0.89, 0.28; chambolle-pock 0.05, 0.01; OpenCV's default 0.26, 0.07
PRESETS = {
    "fast": TVL1Params(lambda_=0.2, warps=2, coarse_warps=8, iterations=15, presmooth=0.5),
    "quality": TVL1Params(lambda_=0.3, scale_step=0.8, presmooth=0.5),
    "opencv": TVL1Params(
        scheme="opencv", scale_step=0.8, scales=5, outer_iterations=10, iterations=30, epsilon=0.01, median=5
    ),
    "chambolle-pock": TVL1Params(solver="chambolle-pock", tau=0.35, warps=10, presmooth=0.8),
    "training": TVL1Params(solver="chambolle-pock", tau=0.35, scale_step=0.8, warps=5, presmooth=0.8),
}


def tvl1_flow(
    a: Tensor | np.ndarray,
    b: Tensor | np.ndarray | None = None,
    *,
    direction: Literal["backward", "forward"] = "backward",
    preset: str | TVL1Params = "fast",
    threads: int | None = None,
    backend: Literal["cpp", "reference"] | None = None,
) -> Tensor:
    """TV-L1 optical flow of image pairs, or between the neighbouring frames of clips.

    Images are uint8, or floating point in [0, 1]; one channel or RGB (reduced to BT.601 luma); tensors on any device
    or numpy arrays; they are never changed.

    - `tvl1_flow(a, b)`: a, b of one shape, (H,W), (C,H,W), (N,C,H,W) or (B,T,C,H,W). The flow lies on a's grid:
      a(p) ~ b(p + flow(p)). Returns (2,H,W), (2,H,W), (N,2,H,W) or (B,T,2,H,W).
    - `tvl1_flow(frames)`: frames (T,C,H,W) or (B,T,C,H,W). Flow t lies on frame t's grid and points to frame t - 1
      (`direction="backward"`, the first one is 0) or to frame t + 1 (`"forward"`, the last one is 0). Returns (T,2,H,W)
      or (B,T,2,H,W).

    The result is float32 on a's device, in pixels, x then y, without a gradient.

    preset: name in PRESETS, or a TVL1Params. "fast"; "quality", four times the work; "opencv", which equals OpenCV's
    default (on the CPU, also for images on a GPU); "chambolle-pock" for textureless scenes, "training" the same over a
    finer pyramid, for small images such as moving digits.
    threads: CPU threads, over pairs or over the rows of a large one, default torch.get_num_threads(); neither they nor
    the instruction set (AVFAST_ISA=avx512|avx2|baseline asks for one) change a bit of the result.
    backend: "cpp" (the compiled engine, on the CPU or in CUDA) or "reference" (PyTorch, on a's device); default:
    AVFAST_BACKEND if set, else cpp where it was built.

    Raises ValueError for a wrong shape or dtype, for float values that are not finite or far out of [0, 1], and for
    input that requires a gradient, for an unknown backend, and for backend "cpp" where it was not built; InputError
    (a ValueError) for an unknown direction or preset.
    Source: Zach, Pock and Bischof (DAGM 2007); Chambolle and Pock (JMIV 2011)."""
    if not isinstance(preset, TVL1Params) and preset not in PRESETS:
        raise InputError(f"preset is {preset!r}, expected {', '.join(map(repr, PRESETS))} or a TVL1Params")
    params = preset if isinstance(preset, TVL1Params) else PRESETS[preset]
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads}, expected a whole number of at least 1")
    if direction not in ("backward", "forward"):
        raise InputError(f"direction is {direction!r}, expected 'backward' or 'forward'")

    if b is None:
        frames = _grey("frames", a, clip=True)
        earlier, later = frames[..., :-1, :, :], frames[..., 1:, :, :]
        flow = frames.new_zeros(*frames.shape[:-2], 2, *frames.shape[-2:], dtype=torch.float32)
        if direction == "backward":
            flow[..., 1:, :, :, :] = tvl1_op(later, earlier, params, threads or 0, backend)
        else:
            flow[..., :-1, :, :, :] = tvl1_op(earlier, later, params, threads or 0, backend)
        return flow

    if direction != "backward":
        raise InputError("direction is 'forward', but applies to a clip only: for two images exchange a and b")
    grey_a, grey_b = _grey("a", a), _grey("b", b)
    if tuple(a.shape) != tuple(b.shape):
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}, expected the same shape")
    if grey_a.dtype != grey_b.dtype:
        grey_a, grey_b = grey_a.float(), grey_b.float()
    return tvl1_op(grey_a, grey_b.to(grey_a.device), params, threads or 0, backend)


def _grey(name: str, images: Tensor | np.ndarray, clip: bool = False) -> Tensor:
    """Images as grey levels 0..255 without the channel axis, (..., H, W): uint8 where they are grey already, else
    float32."""
    if isinstance(images, np.ndarray):
        # a tensor over a read-only or reversed array is not possible, over a copy it is
        images = torch.from_numpy(np.array(images) if not images.flags.writeable else np.ascontiguousarray(images))
    if not isinstance(images, Tensor):
        raise ValueError(f"{name} is a {type(images).__name__}, expected a torch tensor or a numpy array")
    shape = tuple(images.shape)
    expected = "(T,C,H,W) or (B,T,C,H,W)" if clip else "(H,W), (C,H,W), (N,C,H,W) or (B,T,C,H,W)"
    if images.dim() not in ((4, 5) if clip else (2, 3, 4, 5)) or (images.dim() > 2 and shape[-3] not in (1, 3)):
        raise ValueError(f"{name} has shape {shape}, expected {expected} with C = 1 or 3")
    if 0 in shape[-2:]:
        raise ValueError(f"{name} has shape {shape}, expected at least one pixel")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{name} is {images.dtype}, expected uint8 or floating point in [0, 1]")
    if images.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which TV-L1 has not: pass {name}.detach()")
    grey = images.detach() if images.requires_grad else images
    if grey.dtype != torch.uint8:
        _check_values(name, grey)
        grey = grey.float() * 255
    if len(shape) == 2:
        return grey
    if shape[-3] == 1:
        return grey.squeeze(-3)
    red, green, blue = grey.float().unbind(-3)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def _check_values(name: str, images: Tensor) -> None:
    """Raise ValueError for floating-point values that are not finite or far out of [0, 1], where they can be seen."""
    # a compiled program cannot look at values, on a GPU looking would wait for it: the engine takes whatever comes
    if images.is_cpu and not torch.compiler.is_compiling() and images.numel() > 0:
        low, high = (float(v) for v in torch.aminmax(images))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} holds values that are not finite, expected [0, 1]")
        # what resizing overshoots is let through, grey levels 0..255 are not
        if low < -0.5 or high > 1.5:
            raise ValueError(f"{name} holds values from {low:g} to {high:g}, expected floating point in [0, 1]")
