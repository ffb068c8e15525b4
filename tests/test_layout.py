"""The layout: imports run one way, without cycles; files and folders stay small; private names of libraries stay in the
files that are listed.

The lists of exceptions may only shrink: a test fails when an exception is no longer needed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import avfast

ROOT = Path(__file__).parents[1]

# from low to high: a room imports lower rooms and itself; rooms on one level do not import each other
LEVELS = [
    ["errors"],
    ["files"],
    ["kernels"],
    # layers around the kernels: public, and what the models are built of
    ["modules"],
    ["ui", "machine"],
    ["media"],
    ["opticalflow"],
    ["data"],
    ["models"],
    ["scoring"],
    ["training", "deploy"],
    # what commands are made of: nothing below the commands knows the command line
    ["cli", "cli.parser", "cli.command"],
    # every other module that lies in avfast/ itself: the commands, patching and runtime
    ["public"],
    # runs commands by name
    ["cli.main"],
    ["__main__"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def module_name(path: Path) -> str:
    """kernels/warp.py -> avfast.kernels.warp; a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("avfast", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for folder in ("avfast", "kernels") for path in (ROOT / folder).rglob("*.py")}


def imported(module: str) -> Iterator[str]:
    """Modules of avfast that a module imports anywhere, in functions and under TYPE_CHECKING too."""
    path = MODULES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            text = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called == "import_module" and text in MODULES:
                yield text
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            if base.split(".")[0] != "avfast":
                continue
            for name in node.names:
                if f"{base}.{name.name}" in MODULES:
                    yield f"{base}.{name.name}"
                elif base == "avfast":
                    # a public name lives where the lazy table says; __version__ is a literal
                    if name.name != "__version__":
                        yield avfast._HOME[name.name]
                else:
                    yield base


# avfast/__init__.py and avfast/kernels/__init__.py name the public functions and import them only when asked
IMPORTS = {
    module: sorted(set(imported(module)) - {module}) for module in MODULES if module not in ("avfast", "avfast.kernels")
}


def room(module: str) -> str:
    parts = module.split(".")[1:]
    for name in (".".join(parts[:2]), parts[0]):
        if name in LEVEL:
            return name
    assert len(parts) == 1, f"{module}: LEVELS does not say where the folder {parts[0]} stands"
    return "public"


PRIVATE_NAMES = {
    "avfast/deploy/graphs.py": "scan, which exports a rollout as one loop, has no public name",
    "avfast/export.py": "AOTInductor is documented under torch._inductor and has no other name",
    "bench/conftest.py": "the error of a rival that torch.compile cannot build is defined nowhere else",
    "tests/kernels/test_ops.py": "TorchDispatchMode is documented under torch.utils._python_dispatch",
}


def source_files() -> Iterator[Path]:
    for folder in ("avfast", "kernels", "csrc", "tests", "bench", "examples"):
        for path in sorted((ROOT / folder).rglob("*")):
            # avfast/kernels is a link to kernels/
            linked = path.is_relative_to(ROOT / "avfast" / "kernels")
            if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh") and not linked:
                yield path


def test_imports_run_one_way():
    found = set()
    for module, targets in IMPORTS.items():
        here = room(module)
        for target in targets:
            there = room(target)
            if here != there and LEVEL[there] >= LEVEL[here]:
                found.add((module, target))
    assert not found


def test_no_module_imports_itself_through_others():
    reached: dict[str, set[str]] = {}
    for module in IMPORTS:
        reached[module], stack = set(), [module]
        while stack:
            for target in IMPORTS.get(stack.pop(), []):
                if target not in reached[module]:
                    reached[module].add(target)
                    stack.append(target)
    cyclic = {module for module in IMPORTS if module in reached[module]}
    cycles = {frozenset(other for other in cyclic if other in reached[m] and m in reached[other]) for m in cyclic}
    assert not cycles


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    assert not {name for name, length in lengths.items() if length > 450}


def test_folders_are_small():
    counts: dict[Path, int] = {}
    for path in source_files():
        if not path.name.startswith("__"):
            counts[path.parent] = counts.get(path.parent, 0) + 1
    assert not {str(folder.relative_to(ROOT)) for folder, count in counts.items() if count > 14}


def test_private_names_stay_where_they_are_listed():
    """Private names of PyTorch and Triton change with each release."""
    private = re.compile(
        # torch._x, torch.a._x; but not torch.__x__, and not our own operators
        r"\btorch\.(?!ops\.)(?:\w+\.)*_(?!_)\w+|_higher_order_ops|_inductor|pre_run_hooks|packed_metadata"
    )
    found = {
        str(path.relative_to(ROOT))
        for path in source_files()
        if path.resolve() != Path(__file__).resolve() and private.search(path.read_text())
    }
    assert found == set(PRIVATE_NAMES)
