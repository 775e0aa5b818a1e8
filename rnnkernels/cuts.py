"""Padded batches whose rows end early or start anew inside: what a layer is told of them, and how a batch is cut into what runs unbroken.

The CPU's engine takes lengths and resets as they are. For the others a batch is cut into *segments*, each of which is a row of a ragged
batch of its own. Time comes first throughout.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Clock", "Cut", "Segments", "clock", "gather", "join", "segments", "spread", "start"]


@dataclass(frozen=True)
class Cut:
    """``lengths [B]``, ``reset_mask [T, B]``, and by what states are replaced: of each state ``[K, ·]``, ``[K, B, ·]`` or ``[T, K, B, ·]``
    for K layers and directions. None: all steps, nowhere, zeros.
    """

    lengths: Tensor | None
    reset_mask: Tensor | None
    reset_states: Sequence[Tensor] | None

    def resets_of(self, k: int) -> list[Tensor] | None:
        """By what the states of one layer and direction are replaced."""
        if self.reset_states is None:
            return None
        return [state[:, k] if state.dim() == 4 else state[k] for state in self.reset_states]


@dataclass(frozen=True)
class Segments:
    """What of a padded batch runs unbroken: each segment is a row of a ragged batch of its own, the longest first.

    ``index [N]``: of each of the ragged batch's tokens, ``t · B + b`` in the padded one. ``batch_sizes``: as PackedSequence has it.
    ``row [S]``, ``start [S]``, ``end [S]``: where each segment lies. ``reset [S]``: whether it starts at a reset and not at the sequence's
    own start. ``first [B]``, ``last [B]``: the segment in which each row starts and the one in which it ends, S where it has none.
    """

    index: Tensor
    batch_sizes: Tensor
    row: Tensor
    start: Tensor
    end: Tensor
    reset: Tensor
    first: Tensor
    last: Tensor


def segments(T: int, B: int, lengths: Tensor | None, reset_mask: Tensor | None) -> Segments:
    """Cut T steps of B rows, of which row b has ``lengths[b]`` (None: T), before every step that ``reset_mask [T, B]`` marks."""
    given = lengths if reset_mask is None else reset_mask
    device = None if given is None else given.device
    ends = torch.full((B,), T, device=device) if lengths is None else lengths.to(device, torch.int64)
    steps = torch.arange(T, device=device)
    begins = (steps == 0).expand(B, T)
    if reset_mask is not None:
        begins = begins | reset_mask.t()
    row, start = (begins & (steps < ends.unsqueeze(1))).nonzero(as_tuple=True)  # row by row
    S = len(row)
    final = torch.ones(S, dtype=torch.bool, device=device)
    final[:-1] = row[1:] != row[:-1]
    end = torch.where(final, ends[row], start.roll(-1)) if S else start
    reset = start > 0 if reset_mask is None else reset_mask[start, row]
    order = (end - start).argsort(descending=True, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(S, device=device)
    first, last = (torch.full((B,), S, device=device) for _ in range(2))
    last[row[final]] = place[final]
    first[row[start == 0]] = place[start == 0]
    row, start, end, reset = row[order], start[order], end[order], reset[order]
    sizes = S - torch.bincount(end - start, minlength=1).cumsum(0)[:-1]  # how many are longer than 0, 1, …
    step = torch.arange(len(sizes), device=device).repeat_interleave(sizes)
    segment = torch.arange(len(step), device=device) - (sizes.cumsum(0) - sizes)[step]
    return Segments((start[segment] + step) * B + row[segment], sizes.cpu(), row, start, end, reset, first, last)


@dataclass(frozen=True)
class Clock:
    """Which of a layer's modules, ``module`` units each, are due in which steps: ``due [T, modules]``. Units of the others keep their
    state, and a module reads itself and those after it. ``units [T]``: where the last module that is due ends; ``nested``: before it all
    are due.
    """

    due: Tensor
    units: Tensor
    module: int
    nested: bool

    def held(self, batch: int, batch_sizes: Tensor | None, like: Tensor) -> Tensor:
        """Ones for the units that keep their state, zeros for the others, as the input's tokens lie."""
        held = (~self.due).repeat_interleave(self.module, 1).to(like)
        if batch_sizes is not None:
            return held.repeat_interleave(batch_sizes.to(like.device), 0)
        return held.unsqueeze(1).expand(-1, batch, -1)

    def connected(self, like: Tensor) -> Tensor:
        """Ones where U has a weight."""
        block = torch.arange(self.due.shape[1], device=like.device).repeat_interleave(self.module)
        return (block.unsqueeze(1) <= block).to(like.dtype)


