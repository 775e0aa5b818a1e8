"""The traced engine: a page's operations noted down once by the compiled module and followed by torch, step by step, on any device.

What torch does it can differentiate as often as asked, forward and backward, and transform: this is what stands behind every derivative
and transform that no kernel has. Nothing here is fast.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _C
from .cells import Cell, Rows, Sizes, Weights, number, stage_blocks

__all__ = ["run"]

Operation = tuple[str, int, int, int, float]
Value = Any  # a tensor, or for constants and what is absent a number

_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "fma": lambda a, b, c: c + a * b,
    "less": operator.lt,
    "select": torch.where,
    "min": lambda a, b: torch.where(a < b, a, b),
    "max": lambda a, b: torch.where(b < a, a, b),
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
_LEAVES = ("constant", "slot", "vector", "state", "moment")


class _Stage(NamedTuple):
    operations: tuple[tuple[int, Operation], ...]  # with their places, those alone that something depends on
    kept: list[int]
    states: list[int]
    sums: list[int]


class _Program(NamedTuple):
    length: int
    stages: tuple[_Stage, ...]


@functools.cache
def _program(index: int, operands: tuple[int, ...]) -> _Program:
    """A cell's page; ``operands``: the kept values that a stage's matrix multiplies."""
    traced = _C.trace(index)
    operations: list[Operation] = traced["operations"]
    stages: list[tuple[int, list[int], list[int], list[int]]] = traced["stages"]
    wanted = {place for _, _, states, sums in stages for place in (*states, *sums)}
    wanted |= {kept[i] for _, kept, *_ in stages for i in operands if i >= 0}
    for place in range(len(operations) - 1, -1, -1):
        name, *places, _ = operations[place]
        if place in wanted and name not in _LEAVES:
            wanted |= set(places)
    begin, made = 0, []
    for end, kept, states, sums in stages:
        made.append(_Stage(tuple((i, operations[i]) for i in range(begin, end) if i in wanted), kept, states, sums))
        begin = end
    return _Program(len(operations), tuple(made))


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is kept within [−v, v]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, v: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (v,) = ctx.saved_tensors
        return grad.clamp(-v, v), None

    @staticmethod
    def jvp(ctx: Any, h: Tensor, v: Tensor | None) -> Tensor:
        return h.clone()


class _Step:
    """One step of a page, at widths that a projection may make narrower in its last stage."""

    def __init__(self, s: Sizes, weights: Weights) -> None:
        self.cell, self.hidden = s.cell, s.hidden
        self.widths = [s.output if projects else s.hidden for *_, projects in s.cell.stages]
        self.matrices = stage_blocks(s.cell, s.hidden, weights.hh, weights.hr)
        self.vectors = _vectors(s.cell, s.hidden, weights)
        self.biases = {} if weights.bias_hh is None else dict(_biases(s.cell, s.hidden, weights.bias_hh))
        self.program = _program(s.cell.index, tuple(operand for _, _, operand, _ in s.cell.stages))
        self.clip = self.vectors[-len(s.cell.fixed) :][s.cell.fixed.index("grad_clip")] if "grad_clip" in s.cell.fixed else None

    def __call__(self, x: Value, given: Seq[Tensor], states: Seq[Tensor]) -> list[Tensor]:
        """The states after the step; ``x``: W x + b, all input gates."""
        current = list(states)
        values: list[Value] = [None] * self.program.length
        moments: list[Value] = []
        for n, stage in enumerate(self.program.stages):
            width = self.widths[n]
            slots = self._slots(n, x, given, current, values)
            leaves: dict[str, Any] = {"slot": slots, "state": current, "moment": moments}
            for place, (name, a, b, c, value) in stage.operations:
                if name == "constant":
                    values[place] = value
                elif name == "vector":
                    values[place] = self.vectors[a]
                elif name in leaves:
                    values[place] = leaves[name][a]
                else:
                    taken = [_cut(values[i], width) for i in (a, b, c) if i >= 0]
                    values[place] = _FUNCTIONS[name](*taken)
            for i, place in enumerate(stage.states):
                if place >= 0:
                    current[i] = values[place]
            for place in stage.sums:
                variance, mean = torch.var_mean(values[place], -1, correction=0, keepdim=True)
                moments += [mean, variance]
        if self.clip is not None:
            current[0] = _ClipGradient.apply(current[0], self.clip[: current[0].shape[-1]])  # type: ignore[no-untyped-call]
        return current

    def _slots(self, n: int, x: Value, given: Seq[Tensor], states: Seq[Tensor], values: Seq[Value]) -> dict[int, Value]:
        cell, H = self.cell, self.hidden
        first, count, operand, _ = cell.stages[n]
        product: Value = None
        if (matrix := self.matrices[n]) is not None:
            product = linear(states[0] if operand < 0 else values[self.program.stages[n - 1].kept[operand]], matrix)
        column, slots = 0, {}
        for i in range(first, first + count):
            _, of_input, of_matrix, of_caller, _ = cell.slots[i]
            total: Value = 0.0
            if of_caller:
                total = given[cell.given.index(i)]
            elif of_input:
                total = x[..., i * H : (i + 1) * H]
            if of_matrix and product is not None:
                total = total + product[..., column * self.widths[n] : (column + 1) * self.widths[n]]
                column += 1
            if i < cell.input_gates and i in self.biases:
                total = total + self.biases[i]
            slots[i] = total
        return slots


def _cut(value: Value, width: int) -> Value:
    return value[..., :width] if isinstance(value, Tensor) and value.shape[-1] > width else value


def _biases(cell: Cell, hidden: int, bias_hh: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The slots that have a row block of bias_hh, with it."""
    for row, first, end in cell.bias_runs:
        for slot in range(first, end):
            yield slot, bias_hh[(row + slot - first) * hidden : (row + slot - first + 1) * hidden]


