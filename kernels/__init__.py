"""Fused ops of avfast: one file per op; the definitions of the paper's equations are in `reference`."""

if __name__ == "kernels":
    # from the checkout's root `import kernels` would load a second copy under a name that belongs to another
    # package (Hugging Face's `kernels`) and define every op twice
    raise ImportError("this folder is avfast.kernels: use `from avfast.kernels import ...`")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import condense, recall
    from .convlstm import convlstm_gates
    from .loss import flow_loss
    from .modulate import modulate
    from .patches import patch_conv
    from .tvl1 import tvl1_flow_reference
    from .warp import backward_warp
    from .winograd.conv import conv3x3, shared_weights, strided_conv, strided_conv_transpose

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

__all__ = [
    "backward_warp",
    "condense",
    "conv3x3",
    "convlstm_gates",
    "flow_loss",
    "modulate",
    "patch_conv",
    "recall",
    "shared_weights",
    "strided_conv",
    "strided_conv_transpose",
    "tvl1_flow_reference",
]


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
