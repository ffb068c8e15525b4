"""Fused ops of avfast: one file per op; the definitions of the paper's equations are in `reference`."""

if __name__ == "kernels":
    # from the checkout's root `import kernels` would load a second copy under a name that belongs to another
    # package (Hugging Face's `kernels`) and define every op twice
    raise ImportError("this folder is avfast.kernels: use `from avfast.kernels import ...`")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import condense as condense
    from .attention import recall as recall
    from .convlstm import convlstm_gates as convlstm_gates
    from .loss import flow_loss as flow_loss
    from .modulate import modulate as modulate
    from .patches import patch_conv as patch_conv
    from .tvl1 import tvl1_flow_reference as tvl1_flow_reference
    from .warp import backward_warp as backward_warp
    from .winograd.conv import conv3x3 as conv3x3
    from .winograd.conv import shared_weights as shared_weights
    from .winograd.conv import strided_conv as strided_conv
    from .winograd.conv import strided_conv_transpose as strided_conv_transpose

# function -> the file it is in, loaded on first use: TV-L1 alone needs no Triton, which takes a while to import
_HOME = {
    "backward_warp": "warp",
    "condense": "attention",
    "conv3x3": "winograd.conv",
    "convlstm_gates": "convlstm",
    "flow_loss": "loss",
    "modulate": "modulate",
    "patch_conv": "patches",
    "recall": "attention",
    "shared_weights": "winograd.conv",
    "strided_conv": "winograd.conv",
    "strided_conv_transpose": "winograd.conv",
    "tvl1_flow_reference": "tvl1",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def load_all() -> None:
    """Load every op, so that `registry.OPS` holds them all."""
    for module in dict.fromkeys(_HOME.values()):
        import_module(f"{__name__}.{module}")
