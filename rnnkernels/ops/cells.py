"""What the engines' callers share: the cells as Python knows them, sizes of a call, addresses for the compiled module."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C

PERSISTENT = ("persistent", "persistent_3xtf32")
deterministic = torch.are_deterministic_algorithms_enabled
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True, eq=False)
class Cell:
    """What Python needs to know of a page of cells.def."""

    index: int
    name: str
    states: tuple[str, ...]
    slots: tuple[tuple[str, bool, bool, bool, bool], ...]  # name, fed by the input, by a matrix, by the caller; the latter a mask
    # name, slot, in weight_v (else a bias of U), Factor of contract.h, of which state or kept value
    vectors: tuple[tuple[str, int, bool, str, int], ...]
    stages: tuple[tuple[int, int, int, bool], ...]  # first slot, slots, what its matrix multiplies (-1: state 0), as wide as the output
    kept: int
    room: int  # values of a token between forward and backward
    projected: bool
    input_gates: int
    hidden_gates: int
    hidden_runs: tuple[tuple[int, int, int], ...]  # consecutive slots that U feeds: first row block of weight_hh, first slot, last slot + 1
    bias_runs: tuple[tuple[int, int, int], ...]  # likewise those with a row block in bias_hh, by that
    stage_rows: tuple[tuple[int, int], ...]  # of each stage: first and last + 1 row block of weight_hh; (0, 0): none
    learned: int  # row blocks of weight_v, those that nothing learns with them
    fixed: tuple[str, ...]  # the latter's names: they are the last, the caller's, and have no gradient
    given: tuple[int, ...]  # the slots that the caller feeds
    projection: int  # the slot that a projection feeds, or -1
    page: str  # in C++
    sums: tuple[tuple[int, int], ...]  # of each stage: values that go into sums over a row's units, forward and backward
    moments: int  # numbers that a token has of the former
    biased: int  # row blocks of bias_hh
    uniform: bool  # the input and U feed all slots, and a token has room for nothing else


def _runs(slots: Seq[int]) -> list[tuple[int, int, int]]:
    """Consecutive ones: the place of the first, the first, the last + 1."""
    runs, row = [], 0
    for _, group in itertools.groupby(enumerate(slots), lambda pair: pair[1] - pair[0]):
        members = [slot for _, slot in group]
        runs.append((row, members[0], members[-1] + 1))
        row += len(members)
    return runs


def _cell(index: int, d: dict[str, Any]) -> Cell:
    slots: list[tuple[str, bool, bool, bool, bool]] = d["slots"]
    projection = -1
    fed: list[int] = []
    rows: list[tuple[int, int]] = []
    for first, count, _, projects in d["stages"]:
        begin = len(fed)
        by_matrix = [i for i in range(first, first + count) if slots[i][2]]
        if projects:
            projection = by_matrix[0]
        else:
            fed += by_matrix
        rows.append((begin, len(fed)) if len(fed) > begin else (0, 0))
    runs, bias_runs = _runs(fed), _runs([slot for slot in fed if d["biased"][slot]])
    inputs = sum(x for _, x, *_ in slots)
    return Cell(
        index,
        d["name"],
        tuple(d["states"]),
        tuple(slots),
        tuple(d["vectors"]),
        tuple(d["stages"]),
        d["kept"],
        d["room"],
        d["projected"],
        inputs,
        len(fed),
        tuple(runs),
        tuple(bias_runs),
        tuple(rows),
        sum(learned for _, _, learned, *_ in d["vectors"]),
        tuple(name for name, _, _, factor, _ in d["vectors"] if factor == "fixed"),
        tuple(i for i, (*_, given, _) in enumerate(slots) if given),
        projection,
        d["page"],
        tuple(d["sums"]),
        2 * sum(forward for forward, _ in d["sums"]),
        sum(d["biased"]),
        runs == [(0, 0, inputs)] and d["room"] == inputs,
    )


CELLS: dict[str, Cell] = {d["name"]: _cell(i, d) for i, d in enumerate(_C.cells())}


def add_cell(index: int, description: dict[str, Any]) -> None:
    """A cell that was loaded: from now on as the others."""
    CELLS[description["name"]] = _cell(index, description)


class Weights(NamedTuple):
    """Of one layer and direction, each row block a slot; ``hr``: the projection; ``v``: a number a unit, each row block a vector."""

    ih: Tensor | None
    hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    hr: Tensor | None
    v: Tensor | None

    def dense(self) -> Weights:
        return Weights(*(None if w is None else dense(w) for w in self))


def weights_of(some: Seq[Tensor | None]) -> Weights:
    """Of those that there are, in their order."""
    return Weights(*some, *[None] * (len(Weights._fields) - len(some)))


class Rows(NamedTuple):
    """What takes part in which steps, all on the CPU: ``sizes``: a PackedSequence's batch_sizes, else the batch is padded; ``lengths [B]``
    of its rows; ``resets [T, B]``, booleans: where a row's state is replaced; ``units [T]``: how many units a step has.
    """

    sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    units: Tensor | None = None

    def cut(self) -> bool:
        return self.lengths is not None or self.resets is not None or self.units is not None


NO_ROWS = Rows()


# Of a matrix that torch multiplies a single step by, at least so many numbers for each row of the batch, by one thread and by more
# (docs/cpu.md, rung 48).
_COMPLETE = (140_000, 4_000_000)


class Sizes(NamedTuple):
    """What backward needs beyond the arguments: sizes, not tensors."""

    cell: Cell
    reverse: bool
    steps: int
    batch: int
    hidden: int
    output: int
    engine: str = "cpu"
    recompute: bool = False  # backward makes the kept values anew
    returns: bool = False  # the states beyond the first are asked for after each step
    given: int = 0  # how many tensors of given numbers there are
    resets: int = 0  # how many tensors of states that replace others
    cut: bool = False  # not all rows and units take part in all steps of a padded batch, or states are replaced
    module: int = 0  # units of a block of the matrix, where steps end at a unit
    weight_type: int = 0  # how the CPU engine holds the recurrent matrices: as numbers, as bfloat16, as int8
    keeps: bool = False  # packed weights are the caller's

    @property
    def widths(self) -> list[int]:
        """Of the states."""
        return [self.output, *[self.hidden] * (len(self.cell.states) - 1)]

    @property
    def complete(self) -> bool:
        """One step on the CPU of few rows, as large matrices go: torch forms both products, since to pack the matrices costs more than they
        are used for. But then a row's bits may depend on its batch, which deterministic mode is not to allow.
        """
        if self.steps != 1 or len(self.cell.stages) != 1 or self.engine != "cpu" or self.cut or self.keeps:
            return False
        least = _COMPLETE[torch.get_num_threads() > 1]
        if self.cell.hidden_gates * self.hidden * self.output < least * max(self.batch, 1):
            return False
        return not deterministic()


def parted(tensors: Seq[Any], last: int) -> tuple[list[Any], list[Any]]:
    """All but the last so many, and these."""
    return list(tensors[: len(tensors) - last]), list(tensors[len(tensors) - last :])


def grouped(s: Sizes, tensors: Seq[Any]) -> tuple[Weights, list[Any], list[Any], list[Any]]:
    """Weights, states, given and resets, which lie one after the other."""
    at = len(Weights._fields)
    if not (s.given or s.resets):
        return Weights(*tensors[:at]), list(tensors[at:]), [], []
    resets = len(tensors) - s.resets
    given = resets - s.given
    return Weights(*tensors[:at]), list(tensors[at:given]), list(tensors[given:resets]), list(tensors[resets:])


def empty(like: Tensor, shape: Seq[int]) -> Tensor:
    """Memory not yet touched. Where it is large, faults on small pages would cost as much as the arithmetic."""
    t = like.new_empty(*shape)  # quicker than of a tuple
    if t.nbytes >= 2 << 20 and t.device.type == "cpu":
        _C.prefer_large_pages(t.data_ptr(), t.nbytes)
    return t


def dense(t: Tensor) -> Tensor:
    """Its numbers in memory as a kernel reads them: one after the other, none of them still to be negated or made."""
    if t.is_neg() or t._is_zerotensor():
        t = t.resolve_neg() if t.is_neg() else torch.zeros(t.shape, dtype=t.dtype, device=t.device)
    return t.contiguous()


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def addresses(tensors: Seq[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def tf32_allowed() -> bool:
    try:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    except RuntimeError:  # torch's newer setting was used, and forbids reading the older one
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


class Team(NamedTuple):
    """Who may run a call: at least and at most so many threads, and into how many groups of rows they are cut; 0: as seems the quickest."""

    least: int
    most: int
    row_groups: int


def problem(
    s: Sizes,
    dtype: torch.dtype,
    input_size: int,
    rows: Rows,
    training: bool,
    threads: int = 0,
    chained: bool = False,
    team: Team | None = None,
) -> _C.Problem:
    """For ``team``, or at most so many threads; 0: torch's."""
    least, most, row_groups = Team(1, threads or torch.get_num_threads(), 0) if team is None else team
    return _C.Problem(
        s.cell.index,
        STORAGE[dtype],
        s.steps,
        s.batch,
        input_size,
        s.hidden,
        s.output,
        address(rows.sizes),
        s.reverse,
        training,
        s.complete,
        most,
        1 if s.engine == "persistent_3xtf32" else 2 if s.engine == "persistent" and tf32_allowed() else 0,
        address(rows.lengths),
        address(rows.resets),
        address(rows.units),
        s.module,
        s.weight_type,
        s.keeps,
        chained,
        least,
        row_groups,
    )


