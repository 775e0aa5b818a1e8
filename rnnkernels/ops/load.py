"""Cells of one's own: a page compiled against the installed headers, cached by content, and run by every engine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _C
from .cells import CELLS, add_cell

_INCLUDE = Path(_C.__file__).parent / "include"
_LINE = re.compile(r"^\s*RNN_CELL\s*\(\s*(\w+)\s*,\s*(HOT|WARM|COLD)\s*,", re.MULTILINE)
_libraries: list[Any] = []  # they stay: layers may run them to the end
_sources: dict[str, str] = {}
_isas: dict[str, set[str]] = {}  # for which each was compiled
_made_of: dict[str, list[str]] = {}  # of the combinations that were compiled: the cell and its modifiers
_on_gpu: set[str] = set()
_lock = threading.RLock()

# The page stands between these; the macro that names it expands to what the engines need of it.
_CPU = """
#include "num/ISA.h"

#include "engines/cpu/kernels.h"
#include "engines/traced/trace.h"

using namespace rnnkernels;
#define RNN_CELL(name, heat, ...) \\
  extern "C" __attribute__((visibility("default"))) const cpu::Page rnnkernels_page; \\
  extern "C" __attribute__((visibility("default"))) const traced::Tracer rnnkernels_tracer; \\
  const cpu::Page rnnkernels_page = cpu::make_page<Complete<__VA_ARGS__>, ISA::F32, ISA::F64>(#name, #__VA_ARGS__); \\
  const traced::Tracer rnnkernels_tracer = {traced::trace<Complete<__VA_ARGS__>>};
"""
_CUDA = """
#include "engines/cuda/kernels.cuh"

using namespace rnnkernels;
#define RNN_CELL(name, heat, ...) \\
  extern "C" __attribute__((visibility("default"))) const cuda::CellKernels rnnkernels_kernels; \\
  const cuda::CellKernels rnnkernels_kernels = cuda::cell_kernels<cuda::Heat::heat, Complete<__VA_ARGS__>>();
"""


def load_page(source: str | os.PathLike[str], cuda: bool | None = None) -> str:
    """Compile a page, register it as a cell, and return the cell's name. See :func:`rnnkernels.load_cell`."""
    text, shown = _read(source)
    named = _LINE.findall(text)
    if len(named) != 1:
        raise ValueError(f"source: expected one line RNN_CELL(name, HOT or COLD, page) in {shown}, got {len(named)}")
    name: str = named[0][0]
    if name != name.lower():
        raise ValueError(f"source: expected a cell's name in lower case, got {name!r} in {shown}")
    with _lock:
        if name in _sources and _sources[name] != text:
            raise ValueError(f"source: a cell {name!r} is loaded already, from another source: give this one another name")
        if name in CELLS and name not in _sources:
            raise ValueError(f"source: {name!r} is one of the library's own cells: give this one another name")
        _load(name, text, shown)
        if cuda:
            load_kernels(name)
    return name


def _load(name: str, text: str, shown: str) -> None:
    if name in _sources:
        return
    _check_headers()
    isa = _C.isa_of_pages()
    path = _for_isa(text, shown, isa)
    add_cell(*_C.add_cell(isa, _address(path, "rnnkernels_page"), _address(path, "rnnkernels_tracer")))
    _isas[name] = {isa}
    _sources[name] = text


def _for_isa(text: str, shown: str, isa: str) -> Path:
    return _compiled(text, shown, _CPU.replace("ISA", isa), _cpu_command(_C.build()["flags"], isa), ".cpp")


def compile_for(isa: str, cell: str) -> None:
    """A cell that was loaded, for an instruction set that is needed now; others are there for all."""
    if cell not in _isas or isa in _isas[cell]:
        return
    with _lock:
        if isa not in _isas[cell]:
            _C.add_page(CELLS[cell].index, isa, _address(_for_isa(_sources[cell], cell, isa), "rnnkernels_page"))
            _isas[cell].add(isa)


_WRAPPERS = {
    "candidate": "CandidateDropout<{}>",
    "cell_clip": "CellClip<{}>",
    "layer_norm": "LayerNorm<{}, false>",
    "gate_norm": "LayerNorm<{}, true>",
    "projected": "Projected<{}>",
    "proj_clip": "ProjClip<{}>",
    "zoneout": "Zoneout<{}>",
    "grad_clip": "GradClip<{}>",
    "dropout": "Variational<{}>",
    "tangent": "Tangent<{}>",
}


def modified(cell: str, modifiers: Sequence[str]) -> str:
    """The cell with these modifiers, in the order of the table above; one that is not in the library is compiled."""
    name = "_".join([cell, *modifiers])
    # Known ones by lookups alone, which torch.compile can trace.
    if not modifiers or (name in CELLS and (name not in _sources or _made_of.get(name) == [cell, *modifiers])):
        return name
    page = f"Complete<{CELLS[cell].page}>"
    for modifier in modifiers:
        page = _WRAPPERS[modifier].format(page)
    # The user's own line names another cell than is wanted here.
    own = (
        f'#pragma push_macro("RNN_CELL")\n#undef RNN_CELL\n#define RNN_CELL(...)\n{_sources.get(cell, "")}\n#pragma pop_macro("RNN_CELL")\n'
    )
    text = f"{own}RNN_CELL({name}, COLD, {page})\n"
    with _lock:
        if _sources.get(name, text) != text:
            raise ValueError(f"the cell {cell!r} with {', '.join(modifiers)} would be called {name!r}, as one that was loaded is")
        _load(name, text, f"{cell} with {', '.join(modifiers)}")
        _made_of[name] = [cell, *modifiers]
    return name


def is_modified(cell: str) -> bool:
    """Whether a modifier made it of another cell."""
    return CELLS[cell].page.startswith(tuple(template.split("{")[0] for template in _WRAPPERS.values()))


@functools.cache
def heats() -> dict[str, str]:
    """The cells of cells.def, each HOT or WARM (the persistent CUDA engine is compiled for it) or COLD."""
    return dict(_LINE.findall((_INCLUDE / "cells" / "cells.def").read_text(encoding="utf-8")))


def source_of(name: str) -> str:
    """The source that a cell was loaded from."""
    return _sources[name]


def _read(source: str | os.PathLike[str]) -> tuple[str, str]:
    """-> text, what to call it"""
    text = os.fspath(source)
    if isinstance(source, os.PathLike) or "\n" not in text:
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"source: expected a file or the text of a page, got {text!r}")
        return path.read_text(encoding="utf-8"), str(path)
    return text, "page"


