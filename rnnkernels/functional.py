"""A stack of sequences: layers and directions, with dropout between the layers.

Time comes first throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cuts, gates, ops
from .cuts import Clock, Cut

__all__ = ["mask", "normed_gates", "stack"]


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
    return_states: bool | str = False,
    given: Sequence[Sequence[Tensor]] | None = None,
    layer_norm: str | None = None,
    cut: Cut | None = None,
    clock: Clock | None = None,
    packed: Sequence[ops.Packed | ops.Remembered] | None = None,
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
    * ``cut``: how long the rows of a padded batch are and where they start anew. ``clock``: which units take part in which steps, for a
      simple recurrent network that is given nothing.
    * ``packed``: K places for weights that stay packed from call to call, as ``ops.sequence`` has it.
    * output ``[T, B, D · P]`` or ``[N, D · P]``; final states as ``states``.

    * with ``return_states``, after the final states: every state after each step, ``[K, T, B, ·]`` or ``[K, N, ·]``, in the cell's order;
      with "gates" after these the cell's gates.

    ``dropout`` falls on the outputs of every layer but the last, while ``training``. Dtypes, engines, ``recompute`` and errors are those
    of ``ops.sequence``.
    """
    directions = 2 if bidirectional else 1
    lengths = reset_mask = units = None
    module = 0
    if packed is not None and clock is not None and packed[0].weight_dtype is not None:
        raise ValueError(f"weight_dtype: expected None for a layer whose units take turns, got {packed[0].weight_dtype}")
    if clock is not None:
        if clock.nested and batch_sizes is None and ops.cuts_natively(engine, input.device):
            units, module = clock.units, clock.module
        else:  # every unit is computed, and those that are not due are held
            held = clock.held(input.shape[1] if batch_sizes is None else 0, batch_sizes, input)
            cell, given = ops.modified(cell, ["zoneout"]), [[held]] * len(weights)
            weights = [(ih, hh * clock.connected(hh), *biases) for ih, hh, *biases in weights]
    if cut is not None:
        if not ops.cuts_natively(engine, input.device):
            options: dict[str, Any] = {"dropout": dropout, "training": training, "engine": engine, "recompute": recompute}
            options |= {"layer_norm": layer_norm, "packed": packed, "return_states": return_states}
            return _in_segments(cell, input, states, weights, given, cut, directions, options)
        lengths = None if cut.lengths is None else cut.lengths.to("cpu", torch.int64)
        reset_mask = None if cut.reset_mask is None else cut.reset_mask.cpu()
    slots = None if states is None else [state.unbind() for state in states]
    count, shown = len(ops.CELLS[cell].states), bool(return_states)
    plain = batch_sizes is None and input.dim() == 3 and not (cut or clock or given or layer_norm or shown)
    dropped = training and dropout > 0

    def layers(input: Tensor) -> tuple[Tensor, list[Any]]:
        finals: list[Any] = []  # of each layer and direction [1, …]
        for start in range(0, len(weights), directions):
            if start > 0 and dropped:
                input = torch.nn.functional.dropout(input, dropout)
            if plain:
                initials = [[] if states is None else [state[k : k + 1] for state in states] for k in range(start, start + directions)]
                places = None if packed is None else packed[start : start + directions]
                found = ops.layer_again(cell, input, initials, weights[start : start + directions], engine, recompute, places)
                if found is not None:
                    input = torch.cat([output for output, *_ in found], -1) if bidirectional else found[0][0]
                    finals += [rest for _, *rest in found]
                    continue
            calls = []
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
                six = ops.Weights(*of_cell, *[None] * (len(ops.Weights._fields) - len(of_cell)))
                resets = () if cut is None else cut.resets_of(k) or ()
                rows = (batch_sizes, lengths, reset_mask, units)
                calls.append(ops.Call(cell, below, initial, *six, *rows, numbers, resets, module, k > start, engine, recompute, shown))
            if bidirectional:
                results = ops.pair(calls, (None, None) if packed is None else packed[start : start + 2])
                input = torch.cat([output for output, *_ in results], dim=-1)
            else:
                results = (ops.run(calls[0], None if packed is None else packed[start]),)
                input = results[0][0]
            if not shown:
                finals += [[state[None] for state in rest] for _, *rest in results]
                continue
            for call, (output, *rest) in zip(calls, results, strict=True):
                after = [output, *rest[count:]]
                of_layer = [*rest[:count], *after]
                if return_states == "gates":
                    of_call = (cell, call.input, call.states, call.weights(), after, batch_sizes, call.reverse)
                    of_layer += gates.of_sequence(*of_call, cut, call.reset_states or None)
                finals.append([t[None] for t in of_layer])
        return input, finals

    if len(weights) > directions == 1 and plain and not dropped and ops.chain_gains(cell, input, states or (), weights, engine):
        with ops.cpu.side_by_side(chained=True):
            input, finals = layers(input)
    else:
        input, finals = layers(input)
    if len(finals) == 1:
        return input, *finals[0]
    return input, *[torch.cat(column) for column in zip(*finals, strict=True)]


