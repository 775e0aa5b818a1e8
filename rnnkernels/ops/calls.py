"""Calls, looked at whole: which way one goes, up to the kernels and back.

In eager mode it goes through :class:`Sequence`, an ``autograd.Function``; under torch.func through those of ``transforms.py``, whose rules
are made of themselves; under ``torch.compile``, ``torch.export``, on meta and fake tensors through the ops of ``registered.py``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import cpu, peer, tangents, traced
from .autocast import LSTM, autocast, no_autocast
from .autograd import Both, Sequence
from .cells import CELLS, NO_ROWS, STORAGE, Rows, Sizes, Weights, dense, grouped
from .checks import Call, check_reset_states, checked, checked_once, look_at, widths
from .engines import RUNS
from .explained import is_listening, noted
from .load import compile_for
from .packed import Packed, Remembered, keeping
from .packed import check as check_packed
from .transforms import Forward, is_batched, is_forward_mode, is_transformed


def run(call: Call, packed: Packed | Remembered | None = None, is_step: bool = False) -> tuple[Tensor, ...]:
    """:func:`sequence` of its arguments as one value. ``is_step``: it is the step of a cell, to which autocast does something else."""
    found = _begun(call, packed, is_step)
    if not isinstance(found, _Eager):
        return found
    return noted(found.s, found.call, found.rows, packed) if is_listening() else found.finished()


def pair(calls: Seq[Call], packed: Seq[Packed | Remembered | None] = (None, None)) -> Seq[tuple[Tensor, ...]]:
    """Two calls of :func:`sequence` of the same sizes that do not depend on each other, side by side on a thread each, or on a GPU in one
    launch, where that is sooner done. On a CPU the bits are the same either way.
    """
    begun = [_begun(call, place) for call, place in zip(calls, packed, strict=True)]
    first, second = begun
    gains = isinstance(first, _Eager) and isinstance(second, _Eager) and first.gains(second)
    if is_listening():
        return [noted(one.s, one.call, one.rows, one.packed, gains) if isinstance(one, _Eager) else one for one in begun]
    if not (isinstance(first, _Eager) and isinstance(second, _Eager) and gains):
        return [one.finished() if isinstance(one, _Eager) else one for one in begun]
    if not first.call.training:
        with RUNS[first.s.engine].side_by_side():
            return first.finished(), second.finished()
    parts = (first.s, first.rows, len(first.tensors)), (second.s, second.rows)
    results = Both.apply(*parts, *first.tensors, *second.tensors)  # type: ignore[no-untyped-call]
    count = len(results) // 2
    return first.shaped(results[:count]), second.shaped(results[count:])


def chain_gains(cell: str, input: Tensor, states: Seq[Tensor], weights: Seq[Seq[Tensor | None]], engine: str) -> bool:
    """Whether the layers of a stack with these weights, of whole batches and without gradients, are sooner done at the same time, each some
    steps behind the one below: in ``cpu.side_by_side(chained=True)``.
    """
    if engine not in ("auto", "cpu") or not input.is_cpu or input.dim() != 3 or cell not in CELLS or input.dtype not in STORAGE:
        return False
    if torch.compiler.is_compiling() or is_transformed() or torch._C._is_tracing() or torch._C._is_any_autocast_enabled():
        return False
    grads = torch.is_grad_enabled()
    for t in itertools.chain((input,), states, *weights):
        if t is not None and ((type(t) is not Tensor and type(t) is not torch.nn.Parameter) or (grads and t.requires_grad)):
            return False
    spec, above = CELLS[cell], weights[1][0]  # which reads what the first layer gives
    if not spec.input_gates or above is None or above.dim() != 2:
        return False
    compile_for(_C.isa_of_pages(), cell)
    s = Sizes(spec, False, input.shape[0], input.shape[1], above.shape[0] // spec.input_gates, above.shape[1])
    return cpu.gains_chained(s, input.dtype, input.shape[2], len(weights), torch.get_num_threads())


# Input, states, weights, rows, given, resets, as engines take them.
_Arguments = tuple[Tensor, Seq[Tensor], Weights, Rows, Seq[Tensor], Seq[Tensor]]


def inference(s: Sizes, packed: Packed | Remembered | None, arguments: _Arguments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> output, final states, histories"""
    keeps = keeping(s, arguments[0], packed)
    if keeps is None:
        output, final, _, history = RUNS[s.engine].forward(s, False, *arguments)
    else:
        output, final, _, history = cpu.forward(keeps, False, *arguments, packed)
    return output, final, history


