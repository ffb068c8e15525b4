"""Motion and context-aware audio-visual conditioned video prediction (Xu, Hu and Lee, BMVC 2023).

`import avfast` alone is instant: a name below loads its module, and with it PyTorch, on first use (PEP 562)."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

# read without importing by the build (pyproject.toml), so it must stay a plain literal
__version__ = "0.1.0"

if TYPE_CHECKING:
    from avfast.errors import InputError as InputError
    from avfast.kernels import backward_warp as backward_warp
    from avfast.kernels import condense as condense
    from avfast.kernels import conv3x3 as conv3x3
    from avfast.kernels import convlstm_gates as convlstm_gates
    from avfast.kernels import flow_loss as flow_loss
    from avfast.kernels import modulate as modulate
    from avfast.kernels import patch_conv as patch_conv
    from avfast.kernels import recall as recall
    from avfast.kernels import shared_weights as shared_weights
    from avfast.kernels import strided_conv as strided_conv
    from avfast.kernels import strided_conv_transpose as strided_conv_transpose
    from avfast.machine.environment import environment as environment
    from avfast.models.avmodel import AVModel as AVModel
    from avfast.models.avmodel import ModelConfig as ModelConfig
    from avfast.models.registry import from_pretrained as from_pretrained
    from avfast.opticalflow.tvl1 import tvl1_flow as tvl1_flow
    from avfast.patching import patch as patch
    from avfast.training.config import TrainConfig as TrainConfig

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
    "from_pretrained": "avfast.models.registry",
    "modulate": "avfast.kernels",
    "patch": "avfast.patching",
    "patch_conv": "avfast.kernels",
    "recall": "avfast.kernels",
    "shared_weights": "avfast.kernels",
    "strided_conv": "avfast.kernels",
    "strided_conv_transpose": "avfast.kernels",
    "tvl1_flow": "avfast.opticalflow.tvl1",
}

__all__ = [*_HOME, "__version__"]


# OpenMP's threads spin while they wait, and beside one busy process a step on two cores then takes twenty times as
# long. A command has them sleep, unless the user says otherwise; PyTorch's OpenMP reads this as it is loaded. `python
# -m` has the argument -m while it imports this package
if sys.argv[:1] == ["-m"] or (sys.argv and os.path.basename(sys.argv[0]) == "avfast"):
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'avfast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
