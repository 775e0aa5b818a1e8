"""The CPU engine's side of a call: its memory, and what a single step leaves to torch."""

from __future__ import annotations

import threading
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from .. import _C
from .cells import Cell, Sizes, address, empty, problem, summed_bias, vectors


class Memory(threading.local):
    """One thread's workspace, kept from call to call: fresh pages cost as much as a short sequence."""

    KEPT = 64 << 20

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, bytes: int) -> Tensor:
        if self.buffer.numel() >= bytes:
            return self.buffer
        buffer = empty(self.buffer, (bytes,))
        if bytes <= self.KEPT:
            self.buffer = buffer
        return buffer


memory = Memory()


def forward(
    s: Sizes,
    training: bool,
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor]]:
    """-> output, final states, kept values, histories of the states beyond the first (the last two for training only)."""
    cell, H, P = s.cell, s.hidden, s.output
    tokens = input.flatten(0, -2).contiguous()
    N = tokens.shape[0]
    task = problem(s, input.dtype, input.shape[-1], rows, training)
    room = cell.room * H
    gates = empty(input, (N, room)) if training or s.complete else None
    if s.complete:
        assert gates is not None
        _complete(cell, H, gates, tokens, states[0] if states else None, weight_ih, weight_hh, summed_bias(cell, H, bias_ih, bias_hh))
    if cell.projected and gates is not None:
        gates[:, (len(cell.slots) - 1) * H :].zero_()  # a projection fills only its own width of its slot
    output = empty(input, (*input.shape[:-1], P))
    final = [input.new_empty(s.batch, H if i else P) for i in range(len(cell.states))]
    history = [empty(input, (N, H)) for _ in cell.states[1:]] if training else []
    bytes = _C.workspace_bytes(task, False)
    workspace = memory.take(bytes)
    _C.forward(
        task,
        tokens.data_ptr(),
        weight_ih.data_ptr(),
        address(bias_ih),
        address(bias_hh),
        address(gates),
        room,
        [weight_hh.data_ptr(), address(weight_hr)],
        vectors(cell, H, bias_hh),
        [state.data_ptr() for state in states],
        [state.data_ptr() for state in final],
        output.data_ptr(),
        [0, *[h.data_ptr() for h in history]],
        workspace.data_ptr(),
        bytes,
    )
    return output, final, gates if training else None, history


def _complete(
    cell: Cell, H: int, gates: Tensor, x: Tensor, h: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None
) -> None:
    """Both products of a single step, by torch: W x over the slots that the input feeds, U h added to these or alone."""
    inputs = cell.input_gates
    x_gates = gates if cell.uniform else gates[:, : inputs * H]
    if bias is None:
        torch.mm(x, weight_ih.t(), out=x_gates)
    else:
        torch.addmm(bias, x, weight_ih.t(), out=x_gates)
    if h is None:
        gates[:, inputs * H :].zero_()
        return
    for row, first, end in cell.hidden_runs:
        both = max(min(end, inputs), first)  # slots [first, both) have W's part, [both, end) do not
        u = weight_hh[row * H : (row + end - first) * H]
        if first < both:
            gates[:, first * H : both * H].addmm_(h, u[: (both - first) * H].t())
        if both < end:
            torch.mm(h, u[(both - first) * H :].t(), out=gates[:, both * H : end * H])


def backward(
    s: Sizes,
    needs: Seq[bool],  # input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states
    grad_output: Tensor | None,
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    rows: Tensor | None,
    output: Tensor,
    kept: Tensor,
    history: Seq[Tensor],
    overwrite: bool,
) -> list[Tensor | None]:
    """Gradients in the order of `needs`."""
    cell, H = s.cell, s.hidden
    tokens = input.flatten(0, -2).contiguous()
    if grad_output is not None:
        grad_output = grad_output.contiguous()
    finals = [None if g is None else g.contiguous() for g in grad_final]
    task = problem(s, input.dtype, input.shape[-1], rows, True)
    gates = kept if overwrite else empty(kept, kept.shape)
    # A complete run's carried gradient of state 0 is asked for with the part through U still to be added.
    initial = [torch.empty_like(state) if need else None for state, need in zip(states, needs[6:], strict=True)]
    bias = (weight_ih.shape[:1], weight_hh.shape[:1])
    projection = () if weight_hr is None else weight_hr.shape
    shapes = (input.shape, weight_ih.shape, weight_hh.shape, *bias, projection)
    grads = [empty(input, shape) if need else None for shape, need in zip(shapes, needs[:6], strict=True)]
    grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_hr = map(address, grads)
    bytes = _C.workspace_bytes(task, True)
    workspace = memory.take(bytes)
    _C.backward(
        task,
        kept.data_ptr(),
        gates.data_ptr(),
        [weight_hh.data_ptr(), address(weight_hr)],
        vectors(cell, H, bias_hh),
        [state.data_ptr() for state in states],
        output.data_ptr(),
        [0, *[h.data_ptr() for h in history]],
        address(grad_output),
        [address(g) for g in finals],
        [address(g) for g in initial],
        tokens.data_ptr(),
        weight_ih.data_ptr(),
        grad_x,
        grad_ih,
        [grad_hh, grad_hr],
        grad_bias_ih,
        grad_bias_hh,
        [],
        workspace.data_ptr(),
        bytes,
    )
    if s.complete:
        _complete_backward(s, grads, initial, gates, tokens, states[0] if states else None, weight_ih, weight_hh)
    return [*grads, *initial]


def _complete_backward(
    s: Sizes,
    grads: list[Tensor | None],
    initial: list[Tensor | None],
    gates: Tensor,
    x: Tensor,
    h: Tensor | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
) -> None:
    """The products of a single step's gate gradients, by torch."""
    cell, H = s.cell, s.hidden
    grad_x, grad_ih, grad_hh, bias_ih, bias_hh, _ = grads
    x_gates = gates[:, : cell.input_gates * H]
    if grad_x is not None:
        torch.mm(x_gates, weight_ih, out=grad_x.view(x.shape))
    if grad_ih is not None:
        torch.mm(x_gates.t(), x, out=grad_ih)
    if bias_ih is not None:
        torch.sum(x_gates, 0, out=bias_ih)
    for row, first, end in cell.hidden_runs:
        rows, run = slice(row * H, (row + end - first) * H), gates[:, first * H : end * H]
        if grad_hh is not None:
            if h is None:
                grad_hh[rows].zero_()
            else:
                torch.mm(run.t(), h, out=grad_hh[rows])
        if bias_hh is not None:
            torch.sum(run, 0, out=bias_hh[rows])
        if initial and initial[0] is not None:
            initial[0].addmm_(run, weight_hh[rows])
