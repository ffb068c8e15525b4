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
from pkgutil import iter_modules
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import avfast.kernels

ARCHS = (80, 90, 100)
# which of a matrix's strides (matrix, row, column) is 1: that of the column, where nothing else is said
POSITIONS = {f"{name}_strides": 1 for name in ("feature", "query", "out", "grad", "grad_query")}
# offsets of 32 bits, or of 64 where memory or a batch is that large
TILE = {"COLUMNS": 128, "ROWS": 2, "IMAGES": 2, "OFFSET": triton.language.int32, "num_warps": 8}
FAR = {**TILE, "IMAGES": 0, "OFFSET": triton.language.int64}
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# constexpr arguments beside those that follow from the type, options, and strides of 1, as the launchers choose them;
# several variants where they choose the code. A kernel that is not listed is compiled as ELEMENTWISE.
ELEMENTWISE: dict[str, dict[str, Any]] = {"": {"BLOCK": 1024, "OFFSET": triton.language.int32}}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "_recall_fwd_kernel": {"": {"BLOCK": 16, **POSITIONS}},
    "_gates_fwd_kernel": {
        "": {"BLOCK": 256, "OFFSET": triton.language.int32},
        "far": {"BLOCK": 256, "OFFSET": triton.language.int64},
    },
    "_gates_bwd_kernel": {"": {"BLOCK": 256, "OFFSET": triton.language.int32}},
    "_flow_loss_kernel": {
        "grad": {"C": 3, "WANT_GRAD": True, **TILE},
        "no grad": {"C": 1, "WANT_GRAD": False, **TILE},
        "far": {"C": 3, "WANT_GRAD": True, **FAR},
    },
    "_modulate_fwd_kernel": {
        "": {"BLOCK": 1024, "IMAGES": 2, "OFFSET": triton.language.int32},
        "far": {"BLOCK": 1024, "IMAGES": 0, "OFFSET": triton.language.int64},
    },
    "_modulate_bwd_kernel": {
        "": {"BLOCK": 1024, "BLOCKS": 3},
        "large": {"BLOCK": 4096, "BLOCKS": 507, "num_warps": 32},
    },
    "_warp_fwd_kernel": {
        "border": {"C": 1, "AT_ONCE": 1, "ZEROS": False, **TILE},
        "zeros": {"C": 3, "AT_ONCE": 3, "ZEROS": True, **TILE},
        "far": {"C": 8, "AT_ONCE": 4, "ZEROS": True, **FAR},
    },
    "_warp_bwd_kernel": {
        "border": {"C": 1, "AT_ONCE": 1, "ZEROS": False, "WANT_IMAGE": True, "WANT_FLOW": True, "FIXED": False, **TILE},
        "fixed": {"C": 3, "AT_ONCE": 1, "ZEROS": True, "WANT_IMAGE": True, "WANT_FLOW": True, "FIXED": True, **FAR},
        "flow": {"C": 3, "AT_ONCE": 3, "ZEROS": False, "WANT_IMAGE": False, "WANT_FLOW": True, "FIXED": False, **TILE},
    },
}
TYPES = {"fp32": ("fp32", "float32"), "bf16": ("bf16", "float32"), "fp64": ("fp64", "float64")}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def kernels() -> dict[str, Any]:
    """Every kernel of the op files, by name."""
    modules = (import_module(f"avfast.kernels.{module.name}") for module in iter_modules(avfast.kernels.__path__))
    return {name: k for module in modules for name, k in vars(module).items() if name.endswith("_kernel")}


def compile_kernel(
    kernel: Any, constants: dict[str, Any], element: str, compute: str, arch: int, *, ones: bool = False
) -> list[int]:
    """[registers, shared memory] of one kernel; pointers hold `element`, sums and losses the compute type. `ones`: all
    sizes and strides are 1, which makes them constants of the program, without a tensor's methods."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    constants = {**constants, "COMPUTE": getattr(triton.language, compute)}
    if "CHANNELS" in kernel.arg_names:
        # the most that the launchers allow
        constants["PRECISION"] = "tf32" if element == "bf16" else "ieee"
        constants["CHANNELS"] = 64 if compute == "float64" else 128
    accumulator = "fp64" if compute == "float64" else "fp32"
    signature: dict[str, Any] = {}
    constexprs = {}
    for i, name in enumerate(kernel.arg_names):
        if name.endswith("_strides"):
            unit = constants.get(name, 2)
            signature[name] = tuple("constexpr" if ones or dim == unit else "i32" for dim in range(3))
            constexprs.update({(i, dim): 1 for dim in range(3) if ones or dim == unit})
        elif name in constants:
            signature[name] = "constexpr"
            constexprs[i,] = constants[name]
        elif name == "grad_image_ptr":
            signature[name] = "*i64" if constants.get("FIXED") else f"*{accumulator}"
        elif name in ("scale_ptr", "partial_ptr", "level_ptr", "slope_ptr"):
            signature[name] = f"*{accumulator}"
        elif name.endswith("_ptr"):
            signature[name] = f"*{element}"
        elif kernel.params[i].annotation_type:
            signature[name] = kernel.params[i].annotation_type
        else:
            signature[name] = "constexpr" if ones else "i32"
            if ones:
                constexprs[i,] = 1
    source = ASTSource(kernel, signature, constexprs=constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
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
    if unknown := VARIANTS.keys() - found.keys():
        raise SystemExit(f"VARIANTS names kernels that the op files do not have: {sorted(unknown)}")
    result: dict[str, dict[str, list[int]]] = {}
    for name, kernel in sorted(found.items()):
        for variant, constants in VARIANTS.get(name, ELEMENTWISE).items():
            for type_name, (element, compute) in TYPES.items():
                label = " ".join(filter(None, (name, variant, type_name)))
                result[label] = {
                    f"sm_{arch}": compile_kernel(kernel, constants, element, compute, arch) for arch in ARCHS
                }
            # an image or a memory of one element
            compile_kernel(kernel, constants, "fp32", "float32", 90, ones=True)
    # a line per kernel
    print("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items()) + "\n}")


if __name__ == "__main__":
    main()