def _vectors(cell: Cell, hidden: int, weights: Weights) -> list[Value]:
    """The numbers a unit, as ``cells.vectors`` finds their addresses; the thresholds without a gradient."""
    biases = {} if weights.bias_hh is None else dict(_biases(cell, hidden, weights.bias_hh))
    learned = iter(() if weights.v is None else torch.split(weights.v, hidden))
    vectors: list[Value] = [next(learned) if ours else biases.get(slot, 0.0) for _, slot, ours, *_ in cell.vectors]
    return [v.detach() if factor == "fixed" else v for v, (_, _, _, factor, _) in zip(vectors, cell.vectors, strict=True)]


def run(
    s: Sizes,
    input: Tensor,
    states: Seq[Tensor] | None,
    weights: Weights,
    rows: Rows,
    given: Seq[Tensor],
    resets: Seq[Tensor],
) -> tuple[Tensor, ...]:
    """-> output, final states, the states beyond the first after each token; in the arithmetic of the kernels, rounded at the end."""
    kind, dtype = number(input.dtype), input.dtype
    with torch.autocast(input.device.type, enabled=False):
        cast = [[t.to(kind) for t in tensors] for tensors in (states or (), given, resets)]
        wide = Weights(*(None if w is None else w.to(kind) for w in weights))
        found = _run(s, input.to(kind), wide, rows, *cast)
        return tuple(t.to(dtype) for t in found)


def _run(
    s: Sizes, input: Tensor, weights: Weights, rows: Rows, states: Seq[Tensor], given: Seq[Tensor], resets: Seq[Tensor]
) -> tuple[Tensor, ...]:
    sizes = None if rows.sizes is None else rows.sizes.tolist()
    if s.module and weights.hh is not None:
        block = torch.arange(s.hidden, device=input.device) // s.module
        weights = weights._replace(hh=weights.hh * (block.unsqueeze(1) <= block))
    step = _Step(s, weights)
    steps: Seq[Value] = [None] * s.steps
    if weights.ih is not None:
        steps = _by_step(linear(input, weights.ih, weights.bias_ih), sizes)
    numbers = [_by_step(t, sizes) if t.shape[:-1] == input.shape[:-1] else [t] * s.steps for t in given]
    carried = list(states) or [input.new_zeros(s.batch, width) for width in s.widths]
    found: list[list[Tensor]] = [[] for _ in carried]
    for t in range(s.steps)[::-1] if s.reverse else range(s.steps):
        active = s.batch if sizes is None else sizes[t]
        before = [state[:active] for state in carried]
        if rows.resets is not None and 0 < t + s.reverse < s.steps:
            before = _replaced(t + s.reverse, before, rows, resets)
        now = [of_step[t] for of_step in numbers]
        slots = [block for one in now for block in torch.split(one if one.dim() == 1 else one[:active], s.hidden, -1)]
        after = step(steps[t], slots, before)
        if rows.units is not None:
            due = torch.arange(s.hidden, device=input.device) < rows.units[t]
            after = [torch.where(due, new, old) for new, old in zip(after, before, strict=True)]
        shown = after
        if rows.lengths is not None:
            here = (rows.lengths > t).unsqueeze(-1).to(input.device)
            shown = [torch.where(here, new, torch.zeros((), dtype=new.dtype, device=new.device)) for new in after]
            after = [torch.where(here, new, old) for new, old in zip(after, [state[:active] for state in carried], strict=True)]
        for history, state in zip(found, shown, strict=True):
            history.append(state)
        carried = [new if active == s.batch else torch.cat([new, old[active:]]) for new, old in zip(after, carried, strict=True)]
    order = [history[::-1] if s.reverse else history for history in found]
    output, *histories = ((torch.stack if sizes is None else torch.cat)(history) for history in order)
    return output, *carried, *(history.reshape(-1, s.hidden) for history in histories)


def _by_step(t: Tensor, sizes: list[int] | None) -> Seq[Tensor]:
    return t.unbind() if sizes is None else torch.split(t, sizes)


def _replaced(boundary: int, states: Seq[Tensor], rows: Rows, resets: Seq[Tensor]) -> list[Tensor]:
    """The states that a step finds across a boundary, where rows may start anew."""
    assert rows.resets is not None
    mark = rows.resets[boundary] if rows.lengths is None else rows.resets[boundary] & (rows.lengths > boundary)
    mark = mark.unsqueeze(-1).to(states[0].device)
    by = [r[boundary] if r.dim() == 3 else r for r in resets] or [state.new_zeros(state.shape[-1]) for state in states]
    return [torch.where(mark, new, state) for new, state in zip(by, states, strict=True)]
