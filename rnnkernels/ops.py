"""One cell over one sequence: argument checks, memory, autograd and the torch.library ops. The only door to the compiled module.

:func:`sequence` is what layers are made of. In eager mode it goes through :class:`Sequence`, an ``autograd.Function``; under
``torch.compile``, ``torch.export``, on meta and fake tensors it goes through the ops ``torch.ops.rnnkernels.sequence`` and
``sequence_backward``. Both run the same code.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C

_STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@dataclass(frozen=True)
class Cell:
    """What Python needs to know of a page of cells.def."""

    index: int
    name: str
    states: tuple[str, ...]
    slots: tuple[tuple[str, bool, bool], ...]  # name, fed by the input, fed by the state
    vectors: tuple[tuple[str, int], ...]
    room: int  # values of a token between forward and backward
    projected: bool
    input_gates: int
    hidden_gates: int
    hidden_runs: tuple[tuple[int, int, int], ...]  # consecutive slots that U feeds: first row block of weight_hh, first slot, last slot + 1
    uniform: bool  # the input and U feed all slots, and a token has room for nothing else


def _cell(index: int, d: dict[str, Any]) -> Cell:
    slots: list[tuple[str, bool, bool]] = d["slots"]
    first, count = d["stages"][0]
    fed = [i for i in range(first, first + count) if slots[i][2]]
    runs, row = [], 0
    for _, group in itertools.groupby(enumerate(fed), lambda pair: pair[1] - pair[0]):
        members = [slot for _, slot in group]
        runs.append((row, members[0], members[-1] + 1))
        row += len(members)
    inputs = sum(x for _, x, _ in slots)
    return Cell(
        index,
        d["name"],
        tuple(d["states"]),
        tuple(slots),
        tuple(d["vectors"]),
        d["room"],
        d["projected"],
        inputs,
        len(fed),
        tuple(runs),
        runs == [(0, 0, inputs)] and d["room"] == inputs,
    )


CELLS: dict[str, Cell] = {d["name"]: _cell(i, d) for i, d in enumerate(_C.cells())}


def build_info() -> dict[str, Any]:
    """How the compiled module was built and what it runs on: version, compiler, isas, isa, supported, cuda."""
    return {**_C.build(), "isa": _C.isa(), "supported": _C.supported_isas()}


def set_isa(name: str | None) -> None:
    """Choose the instruction set (``"avx512"``, ``"avx2"``, ``"scalar"``; ``None``: the best there is), not while a kernel runs elsewhere.

    Raises ``ValueError`` for one that this processor or build does not have. The variable ``RNNKERNELS_ISA`` does the same at start.
    """
    _C.set_isa(name or "")


def plan(
    cell: str,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    output_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    training: bool = False,
) -> dict[str, Any]:
    """What would run, and why: engine, isa, threads, row_groups, unit_groups, units_per_panel, bytes_workspace, estimated_us, reason.

    With ``training`` it tells of the backward pass. Raises ``ValueError`` for an unknown cell, an unsupported dtype or a negative size.
    """
    if cell not in CELLS or dtype not in _STORAGE or min(steps, batch, input_size, hidden_size, output_size or 0) < 0:
        raise ValueError(
            f"plan: no such cell, dtype or size: {cell!r}, {dtype}, {steps}, {batch}, {input_size}, {hidden_size}, {output_size}"
        )
    sizes = _Saved(CELLS[cell], False, steps, batch, hidden_size, output_size or hidden_size)
    problem = _problem(sizes, dtype, input_size, None, training)
    threads = torch.get_num_threads()
    rows, units, panel, ns = _C.schedule(problem, training)
    if sizes.complete:
        reason = "one step: both products by torch, the rest in one pass"
    elif rows * units == 1:
        reason = "serial: a step is too short to share" if threads > 1 else "serial: one thread"
    elif units == 1:
        reason = "the batch is split: no barrier"
    elif rows == 1:
        reason = "the units are split: each thread keeps its share of the weights, one barrier a step"
    else:
        reason = "batch and units are split"
    return {
        "engine": "cpu",
        "isa": _C.isa(),
        "threads": rows * units,
        "row_groups": rows,
        "unit_groups": units,
        "units_per_panel": panel,
        "bytes_workspace": _C.workspace_bytes(problem, training),
        "estimated_us": ns / 1e3,
        "reason": f"{reason} (torch.get_num_threads() = {threads})",
    }


# ---- one direction of one layer


class _Saved(NamedTuple):
    """What backward needs beyond the arguments: sizes, not tensors."""

    cell: Cell
    reverse: bool
    steps: int
    batch: int
    hidden: int
    output: int

    @property
    def complete(self) -> bool:
        """One step: torch forms both products, since packing weights costs more than using them once."""
        return self.steps == 1 and not self.cell.projected


def _empty(like: Tensor, shape: Seq[int]) -> Tensor:
    """Memory not yet touched. Where it is large, faults on small pages would cost as much as the arithmetic."""
    t = like.new_empty(shape)
    bytes = t.numel() * t.element_size()
    if bytes >= 4 << 20:
        _C.prefer_large_pages(t.data_ptr(), bytes)
    return t


class _Memory(threading.local):
    """One thread's workspace, kept from call to call: fresh pages cost as much as a short sequence."""

    KEPT = 64 << 20

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def take(self, bytes: int) -> Tensor:
        if self.buffer.numel() >= bytes:
            return self.buffer
        buffer = _empty(self.buffer, (bytes,))
        if bytes <= self.KEPT:
            self.buffer = buffer
        return buffer


