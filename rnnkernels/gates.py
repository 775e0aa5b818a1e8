"""The gates of a cell after the fact: one product over all tokens and the page's pointwise maths, by torch, with torch's derivatives.

A kernel has them too, but where a gradient came back into them every page would have to know. States are known for all steps by then, so
nothing here is sequential.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from . import ops
from .cuts import Cut

__all__ = ["check", "of_sequence"]

Formula = Callable[[Tensor, Callable[..., Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]


def _lstm(x: Tensor, u: Any, before: Sequence[Tensor], after: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + u(before[0])).chunk(4, -1)
    return i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()


def _peephole(x: Tensor, u: Any, before: Sequence[Tensor], after: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (x + u(before[0])).chunk(4, -1)
    return (i + v[0] * before[1]).sigmoid(), (f + v[1] * before[1]).sigmoid(), g.tanh(), (o + v[2] * after[1]).sigmoid()


def _three_gates(x: Tensor, u: Any, before: Sequence[Tensor], after: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, g, o = (x + u(before[0])).chunk(3, -1)
    return i.sigmoid(), g.tanh(), o.sigmoid()


def _gru(x: Tensor, u: Any, before: Sequence[Tensor], after: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (x_r, x_z, x_n), (u_r, u_z, u_n) = x.chunk(3, -1), u(before[0]).chunk(3, -1)
    r = (x_r + u_r).sigmoid()
    return r, (x_z + u_z).sigmoid(), (x_n + r * u_n).tanh()


def _reset_before(x: Tensor, u: Any, before: Sequence[Tensor], after: Sequence[Tensor], v: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (x_r, x_z, x_n), (u_r, u_z) = x.chunk(3, -1), u(before[0], 0, 2).chunk(2, -1)
    r = (x_r + u_r).sigmoid()
    return r, (x_z + u_z).sigmoid(), (x_n + u(r * before[0], 2, 3)).tanh()


FORMULAS: dict[str, Formula] = {
    "lstm": _lstm,
    "lstm_projected": _lstm,
    "lstm_peephole": _peephole,
    "lstm_coupled": _three_gates,
    "lstm_no_forget": _three_gates,
    "gru": _gru,
    "gru_reset_before": _reset_before,
}
COUNTS = {cell: ops.CELLS[cell].input_gates for cell in FORMULAS}


def check(cell: str, return_states: bool | str) -> None:
    """Raise ``ValueError`` unless ``return_states`` is False, True, or "gates" for a cell whose gates are given out."""
    if isinstance(return_states, bool):
        return
    if return_states != "gates":
        raise ValueError(f"return_states: expected False, True or 'gates', got {return_states!r}")
    if cell not in FORMULAS:
        raise ValueError(f"return_states: expected True or False for {cell!r}, whose gates are not given out, got 'gates'")


def of_sequence(
    cell: str,
    input: Tensor,
    initial: Sequence[Tensor] | None,
    weights: Sequence[Any],
    after: Sequence[Tensor],
    batch_sizes: Tensor | None,
    reverse: bool,
    cut: Cut | None,
    resets: Sequence[Tensor] | None,
) -> tuple[Tensor, ...]:
    """The gates, each ``[T, B, H]`` or ``[N, H]``, of a sequence whose states after each step are ``after``; the rest as it was called."""
    w = ops.Weights(*weights, *[None] * (len(ops.Weights._fields) - len(weights)))
    assert w.ih is not None
    assert w.hh is not None
    H = w.ih.shape[0] // ops.CELLS[cell].input_gates
    if initial is None:
        batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        initial = [input.new_zeros(batch, state.shape[-1]) for state in after]
    before = []
    for i, (state, first) in enumerate(zip(after, initial, strict=True)):
        if batch_sizes is not None:
            before.append(ops.before_each_token(ops.CELLS[cell], state, first, batch_sizes, reverse))
        else:
            lengths, reset_mask = (None, None) if cut is None else (cut.lengths, cut.reset_mask)
            before.append(ops.before_each_step(state, first, reverse, lengths, reset_mask, None if resets is None else resets[i]))

    def u(h: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        rows = slice(first * H, None if last is None else last * H)
        return linear(h, w.hh[rows], None if w.bias_hh is None else w.bias_hh[rows])  # type: ignore[index]

    v = () if w.v is None else torch.split(w.v, H)
    found = FORMULAS[cell](linear(input, w.ih, w.bias_ih), u, before, after, v)
    if cut is None or cut.lengths is None or batch_sizes is not None:
        return found
    here = (torch.arange(len(input), device=input.device).unsqueeze(1) < cut.lengths.to(input.device)).unsqueeze(2)
    return tuple(torch.where(here, gate, 0) for gate in found)
