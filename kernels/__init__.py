"""Fused ops of avfast: one file per op, the plain PyTorch definition of each in `reference`."""

if __name__ == "kernels":
    # from the checkout's root `import kernels` would load a second copy under a name that belongs to another
    # package (Hugging Face's `kernels`) and define every op twice
    raise ImportError("this folder is avfast.kernels: use `from avfast.kernels import ...`")

from .attention import condense, recall
from .convlstm import convlstm_gates
from .loss import flow_loss
from .modulate import modulate
from .tvl1 import tvl1_flow_reference
from .warp import backward_warp

__all__ = ["backward_warp", "condense", "convlstm_gates", "flow_loss", "modulate", "recall", "tvl1_flow_reference"]