@functools.cache
def _headers() -> str:
    """What CMake made of the headers when it built the module."""
    files = sorted(str(path.relative_to(_INCLUDE)) for path in _INCLUDE.rglob("*") if path.is_file())
    sums = "".join(f"{name} {hashlib.sha256((_INCLUDE / name).read_bytes()).hexdigest()}\n" for name in files)
    return hashlib.sha256(sums.encode()).hexdigest()


def _check_headers() -> None:
    if _headers() != _C.build()["headers"]:
        raise RuntimeError(f"load_cell: the headers under {_INCLUDE} are not those that the module was compiled with: install it again")


def _cpu_command(flags: dict[str, str], isa: str) -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or shutil.which("g++") or "c++"]
    machine = ["-DRNNKERNELS_X86=1"] if "avx2" in _C.build()["isas"] else []
    plain = ["-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden"]
    return [*compiler, *plain, *shlex.split(flags["all"]), *shlex.split(flags[isa]), *machine]


def load_kernels(name: str) -> None:
    """Compile a loaded cell for a GPU too, once."""
    if not hasattr(_C, "add_cuda_cell"):
        raise RuntimeError("cuda: this build of rnnkernels has no CUDA part")
    with _lock:
        if name in _sources and name not in _on_gpu:
            _C.add_cuda_cell(CELLS[name].index, _address(_compile_cuda(_sources[name], name), "rnnkernels_kernels"))
            _on_gpu.add(name)


def _compile_cuda(text: str, shown: str) -> Path:
    """The kernels, for the devices at hand; where there is none, for the newest that the module was built for."""
    compiler = shlex.split(os.environ.get("CUDACXX", "")) or [shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"]
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        numbers = sorted(f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in found)
    else:
        numbers = [number.split("-")[0] for number in _C.build()["cuda"]["architectures"].split() if number.endswith("-real")][-1:]
    archs = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    plain = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared", "--cudart=static"]
    command = [*compiler, *plain, *shlex.split(_C.build()["flags"]["cuda"]), *archs]
    return _compiled(text, shown, _CUDA, command, ".cu")


def _compiled(text: str, shown: str, prologue: str, command: list[str], suffix: str) -> Path:
    """The library of a page, made unless an equal one is in the cache."""
    key = hashlib.sha256("\0".join([text, prologue, *command, _version(command[0]), _headers()]).encode()).hexdigest()
    cache = Path(os.environ.get("RNNKERNELS_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnkernels")
    library = cache / f"{key}.so"
    if library.is_file():
        return library
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        unit, made = Path(folder) / f"page{suffix}", Path(folder) / "page.so"
        unit.write_text(f"{prologue}#line 1 {json.dumps(shown)}\n{text}", encoding="utf-8")
        try:
            done = subprocess.run([*command, f"-I{_INCLUDE}", str(unit), "-o", str(made)], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            what = f"{shown} has to be compiled, and there is no compiler {command[0]!r} here"
            raise RuntimeError(f"{what}: put one on PATH or set CXX (for a GPU: CUDACXX)") from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise RuntimeError("\n".join([f"load_cell: {shown} does not compile", *said[:20]]))
        made.replace(library)  # others may be making the same
    return library


@functools.cache
def _version(compiler: str) -> str:
    with contextlib.suppress(FileNotFoundError):  # said when it is to compile
        return str(subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout)
    return ""


def _address(path: Path, symbol: str) -> int:
    library = ctypes.CDLL(str(path))
    _libraries.append(library)
    return ctypes.addressof(ctypes.c_char.in_dll(library, symbol))