def vectors(cell: Cell, hidden: int, weights: Weights) -> list[int]:
    """The per-unit vectors: row blocks of weight_v, and the biases of slots which U alone feeds (b_hn of GRU), blocks of bias_hh."""
    if not cell.vectors:
        return []
    block = {slot: row + slot - first for row, first, end in cell.bias_runs for slot in range(first, end)}
    addresses, row = [], 0
    for _, slot, learned, *_ in cell.vectors:
        source = weights.v if learned else weights.bias_hh
        start = row if learned else block[slot]
        row += learned
        addresses.append(0 if source is None else source.data_ptr() + start * hidden * source.element_size())
    return addresses


def stage_blocks(cell: Cell, hidden: int, hh: Tensor | None, hr: Tensor | None) -> list[Tensor | None]:
    """What each stage multiplies with: row blocks of weight_hh, or the projection. Likewise their gradients."""
    if cell.stage_rows[0] == (0, cell.hidden_gates):  # all of it in the first stage; a view would cost microseconds
        return [hh if cell.hidden_gates else None, *(hr if projects else None for *_, projects in cell.stages[1:])]
    return [
        hr if projects else None if hh is None or begin == end else hh[begin * hidden : end * hidden]
        for (begin, end), (*_, projects) in zip(cell.stage_rows, cell.stages, strict=True)
    ]