class _Eager(NamedTuple):
    """A call that is checked and ready for kernels, in eager mode outside of transforms."""

    s: Sizes
    call: Call
    rows: Rows
    tensors: list[Any]  # input, weights, states, given, resets, without lists' own brackets
    packed: Packed | Remembered | None

    def gains(self, other: _Eager) -> bool:
        """Whether the two are sooner done side by side."""
        s, input = self.s, self.call.input
        same = s._replace(reverse=other.s.reverse) == other.s and self.call.training == other.call.training
        theirs = other.call.input
        if not same or input.dtype != theirs.dtype or input.device != theirs.device or self.rows.sizes is not other.rows.sizes:
            return False
        found: bool = RUNS[s.engine].gains_side_by_side(s, input, self.call.training)
        return found

    def finished(self) -> tuple[Tensor, ...]:
        s, input, tensors = self.s, self.call.input, self.tensors
        if self.call.training:
            return self.shaped(Sequence.apply(s, self.rows, *tensors))  # type: ignore[no-untyped-call]
        weights, states, given, resets = grouped(s, tensors[1:])
        output, final, history = inference(s, self.packed, (input, states, weights, self.rows, given, resets))
        return _shaped((output, *final, *history), len(final), input) if history else (output, *final)

    def shaped(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _shaped(results, len(self.s.cell.states), self.call.input) if self.call.return_states else results


def _begun(call: Call, packed: Packed | Remembered | None, is_step: bool = False) -> _Eager | tuple[Tensor, ...]:
    """The call as far as it goes without kernels of its own: ready for them, or, by another way, done."""
    input, weights, engine, transformed = call.input, call.weights(), call.engine, is_transformed()
    asked = packed if isinstance(packed, Packed) else None
    if asked is not None:
        check_packed(asked.weight_dtype, engine, input.device, transformed)
    if torch._C._is_any_autocast_enabled() and (place := input.device.type) in ("cpu", "cuda") and torch.is_autocast_enabled(place):
        call = autocast(call, asked, is_step)
        input, weights = call.input, call.weights()
    if call.return_states and engine == "torch" and call.cell in CELLS and len(CELLS[call.cell].states) > 1:
        raise RuntimeError("return_states: torch.nn's functions do not give them; choose another engine")
    if engine == "torch" or (engine == "auto" and input.is_cuda and not call.return_states and _torch_is_faster(call)):
        s = checked(call.changed(engine="torch"), not torch.compiler.is_compiling())
        if is_listening():
            return noted(s._replace(engine="torch"), call, call.rows())
        # torch.nn's LSTM over a sequence would be cast; its GRU, and what autocast makes of that one's products, is torch's own affair.
        kept = is_step and input.is_cpu and torch.is_autocast_enabled("cpu") and LSTM.fullmatch(call.cell)
        with no_autocast() if kept else contextlib.nullcontext():
            theirs: tuple[Tensor, ...] = peer.run(s, input, call.states, weights, call.batch_sizes)
        return theirs
    if call.reset_mask is not None and not call.reverse:
        call = call.changed(states=_first_states(call))
    if engine == "traced" or transformed:
        call = call.changed(recompute=False, training=True)
        return _by_rules(call) if engine != "traced" and (not is_forward_mode() or _has_tangents(call)) else _traced(call)
    tensors: list[Any] = [input, *weights, *(call.states or ()), *call.given, *call.reset_states]
    compiling = torch.compiler.is_compiling()
    tracing = not compiling and torch._C._is_tracing()  # of which torch.compile must not hear
    look = None if compiling or tracing or input.is_meta else look_at(tensors, input.dtype)
    plain = look is not None and look.plain
    needs_grad = any(t is not None and t.requires_grad for t in tensors) if look is None else look.needs_grad
    # A traced graph is run with and without gradients.
    needs_grad = needs_grad and (torch.is_grad_enabled() or tracing)
    if needs_grad:
        call = call.changed(training=True)
    if asked is not None:
        check_packed(asked.weight_dtype, engine, input.device, training=needs_grad, plain=plain)
    if look is None or not plain:
        return _traceable(call)
    if not look.dense:
        tensors[1:] = [None if t is None else dense(t) for t in tensors[1:]]
    s, rows = checked_once(call, look), call.rows()
    lone = needs_grad and s.steps == 1 and rows is NO_ROWS and not (s.recompute or s.returns or s.given)
    if lone and engine == "auto" and peer.steps_faster(call.cell, input, s.hidden):
        if is_listening():
            return noted(s._replace(engine="torch"), call, rows)
        state = peer.step(call.cell, input[0], call.states or (), weights)
        return state[None], state.clone()
    return _Eager(s, call, rows, tensors, packed)


def _traced(call: Call) -> tuple[Tensor, ...]:
    s = checked(call.changed(engine="traced"), not torch.compiler.is_compiling(), not any(map(is_batched, call.rows())))
    if is_listening():
        return noted(s, call, call.rows())
    results = traced.run(s, call.input, call.states, call.weights(), call.rows(), call.given, call.reset_states)
    n = len(s.cell.states)
    return _shaped(results if s.returns else results[: 1 + n], n, call.input)


def _has_tangents(call: Call) -> bool:
    """Whether forward-mode derivatives are the kernels' too."""
    return call.cell in CELLS and tangents.cell_of(CELLS[call.cell], call.module) is not None


def _by_rules(call: Call) -> tuple[Tensor, ...]:
    """Under a transform of torch.func, by the kernels."""
    s = checked(call, True, not any(map(is_batched, call.rows())))
    if is_listening():
        return noted(s, call, call.rows())
    leaves = (*call.rows(), call.input, *call.weights(), *(call.states or ()), *call.given, *call.reset_states)
    output, *rest = Forward.apply(s, *leaves)  # type: ignore[no-untyped-call]
    n = len(s.cell.states)
    return _shaped([output, *rest[:n], *(rest[n + 1 : 2 * n] if s.returns else ())], n, call.input)


def _first_states(call: Call) -> list[Tensor] | None:
    """The states of the first step, which may be marked too."""
    input, mask, lengths = call.input, call.reset_mask, call.lengths
    assert mask is not None
    if call.cell not in CELLS or input.dim() != 3 or mask.shape != input.shape[:2] or input.shape[0] == 0:
        return list(call.states or ())  # what is wrong with it is said elsewhere
    spec, resets = CELLS[call.cell], call.reset_states
    if resets:
        check_reset_states(spec, resets, widths(call.cell, *call.weights()), input)
    if call.states is not None and len(call.states) != len(spec.states):
        return list(call.states)
    if call.states is None and not resets:
        return None  # zeros, with or without
    marked = mask[0] if lengths is None else mask[0] & (lengths > 0)
    given = call.states or _zeros(call.cell, input, None, call.weights())
    if not resets:
        return [state.masked_fill(marked.unsqueeze(1), 0) for state in given]
    pairs = zip(given, resets, strict=True)
    return [torch.where(marked.unsqueeze(1), reset[0] if reset.dim() == 3 else reset, state) for state, reset in pairs]


def _zeros(cell: str, input: Tensor, batch_sizes: Tensor | None, weights: Weights) -> list[Tensor]:
    """Initial states."""
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return [input.new_zeros(batch, width) for width in widths(cell, *weights)]


def _shaped(results: Seq[Tensor], count: int, input: Tensor) -> tuple[Tensor, ...]:
    """Histories, which come last, in the input's shape."""
    return (*results[: 1 + count], *(t.view(*input.shape[:-1], t.shape[-1]) for t in results[1 + count :]))


def _torch_is_faster(call: Call) -> bool:
    cell, input, ih = call.cell, call.input, call.weight_ih
    if cell not in CELLS or call.batch_sizes is not None or input.dim() != 3 or torch.compiler.is_compiling() or ih is None:
        return False  # what is wrong with it is said elsewhere
    H = ih.shape[0] // CELLS[cell].input_gates
    return peer.is_faster(Sizes(CELLS[cell], call.reverse, input.shape[0], input.shape[1], H, H), input.dtype, input.device)


def _traceable(call: Call) -> tuple[Tensor, ...]:
    """The same through the registered op: for compilers, fake and meta tensors, and tensor subclasses."""
    if call.states is None and call.batch_sizes is not None:  # which alone says how many rows there are
        call = call.changed(states=_zeros(call.cell, call.input, call.batch_sizes, call.weights()))
    s = checked(call, is_listening())
    if is_listening():
        return noted(s, call, call.rows())
    if call.states is None:
        call = call.changed(states=[])
    results: list[Tensor] = torch.ops.rnnkernels.sequence(*call)
    n = len(s.cell.states)
    end = len(results) - (call.training and s.cell.moments > 0)
    histories = results[end - n + 1 : end] if call.return_states else []
    return _shaped([*results[: 1 + n], *histories], n, call.input)
