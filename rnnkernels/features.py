"""The table of what each layer is and takes, found by asking the layers: built on the meta device, they say which cells they would run."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkernels

from . import ops
from .modules.shared import SRNS
from .ops.cells import STORAGE

BEGIN, END = "<!-- features:begin -->", "<!-- features:end -->"
SIZE = 8  # of whatever a layer asks the size of
# What decides which cell a layer runs, and values to try.
CELL_OPTIONS: dict[str, tuple[Any, ...]] = {
    "nonlinearity": tuple(SRNS),
    "recurrent": (True, False),
    "proj_size": (0, 1),
    "cell_norm": (False, True),
    "layer_norm": (None, "gates", "gate"),
    "zoneout": (0.0, 0.5),
    "recurrent_dropout": (0.0, 0.5),
    "candidate_dropout": (0.0, 0.5),
    "cell_clip": (None, 1.0),
    "proj_clip": (None, 1.0),
    "grad_clip": (None, 1.0),
}
# A value to try where neither the default nor the annotation suggests one.
VALUES: dict[str, Any] = {"recurrent_init": "identity", **{name: values[-1] for name, values in CELL_OPTIONS.items()}}
# Said of every layer elsewhere.
EVERYWHERE = ("engine", "recompute", "weight_dtype", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "device", "dtype")


class NotBuiltError(Exception):
    """A cell that would be compiled now."""


class CellsRun(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the cells of the library's ops."""

    cells: list[str]

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cells = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rnnkernels":
            self.cells.append(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Feature:
    """A row: a layer class, all the cells it runs that are built, what it takes (and whether only by compiling), and its calls' options."""

    layer: str
    step: str | None
    cells: tuple[str, ...]
    source: str | None
    takes: dict[str, bool]
    calls: tuple[str, ...]

    @property
    def plain_cells(self) -> list[str]:
        """Without those that a modifier makes."""
        return [name for name in self.cells if not ops.is_modified(name)]


def layers() -> dict[str, type[nn.Module]]:
    """The public layers, by name."""
    found = {name: getattr(rnnkernels, name) for name in rnnkernels.__all__}
    return {
        name: value
        for name, value in found.items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and not name.endswith("Cell")
    }


def keywords(layer: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """What its constructor takes by keyword only, its bases' constructors with it."""
    own = [inspect.signature(base.__dict__["__init__"]) for base in layer.__mro__ if "__init__" in base.__dict__ and base is not object]
    return {p.name: p for signature in own for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}


def value_for(parameter: inspect.Parameter) -> Any:
    """Something else than the default that may be accepted."""
    if isinstance(parameter.default, bool):
        return not parameter.default
    for kind, value in (("float", 0.5), ("int", 1)):
        if kind in str(parameter.annotation):
            return value
    raise LookupError(f"features: no value to try for the option {parameter.name!r}: give it one in rnnkernels/features.py")


def run(layer: type[nn.Module], **options: Any) -> list[str]:
    """The cells of one layer; raises what its constructor does, and NotBuiltError where it would compile."""

    def modified(cell: str, modifiers: Iterable[str]) -> str:
        name = "_".join([cell, *modifiers])
        if name not in ops.heats():
            raise NotBuiltError(name)
        return name

    required = [p for p in inspect.signature(layer).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    with patch.object(ops, "modified", modified):
        module = layer(*[SIZE] * max(2, len(required)), **options, device="meta")
        with CellsRun() as noted:
            module(torch.empty(2, 1, SIZE, device="meta"))
    cells: list[str] = noted.cells
    return cells


def accepted(layer: type[nn.Module], options: dict[str, Any]) -> bool | None:
    """Whether it takes them; None: only by compiling."""
    try:
        run(layer, **options)
    except (TypeError, ValueError):
        return False
    except NotBuiltError:
        return None
    return True


def taken(layer: type[nn.Module], option: str, value: Any) -> bool | None:
    """Likewise of one, which may need a projection beside it."""
    alone = accepted(layer, {option: value})
    return accepted(layer, {"proj_size": 1, option: value}) if alone is False else alone


def cells_of(layer: type[nn.Module]) -> Iterator[str]:
    """All that some combination of options runs, and that are built."""
    known = {name: values for name, values in CELL_OPTIONS.items() if taken(layer, name, values[-1]) is not False}
    for chosen in itertools.product(*known.values()):
        with suppress(ValueError, NotBuiltError):
            yield from run(layer, **dict(zip(known, chosen, strict=True)))


def feature(name: str, layer: type[nn.Module]) -> Feature:
    tried = {
        option: VALUES[option] if option in VALUES else value_for(p) for option, p in keywords(layer).items() if option not in EVERYWHERE
    }
    found = {option: [taken(layer, option, value)] for option, value in {**tried, **VALUES}.items()}
    for option, values in CELL_OPTIONS.items():
        found[option] += [taken(layer, option, value) for value in values[1:-1]]
    cells = set(cells_of(layer))
    calls = [p.name for p in inspect.signature(layer.forward).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return Feature(
        layer=name,
        step=f"{name}Cell" if f"{name}Cell" in rnnkernels.__all__ else None,
        cells=tuple(cell for cell in ops.heats() if cell in cells),
        source=source(layer),
        takes={option: True not in built for option, built in found.items() if built != [False] * len(built)},
        calls=(*calls, *(["stream"] if streams(layer) else [])),
    )


def streams(layer: type[nn.Module]) -> bool:
    if not hasattr(layer, "stream"):
        return False
    try:
        layer(SIZE, SIZE).stream(1).step(torch.zeros(1, SIZE))  # type: ignore[operator]
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def source(layer: type[nn.Module]) -> str | None:
    """The paper, as the first sentences of the class's documentation name it in brackets."""
    found = re.search(r"\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)", (layer.__doc__ or "").split("\n\n")[0])
    return " ".join(found[1].split()) if found else None


def features() -> list[Feature]:
    return [feature(name, layer) for name, layer in layers().items()]


def shortened(cells: Iterable[str]) -> str:
    """Names that differ in their last word alone are written as one."""
    groups: dict[str, list[str]] = {}
    for name in cells:
        stem, _, activation = name.rpartition("_")
        if activation in SRNS:
            groups.setdefault(f"{stem}_", []).append(activation)
        else:
            groups[name] = []
    return ", ".join(
        f"`{stem}{ends[0]}`" if len(ends) == 1 else f"`{stem}{{{', '.join(ends)}}}`" if ends else f"`{stem}`"
        for stem, ends in groups.items()
    )


def on_cuda(cells: list[str]) -> str:
    hot = [name for name in cells if ops.heats()[name] != "COLD"]
    if not hot:
        return "stepwise"
    return "persistent, stepwise" if len(hot) == len(cells) else f"stepwise; persistent: {shortened(hot)}"


def markdown() -> str:
    """A row a layer."""
    lines = [
        "| layer, its step | cells | equation's source | dtypes | CPU | CUDA, not yet run on a GPU | takes | calls take |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE)
    isas = ", ".join(reversed(ops.build_info()["isas"]))
    rows, mark = features(), "\\*"
    for row in rows:
        takes = ", ".join(f"`{name}`{mark if compiles else ''}" for name, compiles in row.takes.items())
        names = ", ".join(f"`{name}`" for name in (row.layer, row.step) if name)
        calls = ", ".join(f"`{name}`" for name in row.calls) or "–"
        cells = row.plain_cells
        lines.append(f"| {names} | {shortened(cells)} | {row.source or '–'} | {dtypes} | {isas} | {on_cuda(cells)} | {takes} | {calls} |")
    modified = sorted({name for row in rows for name in row.cells if ops.is_modified(name)})
    lines += [
        "",
        f"\\* compiled when first used. {len(modified)} more cells are those above with modifiers; "
        f"on CUDA, not yet run on a GPU: {on_cuda(modified)}. What is taken is taken by layers; steps take torch.nn's arguments, `engine`, "
        "and what their equation asks for (`nonlinearity`, `recurrent`, `alpha`). `stream` needs a layer that is not bidirectional. "
        "Written by "
        "`python -m rnnkernels features --write README.md`.",
    ]
    return "\n".join(lines)
