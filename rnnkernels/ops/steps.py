"""The stepwise and the persistent engine's side of a call.

Stepwise, each step is a product by torch and one run of the page by the compiled module: on a GPU one launch, on a CPU plain loops, which
make this engine the yardstick of the others. Persistent, a GPU runs all steps in one launch. In both the products over all tokens are
torch's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import _C
from . import products
from .cells import (
    PERSISTENT,
    Cell,
    Rows,
    Sizes,
    Weights,
    address,
    before_each_token,
    dense,
    empty,
    given_each_token,
    grad_given,
    new_kept,
    new_moments,
    number,
    place_given,
    problem,
    stage_addresses,
    stage_blocks,
    summed_bias,
    tf32_allowed,
    vectors,
)
from .together import Together

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _in_given_dtypes(run: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Autograd calls with the caller's autocast on: products would come out in another dtype than the kernels are told."""

    @functools.wraps(run)
    def plain(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        if not kinds:
            return run(*args, **kwargs)
        with torch.autocast(kinds[0], enabled=False), torch.autocast(kinds[-1], enabled=False):
            return run(*args, **kwargs)

    return plain


def device_of(t: Tensor) -> tuple[int, int]:
    """-> device index (-1: the CPU), stream"""
    if not t.is_cuda:
        return -1, 0
    index = t.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


class _Launch(NamedTuple):
    """A persistent kernel's call, but for its workspace, whose size depends on how many are launched together."""

    task: _C.Problem
    backward: bool
    call: Callable[[int], _C.Forward | _C.Backward]
    offsets: Callable[[], Tensor]  # the same for all of a launch
    place: tuple[int, int]


def _launch(launches: list[_Launch]) -> None:
    task, backward, _, of_steps, place = launches[0]
    offsets = of_steps()
    bytes = _C.cuda_workspace_bytes(task, backward, place[0], len(launches))
    workspaces = [torch.empty(bytes, dtype=torch.uint8, device=offsets.device) for _ in launches]
    calls: list[Any] = [launch.call(workspace.data_ptr()) for launch, workspace in zip(launches, workspaces, strict=True)]
    run: Any = _C.cuda_backward if backward else _C.cuda_forward
    run(calls, offsets.data_ptr(), *place)


_together = Together(lambda launches: _launch(launches))


def side_by_side() -> contextlib.AbstractContextManager[None]:
    """The two forward or the two backward calls inside, of a persistent engine and of the same sizes, do not depend on each other. They are
    one launch when the block ends; what follows from it is not there before.
    """
    return _together.block()


def gains_side_by_side(s: Sizes, input: Tensor, training: bool) -> bool:
    """Whether two such sequences are sooner done in one launch than in two."""
    if s.engine not in PERSISTENT or s.recompute or not s.batch:
        return False
    return _gains(s._replace(steps=1), input.dtype, training, device_of(input)[0], tf32_allowed())


@functools.lru_cache(maxsize=1024)
def _gains(s: Sizes, dtype: torch.dtype, training: bool, index: int, tf32: bool) -> bool:
    """For any number of steps. ``tf32`` is a setting of torch's that the problem depends on."""
    task = problem(s, dtype, 0, Rows(), training)
    return all(_C.cuda_gains_together(task, backward, index) for backward in ([False, True] if training else [False]))


class _Steps:
    """The tokens of each step, and which step a walk comes from."""

    def __init__(self, s: Sizes, rows: Tensor | None) -> None:
        self.size = [s.batch] * s.steps if rows is None else rows.tolist()
        self.start = [0, *itertools.accumulate(self.size)]
        self.reverse, self.steps = s.reverse, s.steps

    def forward(self) -> range:
        return range(self.steps)[::-1] if self.reverse else range(self.steps)

    def before(self, step: int) -> int | None:
        """The step before, in the walk's own direction of time."""
        step += 1 if self.reverse else -1
        return step if 0 <= step < self.steps else None

    def offsets(self, like: Tensor, batch: int, ragged: bool) -> Tensor:
        """Where each step's tokens start, on the tensor's device; a padded batch needs no copy from the host, so graphs capture it."""
        if ragged:
            return torch.tensor(self.start, dtype=torch.int64, device=like.device)
        return torch.arange(self.steps + 1, dtype=torch.int64, device=like.device) * batch


def _columns(cell: Cell, stage: int) -> int:
    first, count, *_ = cell.stages[stage]
    return sum(h for _, _, h, *_ in cell.slots[first : first + count])


def _width(s: Sizes, stage: int) -> int:
    return s.output if s.cell.stages[stage][3] else s.hidden


@_in_given_dtypes
def forward(
    s: Sizes,
    training: bool,
    input: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Rows,
    given: Seq[Tensor],
    resets: Seq[Tensor],
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
    """-> output, final states, kept values (for training), histories of the states beyond the first (for training, or where asked for) and,
    for training, moments of a cell that has them.
    """
    H, keeps = s.hidden, training and not s.recompute
    tokens = dense(input.flatten(0, -2))
    N = tokens.shape[0]
    gates = new_kept(s, input, N) if keeps else empty(input, (N, s.cell.input_gates * H))
    _input_gates(s, gates, tokens, weights)
    output = input.new_empty(*input.shape[:-1], s.output)
    history = [input.new_empty(N, H) for _ in s.cell.states[1:]] if training or s.returns else []
    if training:
        history += new_moments(s, input, N)
    if s.batch == 0:
        return output, [input.new_empty(0, width) for width in s.widths], gates if keeps else None, history
    walk = _walk_together if s.engine in PERSISTENT else _walk
    final = walk(s, keeps, gates, states, weights, rows.sizes, output, history, place_given(s, given, input.shape[:-1]))
    return output, final, gates if keeps else None, history


def _input_gates(s: Sizes, gates: Tensor, tokens: Tensor, weights: Weights) -> None:
    if weights.ih is None:
        return
    x_gates = gates[:, : s.cell.input_gates * s.hidden]
    bias = summed_bias(s.cell, s.hidden, weights.bias_ih, weights.bias_hh)
    if bias is None:
        torch.mm(tokens, weights.ih.t(), out=x_gates)
    else:
        torch.addmm(bias, tokens, weights.ih.t(), out=x_gates)


def recompute(
    s: Sizes,
    input: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Tensor | None,
    output: Tensor,
    history: Seq[Tensor],
    given: Seq[Tensor],
) -> Tensor:
    """The kept values from the states: all tokens as one step of as many rows."""
    tokens = dense(input.flatten(0, -2))
    N = tokens.shape[0]
    kept = new_kept(s, input, N)
    _input_gates(s, kept, tokens, weights)
    after = [output.view(N, s.output), *history[: len(s.cell.states) - 1]]
    before = [before_each_token(s, state, states[i] if states else None, rows) for i, state in enumerate(after)]
    if N:
        once = s._replace(steps=1, batch=N, engine="stepwise")
        again = [torch.empty_like(h) for h in history]
        laid = given_each_token(s, given, input.shape[:-1], rows)
        _walk(once, True, kept, before, weights, None, torch.empty_like(after[0]), again, place_given(once, laid, (N,)))
    return kept


def _walk_together(
    s: Sizes,
    training: bool,
    gates: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Tensor | None,
    output: Tensor,
    history: Seq[Tensor],
    given: list[tuple[int, int, int]],
) -> list[Tensor]:
    place = device_of(gates)
    task = problem(s, gates.dtype, 0, Rows(), training)
    final = [gates.new_empty(s.batch, width) for width in s.widths]
    offsets = functools.partial(_Steps(s, rows).offsets, gates, s.batch, rows is not None)
    call = functools.partial(
        _C.cuda_forward_call,
        task,
        gates.data_ptr(),
        gates.shape[1],
        stage_addresses(s.cell, s.hidden, weights.hh, weights.hr),
        vectors(s.cell, s.hidden, weights),
        [state.data_ptr() for state in states],
        [state.data_ptr() for state in final],
        output.data_ptr(),
        [0, *[h.data_ptr() for h in history]],
    )
    held = (gates, states, weights, final, output, history)
    _together.run(_Launch(task, False, call, offsets, place), None, *held)
    return final


def _walk(
    s: Sizes,
    training: bool,
    gates: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Tensor | None,
    output: Tensor,
    history: Seq[Tensor],
    given: list[tuple[int, int, int]],
) -> list[Tensor]:
    cell, H, dtype, matrices = s.cell, s.hidden, gates.dtype, stage_blocks(s.cell, s.hidden, weights.hh, weights.hr)
    steps, task = _Steps(s, rows), problem(s, dtype, 0, Rows(), training)
    kind = number(dtype)
    carried = [state.to(kind, copy=True) for state in states] or [gates.new_zeros(s.batch, width, dtype=kind) for width in s.widths]
    between = gates.new_empty(s.batch, cell.kept * H, dtype=kind) if len(cell.stages) > 1 else None
    y, unit_vectors, place = output.view(-1, s.output), vectors(cell, H, weights), device_of(gates)
    sums = _Sums(s, gates, history[-1] if cell.moments and len(history) == len(cell.states) else None)
    for n, step in enumerate(steps.forward()):
        active, token, before = steps.size[step], steps.start[step], steps.before(step)
        for stage, (_, _, operand, _) in enumerate(cell.stages):
            weight, read = matrices[stage], None
            if weight is None or not _columns(cell, stage):
                pass
            elif operand >= 0:
                assert between is not None
                read = between[:active, operand * H : (operand + 1) * H].to(dtype)
            elif n == 0 or before is None:
                read = states[0][:active] if states else None
            else:
                known = min(active, steps.size[before])
                read = y[steps.start[before] : steps.start[before] + known]
                if known < active:
                    rest = states[0][known:active] if states else y.new_zeros(active - known, s.output)
                    read = torch.cat([read, rest])
            product = None if read is None or weight is None else torch.mm(read, weight.t())
            _C.forward_step(
                task,
                stage,
                _at(gates, token),
                gates.shape[1],
                _at(gates, token) if training else 0,
                address(between),
                unit_vectors,
                [state.data_ptr() for state in carried],
                [_at(y, token), *[_at(h, token) for h in history[: len(cell.states) - 1]]],
                [data + token * per_token * gates.element_size() for data, per_token, _ in given],
                [per_row for *_, per_row in given],
                active,
                address(product),
                sums.moments_at(token),
                sums.partial_of(cell.sums[stage][0]),
                *place,
            )
            sums.take_moments(stage, token, active)
    return [state.to(dtype) for state in carried]


class _Sums:
    """The sums over a row's units of a cell that has such: a stage leaves each unit's part, torch adds them up, the next stage reads it."""

    def __init__(self, s: Sizes, like: Tensor, moments: Tensor | None) -> None:
        self.cell, self.hidden, self.every_token = s.cell, s.hidden, moments is not None
        if s.cell.moments:
            most = max(max(pair) for pair in s.cell.sums)
            self.partial = like.new_empty(s.batch * s.hidden * most * 2, dtype=torch.float64)
            self.moments = like.new_empty(s.batch, s.cell.moments, dtype=number(like.dtype)) if moments is None else moments
            self.means = like.new_empty(s.batch, _C.MAX_SUMS, dtype=number(like.dtype))

    def moments_at(self, token: int) -> int:
        return _at(self.moments, token if self.every_token else 0) if self.cell.moments else 0

    def partial_of(self, count: int) -> int:
        return self.partial.data_ptr() if count else 0

    def _added(self, active: int, count: int) -> Tensor:
        parts = self.partial[: active * self.hidden * count * 2].view(active, self.hidden, count, 2)
        return parts.sum(1) / self.hidden

    def take_moments(self, stage: int, token: int, active: int) -> None:
        count = self.cell.sums[stage][0]
        if not count:
            return
        first = 2 * sum(forward for forward, _ in self.cell.sums[:stage])
        mean, square = self._added(active, count).unbind(2)
        start = token if self.every_token else 0
        rows = self.moments[start : start + active, first : first + 2 * count].view(active, count, 2)
        rows[..., 0] = mean
        rows[..., 1] = (square - mean * mean).clamp_min(0)

    def take_means(self, stage: int, active: int) -> None:
        count = self.cell.sums[stage][1]
        if count:
            self.means[:active, :count] = self._added(active, count)[..., 0]


def _at(t: Tensor | None, row: int) -> int:
    return 0 if t is None else t.data_ptr() + row * t.stride(0) * t.element_size()


@_in_given_dtypes
def backward(
    s: Sizes,
    needs: Seq[bool],  # input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v, *states, *given
    grad_states: Seq[Tensor | None],  # of each state after each token, the output's first
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Rows,
    output: Tensor,
    kept: Tensor | None,
    history: Seq[Tensor],
    given: Seq[Tensor],
    resets: Seq[Tensor],
    overwrite: bool,
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients in the order of `needs`, and those of all slots, ``[N, room · H]``; within :func:`side_by_side` they are there after it."""
    cell, H, P = s.cell, s.hidden, s.output
    tokens, y = input.flatten(0, -2), output.view(-1, P)
    if kept is None:
        kept, overwrite = recompute(s, input, states, weights, rows.sizes, output, history, given), True
    # The stages of a cell hand kept values on to each other where the gradients go.
    gates = kept if overwrite else kept.clone() if len(cell.stages) > 1 else torch.empty_like(kept)
    wanted = needs[1 + len(weights) :]
    initial = [torch.empty_like(state) if need else None for state, need in zip(states, wanted[: len(states)], strict=True)]
    upstream = [None if g is None else dense(g).view(y.shape[0], g.shape[-1]) for g in grad_states]
    finals = [None if g is None else dense(g) for g in grad_final]
    found: list[Tensor | None] = []

    @_in_given_dtypes
    def finish() -> None:
        """What is left to products over all tokens."""
        grads: list[Tensor | None] = [None] * (1 + len(weights))
        after = [y, *history]
        x_gates = gates[:, : cell.input_gates * H]
        if needs[0]:
            grads[0] = torch.zeros_like(input) if weights.ih is None else torch.mm(x_gates, weights.ih).view(input.shape)
        if needs[1]:
            grads[1] = products.grad_ih(s, gates, tokens)
        if needs[2]:
            grads[2] = products.grad_hh(s, gates, kept, before_each_token(s, y, states[0] if states else None, rows.sizes))
        if needs[3] or needs[4]:
            grads[3:5] = (grad if need else None for grad, need in zip(products.bias_grads(s, gates), needs[3:5], strict=True))
        if needs[5]:
            grads[5] = products.grad_hr(s, gates, kept)
        if needs[6]:
            grads[6] = products.grad_vectors(s, gates, kept, states, after, rows.sizes)
        found.extend([*grads, *initial, *grad_given(s, gates, given, wanted[len(states) :], input.shape[:-1], rows.sizes)])

    if s.batch and s.engine in PERSISTENT:
        _walk_back_together(s, gates, kept, upstream, finals, initial, states, weights, rows.sizes, y, history, finish)
        return found, gates
    if s.batch:
        _walk_back(s, gates, kept, upstream, finals, initial, states, weights, rows.sizes, y, history)
    finish()
    return found, gates


def _walk_back_together(
    s: Sizes,
    gates: Tensor,
    kept: Tensor,
    upstream: Seq[Tensor | None],
    finals: Seq[Tensor | None],
    initial: Seq[Tensor | None],
    states: Seq[Tensor],
    weights: Weights,
    rows: Tensor | None,
    y: Tensor,
    history: Seq[Tensor],
    done: Callable[[], None],
) -> None:
    place = device_of(gates)
    task = problem(s, gates.dtype, 0, Rows(), True)
    offsets = functools.partial(_Steps(s, rows).offsets, gates, s.batch, rows is not None)
    call = functools.partial(
        _C.cuda_backward_call,
        task,
        (gates if len(s.cell.stages) > 1 else kept).data_ptr(),
        gates.data_ptr(),
        stage_addresses(s.cell, s.hidden, weights.hh, weights.hr),
        vectors(s.cell, s.hidden, weights),
        [state.data_ptr() for state in states],
        y.data_ptr(),
        [0, *[h.data_ptr() for h in history]],
        [address(g) for g in upstream],
        [address(g) for g in finals],
        [address(g) for g in initial],
    )
    held = (gates, kept, upstream, finals, initial, states, weights, y, history)
    _together.run(_Launch(task, True, call, offsets, place), done, *held)


def _walk_back(
    s: Sizes,
    gates: Tensor,
    kept: Tensor,
    upstream: Seq[Tensor | None],
    finals: Seq[Tensor | None],
    initial: Seq[Tensor | None],
    states: Seq[Tensor],
    weights: Weights,
    rows: Tensor | None,
    y: Tensor,
    history: Seq[Tensor],
) -> None:
    cell, dtype, matrices = s.cell, gates.dtype, stage_blocks(s.cell, s.hidden, weights.hh, weights.hr)
    steps, task = _Steps(s, rows), problem(s, dtype, 0, Rows(), True)
    kind, last = number(dtype), len(cell.stages) - 1
    carried = [
        gates.new_zeros(s.batch, width, dtype=kind) if g is None else g.to(kind, copy=True)
        for g, width in zip(finals, s.widths, strict=True)
    ]
    # The gate gradients that the next product reads; a row that has left keeps those of its last visit.
    staged = [gates.new_zeros(s.batch, _columns(cell, stage) * _width(s, stage), dtype=kind) for stage in range(last + 1)]
    unit_vectors, place = vectors(cell, s.hidden, weights), device_of(gates)
    sums = _Sums(s, gates, history[-1] if cell.moments else None)
    history = history[: len(cell.states) - 1]
    source = gates if last else kept
    for n, step in enumerate(reversed(steps.forward())):
        active, token, before = steps.size[step], steps.start[step], steps.before(step)
        after = step - 1 if s.reverse else step + 1  # the step that the walk comes from
        for stage in range(last, -1, -1):
            reader = 0 if stage == last else stage + 1
            summed = active if stage < last else 0 if n == 0 else min(active, steps.size[after])
            weight = matrices[reader]
            product = None
            if summed and weight is not None and staged[reader].shape[1]:
                product = torch.mm(staged[reader][:summed].to(dtype), weight)
            _C.backward_step(
                task,
                stage,
                _at(source, token),
                _at(gates, token),
                unit_vectors,
                0 if before is None else min(active, steps.size[before]),
                [] if before is None else [_at(t, steps.start[before]) for t in (y, *history)],
                [state.data_ptr() for state in states],
                [_at(t, token) for t in (y, *history)],
                [_at(g, token) for g in upstream],
                [state.data_ptr() for state in carried],
                staged[stage].data_ptr(),
                active,
                summed if product is not None else 0,
                address(product),
                sums.moments_at(token),
                sums.means.data_ptr() if cell.moments else 0,
                sums.partial_of(cell.sums[stage][1]),
                *place,
            )
            sums.take_means(stage, active)
    for i, (to, state) in enumerate(zip(initial, carried, strict=False)):
        if to is not None:
            if i == 0 and matrices[0] is not None:
                state = state + torch.mm(staged[0].to(dtype), matrices[0])
            to.copy_(state)
