"""Backward of a long sequence whose kept values are made anew: stretch by stretch of time, so that only one stretch's exist at a time."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from . import cpu
from .cells import Rows, Sizes, Weights, dense, given_each_token, number

__all__ = ["backward", "fits", "longest"]

_WEIGHTS = len(Weights._fields)

# Of a stretch, about: enough for the products outside the recurrence to run at their rate, and for packing U to be a small part.
TOKENS = 512


def fits(s: Sizes, rows: Rows) -> bool:
    """Whether a call is cut into stretches: those of one stage and whole rows, whose kept values are made of the states on both sides."""
    return s.engine == "cpu" and s.recompute and len(s.cell.stages) == 1 and not s.cut and rows.sizes is None and len(_stretches(s)) > 1


def longest(s: Sizes, rows: Rows) -> Sizes:
    """What backward walks at a time, at most."""
    return s._replace(steps=max(end - begin for begin, end in _stretches(s))) if fits(s, rows) else s


def _stretches(s: Sizes) -> list[tuple[int, int]]:
    """The first and last + 1 step of each, the sequence's end, where backward begins, first."""
    steps = max(1, TOKENS // max(1, s.batch))
    starts = range(0, s.steps, steps) if s.steps * s.batch >= 2 * TOKENS else (0,)
    found = list(zip(starts, [*starts[1:], s.steps], strict=True))
    return found if s.reverse else found[::-1]


def backward(
    s: Sizes,
    needs: Seq[bool],
    grad_states: Seq[Tensor | None],
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    output: Tensor,
    history: Seq[Tensor],
    given: Seq[Tensor],
) -> list[Tensor | None]:
    """As ``cpu.backward``, without the gradients of all slots. Sums over stretches are added up in the kernels' number type."""
    kind, dtype = number(input.dtype), input.dtype

    def by_step(t: Tensor) -> Tensor:
        return t.view(s.steps, s.batch, -1)

    def of_token(t: Tensor) -> bool:
        return t.shape[:-1] == input.shape[:-1]

    after = [by_step(t) for t in (output, *history)]
    upstream = [None if g is None else by_step(dense(g)) for g in grad_states]
    leaves: list[Tensor | None] = [input, *weights, *states, *given]
    total: list[Tensor | None] = [None] * len(leaves)
    first_given = 1 + _WEIGHTS + len(states)
    carried = list(grad_final)
    for begin, end in _stretches(s):
        starts = end == s.steps if s.reverse else begin == 0
        before = list(states) if starts else [t[end if s.reverse else begin - 1] for t in after]
        part = s._replace(steps=end - begin)
        x, y, past = input[begin:end], output[begin:end], [t[begin:end].flatten(0, 1) for t in after[1:]]
        numbers = [t[begin:end] if of_token(t) else t for t in given]
        of_states = needs[1 + _WEIGHTS : first_given] if starts else [True] * len(before)
        wanted = [*needs[: 1 + _WEIGHTS], *of_states, *needs[first_given:]]
        if starts:
            kept = cpu.recompute(part, x, before, weights, Rows(), y, past, numbers, ())
        else:
            shift = 1 if s.reverse else -1
            known = [t[begin + shift : end + shift].flatten(0, 1) for t in after[: len(s.cell.states)]]
            kept = cpu.kept_of_tokens(part, x.flatten(0, -2), known, weights, given_each_token(part, numbers, x.shape[:-1], None))
        above = [None if g is None else g[begin:end] for g in upstream]
        found = cpu.backward(part, wanted, above, carried, x, before, weights, Rows(), y, kept, past, numbers, (), True)[0]
        del kept  # before the next stretch's are made
        carried = found[1 + _WEIGHTS : 1 + _WEIGHTS + len(before)]
        places = [*range(1 + _WEIGHTS), *range(first_given, len(leaves))]
        for i, grad in zip(places, [*found[: 1 + _WEIGHTS], *found[1 + _WEIGHTS + len(before) :]], strict=True):
            like = leaves[i]
            if grad is None or like is None:
                continue
            whole = total[i]
            if i == 0 or (i >= first_given and of_token(like)):
                whole = torch.empty_like(like) if whole is None else whole
                whole[begin:end] = grad.view(x.shape) if i == 0 else grad
            else:
                whole = grad.to(kind) if whole is None else whole.add_(grad)
            total[i] = whole
        del found, grad
    total[1 + _WEIGHTS : first_given] = carried[: len(states)]
    return [t if t is None else t.to(dtype) for t in total]
