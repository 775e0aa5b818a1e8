"""The law of the house, read off the source."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINE = [
    "num",
    "cells",
    "core",
    "engines",
    "bind",
    "ops",
    "cuts",
    "gates",
    "functional",
    "streaming",
    "modules",
    "variants",
    "scrn",
    "own",
    "conversion",
]


def room(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "csrc":
        return relative.parts[1].removesuffix(".cpp")
    return relative.parts[1].removesuffix(".py")


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".def"} and "test" not in p.parts)
MODULES = sorted((ROOT / "rnnkernels").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_includes_only_rooms_to_its_left(path: Path) -> None:
    here = LINE.index(room(path))
    for include in re.findall(r'#include "([^"]+)"', path.read_text()):
        target = ROOT / "csrc" / include if (ROOT / "csrc" / include).exists() else path.parent / include
        assert LINE.index(room(target)) <= here, f"{path.name} includes {include}"
        if "engines" in path.parts and "engines" in target.parts:
            assert path.parent == target.parent, f"engines ignore each other: {path.name} includes {include}"


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {re.sub(r"^rnnkernels\b\.?", ".", alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A package's own modules are one room; two dots lead out of it.
            level = node.level - (path.parent.name != "rnnkernels")
            if node.level and level == 0:
                continue
            base = re.sub(r"^rnnkernels\b\.?", ".", "." * level + (node.module or ""))
            names |= {f".{alias.name}" if base == "." else base for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_modules_to_its_left(path: Path) -> None:
    own = {name.lstrip(".").split(".")[0] for name in imports(path) if name.startswith(".")}
    here = room(path)
    if here in LINE:
        bound = LINE.index(here)
        assert all((name == "_C" and here == "ops") or (name in LINE and LINE.index(name) < bound) for name in own), own
    assert "_C" not in own or here == "ops", "ops is the only door to _C"
    if path.stem == "reference":
        outside = {name.split(".")[0] for name in imports(path) if not name.startswith((".", "__future__", "collections", "typing"))}
        assert outside <= {"torch", "math", "itertools", "dataclasses"}
        assert not own
    assert "reference" not in own or path.stem in {"verify", "__main__"}, "only tests and verify see both the reference and the kernels"


def test_cells_are_listed_once() -> None:
    names = re.findall(r"^RNN_CELL\((\w+)", (ROOT / "csrc/cells/cells.def").read_text(), re.MULTILINE)
    assert len(names) == len(set(names)) > 0
    from rnnkernels import ops, reference

    listed = [name for name in ops.CELLS if name not in ops.load._sources]  # other tests may have loaded cells of their own
    assert listed == names
    assert set(reference.CELLS) == set(names), "every page has its reference cell, and every reference cell its page"


def test_pages_stay_pages_and_engines_stay_readable() -> None:
    for path in SOURCES:
        lines = len(path.read_text().splitlines())
        if "engines" in path.parts:
            assert lines <= 450, f"{path.name} has {lines} lines"
        if path.parent.name == "cells" and path.name not in {"contract.h", "list.h"}:
            makes_pages = path.name in {"automatic.h", "layer_norm.h", "zoneout.h", "variational.h"}
            assert lines <= (150 if makes_pages else 90), f"{path.name} has {lines} lines"


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16", "amx"])
def test_no_function_of_an_instruction_set_can_be_picked_for_another(isa: str) -> None:
    objects = sorted((ROOT / "build").glob(f"**/isa_{isa}.cpp.o"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not objects:
        pytest.skip(f"no object file of isa_{isa}.cpp under build/: the package was not built in this checkout")
    listing = subprocess.run(["nm", "-C", str(objects[0])], capture_output=True, text=True, check=True).stdout
    weak = [line for line in listing.splitlines() if re.search(r" [WV] ", line)]
    assert weak or isa == "amx", "the kernels are templates, so there must be some; AMX's are its file's own"
    # Data of the contract's tables holds no instructions; everything else must carry its number type in its name.
    shared = [line for line in weak if f"rnnkernels::{isa}::" not in line and not re.search(r" V ", line)]
    assert not shared, shared


@pytest.mark.parametrize("isa", ["avx2", "avx512", "avx512bf16"])
def test_sums_of_a_tile_stay_in_registers(isa: str) -> None:
    objects = sorted((ROOT / "build").glob(f"**/isa_{isa}.cpp.o"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not objects or not shutil.which("objdump"):
        pytest.skip(f"no object file of isa_{isa}.cpp under build/, or no objdump")
    symbols = subprocess.run(["nm", str(objects[0])], capture_output=True, text=True, check=True).stdout.split()
    tiles = [name for name in symbols if name.startswith("_ZN10rnnkernels3cpu7product")]
    sections = [f"--section=.text.{name}" for name in tiles]
    command = ["objdump", "--disassemble", "--no-show-raw-insn", *sections, str(objects[0])]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(\w+)>:$", listing, flags=re.MULTILINE)[1:]
    stores = {name: len(re.findall(r"vmov\w+\s+%[yz]mm\d+,.*\(%r[sb]p\)", code)) for name, code in zip(*[iter(parts)] * 2, strict=True)}
    assert set(tiles) <= set(stores)
    assert len(tiles) > 40
    # Two may set up the rows' addresses, before the loop. Narrow weights come two vectors at a time, for which 16 registers are too few.
    assert not {name: count for name, count in stores.items() if count > 2 and not (isa == "avx2" and "4bf16" in name)}


def test_the_module_links_neither_torch_nor_cuda() -> None:
    from rnnkernels import _C

    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"NEEDED.*\[(.+)\]", needed)
    assert not [name for name in libraries if re.search("torch|c10|cuda|cudart", name)], libraries
    assert "libgomp.so.1" in libraries, "torch's own OpenMP threads are shared by this name"
