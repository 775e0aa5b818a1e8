"""torch.nn's own functions as an engine, for the cells that torch.nn has: oneDNN's and torch's on a CPU, cuDNN's on a GPU."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from .cells import Cell, Sizes, Weights, deterministic

_FUNCTIONS: dict[str, Any] = {
    "srn_tanh": torch._VF.rnn_tanh,
    "srn_relu": torch._VF.rnn_relu,
    "gru": torch._VF.gru,
    "lstm": torch._VF.lstm,
    "lstm_projected": torch._VF.lstm,
}

STEPS: dict[str, Any] = {"srn_tanh": torch._VF.rnn_tanh_cell, "srn_relu": torch._VF.rnn_relu_cell}

CELLS = tuple(_FUNCTIONS)
CUDNN_IS_FASTER = "torch's cuDNN is taken to be faster here (a guess, not yet measured)"
STEP_IS_FASTER = "torch's own step with gradients is faster: of so small a one the call takes longer than its arithmetic (measured)"


def is_faster(s: Sizes, dtype: torch.dtype, device: torch.device) -> bool:
    """Where "auto" leaves a whole padded sequence to torch.

    A guess until it is measured: cuDNN's persistent kernels beyond its smallest sizes serve float16, LSTM and SRN, H a multiple of 128 up
    to 1024, B a multiple of 8.
    """
    cells = ("lstm", "srn_tanh", "srn_relu")
    tiled = s.hidden % 128 == 0 and 192 < s.hidden <= 1024 and s.batch % 8 == 0 and s.batch > 0
    return device.type == "cuda" and dtype is torch.float16 and s.cell.name in cells and tiled and not s.reverse


def steps_faster(cell: str, input: Tensor, hidden: int) -> bool:
    """Where "auto" leaves a step with gradients on a CPU, of an input ``[..., B, I]``, to torch: its own takes 55 µs at H 32, B 1 in a loop
    of such steps, forward and backward, ours 90, most of it Python's; 390 and 400 at H 256, B 64. LSTM and GRU, whose steps are many
    operations of torch's, are quicker here. Not in deterministic mode, since torch's products of a row may depend on its batch.
    """
    exact = input.dtype is torch.float32 or input.dtype is torch.float64
    return cell in STEPS and input.is_cpu and exact and 0 < input.shape[-2] * hidden < 1 << 14 and not deterministic()


def step(cell: str, input: Tensor, states: Seq[Tensor], weights: Seq[Tensor | None]) -> Tensor:
    """The state after a step ``[B, I]`` from ``[B, H]``, none for zeros."""
    ih, hh, *biases = weights[:4]
    assert hh is not None
    state = states[0] if states else input.new_zeros(input.shape[0], hh.shape[1])
    after: Tensor = STEPS[cell](input, state, ih, hh, *biases)
    return after


def differentiates_sooner(s: Sizes, dtype: torch.dtype, device: torch.device) -> bool:
    """Where second derivatives of a cell that has none for its tangents, outside of transforms, of which it knows only some, are better
    left to torch's function, which takes fewer operations for a step than the page followed by torch: not where it would round between.
    """
    exact = dtype in (torch.float32, torch.float64) and device.type == "cpu"
    return s.cell.name in _FUNCTIONS and exact and not s.cut and s.steps > 0 and s.batch > 0


def check(cell: Cell) -> None:
    """Raise unless torch.nn has the cell."""
    if cell.name not in _FUNCTIONS:
        raise RuntimeError(f"engine: 'torch' cannot run this: torch.nn has no cell {cell.name}")


def run(s: Sizes, input: Tensor, states: Seq[Tensor] | None, weights: Weights, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
    """-> output, final states, with torch's own derivatives. torch.compile breaks its graph here, as at torch.nn's layers."""
    # No decorator: that would import all of the compiler with this package, which takes longer than torch itself.
    whole = torch.compiler.disable(_run) if torch.compiler.is_compiling() else _run  # type: ignore[no-untyped-call]
    found: tuple[Tensor, ...] = whole(s, input, states, weights, batch_sizes)
    return found


def _run(s: Sizes, input: Tensor, states: Seq[Tensor] | None, weights: Weights, batch_sizes: Tensor | None) -> tuple[Tensor, ...]:
    check(s.cell)
    turned = None
    if s.reverse:
        if batch_sizes is None:
            input = input.flip(0)
        else:
            turned = _turned(batch_sizes).to(input.device)
            input = input.index_select(0, turned)
    if states is None:
        states = [input.new_zeros(s.batch, s.hidden if i else s.output) for i in range(len(s.cell.states))]
    hx = tuple(state.unsqueeze(0).contiguous() for state in states)
    assert weights.ih is not None
    assert weights.hh is not None
    flat = [weights.ih, weights.hh]
    biased = weights.bias_ih is not None or weights.bias_hh is not None
    if biased:
        pair = (weights.bias_ih, weights.bias_hh)
        flat += [w.new_zeros(w.shape[0]) if bias is None else bias for w, bias in zip(flat, pair, strict=True)]
    if weights.hr is not None:
        flat.append(weights.hr)
    options = (biased, 1, 0.0, torch.is_grad_enabled(), False)
    arguments = (hx if len(hx) > 1 else hx[0], flat, *options)
    function = _FUNCTIONS[s.cell.name]
    output, *final = function(input, *arguments, False) if batch_sizes is None else function(input, batch_sizes, *arguments)
    if s.reverse:
        output = output.flip(0) if turned is None else output.index_select(0, turned)
    return (output, *(state.squeeze(0) for state in final))


def _turned(batch_sizes: Tensor) -> Tensor:
    """For each token of a ragged batch the token of its row that is as far from the row's other end: its own inverse."""
    device = batch_sizes.device
    steps = torch.arange(len(batch_sizes), device=device).repeat_interleave(batch_sizes)
    starts = batch_sizes.cumsum(0) - batch_sizes
    row = torch.arange(len(steps), device=device) - starts[steps]
    lengths = (batch_sizes > torch.arange(int(batch_sizes[0]), device=device).unsqueeze(1)).sum(1)
    return starts[lengths[row] - 1 - steps] + row
