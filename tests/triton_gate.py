"""Compile every Triton kernel for GPUs that are not here, and print what each takes: the program behind
test_triton_compile.py, which runs it in a process of its own, without the interpreter.

Output, JSON: {kernel and variant: {"sm_80": [registers, bytes of shared memory], ...}}. A stack frame, where spilled
registers go, is an error.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

MODULES = ("convlstm", "loss", "modulate", "warp")
ARCHS = (80, 90, 100)
# constexpr arguments beside COMPUTE, as the launchers choose them; several variants where they choose the code
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "_gates_fwd_kernel": {"": {"BLOCK": 512}},
    "_gates_bwd_kernel": {"": {"BLOCK": 512}},
    "_flow_loss_kernel": {
        "grad": {"C": 3, "WANT_GRAD": True, "BLOCK": 256},
        "no grad": {"C": 1, "WANT_GRAD": False, "BLOCK": 256},
    },
    "_modulate_fwd_kernel": {"": {"BLOCK": 1024}},
    "_modulate_bwd_kernel": {"": {"BLOCK": 1024, "BLOCKS": 3}},
    "_warp_fwd_kernel": {
        "border": {"C": 1, "ZEROS": False, "BLOCK": 256},
        "zeros": {"C": 3, "ZEROS": True, "BLOCK": 256},
    },
    "_warp_bwd_kernel": {
        "border": {"C": 1, "ZEROS": False, "WANT_IMAGE": True, "WANT_FLOW": True, "FIXED": False, "BLOCK": 256},
        "fixed": {"C": 3, "ZEROS": True, "WANT_IMAGE": True, "WANT_FLOW": True, "FIXED": True, "BLOCK": 256},
        "flow": {"C": 3, "ZEROS": False, "WANT_IMAGE": False, "WANT_FLOW": True, "FIXED": False, "BLOCK": 256},
    },
}
TYPES = {"fp32": ("fp32", "float32"), "bf16": ("bf16", "float32"), "fp64": ("fp64", "float64")}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def kernels() -> dict[str, Any]:
    """Every kernel of the op files, by name."""
    modules = (import_module(f"avfast.kernels.{name}") for name in MODULES)
    return {name: k for module in modules for name, k in vars(module).items() if name.endswith("_kernel")}


def compile_kernel(kernel: Any, constants: dict[str, Any], element: str, compute: str, arch: int) -> list[int]:
    """[registers, shared memory] of one kernel; pointers hold `element`, sums and losses the compute type."""
    constants = {**constants, "COMPUTE": getattr(triton.language, compute)}
    accumulator = "fp64" if compute == "float64" else "fp32"
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "grad_image_ptr":
            signature[name] = "*i64" if constants.get("FIXED") else f"*{accumulator}"
        elif name in ("scale_ptr", "partial_ptr"):
            signature[name] = f"*{accumulator}"
        elif name.endswith("_ptr"):
            signature[name] = f"*{element}"
        else:
            signature[name] = "fp32" if name.endswith("_weight") else "i32"
    source = ASTSource(kernel, signature, constexprs={(kernel.arg_names.index(n),): v for n, v in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    if stack:
        raise SystemExit(f"{kernel.__name__} {constants} spills: {stack} bytes of stack on sm_{arch}")
    return [registers, compiled.metadata.shared]


def main() -> None:
    found = kernels()
    if found.keys() != VARIANTS.keys():
        raise SystemExit(f"VARIANTS and the op files differ: {sorted(found.keys() ^ VARIANTS.keys())}")
    result: dict[str, dict[str, list[int]]] = {}
    for name, variants in sorted(VARIANTS.items()):
        for variant, constants in variants.items():
            for type_name, (element, compute) in TYPES.items():
                label = " ".join(filter(None, (name, variant, type_name)))
                result[label] = {
                    f"sm_{arch}": compile_kernel(found[name], constants, element, compute, arch) for arch in ARCHS
                }
    # a line per kernel
    print("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items()) + "\n}")


if __name__ == "__main__":
    main()