def clock(periods: Sequence[int], module: int, steps: int, first: int) -> Clock:
    """That of steps from ``first`` on, in which the modules are due whose period divides the step."""
    due = (torch.arange(first, first + steps).unsqueeze(1) % torch.tensor(periods)) == 0
    units = (due * torch.arange(1, len(periods) + 1)).amax(1) * module
    return Clock(due, units, module, all(b % a == 0 for a, b in itertools.pairwise(periods)))


def gather(given: Tensor, cut: Segments, T: int, B: int) -> Tensor:
    """What each token or row of a padded batch is given, for the tokens or rows of the ragged one; what is the same for all stays."""
    if given.dim() == 1:
        return given
    if given.shape[:-1] == (T, B):
        return given.flatten(0, 1).index_select(0, cut.index.to(given.device))
    return given.index_select(0, cut.row.to(given.device))


def spread(tokens: Tensor, cut: Segments, T: int, B: int) -> Tensor:
    """Tokens of segments ``[…, N, ·]`` where they lie in the padded batch ``[…, T, B, ·]``, zero elsewhere."""
    shape = (*tokens.shape[:-2], T * B, tokens.shape[-1])
    padded = tokens.new_zeros(shape).index_copy(-2, cut.index.to(tokens.device), tokens)
    return padded.view(*shape[:-2], T, B, shape[-1])


def start(states: Sequence[Tensor], cut: Segments, resets: Sequence[Tensor] | None, T: int, directions: int) -> list[Tensor]:
    """States ``[K, S, ·]`` from which the segments start, in the direction of each, of ``[K, B, ·]`` from which the rows start."""
    initial = []
    for i, state in enumerate(states):
        K = state.shape[0]
        row, S = cut.row.to(state.device), len(cut.row)
        # Forward a segment's state comes from before its start, in reverse from after its end.
        own = torch.stack([~cut.reset, cut.last[cut.row] == torch.arange(S, device=cut.row.device)][:directions]).to(state.device)
        at = torch.stack([cut.start, cut.end.clamp(max=T - 1)][:directions]).to(state.device)
        if resets is None:
            reset = state.new_zeros(1, 1, 1)
        elif resets[i].dim() == 2:
            reset = resets[i].unsqueeze(1)
        elif resets[i].dim() == 3:
            reset = resets[i].index_select(1, row)
        else:
            both = [resets[i][at[d], :, row].transpose(0, 1)[d::directions] for d in range(directions)]
            reset = torch.stack(both, 1).flatten(0, 1)
        initial.append(torch.where(own.repeat(K // directions, 1).unsqueeze(2), state.index_select(1, row), reset))
    return initial


def join(finals: Sequence[Tensor], cut: Segments, initial: Sequence[Tensor], directions: int) -> list[Tensor]:
    """The rows' final states ``[K, B, ·]``, of the segments' ``[K, S, ·]``; a row without a step keeps its initial one."""
    ends = [cut.last, cut.first][:directions]
    joined = []
    for state, kept in zip(finals, initial, strict=True):
        K, S, width = state.shape
        found = torch.cat([state, state.new_zeros(K, 1, width)], 1)
        place = torch.stack(ends).repeat(K // directions, 1).to(state.device).unsqueeze(2).expand(K, kept.shape[1], width)
        joined.append(torch.where(place < S, found.gather(1, place), kept))
    return joined
