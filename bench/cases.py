"""The registry of cases: what is run, and how much work it is."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rnnkernels import cuts, ops

# The cells that torch.nn has, by the names that reports know them by; all others are those of cells.def.
IN_TORCH = {"lstm": "lstm", "gru": "gru", "srn": "srn_tanh"}
OTHERS = tuple(
    name
    for name, cell in ops.CELLS.items()
    if name not in IN_TORCH.values() and not cell.projected and not cell.page.startswith("Tangent")  # "derivatives" has those
)
PASSES = ("inference", "training")
# Forward mode, along a direction of the input and of all weights; and a gradient penalty: gradients of the squared gradient of the input.
DERIVATIVES = JVP, PENALTY = ("jvp", "penalty")
# What a batch is to a layer: "padded", every row T steps; "lengths", every row another length, unsorted; "one_short", a single row ends
# early, the least that can be said about lengths; "resets", episodes end within the rows; "packed", the lengths as a PackedSequence.
PADDED, LENGTHS, ONE_SHORT, RESETS, PACKED = LAYOUTS = ("padded", "lengths", "one_short", "resets", "packed")
# Padded, but each step computes only those of a simple recurrent network's modules that are due.
CLOCKWORK = "clockwork"
# Padded, each step a call of the layer's cell (nn.LSTMCell and the like) in a loop in Python.
STEPS = "steps"
# Padded, the layer under torch.compile, torch.nn's too.
COMPILED = "compiled"
PERIODS = (1, 2, 4, 8, 16, 32, 64, 128)
# Of all tokens, those at which an episode begins anew.
RESET_SHARE = 0.02
# The longest loop that is given to torch.compile.
COMPILED_STEPS = 20
# A preset of its own kind: not whole calls but what more steps cost, beside the roof (bench/recurrence.py).
RECURRENCE = "recurrence"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Case:
    """One layer, one direction or both, sequences of up to T steps. Training is forward and backward, with gradients of all weights and
    the input; streaming is inference by T calls of a step each, which hand the state on.
    """

    cell: str
    direction: str  # of PASSES or DERIVATIVES, or "streaming"; `pass` is a word of Python
    dtype: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    threads: int
    layout: str = PADDED
    bidirectional: bool = False

    @property
    def id(self) -> str:
        name = f"{self.cell}/{self.direction}/{self.dtype}/T{self.T}/B{self.B}/I{self.I}/H{self.H}/t{self.threads}"
        name = f"{name}/bidirectional" if self.bidirectional else name
        return name if self.layout == PADDED else f"{name}/{self.layout}"

    @property
    def page(self) -> ops.Cell:
        """The cell as cells.def has it."""
        return ops.CELLS[IN_TORCH.get(self.cell, self.cell)]

    @property
    def training(self) -> bool:
        return self.direction == "training"

    @property
    def lengths(self) -> Tensor | None:
        """Of the rows, the longest T; None where all are."""
        if self.layout == ONE_SHORT:
            return torch.full((self.B,), self.T).index_fill(0, torch.tensor(self.B // 2), self.T // 2)
        if self.layout not in (LENGTHS, PACKED):
            return None
        lengths = torch.linspace(self.T // 4, self.T, self.B).round().long()
        return lengths[torch.randperm(self.B, generator=torch.Generator().manual_seed(0))]

    @property
    def reset_mask(self) -> Tensor | None:
        """``[T, B]``, or None where no state is reset."""
        if self.layout != RESETS:
            return None
        marked = torch.randperm(self.T * self.B, generator=torch.Generator().manual_seed(0))[: max(1, round(RESET_SHARE * self.T * self.B))]
        return torch.zeros(self.T * self.B, dtype=torch.bool).index_fill(0, marked, True).view(self.T, self.B)

    @property
    def clock(self) -> cuts.Clock | None:
        """Of a clockwork network of eight modules, or None."""
        return cuts.clock(PERIODS, self.H // len(PERIODS), self.T, 0) if self.layout == CLOCKWORK else None

    @property
    def units_share(self) -> float:
        """Of all units, those that a step computes, in the mean."""
        return 1.0 if self.clock is None else float(self.clock.units.double().mean()) / self.H

    @property
    def weights_share(self) -> float:
        """Of U, what they read."""
        if self.clock is None:
            return 1.0
        columns = self.H - torch.arange(len(PERIODS)) * self.clock.module
        return float((self.clock.due * columns).sum(1).double().mean()) * self.clock.module / self.H**2

    @property
    def tokens(self) -> int:
        """Steps of all rows together, without the padding."""
        return self.T * self.B if self.lengths is None else int(self.lengths.sum())

    @property
    def recurrent_flops(self) -> int:
        """U h, and U' dG in training: what has to be done step by step."""
        return round((2 if self.training else 1) * 2 * self.tokens * self.page.hidden_gates * self.H * self.H * self.weights_share)

    @property
    def outside_flops(self) -> int:
        """W x; in training dW, dx and dU too: large products over all steps at once."""
        to_input = round(2 * self.tokens * self.page.input_gates * self.H * self.I * self.units_share)
        of_weights = round(2 * self.tokens * self.page.hidden_gates * self.H * self.H * self.weights_share)
        return 3 * to_input + of_weights if self.training else to_input

    @property
    def flops(self) -> int:
        return (self.recurrent_flops + self.outside_flops) * (2 if self.bidirectional else 1)

    @property
    def weight_bytes(self) -> int:
        """U, read once a step (and once more a step in training); in streaming and by a cell W too."""
        depth = self.H + (self.I if self.direction == "streaming" or self.layout == STEPS else 0)
        return round(self.page.hidden_gates * self.H * depth * DTYPES[self.dtype].itemsize * self.weights_share)

    @property
    def sweeps(self) -> int:
        """How many times U is read, at least: what a reset parts need not wait for each other."""
        steps = self.T if self.reset_mask is None else len(cuts.segments(self.T, self.B, None, self.reset_mask).batch_sizes)
        return steps * (2 if self.training else 1)

    def facts(self) -> dict[str, Any]:
        fields = asdict(self)
        return {"id": self.id, "pass": fields.pop("direction"), **fields, "tokens": self.tokens}


