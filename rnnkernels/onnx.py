"""Layers of this package as ONNX's own operators RNN, GRU and LSTM, in an export of a whole model. Needs the extra ``onnx``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import ops

__all__ = ["CELLS", "export", "translations"]


@dataclass(frozen=True)
class Node:
    """How ONNX has a cell: the operator, the order of its gates, by our row blocks (None: a block of zeros), and its attributes."""

    operator: str
    gates: tuple[int | None, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "tanh": {"activations": ["Tanh"]},
    "relu": {"activations": ["Relu"]},
    "sigmoid": {"activations": ["Sigmoid"]},
    "identity": {"activations": ["Affine"], "activation_alpha": [1.0], "activation_beta": [0.0]},
}
_PEEPHOLES = (0, 2, 1)  # of i, f, o, in the order i, o, f
# Ours are i, f, g, o of an LSTM and r, z, n of a GRU; ONNX's i, o, f, g and z, r, n.
CELLS: dict[str, Node] = {
    **{f"srn_{name}": Node("RNN", (0,), attributes) for name, attributes in _ACTIVATIONS.items()},
    "gru": Node("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "gru_reset_before": Node("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "lstm": Node("LSTM", (0, 3, 1, 2)),
    "lstm_peephole": Node("LSTM", (0, 3, 1, 2)),
    "lstm_coupled": Node("LSTM", (0, 2, None, 1), {"input_forget": 1}),
}


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export(…, dynamo=True)`` for models with layers of this package.

    Export them without gradients (``torch.no_grad()``), as :func:`export` does.
    """
    return {torch.ops.rnnkernels.sequence.default: _sequence}


def export(model: nn.Module, args: tuple[Any, ...] = (), f: Any = None, **options: Any) -> Any:
    """``torch.onnx.export(model, args, f, dynamo=True, …)``, in which our layers become ONNX's operators: those of the cells in
    :data:`CELLS`, in any number of layers and directions, with ``lengths`` and hx.

    Args:
        model: in ``eval()``, so that no dropout is exported.
        args, f, options: as torch.onnx.export has them, ``dynamic_shapes`` among the options.

    Returns:
        What torch.onnx.export returns, an ``ONNXProgram``.

    Raises:
        torch.onnx.ConversionError: for what ONNX's operators cannot: other cells and modifiers, projections, reset_mask, return_states,
            PackedSequence; the text says which.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.PeepholeLSTM(3, 5).eval()
    >>> program = rnnkernels.onnx.export(layer, (torch.zeros(7, 2, 3),), verbose=False)
    >>> [node.op_type for node in program.model.graph if node.op_type == "LSTM"]
    ['LSTM']
    """
    with torch.no_grad():
        table = {**translations(), **(options.pop("custom_translation_table", None) or {})}
        return torch.onnx.export(model, args, f, dynamo=True, custom_translation_table=table, **options)


def _refuse(why: str) -> None:
    raise NotImplementedError(f"rnnkernels.onnx: {why}")


def _sequence(
    cell: str,
    input: Any,
    states: Sequence[Any] | None,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    weight_hr: Any,
    weight_v: Any,
    batch_sizes: Any,
    lengths: Any,
    reset_mask: Any,
    units: Any,
    given: Any,
    reset_states: Any,
    module: int,
    reverse: bool,
    engine: str,
    recompute: bool,
    return_states: bool,
    training: bool,
) -> tuple[Any, ...]:
    """The operator ``rnnkernels::sequence`` on symbols: output and final states."""
    import onnxscript

    op: Any = onnxscript.opset18
    spec, node = ops.CELLS[cell], CELLS.get(cell)
    if node is None:
        _refuse(f"ONNX has no operator for the cell {cell!r}; it has for {', '.join(CELLS)}")
    assert node is not None
    for name, used in (("PackedSequence", batch_sizes), ("reset_mask", reset_mask), ("a clockwork's units", units)):
        if used is not None:
            _refuse(f"ONNX's operators take no {name}")
    if training or (return_states and len(spec.states) > 1):
        _refuse("ONNX's operators give no states between the steps" if return_states else "export without gradients: torch.no_grad()")
    H = int(weight_hh.shape[1])

    def turned(t: Any, order: Sequence[int | None], blocks: int) -> Any:
        """Row blocks of a weight, one after the other; after the last of them stands one of zeros."""
        places = [blocks if block is None else block for block in order]
        rows = [row for place in places for row in range(H * place, H * (place + 1))]
        if None in order:
            zeros = op.ConstantOfShape(op.Constant(value_ints=[H, *(int(n) for n in t.shape[1:])]))
            t = op.Concat(t, op.CastLike(zeros, t), axis=0)
        return op.Gather(t, op.Constant(value_ints=rows), axis=0)

    bias = None
    if bias_ih is not None or bias_hh is not None:
        halves = [turned(b, node.gates, spec.input_gates) for b in (bias_ih, bias_hh) if b is not None]
        assert len(halves) == 2
        bias = op.Unsqueeze(op.Concat(*halves, axis=0), [0])
    weights = [op.Unsqueeze(turned(w, node.gates, spec.input_gates), [0]) for w in (weight_ih, weight_hh)]
    rows = None if lengths is None else op.Cast(lengths, to=6)  # INT32
    initial = [op.Unsqueeze(state, [0]) for state in states] if states else [None] * len(spec.states)
    arguments = [input, *weights, bias, rows, *initial]
    if weight_v is not None:
        arguments.append(op.Unsqueeze(turned(weight_v, _PEEPHOLES, 3), [0]))
    options = {"hidden_size": H, "direction": "reverse" if reverse else "forward", **node.attributes}
    output, *finals = getattr(op, node.operator)(*arguments, **options)
    return op.Squeeze(output, [1]), *(op.Squeeze(state, [0]) for state in finals)