def _in_segments(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Sequence[Any]],
    given: Sequence[Sequence[Tensor]] | None,
    cut: Cut,
    directions: int,
    options: dict[str, Any],
) -> tuple[Tensor, ...]:
    """The stack with each segment of the batch as a row of a ragged one."""
    (T, B), count = input.shape[:2], len(ops.CELLS[cell].states)
    if states is None:
        states = [input.new_zeros(len(weights), B, width) for width in ops.widths(cell, *(*weights[0], *[None] * 6)[:6])]
    found = cuts.segments(T, B, cut.lengths, cut.reset_mask)
    if len(found.batch_sizes) == 0:
        # Of everything a part, and none of it: all has a gradient, which is zero.
        nothing = sum((t.flatten()[:0].sum() for of_layer in weights for t in of_layer if t is not None), start=input.flatten()[:0].sum())
        output = input.new_zeros(T, B, states[0].shape[-1] * directions) + nothing
        histories = [state.new_zeros(state.shape[0], T, *state.shape[1:]) for state in states] if options["return_states"] else []
        if options["return_states"] == "gates":
            like = histories[-1] if count > 1 else histories[0]
            histories += [torch.zeros_like(like) for _ in range(gates.COUNTS[cell])]
        return output, *(state + nothing for state in states), *(history + nothing for history in histories)
    tokens = input.flatten(0, 1).index_select(0, found.index.to(input.device))
    numbers = None if given is None else [[cuts.gather(t, found, T, B) for t in of_layer] for of_layer in given]
    initial = cuts.start(states, found, cut.reset_states, T, directions)
    output, *rest = stack(
        cell, tokens, initial, weights, bidirectional=directions == 2, batch_sizes=found.batch_sizes, given=numbers, **options
    )
    finals = cuts.join(rest[:count], found, states, directions)
    return cuts.spread(output, found, T, B), *finals, *(cuts.spread(history, found, T, B) for history in rest[count:])


def _hidden_size(cell: str, weight_hh: Tensor) -> int:
    return weight_hh.shape[0] // ops.CELLS[cell].hidden_gates


def normed_gates(x: Tensor, weight_ih: Tensor, gain: Tensor, shift: Tensor | None, how: str, gates: int) -> Tensor:
    """γ ⊙ N(W x) + b, the norm over all gates at once or of each."""
    product = torch.nn.functional.linear(x, weight_ih)
    if how == "gates" and not ops.is_transformed():
        return torch.nn.functional.layer_norm(product, product.shape[-1:], gain, shift)
    # Half the time of torch.group_norm, which is meant for images.
    count = 1 if how == "gates" else gates
    blocks = product.view(*product.shape[:-1], count, product.shape[-1] // count)
    if ops.is_transformed():  # of torch's layer_norm a gradient of a tangent is wrong (2.13)
        variance, mean = torch.var_mean(blocks, -1, correction=0, keepdim=True)
        normed = ((blocks - mean) * (variance + 1e-5).rsqrt()).view(product.shape)
    else:
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
