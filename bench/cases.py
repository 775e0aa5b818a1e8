"""The registry of cases: what is run, and how much work it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from rnnkernels import ops

# The cells that torch.nn has, by the names that reports know them by; all others are those of cells.def.
IN_TORCH = {"lstm": "lstm", "gru": "gru", "srn": "srn_tanh"}
OTHERS = tuple(name for name, cell in ops.CELLS.items() if name not in IN_TORCH.values() and not cell.projected)
PASSES = ("inference", "training")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One layer, one direction, a padded sequence. Training is forward and backward, with gradients of all weights and the input; streaming
    is inference by T calls of a step each, which hand the state on.
    """

    cell: str
    direction: str  # of PASSES; `pass` is a word of Python
    dtype: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    threads: int

    @property
    def id(self) -> str:
        return f"{self.cell}/{self.direction}/{self.dtype}/T{self.T}/B{self.B}/I{self.I}/H{self.H}/t{self.threads}"

    @property
    def page(self) -> ops.Cell:
        """The cell as cells.def has it."""
        return ops.CELLS[IN_TORCH.get(self.cell, self.cell)]

    @property
    def training(self) -> bool:
        return self.direction == "training"

    @property
    def recurrent_flops(self) -> int:
        """U h, and U' dG in training: what has to be done step by step."""
        return (2 if self.training else 1) * 2 * self.T * self.B * self.page.hidden_gates * self.H * self.H

    @property
    def outside_flops(self) -> int:
        """W x; in training dW, dx and dU too: large products over all steps at once."""
        to_input = 2 * self.T * self.B * self.page.input_gates * self.H * self.I
        return 3 * to_input + 2 * self.T * self.B * self.page.hidden_gates * self.H * self.H if self.training else to_input

    @property
    def flops(self) -> int:
        return self.recurrent_flops + self.outside_flops

    @property
    def weight_bytes(self) -> int:
        """U, read once a step (and once more a step in training); in streaming W too."""
        depth = self.H + (self.I if self.direction == "streaming" else 0)
        return self.page.hidden_gates * self.H * depth * DTYPES[self.dtype].itemsize

    @property
    def sweeps(self) -> int:
        """How many times U is read, at least."""
        return self.T * (2 if self.training else 1)

    def facts(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"id": self.id, "pass": fields.pop("direction"), **fields}


@dataclass(frozen=True)
class Preset:
    """Sizes to cross; I = H."""

    cells: Sequence[str]
    passes: Sequence[str]
    T: Sequence[int]
    B: Sequence[int]
    H: Sequence[int]

    def cases(self, dtypes: Iterable[str], threads: Iterable[int]) -> list[Case]:
        crossed = product(self.cells, self.passes, dtypes, threads, self.T, self.B, self.H)
        return [Case(cell, direction, dtype, T, B, H, H, n) for cell, direction, dtype, n, T, B, H in crossed]


PRESETS = {
    "quick": (Preset(tuple(IN_TORCH), PASSES, (50,), (1, 32), (128,)),),
    "grid": (Preset(tuple(IN_TORCH), PASSES, (50, 100), (1, 8, 32, 64, 128), (64, 128, 256, 512)),),
    "stream": (Preset(tuple(IN_TORCH), ("streaming",), (100,), (1, 8), (64, 128, 256, 512)),),
    "cells": (Preset(OTHERS, PASSES, (100,), (1, 16, 64), (128, 256)),),
    "figures": (
        Preset(("lstm",), ("inference",), (100,), (1,), (64, 128, 256, 512, 1024)),
        Preset(("gru", "srn"), ("training",), (100,), (1,), (128, 256)),
    ),
}


def select(preset: str, dtypes: Sequence[str], threads: Sequence[int], pattern: str = "") -> list[Case]:
    """The cases of a preset whose id the regular expression finds."""
    found = (case for part in PRESETS[preset] for case in part.cases(dtypes, threads))
    return [case for case in found if re.search(pattern, case.id)]
