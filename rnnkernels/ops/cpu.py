"""The CPU engine's side of a call: its memory, and what a single step leaves to torch."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import products
from .cells import (
    NO_ROWS,
    Cell,
    Rows,
    Sizes,
    Team,
    Weights,
    address,
    addresses,
    before_each_token,
    dense,
    empty,
    given_each_token,
    grad_given,
    grad_resets,
    grad_shapes,
    grouped,
    new_kept,
    new_moments,
    place_given,
    place_resets,
    problem,
    stage_addresses,
    summed_bias,
    vectors,
)
from .choice import Choice
from .packed import Pack, Packed, Packing, Remembered, keep
from .together import Together


def _run_all(calls: list[Any]) -> None:
    run: Any = _C.forward if isinstance(calls[0], _C.Forward) else _C.backward
    run(calls)


class _Thread(Together):
    """What one thread of Python's keeps: workspaces, since fresh pages cost as much as a short sequence, and calls that wait for others."""

    KEPT = 64 << 20

    def __init__(self) -> None:
        super().__init__(lambda calls: _run_all(calls))
        self.buffers: list[Tensor] = []
        self.chained = False  # each of those that wait reads the output of the one before it

    @property
    def threads(self) -> int:
        """How many a call may use."""
        return torch.get_num_threads() if self.waiting is None else 1

    def take(self, bytes: int) -> Tensor:
        """A workspace that none of those that wait has."""
        i = 0 if self.waiting is None else len(self.waiting)
        if i == len(self.buffers):
            self.buffers.append(torch.empty(0, dtype=torch.uint8, device="cpu"))
        if self.buffers[i].numel() >= bytes:
            return self.buffers[i]
        buffer = empty(self.buffers[i], (bytes,))
        if bytes <= self.KEPT:
            self.buffers[i] = buffer
        return buffer


thread = _Thread()


@contextlib.contextmanager
def side_by_side(chained: bool = False) -> Iterator[None]:
    """The forward or the backward calls inside do not depend on each other; or, ``chained``, they are forward calls and each reads what the
    one before it gives. They run when the block ends, on a thread each. Their results are not there before.
    """

    def chain(calls: list[Any]) -> None:
        _C.forward_chain(calls, torch.get_num_threads())

    around, thread.chained = thread.chained, chained
    try:
        with thread.block(chain if chained else None):
            yield
    finally:
        thread.chained = around


def gains_side_by_side(s: Sizes, input: Tensor, training: bool) -> bool:
    """Whether two such sequences side by side, on a thread each, are sooner done than one after the other with all threads."""
    if s.recompute or s.given or s.resets or s.module:
        return False  # what these leave to do is done right after the kernel
    return _C.gains_apart(problem(s, input.dtype, input.shape[-1], NO_ROWS, training), training)


@functools.lru_cache(maxsize=1024)
def gains_chained(s: Sizes, dtype: torch.dtype, input_size: int, layers: int, threads: int) -> bool:
    """Whether so many such layers, each of which reads the one below, are sooner done at the same time than one after the other."""
    return _C.gains_chained(problem(s, dtype, s.output, NO_ROWS, False, threads), input_size, layers)


class Task(NamedTuple):
    """A problem as the compiled module takes it, and the memory that goes with it."""

    problem: _C.Problem
    complete: bool
    bytes: int  # of the workspace
    packing: Packing


class _Teams(NamedTuple):
    """Those that may run a kind of calls, and which does; None: there is one."""

    all: list[Team]
    choice: Choice | None


@functools.lru_cache(maxsize=1024)
def _teams(
    s: Sizes, dtype: torch.dtype, input_size: int, ragged: bool, training: bool, complete: bool, threads: int, chained: bool
) -> _Teams:
    found = [Team(*team) for team in _C.teams(problem(s, dtype, input_size, NO_ROWS, training, threads, chained), training)]
    return _Teams(found, Choice(len(found)) if len(found) > 1 else None)


_one_at_a_time = threading.Lock()  # or two threads would make a choice each for one kind


def _teams_of(
    s: Sizes, dtype: torch.dtype, input_size: int, ragged: bool, training: bool, complete: bool, threads: int, chained: bool
) -> _Teams:
    """Calls are of one kind up to twice as many steps, in either direction."""
    kind = s._replace(steps=1 << max(s.steps.bit_length() - 1, 0), reverse=False)
    with _one_at_a_time:
        return _teams(kind, dtype, input_size, ragged, training, complete, threads, chained)