def stage_addresses(cell: Cell, hidden: int, hh: Tensor | None, hr: Tensor | None) -> list[int]:
    if len(cell.stages) == 1:
        return [address(hh) if cell.hidden_gates else 0]
    return [address(block) for block in stage_blocks(cell, hidden, hh, hr)]


def place_given(s: Sizes, given: Seq[Tensor], tokens: Seq[int]) -> list[tuple[int, int, int]]:
    """Of each given slot: its address, and how many numbers further the next token's and the next row's lie; 0 where all have the same."""
    places = []
    for t in given:
        width = t.shape[-1]
        per_token = t.shape[:-1] == tuple(tokens)
        strides = (0, 0) if t.dim() == 1 else (width, width) if per_token else (0, width)
        places += [(t.data_ptr() + at * t.element_size(), *strides) for at in range(0, width, s.hidden)]
    return places


def place_resets(s: Sizes, resets: Seq[Tensor]) -> list[tuple[int, int, int]]:
    """As :func:`place_given`, of what replaces each state: ``[T, B, ·]``, ``[B, ·]`` or the same for all."""
    places = []
    for t in resets:
        width = t.shape[-1]
        places.append((t.data_ptr(), s.batch * width if t.dim() == 3 else 0, width if t.dim() > 1 else 0))
    return places


def grad_resets(resets: Seq[Tensor], found: Seq[Tensor | None], mask: Tensor | None) -> list[Tensor | None]:
    """Gradients of what replaces states, from those of each mark."""
    grads: list[Tensor | None] = []
    for t, of_mark in zip(resets, found, strict=True):
        if of_mark is None:
            grads.append(None)
        elif t.dim() == 1:
            grads.append(of_mark.sum(0))
        else:
            assert mask is not None
            step, row = mask.nonzero(as_tuple=True)
            grad = t.new_zeros(t.shape)
            grads.append(grad.index_add_(0, row, of_mark) if t.dim() == 2 else grad.index_put_((step, row), of_mark))
    return grads


def given_each_token(s: Sizes, given: Seq[Tensor], tokens: Seq[int], rows: Tensor | None) -> list[Tensor]:
    """Given numbers ``[N, ·]``, those of a row laid out for each of its tokens; those for all stay as they are."""
    return [
        t if t.dim() == 1 else t.flatten(0, -2) if t.shape[:-1] == tuple(tokens) else t.index_select(0, _row_of_token(s, rows, t.device))
        for t in given
    ]


def _row_of_token(s: Sizes, rows: Tensor | None, device: torch.device) -> Tensor:
    if rows is None:
        return torch.arange(s.batch, device=device).repeat(s.steps)
    return torch.cat([torch.arange(n, device=device) for n in rows.tolist()])


