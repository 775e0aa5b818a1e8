"""What the tangents of a cell's states depend on: they are a recurrence of their own (``csrc/cells/tangent.h``), which engines run as any
other cell, given the pre-activations, their tangents but for those of U h, and the states before each step.

All of these are products over tokens, by torch, with torch's derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .cells import CELLS, PERSISTENT, Cell, Sizes, Weights

__all__ = ["cell_of", "given", "sizes_of"]


def cell_of(of: Cell, module: int) -> Cell | None:
    """The cell of the tangents, where there is one and all units take part in all steps."""
    cell = CELLS.get(f"{of.name}_tangent")
    return cell if cell is not None and cell.page == f"Tangent<{of.page}>" and not module else None


def sizes_of(s: Sizes, given: int, resets: int) -> Sizes:
    cell = cell_of(s.cell, s.module)
    assert cell is not None
    return s._replace(cell=cell, engine="stepwise" if s.engine in PERSISTENT else s.engine, recompute=False, given=given, resets=resets)


def given(
    s: Sizes, x: Tensor, weights: Weights, before: Seq[Tensor], x_tangent: Tensor | None, weight_tangents: Weights
) -> tuple[Tensor, ...]:
    """What the cell of the tangents is given, ``[N, ·]`` each, from tokens and the states before them; a tangent that is None is zero."""
    h, w, d = before[0], weights, weight_tangents
    assert w.ih is not None
    assert w.hh is not None
    of_input = _total(_times(x_tangent, w.ih), _times(x, d.ih), d.bias_ih)
    of_matrix = _total(_times(h, d.hh), d.bias_hh)
    tangents = _by_slot(s, x.shape[:-1], of_input, of_matrix)
    values = _by_slot(s, x.shape[:-1], linear(x, w.ih, w.bias_ih), linear(h, w.hh, w.bias_hh))
    assert values is not None
    if tangents is None:
        tangents = torch.zeros_like(values)
    return tangents.expand(values.shape), values, *before


def _times(t: Tensor | None, matrix: Tensor | None) -> Tensor | None:
    return None if t is None or matrix is None else linear(t, matrix)


def _total(*terms: Tensor | None) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return sum(there[1:], there[0]) if there else None


def _by_slot(s: Sizes, tokens: Seq[int], of_input: Tensor | None, of_matrix: Tensor | None) -> Tensor | None:
    """Slot by slot what the input's and the matrix' row blocks add up to."""
    if s.cell.uniform or (of_input is None and of_matrix is None):
        return _total(of_input, of_matrix)
    blocks: list[list[Any]] = [[] for _ in s.cell.slots]
    if of_input is not None:
        for i, block in enumerate(torch.split(of_input, s.hidden, -1)):
            blocks[i].append(block)
    if of_matrix is not None:
        rows = torch.split(of_matrix, s.hidden, -1)
        for row, first, end in s.cell.hidden_runs:
            for i in range(first, end):
                blocks[i].append(rows[row + i - first])
    some = of_input if of_input is not None else of_matrix
    assert some is not None
    zero = some.new_zeros(*tokens, s.hidden)
    return torch.cat([zero if total is None else total.expand(zero.shape) for total in (_total(*block) for block in blocks)], -1)