def _make_task(
    s: Sizes, dtype: torch.dtype, input_size: int, rows: Rows, training: bool, backward: bool, chained: bool, team: Team
) -> Task:
    task = problem(s, dtype, input_size, rows, training, chained=chained, team=team)
    return Task(task, s.complete, _C.workspace_bytes(task, backward), _C.packing(task))


@functools.lru_cache(maxsize=1024)
def tasks_of_whole_rows(
    s: Sizes, dtype: torch.dtype, input_size: int, training: bool, backward: bool, complete: bool, threads: int, chained: bool
) -> tuple[list[Task], Choice | None]:
    """For each team. Known by the sizes; ``complete`` depends on a setting of torch's too."""
    teams, choice = _teams_of(s, dtype, input_size, False, training, complete, threads, chained)
    return [_make_task(s, dtype, input_size, NO_ROWS, training, backward, chained, team) for team in teams], choice


class _Turn(NamedTuple):
    """A call's way to run, and whom it tells how long that took."""

    task: Task
    way: int
    choice: Choice | None
    follows: bool  # a forward call that kept what this one reads, and had better run on the same cores

    def run(self, call: Any, done: Callable[[], None] | None, tokens: int, rows: Rows, *held: Any) -> None:
        started = perf_counter_ns()
        thread.run(call, done, rows, *held)
        if self.choice is not None and self.choice.asks:
            tokens = tokens if rows.lengths is None else int(rows.lengths.sum())
            self.choice.took(self.way, self.follows, perf_counter_ns() - started, tokens)


def turn_of(
    s: Sizes, dtype: torch.dtype, input_size: int, rows: Rows, training: bool, backward: bool = False, looks: bool = False
) -> _Turn:
    """``looks``: no call follows."""
    threads, chained, whole = thread.threads, thread.chained, rows.sizes is None and not s.cut
    complete = s.steps == 1 and s.complete
    tasks: list[Task] = []
    if whole:
        tasks, choice = tasks_of_whole_rows(s, dtype, input_size, training, backward, complete, threads, chained)
    else:
        teams, choice = _teams_of(s, dtype, input_size, rows.sizes is not None, training, complete, threads, chained)
    follows = backward and not s.recompute
    if choice is None:
        way = 0
    elif looks:
        way = choice.best
    else:
        way = choice.backward() if follows else choice.forward()
    task = tasks[way] if whole else _make_task(s, dtype, input_size, rows, training, backward, chained, teams[way])
    return _Turn(task, way, choice, follows)


class _Generation:
    """Of what is known of calls."""

    number = 0


def generation() -> int:
    """Another one once what was known is forgotten."""
    return _Generation.number


def forget() -> None:
    """What was known of an instruction set."""
    _Generation.number += 1
    gains_chained.cache_clear()
    tasks_of_whole_rows.cache_clear()
    _teams.cache_clear()