def grad_given(s: Sizes, gates: Tensor, given: Seq[Tensor], needs: Seq[bool], tokens: Seq[int], rows: Tensor | None) -> list[Tensor | None]:
    """Gradients of the given numbers, which are their slots'."""
    grads: list[Tensor | None] = []
    slots = iter(s.cell.given)
    for t, need in zip(given, needs, strict=True):
        mine = list(itertools.islice(slots, t.shape[-1] // s.hidden))
        if not need:
            grads.append(None)
            continue
        if mine == list(range(mine[0], mine[0] + len(mine))):
            grad = gates[:, mine[0] * s.hidden : (mine[-1] + 1) * s.hidden]
        else:
            grad = torch.cat([gates[:, i * s.hidden : (i + 1) * s.hidden] for i in mine], 1)
        if t.shape[:-1] == tuple(tokens):
            grads.append(grad.view(t.shape) if len(tokens) == 1 or grad.is_contiguous() else torch.unflatten(grad, 0, tuple(tokens)))
        elif t.dim() == 1:
            grads.append(grad.sum(0))
        else:
            grads.append(t.new_zeros(t.shape).index_add_(0, _row_of_token(s, rows, t.device), grad))
    return grads


def grad_shapes(s: Sizes, input: Tensor, weights: Weights) -> list[Seq[int]]:
    """Of the input's gradient and the weights'; biases have one where the weight is absent too."""
    cell, H = s.cell, s.hidden
    ih, hh, hr = ((0,) if w is None else w.shape for w in (weights.ih, weights.hh, weights.hr))
    return [input.shape, ih, hh, (cell.input_gates * H,), (cell.biased * H,), hr, (cell.learned * H,)]


def number(dtype: torch.dtype) -> torch.dtype:
    """What numbers of a storage type are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def new_moments(s: Sizes, like: Tensor, tokens: int) -> list[Tensor]:
    """Room for a token's means and variances, for cells that have any."""
    return [like.new_empty(tokens, s.cell.moments, dtype=number(like.dtype))] if s.cell.moments else []


def new_kept(s: Sizes, like: Tensor, tokens: int) -> Tensor:
    """Room for what backward needs, to be filled."""
    kept = empty(like, (tokens, s.cell.room * s.hidden))
    if s.cell.projected:
        kept[:, s.cell.projection * s.hidden :].zero_()  # a projection fills only its own width of its slot
    return kept


def before_each_token(s: Sizes, states: Tensor, initial: Tensor | None, rows: Tensor | None) -> Tensor:
    """A state before each token, from ``[N, width]`` after each and what it was at the start (None: zeros)."""
    if initial is None:
        initial = states.new_zeros(s.batch, states.shape[1])
    if rows is None:
        cut = states.shape[0] - s.batch
        return torch.cat([states[s.batch :], initial] if s.reverse else [initial, states[:cut]])
    sizes, N, parts = rows.tolist(), states.shape[0], []
    starts = [0, *itertools.accumulate(sizes)]
    for step, active in enumerate(sizes):
        before = step + 1 if s.reverse else step - 1
        known = min(active, sizes[before]) if 0 <= before < len(sizes) else 0
        if known:
            parts.append(torch.arange(starts[before], starts[before] + known))
        if known < active:
            parts.append(torch.arange(N + known, N + active))
    return torch.cat([states, initial]).index_select(0, torch.cat(parts).to(states.device))


def summed_bias(cell: Cell, hidden: int, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """The sum of both biases for the slots that the input feeds."""
    if bias_hh is None:
        return bias_ih
    if bias_ih is None:
        bias = torch.zeros(cell.input_gates * hidden, dtype=bias_hh.dtype, device=bias_hh.device)
    elif len(cell.bias_runs) == 1 and cell.bias_runs[0][1:] == (0, cell.input_gates):
        return bias_ih + bias_hh
    else:
        bias = bias_ih.clone()
    for row, first, end in cell.bias_runs:
        end = min(end, cell.input_gates)
        if first < end:
            bias[first * hidden : end * hidden] += bias_hh[row * hidden : (row + end - first) * hidden]
    return bias


def before_each_step(
    after: Tensor, initial: Tensor, reverse: bool, lengths: Tensor | None, reset_mask: Tensor | None, reset: Tensor | None
) -> Tensor:
    """A state before each step of a padded batch, ``[T, B, width]``, of which rows may end early and start anew."""
    first = initial.unsqueeze(0)
    # To an exporter len() is a constant, and T - 1 rows in a concatenation are a condition on T.
    before = torch.cat([after, first])[1:] if reverse else torch.cat([first, after])[:-1]
    T, device = after.shape[0], after.device
    steps = torch.arange(T, device=device).unsqueeze(1)
    ends = torch.full((after.shape[1],), T, device=device) if lengths is None else lengths.to(device)
    if reverse and lengths is not None:
        before = torch.where((steps == ends - 1).unsqueeze(2), first, before)
    if reset_mask is None:
        return before
    marks, at = reset_mask.to(device), steps
    if reverse:
        marks, at = torch.cat([marks, marks.new_zeros(1, marks.shape[1])])[1:], steps + 1
    if reset is None:
        reset = after.new_zeros(after.shape[-1])
    elif reset.dim() == 3 and reverse:
        reset = reset.roll(-1, 0)
    return torch.where((marks & (at < ends)).unsqueeze(2), reset, before)