_memory = _Memory()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _problem(s: _Saved, dtype: torch.dtype, input_size: int, rows: Tensor | None, training: bool) -> _C.Problem:
    return _C.Problem(
        s.cell.index,
        _STORAGE[dtype],
        s.steps,
        s.batch,
        input_size,
        s.hidden,
        s.output,
        _address(rows),
        s.reverse,
        training,
        s.complete,
        torch.get_num_threads(),
    )


def _vectors(cell: Cell, hidden: int, bias_hh: Tensor | None) -> list[int]:
    """The per-unit vectors that stand for biases of slots which U alone feeds (b_hn of GRU): blocks of bias_hh."""
    if bias_hh is None or not cell.vectors:
        return []
    block = {slot: row + slot - first for row, first, end in cell.hidden_runs for slot in range(first, end)}
    return [bias_hh.data_ptr() + block[slot] * hidden * bias_hh.element_size() for _, slot in cell.vectors]


def _bias(cell: Cell, hidden: int, bias_ih: Tensor | None, bias_hh: Tensor | None) -> Tensor | None:
    """The sum of both biases for the slots that the input feeds."""
    if bias_hh is None:
        return bias_ih
    if bias_ih is None:
        bias = torch.zeros(cell.input_gates * hidden, dtype=bias_hh.dtype, device=bias_hh.device)
    elif len(cell.hidden_runs) == 1 and cell.hidden_runs[0][1:] == (0, cell.input_gates):
        return bias_ih + bias_hh
    else:
        bias = bias_ih.clone()
    for row, first, end in cell.hidden_runs:
        end = min(end, cell.input_gates)
        if first < end:
            bias[first * hidden : end * hidden] += bias_hh[row * hidden : (row + end - first) * hidden]
    return bias


