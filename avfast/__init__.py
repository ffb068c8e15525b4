"""Motion and context-aware audio-visual conditioned video prediction (Xu, Hu and Lee, BMVC 2023).

`import avfast` alone is instant: a name below loads its module, and with it PyTorch, on first use (PEP 562)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# read without importing by the build (pyproject.toml), so it must stay a plain literal
__version__ = "0.1.0"

if TYPE_CHECKING:
    from avfast.errors import InputError
    from avfast.kernels import (
        backward_warp,
        condense,
        conv3x3,
        convlstm_gates,
        flow_loss,
        modulate,
        patch_conv,
        recall,
        shared_weights,
        strided_conv,
        strided_conv_transpose,
    )
    from avfast.machine.environment import environment
    from avfast.models.avmodel import AVModel, ModelConfig
    from avfast.opticalflow.tvl1 import tvl1_flow
    from avfast.patching import patch
    from avfast.training.config import TrainConfig

_HOME = {
    "AVModel": "avfast.models.avmodel",
    "InputError": "avfast.errors",
    "ModelConfig": "avfast.models.avmodel",
    "TrainConfig": "avfast.training.config",
    "backward_warp": "avfast.kernels",
    "condense": "avfast.kernels",
    "conv3x3": "avfast.kernels",
    "convlstm_gates": "avfast.kernels",
    "environment": "avfast.machine.environment",
    "flow_loss": "avfast.kernels",
    "modulate": "avfast.kernels",
    "patch": "avfast.patching",
    "patch_conv": "avfast.kernels",
    "recall": "avfast.kernels",
    "shared_weights": "avfast.kernels",
    "strided_conv": "avfast.kernels",
    "strided_conv_transpose": "avfast.kernels",
    "tvl1_flow": "avfast.opticalflow.tvl1",
}

__all__ = [
    "AVModel",
    "InputError",
    "ModelConfig",
    "TrainConfig",
    "__version__",
    "backward_warp",
    "condense",
    "conv3x3",
    "convlstm_gates",
    "environment",
    "flow_loss",
    "modulate",
    "patch",
    "patch_conv",
    "recall",
    "shared_weights",
    "strided_conv",
    "strided_conv_transpose",
    "tvl1_flow",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'avfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
