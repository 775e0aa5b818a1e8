"""A stack of sequences: layers and directions, with dropout between the layers; and how a padded batch is cut into what runs unbroken.

Time comes first throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["Segments", "mask", "normed_gates", "segments", "stack"]


def stack(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Sequence[Any]],
    *,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    engine: str = "auto",
    recompute: bool = False,
    return_states: bool = False,
    given: Sequence[Sequence[Tensor]] | None = None,
    layer_norm: str | None = None,
) -> tuple[Tensor, ...]:
    """Run layers × directions of ``cell`` and return ``(output, *final_states)``.

    Shapes, with K = layers · directions, D = directions, and P the width of the hidden state:

    * ``input``: padded ``[T, B, I]``, or ragged ``[N, I]`` with ``batch_sizes`` as PackedSequence has it (CPU, int64, non-increasing).
    * ``states``: one ``[K, B, ·]`` tensor per state of the cell, or None for zeros.
    * ``weights``: K times ``(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)``, what is absent None or, at the end, left out; a layer's
      forward direction comes before its reverse one.
    * ``layer_norm``: "gates" or "gate", for cells that are given their input gates: the last of each direction's weights is the gain of the
      norm that these get, ``bias_ih`` its shift.
    * ``given``: K lists of what the cell is given, as ``ops.sequence`` has it, or None.
    * output ``[T, B, D · P]`` or ``[N, D · P]``; final states as ``states``.

    * with ``return_states``, after the final states: every state after each step, ``[K, T, B, ·]`` or ``[K, N, ·]``, in the cell's order.

    ``dropout`` falls on the outputs of every layer but the last, while ``training``. Dtypes, engines, ``recompute`` and errors are those
    of ``ops.sequence``.
    """
    slots = None if states is None else [state.unbind() for state in states]
    directions = 2 if bidirectional else 1
    finals: list[Sequence[Tensor]] = []
    for start in range(0, len(weights), directions):
        if start > 0 and dropout > 0 and training:
            input = torch.nn.functional.dropout(input, dropout)
        outputs = []
        for k in range(start, start + directions):
            initial = None if slots is None else [slot[k] for slot in slots]
            below, of_cell, numbers = input, weights[k], () if given is None else given[k]
            if layer_norm is not None:
                weight_ih, weight_hh, bias_ih, *of_cell, gain = weights[k]
                numbers = [
                    normed_gates(input, weight_ih, gain, bias_ih, layer_norm, gain.shape[0] // _hidden_size(cell, weight_hh)),
                    *numbers,
                ]
                below, of_cell = input[..., :0], [None, weight_hh, None, *of_cell]
            output, *rest = ops.sequence(
                cell,
                below,
                initial,
                *of_cell,
                batch_sizes=batch_sizes,
                given=numbers,
                reverse=k > start,
                engine=engine,
                recompute=recompute,
                return_states=return_states,
            )
            outputs.append(output)
            count = len(ops.CELLS[cell].states)
            finals.append([*rest[:count], output, *rest[count:]] if return_states else rest)
        input = torch.cat(outputs, dim=-1) if bidirectional else output
    if len(finals) == 1:
        return input, *[state.unsqueeze(0) for state in finals[0]]
    return input, *[torch.stack(column) for column in zip(*finals, strict=True)]


def _hidden_size(cell: str, weight_hh: Tensor) -> int:
    return weight_hh.shape[0] // ops.CELLS[cell].hidden_gates


def normed_gates(x: Tensor, weight_ih: Tensor, gain: Tensor, shift: Tensor | None, how: str, gates: int) -> Tensor:
    """γ ⊙ N(W x) + b, the norm over all gates at once or of each."""
    product = torch.nn.functional.linear(x, weight_ih)
    if how == "gates":
        return torch.nn.functional.layer_norm(product, product.shape[-1:], gain, shift)
    # Half the time of torch.group_norm, which is meant for images.
    blocks = product.view(*product.shape[:-1], gates, product.shape[-1] // gates)
    normed = torch.nn.functional.layer_norm(blocks, blocks.shape[-1:]).view(product.shape)
    return normed * gain if shift is None else torch.addcmul(shift, normed, gain)


def mask(like: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """Ones with probability p, to the nearest 65536th, and zeros: 16 random bits a number are drawn sooner than a number."""
    level = round(p * 65536)
    if level in (0, 65536):
        return like.new_full(shape, level / 65536)
    count = math.prod(shape)
    bits = torch.randint(-(2**31), 2**31 - 1, ((count + 1) // 2,), dtype=torch.int32, device=like.device).view(torch.int16)[:count]
    return (bits < level - 32768).view(shape).to(like.dtype)


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