def _forward(
    s: _Saved,
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
    problem = _problem(s, input.dtype, input.shape[-1], rows, training)
    room = cell.room * H
    gates = _empty(input, (N, room)) if training or s.complete else None
    if s.complete:
        assert gates is not None
        _complete(cell, H, gates, tokens, states[0] if states else None, weight_ih, weight_hh, _bias(cell, H, bias_ih, bias_hh))
    if cell.projected and gates is not None:
        gates[:, (len(cell.slots) - 1) * H :].zero_()  # a projection fills only its own width of its slot
    output = _empty(input, (*input.shape[:-1], P))
    final = [input.new_empty(s.batch, H if i else P) for i in range(len(cell.states))]
    history = [_empty(input, (N, H)) for _ in cell.states[1:]] if training else []
    bytes = _C.workspace_bytes(problem, False)
    workspace = _memory.take(bytes)
    _C.forward(
        problem,
        tokens.data_ptr(),
        weight_ih.data_ptr(),
        _address(bias_ih),
        _address(bias_hh),
        _address(gates),
        room,
        [weight_hh.data_ptr(), _address(weight_hr)],
        _vectors(cell, H, bias_hh),
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


def _backward(
    s: _Saved,
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
    problem = _problem(s, input.dtype, input.shape[-1], rows, True)
    gates = kept if overwrite else _empty(kept, kept.shape)
    # A complete run's carried gradient of state 0 is asked for with the part through U still to be added.
    initial = [torch.empty_like(state) if need else None for state, need in zip(states, needs[6:], strict=True)]
    bias = (weight_ih.shape[:1], weight_hh.shape[:1])
    projection = () if weight_hr is None else weight_hr.shape
    shapes = (input.shape, weight_ih.shape, weight_hh.shape, *bias, projection)
    grads = [_empty(input, shape) if need else None for shape, need in zip(shapes, needs[:6], strict=True)]
    grad_x, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh, grad_hr = map(_address, grads)
    bytes = _C.workspace_bytes(problem, True)
    workspace = _memory.take(bytes)
    _C.backward(
        problem,
        kept.data_ptr(),
        gates.data_ptr(),
        [weight_hh.data_ptr(), _address(weight_hr)],
        _vectors(cell, H, bias_hh),
        [state.data_ptr() for state in states],
        output.data_ptr(),
        [0, *[h.data_ptr() for h in history]],
        _address(grad_output),
        [_address(g) for g in finals],
        [_address(g) for g in initial],
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
    s: _Saved,
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


def _hooked() -> bool:
    """Whether somebody else may hold what is saved now."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _last_use() -> bool:
    """Whether this backward is the saved values' last use: then gradients may be written over them."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is not None and not keep_graph()


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("second derivatives are not supported by rnnkernels yet; use torch.nn here")


class _Once(torch.autograd.Function):
    """Gradients as a function of what they depend on, so that a second derivative raises instead of passing them by as constants."""

    @staticmethod
    def forward(ctx: Any, count: int, *args: Tensor | None) -> Any:
        return args[:count]

    backward = staticmethod(_refuse_second_derivative)


class Sequence(torch.autograd.Function):
    """A cell over a sequence, as autograd sees it. Use :func:`sequence`, which checks its arguments.

    ``apply(saved, batch_sizes, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states) -> (output, *final_states)``.
    Saves 5·H numbers a token for LSTM, 4·H for GRU and H for SRN, besides input and output.
    """

    @staticmethod
    def forward(ctx: Any, s: _Saved, rows: Tensor | None, *args: Tensor | None) -> Any:
        input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states = args
        assert input is not None
        assert weight_ih is not None
        assert weight_hh is not None
        states_ = [state for state in states if state is not None]
        output, final, kept, history = _forward(s, True, input, states_, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, rows)
        ctx.sizes, ctx.own = s, not _hooked()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, weight_ih, weight_hh, bias_hh, weight_hr, rows, output, kept, *states_, *history)
        return (output, *final)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *grad_final: Tensor | None) -> Any:
        s: _Saved = ctx.sizes
        input, weight_ih, weight_hh, bias_hh, weight_hr, rows, output, kept, *rest = ctx.saved_tensors
        n = len(rest) - len(s.cell.states) + 1  # the rest are initial states, if there were any, and histories
        with torch.no_grad():
            grads = _backward(
                s,
                ctx.needs_input_grad[2:],
                grad_output,
                grad_final,
                input,
                rest[:n],
                weight_ih,
                weight_hh,
                bias_hh,
                weight_hr,
                rows,
                output,
                kept,
                rest[n:],
                ctx.own and _last_use(),
            )
        if torch.is_grad_enabled():
            sources = (grad_output, *grad_final, input, weight_ih, weight_hh, weight_hr, *rest[:n])
            grads = _Once.apply(len(grads), *grads, *sources)  # type: ignore[no-untyped-call]
        return (None, None, *grads)


# ---- argument checks


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor.shape == shape and tensor.dtype is like.dtype and tensor.device == like.device:
        return
    if tensor.shape != shape:
        raise RuntimeError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype:
        raise RuntimeError(f"{name}: expected dtype {like.dtype} as input has, got {tensor.dtype}")
    raise RuntimeError(f"{name}: expected device {like.device} as input is on, got {tensor.device}")


def _check_rows(batch_sizes: Tensor, tokens: int) -> tuple[int, int]:
    """-> steps, batch"""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.numel() == 0:
        raise RuntimeError(
            f"batch_sizes: expected a non-empty 1-D int64 CPU tensor, got {batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
            f" of {batch_sizes.numel()} elements"
        )
    sizes = batch_sizes.tolist()
    if any(a < b for a, b in itertools.pairwise(sizes)) or sizes[-1] < 1:
        raise RuntimeError(f"batch_sizes: expected positive and non-increasing, got {sizes}")
    if sum(sizes) != tokens:
        raise RuntimeError(f"batch_sizes: expected to sum to the {tokens} tokens of input, got {sum(sizes)}")
    return len(sizes), sizes[0]


def _checked(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    concrete: bool,
) -> _Saved:
    spec = CELLS.get(cell)
    if spec is None:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    if input.dtype not in _STORAGE:
        raise RuntimeError(f"input: expected dtype float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() != (3 if batch_sizes is None else 2):
        raise RuntimeError(
            f"input: expected {'3-D [T, B, I]' if batch_sizes is None else '2-D [N, I] with batch_sizes'}, got {input.dim()}-D"
        )
    if weight_ih.dim() != 2 or weight_ih.shape[0] % spec.input_gates or weight_ih.shape[0] == 0:
        raise RuntimeError(f"weight_ih: expected shape ({spec.input_gates}·hidden_size, input_size), got {tuple(weight_ih.shape)}")
    if spec.projected != (weight_hr is not None):
        raise RuntimeError(f"weight_hr: expected {'a tensor' if spec.projected else 'None'} for cell {cell!r}")
    if states is not None and len(states) != len(spec.states):
        raise RuntimeError(f"states: expected {len(spec.states)} ({', '.join(spec.states)}) for cell {cell!r}, got {len(states)}")
    H = weight_ih.shape[0] // spec.input_gates
    P = H
    if weight_hr is not None:
        P = weight_hr.shape[0]
        if not 0 < P <= H:
            raise RuntimeError(f"weight_hr: expected at least 1 and at most hidden_size = {H} rows, got {P}")
        _expect("weight_hr", weight_hr, (P, H), input)
    if batch_sizes is None:
        T, B = input.shape[:2]
        if concrete and T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    elif concrete:
        T, B = _check_rows(batch_sizes, input.shape[0])
    else:
        assert states is not None
        T, B = batch_sizes.shape[0], states[0].shape[0]
    if concrete and max(input.numel(), input.numel() // max(input.shape[-1], 1) * spec.room * H) >= 2**60:
        raise RuntimeError(f"input: {T} steps of {B} rows with {H} hidden units are more than memory can address")
    _expect("weight_ih", weight_ih, (spec.input_gates * H, input.shape[-1]), input)
    _expect("weight_hh", weight_hh, (spec.hidden_gates * H, P), input)
    for i, state in enumerate(states or ()):
        _expect(f"states[{i}] ({spec.states[i]})", state, (B, H if i else P), input)
    if bias_ih is not None:
        _expect("bias_ih", bias_ih, (spec.input_gates * H,), input)
    if bias_hh is not None:
        _expect("bias_hh", bias_hh, (spec.hidden_gates * H,), input)
    if concrete and input.device.type != "cpu":
        raise RuntimeError(f"input: no engine for device {input.device}: this build computes on the CPU")
    return _Saved(spec, reverse, T, B, H, P)


def _autocast(t: Any, dtype: torch.dtype) -> Any:
    return t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)


def _refuse_transforms(*tensors: Tensor | None) -> None:
    """Raise rather than lose a tangent or read memory that a transform has wrapped."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError("torch.func transforms (vmap, grad, jvp …) are not supported by rnnkernels yet; use torch.nn here")
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError("forward-mode derivatives are not supported by rnnkernels yet; use torch.nn here")


def sequence(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``cell`` over a sequence in one direction.

    Args:
        cell: a name of :data:`CELLS`, for instance ``"lstm"``, ``"gru"``, ``"srn_tanh"``; the equations: :mod:`rnnkernels.reference`.
        input: ``[T, B, I]``, or with ``batch_sizes`` ``[N, I]``, the tokens step by step as in a ``PackedSequence``; float32, float64,
            bfloat16 or float16.
        states: one tensor a state before the first step, ``h [B, P]`` and for LSTM ``c [B, H]``; None: zeros.
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr: as in torch.nn: ``[gates·H, I]``, ``[gates·H, P]``, ``[gates·H]``,
            ``[gates·H]``, ``[P, H]``.
        batch_sizes: how many rows take part in each step, non-increasing, on the CPU.
        reverse: run from the last step (a ragged row's own last step) to the first. The output keeps the input's order.

    Returns:
        ``(output, *final_states)``, the output ``[T, B, P]`` or ``[N, P]``.

    Raises:
        ValueError: an unknown cell. RuntimeError: a tensor of the wrong rank, size, dtype or device; the text names it.

    >>> x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
    >>> y, h_n = sequence("gru", x, [h], torch.randn(12, 3), torch.randn(12, 4))
    >>> y.shape, torch.equal(y[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """
    if torch.is_autocast_enabled("cpu"):
        # As torch.nn, whose GRU keeps the input's dtype.
        dtype = input.dtype if cell == "gru" else torch.get_autocast_dtype("cpu")
        input, weight_ih, weight_hh = (_autocast(t, dtype) for t in (input, weight_ih, weight_hh))
        bias_ih, bias_hh, weight_hr = (_autocast(t, dtype) for t in (bias_ih, bias_hh, weight_hr))
        states = None if states is None else [_autocast(state, dtype) for state in states]
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_transforms(input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *(states or ()))
    tensors = [input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *(states or ())]
    plain, needs_grad = not (torch.compiler.is_compiling() or input.is_meta), False
    for i, t in enumerate(tensors):
        if t is not None:
            plain = plain and (type(t) is Tensor or type(t) is torch.nn.Parameter)
            needs_grad = needs_grad or t.requires_grad
            if i and not t.is_contiguous():
                tensors[i] = t.contiguous()
    needs_grad = needs_grad and torch.is_grad_enabled()
    if batch_sizes is not None:
        batch_sizes = batch_sizes.contiguous()
    if not plain:
        return _traceable(cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, needs_grad)
    s = _checked(cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, True)
    if needs_grad:
        result: tuple[Tensor, ...] = Sequence.apply(s, batch_sizes, *tensors)  # type: ignore[no-untyped-call]
        return result
    _, w_ih, w_hh, b_ih, b_hh, w_hr, *h = tensors
    output, final, _, _ = _forward(s, False, input, h, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes)  # type: ignore[arg-type]
    return (output, *final)


def _traceable(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    training: bool,
) -> tuple[Tensor, ...]:
    """The same through the registered op: for compilers, fake and meta tensors, and tensor subclasses."""
    if states is None:
        batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        widths = [weight_hh.shape[1]] + [weight_hh.shape[0] // CELLS[cell].hidden_gates] * (len(CELLS[cell].states) - 1)
        states = [input.new_zeros(batch, width) for width in widths]
    s = _checked(cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, False)
    results: list[Tensor] = torch.ops.rnnkernels.sequence(
        cell, input, list(states), weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, training
    )
    return tuple(results[: 1 + len(s.cell.states)])


# ---- torch.library: the same code for torch.compile, torch.export and fake tensors

_library: Any = torch.library.Library("rnnkernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "sequence(str cell, Tensor input, Tensor[] states, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? batch_sizes, bool reverse, bool training) -> Tensor[]"
)
_library.define(
    "sequence_backward(str cell, bool[] needs, Tensor? grad_output, Tensor?[] grad_final, Tensor input, Tensor[] states,"
    " Tensor weight_ih, Tensor weight_hh, Tensor? bias_hh, Tensor? weight_hr, Tensor? batch_sizes, bool reverse,"
    " Tensor output, Tensor kept, Tensor[] history) -> Tensor[]"
)


def _op_forward(
    cell: str,
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    training: bool,
) -> list[Tensor]:
    """output, final states, and for training the kept values and the histories of the other states"""
    s = _checked(cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, True)
    dense = [state.contiguous() for state in states]
    b_ih, b_hh, w_hr = (None if t is None else t.contiguous() for t in (bias_ih, bias_hh, weight_hr))
    w_ih, w_hh = weight_ih.contiguous(), weight_hh.contiguous()
    rows = None if batch_sizes is None else batch_sizes.contiguous()
    output, final, kept, history = _forward(s, training, input, dense, w_ih, w_hh, b_ih, b_hh, w_hr, rows)
    return [output, *final, *([] if kept is None else [kept]), *history]


def _op_forward_fake(
    cell: str,
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    training: bool,
) -> list[Tensor]:
    spec = CELLS[cell]
    H, P = weight_ih.shape[0] // spec.input_gates, weight_hh.shape[1]
    N = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    results = [input.new_empty(*input.shape[:-1], P), *(input.new_empty(state.shape) for state in states)]
    if training:
        results += [input.new_empty(N, spec.room * H), *(input.new_empty(N, H) for _ in states[1:])]
    return results


def _op_backward(
    cell: str,
    needs: Seq[bool],
    grad_output: Tensor | None,
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    output: Tensor,
    kept: Tensor,
    history: Seq[Tensor],
) -> list[Tensor]:
    """Gradients in the order of `needs`; an empty tensor where none is needed."""
    s = _checked(cell, input, states, weight_ih, weight_hh, None, bias_hh, weight_hr, batch_sizes, reverse, True)
    N = s.steps * s.batch if batch_sizes is None else input.shape[0]
    if len(needs) != 6 + len(states) or len(grad_final) != len(states) or len(history) != len(states) - 1:
        raise RuntimeError(f"needs, grad_final, history: expected {6 + len(states)}, {len(states)}, {len(states) - 1} of them")
    _expect("output", output, (*input.shape[:-1], s.output), input)
    _expect("kept", kept, (N, s.cell.room * s.hidden), input)
    for name, tensors, first in (("grad_output", [grad_output], output), ("grad_final", grad_final, None), ("history", history, None)):
        for i, tensor in enumerate(tensors):
            shape = first.shape if first is not None else states[i].shape if name == "grad_final" else (N, s.hidden)
            if tensor is not None:
                _expect(name, tensor, shape, input)
    grads = _backward(
        s,
        needs,
        grad_output,
        grad_final,
        input,
        [state.contiguous() for state in states],
        weight_ih.contiguous(),
        weight_hh.contiguous(),
        None if bias_hh is None else bias_hh.contiguous(),
        None if weight_hr is None else weight_hr.contiguous(),
        None if batch_sizes is None else batch_sizes.contiguous(),
        output.contiguous(),
        kept.contiguous(),
        [h.contiguous() for h in history],
        False,
    )
    return [input.new_empty(0) if grad is None else grad for grad in grads]


def _op_backward_fake(
    cell: str,
    needs: Seq[bool],
    grad_output: Tensor | None,
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    batch_sizes: Tensor | None,
    reverse: bool,
    output: Tensor,
    kept: Tensor,
    history: Seq[Tensor],
) -> list[Tensor]:
    spec = CELLS[cell]
    bias = (weight_hh.shape[0],)
    H = weight_ih.shape[0] // spec.input_gates
    projection = (0,) if weight_hr is None else weight_hr.shape
    shapes = (input.shape, weight_ih.shape, weight_hh.shape, (spec.input_gates * H,), bias, projection, *(state.shape for state in states))
    return [input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    cell, input, states, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, batch_sizes, reverse, training = inputs
    n = len(states)
    ctx.cell, ctx.reverse, ctx.states, ctx.training = cell, reverse, n, training
    if not training:
        return
    y, kept, history = output[0], output[1 + n], output[2 + n :]
    ctx.needs = [t is not None and t.requires_grad for t in (input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, *states)]
    ctx.save_for_backward(input, weight_ih, weight_hh, bias_hh, weight_hr, batch_sizes, y, kept, *states, *history)


def _op_autograd(ctx: Any, grads: list[Tensor | None]) -> Any:
    if not ctx.training:
        raise RuntimeError("training: expected True for an op that is differentiated, got False")
    n = ctx.states
    input, weight_ih, weight_hh, bias_hh, weight_hr, batch_sizes, y, kept, *rest = ctx.saved_tensors
    results = torch.ops.rnnkernels.sequence_backward(
        ctx.cell,
        ctx.needs,
        grads[0],
        grads[1 : 1 + n],
        input,
        rest[:n],
        weight_ih,
        weight_hh,
        bias_hh,
        weight_hr,
        batch_sizes,
        ctx.reverse,
        y,
        kept,
        rest[n:],
    )
    needed = [grad if need else None for grad, need in zip(results, ctx.needs, strict=True)]
    input_grad, *others = needed[:6]
    return (None, input_grad, needed[6:], *others, None, None, None)


for _name, _run, _fake in (("sequence", _op_forward, _op_forward_fake), ("sequence_backward", _op_backward, _op_backward_fake)):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"rnnkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("rnnkernels::sequence", _op_autograd, setup_context=_op_setup, lib=_library)
torch.library.register_autograd("rnnkernels::sequence_backward", _refuse_second_derivative, lib=_library)
