"""A stack of sequences: layers and directions, with dropout between the layers. Time comes first throughout."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["stack"]


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
) -> tuple[Tensor, ...]:
    """Run layers × directions of ``cell`` and return ``(output, *final_states)``.

    Shapes, with K = layers · directions, D = directions, and P the width of the hidden state:

    * ``input``: padded ``[T, B, I]``, or ragged ``[N, I]`` with ``batch_sizes`` as PackedSequence has it (CPU, int64, non-increasing).
    * ``states``: one ``[K, B, ·]`` tensor per state of the cell, or None for zeros.
    * ``weights``: K times ``(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr)``, what is absent None or, at the end, left out; a layer's
      forward direction comes before its reverse one.
    * output ``[T, B, D · P]`` or ``[N, D · P]``; final states as ``states``.

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
            output, *final = ops.sequence(
                cell, input, initial, *weights[k], batch_sizes=batch_sizes, reverse=k > start, engine=engine, recompute=recompute
            )
            outputs.append(output)
            finals.append(final)
        input = torch.cat(outputs, dim=-1) if bidirectional else output
    if len(finals) == 1:
        return input, *[state.unsqueeze(0) for state in finals[0]]
    return input, *[torch.stack(column) for column in zip(*finals, strict=True)]