def label(facts: dict[str, Any]) -> str:
    """The cell of a case in a report, its dtype where it is not float32, and what its batch is where it is not padded, as in older reports
    all are.
    """
    layout, dtype = facts.get("layout", PADDED), facts["dtype"]
    names = ("bidirectional" if facts.get("bidirectional") else "", facts["cell"], dtype if dtype != "float32" else "")
    return " ".join(filter(None, (*names, layout if layout != PADDED else "")))


@dataclass(frozen=True)
class Preset:
    """Sizes to cross; I = H."""

    cells: Sequence[str]
    passes: Sequence[str]
    T: Sequence[int]
    B: Sequence[int]
    H: Sequence[int]
    layouts: Sequence[str] = (PADDED,)
    bidirectional: bool = False

    def cases(self, dtypes: Iterable[str], threads: Iterable[int]) -> list[Case]:
        crossed = product(self.cells, self.layouts, self.passes, dtypes, threads, self.T, self.B, self.H)
        both = self.bidirectional
        return [Case(cell, direction, dtype, T, B, H, H, n, layout, both) for cell, layout, direction, dtype, n, T, B, H in crossed]


@dataclass(frozen=True)
class Drawn:
    """Sizes that nobody chose, and I is not H: by lot, the same each time."""

    cells: Sequence[str]
    passes: Sequence[str]
    count: int  # for each cell and pass

    LONGEST = 10**10  # flops of a case

    def sizes(self, draw: random.Random) -> tuple[int, int, int, int]:
        """T, B, I, H, each as likely to be small as large."""

        def between(least: int, most: int) -> int:
            return round(math.exp(draw.uniform(math.log(least), math.log(most))))

        return between(1, 1000), between(1, 300), between(10, 1000), between(10, 1000)

    def cases(self, dtypes: Iterable[str], threads: Iterable[int]) -> list[Case]:
        found = []
        for cell, direction, dtype, n in product(self.cells, self.passes, dtypes, threads):
            draw = random.Random(0)
            drawn = (Case(cell, direction, dtype, *self.sizes(draw), n) for _ in itertools.count())
            found += itertools.islice((case for case in drawn if case.flops <= self.LONGEST), self.count)
        return found


PRESETS: dict[str, tuple[Preset | Drawn, ...]] = {
    "quick": (Preset(tuple(IN_TORCH), PASSES, (50,), (1, 32), (128,)),),
    "grid": (Preset(tuple(IN_TORCH), PASSES, (50, 100), (1, 8, 32, 64, 128), (64, 128, 256, 512)),),
    "drawn": (Drawn(tuple(IN_TORCH), PASSES, 20),),
    "steps": (Preset(tuple(IN_TORCH), PASSES, (10,), (1, 16, 64), (32, 128, 256), (STEPS,)),),
    "stream": (Preset(tuple(IN_TORCH), ("streaming",), (100,), (1, 8), (64, 128, 256, 512)),),
    "cells": (Preset(OTHERS, PASSES, (100,), (1, 16, 64), (128, 256)),),
    # torch.compile unrolls the loop and compiles it anew for every case, the slower the more steps: half a minute for training with these
    # 20, so that "cells" cannot have it. All peers of a case run its T, so ratios to the plain loop are to be taken from one preset.
    "compiled": (
        Preset(OTHERS, PASSES, (COMPILED_STEPS,), (1, 16), (128,)),
        Preset(tuple(IN_TORCH), PASSES, (10, 50), (1, 16), (32, 128), (COMPILED,)),
    ),
    "inside": (Preset(tuple(IN_TORCH), PASSES, (100,), (16, 64), (128, 256), LAYOUTS[1:]),),
    "clockwork": (Preset(("srn_tanh",), PASSES, (100, 1000), (1, 16), (512,), (CLOCKWORK,)),),
    "packed": (Preset(tuple(IN_TORCH), ("inference", "streaming"), (100,), (1, 8), (256, 512, 1024)),),
    "derivatives": (Preset(tuple(IN_TORCH), DERIVATIVES, (100,), (1, 16, 64), (128, 256)),),
    "bidirectional": (Preset(tuple(IN_TORCH), PASSES, (100,), (1, 8, 32), (64, 128, 256), bidirectional=True),),
    RECURRENCE: (Preset(tuple(IN_TORCH), PASSES, (100,), (1, 8, 32, 128), (64, 128, 256, 512, 1024)),),
    "memory": (Preset(("lstm", "gru"), ("training",), (100, 400), (1, 64), (256,)),),
    "figures": (
        Preset(("lstm",), ("inference",), (100,), (1,), (64, 128, 256, 512, 1024)),
        Preset(("gru", "srn"), ("training",), (100,), (1,), (128, 256)),
    ),
}


def select(preset: str, dtypes: Sequence[str], threads: Sequence[int], pattern: str = "") -> list[Case]:
    """The cases of a preset whose id the regular expression finds."""
    found = (case for part in PRESETS[preset] for case in part.cases(dtypes, threads))
    return [case for case in found if re.search(pattern, case.id)]