def forward(
    s: Sizes,
    training: bool,
    input: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Rows,
    given: Seq[Tensor],
    resets: Seq[Tensor],
    packed: Packed | Remembered | None = None,
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
    """-> output, final states, kept values (for training), histories of the states beyond the first (for training, or where asked for) and,
    for training, moments of a cell that has them.
    """
    cell, H = s.cell, s.hidden
    tokens = dense(input)
    around = tokens.shape[:-1]
    N, keeps = around.numel(), training and not s.recompute
    turn = turn_of(s, tokens.dtype, tokens.shape[-1], rows, keeps)
    _, complete, bytes, packing = turn.task
    kept = new_kept(s, input, N) if keeps or complete else None
    output = empty(input, (*around, s.output))
    final, history, moments = [input.new_empty(s.batch, s.output)], list[Tensor](), list[Tensor]()
    for _ in cell.states[1:]:
        final.append(input.new_empty(s.batch, H))
        if training or s.returns:
            history.append(empty(input, (N, H)))
    if training and cell.moments:
        moments = new_moments(s, input, N)
    if complete:
        assert kept is not None
        complete_step(cell, H, kept, tokens.flatten(0, -2), states[0] if states else None, weights)
    workspace = thread.take(bytes)
    own, pack, done = None, Pack.ALL, None
    if packed is not None:
        own, pack, found = packed.memory(packing, weights)
        done = None if found is None else functools.partial(keep, found, packing, own)
    place = place_given(s, given, around), place_resets(s, resets) if resets else []
    call = _forward(turn, cell, H, tokens, states, weights, kept, output, final, history, workspace, moments, *place, own, pack)
    turn.run(call, done, N, rows, tokens, states, weights, kept, output, final, history, moments, workspace, own)
    return output, final, kept if keeps else None, [*history, *moments]


def _forward(
    turn: _Turn,
    cell: Cell,
    H: int,
    tokens: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    kept: Tensor | None,
    output: Tensor | None,
    final: Seq[Tensor],
    history: Seq[Tensor],
    workspace: Tensor,
    moments: Seq[Tensor],
    given: list[tuple[int, int, int]],
    resets: list[tuple[int, int, int]],
    own: Tensor | None = None,
    pack: Pack = Pack.ALL,
) -> Any:
    """What `_C` is asked to do; results for which there is no memory are not stored."""
    return _C.Forward(
        turn.task.problem,
        tokens.data_ptr(),
        address(weights.ih),
        address(weights.bias_ih),
        address(weights.bias_hh),
        address(kept),
        cell.room * H,
        stage_addresses(cell, H, weights.hh, weights.hr),
        vectors(cell, H, weights) if cell.vectors else [],
        addresses(states),
        addresses(final),
        address(output),
        [0, *addresses(history)],
        workspace.data_ptr(),
        turn.task.bytes,
        given,
        moments[0].data_ptr() if moments else 0,
        resets,
        address(own),
        pack,
    )


def recompute(
    s: Sizes,
    input: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    rows: Rows,
    output: Tensor,
    history: Seq[Tensor],
    given: Seq[Tensor],
    resets: Seq[Tensor],
) -> Tensor:
    """The kept values from the states. A cell of several stages, and where not everything takes part in every step, runs the sequence
    again.
    """
    s = s._replace(recompute=False)
    if len(s.cell.stages) > 1 or s.cut:
        _, _, kept, _ = forward(s, True, input, states, weights, rows, given, resets)
    else:
        tokens = input.flatten(0, -2)
        N = tokens.shape[0]
        after = [output.view(N, s.output), *history[: len(s.cell.states) - 1]]
        before = [before_each_token(s, state, states[i] if states else None, rows.sizes) for i, state in enumerate(after)]
        return kept_of_tokens(s, tokens, before, weights, given_each_token(s, given, input.shape[:-1], rows.sizes))
    assert kept is not None
    return kept


def kept_of_tokens(s: Sizes, tokens: Tensor, before: Seq[Tensor], weights: Weights, given: Seq[Tensor]) -> Tensor:
    """The kept values of tokens ``[N, I]`` of a cell of one stage from the states before each, all of them one step of N rows."""
    N, cell, H = tokens.shape[0], s.cell, s.hidden
    s = s._replace(steps=1, batch=N, recompute=False)
    turn = turn_of(s, tokens.dtype, tokens.shape[-1], NO_ROWS, True)
    tokens, kept = dense(tokens), new_kept(s, tokens, N)
    if turn.task.complete:
        complete_step(cell, H, kept, tokens, before[0], weights)
    workspace = thread.take(turn.task.bytes)
    call = _forward(turn, cell, H, tokens, before, weights, kept, None, (), (), workspace, (), place_given(s, given, tokens.shape[:-1]), [])
    turn.run(call, None, N, NO_ROWS, tokens, before, weights, kept, workspace, given)
    return kept


def complete_step(cell: Cell, H: int, gates: Tensor, x: Tensor, h: Tensor | None, weights: Weights) -> None:
    """Both products of a single step, by torch: W x over the slots that the input feeds, U h added to these or alone."""
    inputs, bias = cell.input_gates, summed_bias(cell, H, weights.bias_ih, weights.bias_hh)
    x_gates = gates if cell.uniform else gates[:, : inputs * H]
    if weights.ih is None:
        pass
    elif bias is None:
        torch.mm(x, weights.ih.t(), out=x_gates)
    else:
        torch.addmm(bias, x, weights.ih.t(), out=x_gates)
    if h is None:
        gates[:, inputs * H :].zero_()
        return
    for row, first, end in cell.hidden_runs:
        both = max(min(end, inputs), first)  # slots [first, both) have W's part, [both, end) do not
        assert weights.hh is not None
        u = weights.hh[row * H : (row + end - first) * H]
        if first < both:
            gates[:, first * H : both * H].addmm_(h, u[: (both - first) * H].t())
        if both < end:
            torch.mm(h, u[(both - first) * H :].t(), out=gates[:, both * H : end * H])


def backward(
    s: Sizes,
    needs: Seq[bool],  # input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v, *states, *given, *resets
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
    """Gradients in the order of `needs`, and those of all slots, ``[N, room · H]``; past a row's end anything."""
    cell, H = s.cell, s.hidden
    tokens = dense(input)
    if kept is None:
        kept, overwrite = recompute(s, input, states, weights, rows, output, history, given, resets), True
    upstream = [None if g is None else dense(g) for g in grad_states]
    finals = [None if g is None else dense(g) for g in grad_final]
    turn = turn_of(s, input.dtype, input.shape[-1], rows, True, True)
    task, complete, bytes, _ = turn.task
    gates = kept if overwrite else empty(kept, kept.shape)
    # A complete run's carried gradient of state 0 is asked for with the part through U still to be added.
    _, of_states, of_given, of_resets = grouped(s, needs[1:])
    initial = [torch.empty_like(state) if need else None for state, need in zip(states, of_states, strict=True)]
    marks = int(rows.resets.sum()) if any(of_resets) and rows.resets is not None else 0
    found = [input.new_zeros(marks, t.shape[-1]) if need else None for t, need in zip(resets, of_resets, strict=True)]
    grads = [empty(input, shape) if need else None for shape, need in zip(grad_shapes(s, input, weights), needs, strict=False)]
    grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_hr, grad_v = grads
    workspace = thread.take(bytes)
    call = _C.Backward(
        task,
        kept.data_ptr(),
        gates.data_ptr(),
        stage_addresses(cell, H, weights.hh, weights.hr),
        vectors(cell, H, weights),
        addresses(states),
        output.data_ptr(),
        [0, *addresses(history[: len(cell.states) - 1])],
        [address(g) for g in upstream],
        [address(g) for g in finals],
        [address(g) for g in initial],
        tokens.data_ptr(),
        address(weights.ih),
        address(grad_x),
        address(grad_ih),
        stage_addresses(cell, H, grad_hh, grad_hr),
        address(grad_bias_ih),
        address(grad_bias_hh),
        grad_vectors(cell, H, grad_v),
        workspace.data_ptr(),
        bytes,
        history[-1].data_ptr() if cell.moments else 0,
        place_resets(s, resets),
        [address(g) for g in found],
    )
    held = (tokens, states, weights, kept, gates, output, history, upstream, finals, initial, grads, workspace, found)
    turn.run(call, None, kept.shape[0], rows, *held)
    if complete:
        after = [output.flatten(0, -2), *history]
        complete_backward(s, grads, initial, gates, kept, tokens.flatten(0, -2), states, weights, after)
    if given or resets:
        initial += grad_given(s, gates, given, of_given, input.shape[:-1], rows.sizes)
        initial += grad_resets(resets, found, rows.resets)
    return [*grads, *initial], gates


def grad_vectors(cell: Cell, H: int, grad_v: Tensor | None) -> list[int]:
    """Where the gradients of the per-unit vectors lie."""
    if grad_v is None:
        return []
    if cell.fixed:
        grad_v[-len(cell.fixed) * H :].zero_()  # the engine leaves them as they are
    addresses, row = [], 0
    for _, _, learned, *_ in cell.vectors:
        addresses.append(grad_v[row * H :].data_ptr() if learned else 0)
        row += learned
    return addresses


def complete_backward(
    s: Sizes,
    grads: list[Tensor | None],
    initial: list[Tensor | None],
    gates: Tensor,
    kept: Tensor,
    x: Tensor,
    states: Seq[Tensor],
    weights: Weights,
    after: Seq[Tensor],
) -> None:
    """The products of a single step's gate gradients, by torch."""
    cell, H, h = s.cell, s.hidden, states[0] if states else None
    grad_x, grad_ih, grad_hh, bias_ih, bias_hh, _, grad_v = grads
    x_gates = gates[:, : cell.input_gates * H]
    if grad_x is not None and weights.ih is not None:
        torch.mm(x_gates, weights.ih, out=grad_x.view(x.shape))
    elif grad_x is not None:
        grad_x.zero_()
    if grad_ih is not None:
        torch.mm(x_gates.t(), x, out=grad_ih)
    if bias_ih is not None:
        torch.sum(x_gates, 0, out=bias_ih)
    if grad_v is not None:
        grad_v.copy_(products.grad_vectors(s, gates, kept, states, after, None))
    if bias_hh is not None:
        for row, first, end in cell.bias_runs:
            torch.sum(gates[:, first * H : end * H], 0, out=bias_hh[row * H : (row + end - first) * H])
    for row, first, end in cell.hidden_runs:
        rows, run = slice(row * H, (row + end - first) * H), gates[:, first * H : end * H]
        if grad_hh is not None:
            if h is None:
                grad_hh[rows].zero_()
            else:
                torch.mm(run.t(), h, out=grad_hh[rows])
        if initial and initial[0] is not None and weights.hh is not None:
            initial[0].addmm_(run, weights.hh[rows])
