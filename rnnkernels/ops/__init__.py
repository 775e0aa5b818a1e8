"""One cell over one sequence: argument checks, memory, autograd and the torch.library ops. The only door to the compiled module.

:func:`sequence` is what layers are made of. In eager mode it goes through :class:`Sequence`, an ``autograd.Function``; under torch.func
through those of ``transforms.py``, whose rules are made of themselves; under ``torch.compile``, ``torch.export``, on meta and fake tensors
through the ops of ``registered.py``. All run the same code.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import cells, peer, tangents, traced
from . import cpu as cpu
from . import parts as parts
from . import registered as registered
from .autograd import Both, Sequence, repeated
from .cells import CELLS, NO_ROWS, STORAGE, Cell, Rows, Sizes, Weights, before_each_step, dense, grouped, weights_of
from .checks import (
    Call,
    check_lengths,
    check_reset_mask,
    check_reset_states,
    checked,
    checked_once,
    forget_seen,
    look_at,
    seen,
    widths,
)
from .engines import ENGINES, RUNS, cuts_natively
from .explained import is_listening, listening, noted
from .load import compile_for, heats, is_modified, load_page, modified, source_of
from .packed import Packed, Remembered, keeping, weight_type
from .packed import check as check_packed
from .repeat import Directions, Inference, Training
from .transforms import Forward, is_batched, is_forward_mode, is_transformed

__all__ = [
    "CELLS",
    "ENGINES",
    "Call",
    "Cell",
    "Packed",
    "Remembered",
    "Sequence",
    "Weights",
    "again",
    "before_each_step",
    "before_each_token",
    "build_info",
    "chain_gains",
    "check_lengths",
    "check_reset_mask",
    "cuts_natively",
    "heats",
    "is_modified",
    "layer_again",
    "listening",
    "load_page",
    "modified",
    "pair",
    "run",
    "sequence",
    "set_isa",
    "source_of",
    "weight_type",
    "widths",
]

_GRU = re.compile("gru(_candidate|_layer_norm|_gate_norm|_zoneout|_grad_clip|_dropout)*")
_LSTM = re.compile("lstm(_.*)?")


def build_info() -> dict[str, Any]:
    """How the compiled module was built and what it runs on: version, compiler, isas, isa, supported, cuda."""
    return {**_C.build(), "isa": _C.isa(), "supported": _C.supported_isas()}


def set_isa(name: str | None) -> None:
    """Choose the instruction set (``"avx512bf16"``, ``"avx512"``, ``"avx2"``, ``"scalar"``; ``None``: the best there is), not while a
    kernel runs elsewhere.

    Raises ``ValueError`` for one that this processor or build does not have. The variable ``RNNKERNELS_ISA`` does the same at start.
    """
    _C.set_isa(name or "")
    forget_seen()
    cpu.forget()


def before_each_token(cell: Cell, after: Tensor, initial: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """A state before each token of a ragged batch, ``[N, ·]``, from that after each."""
    width = after.shape[1]
    return cells.before_each_token(Sizes(cell, reverse, len(batch_sizes), initial.shape[0], width, width), after, initial, batch_sizes)


def _keeps_dtype(cell: str, is_step: bool) -> bool:
    """Whether autocast is on on the CPU and leaves a cell the dtype of its state, as torch.nn's GRU and, a step at a time, its LSTM."""
    return torch.is_autocast_enabled("cpu") and bool(_GRU.fullmatch(cell) or (is_step and _LSTM.fullmatch(cell)))


def _autocast(call: Call, packed: Packed | None, is_step: bool) -> Call:
    """As torch.nn."""
    place, weights = call.input.device.type, call.weights()
    if place == "cpu" and _keeps_dtype(call.cell, is_step):
        dtype = (call.states[-1] if call.states else call.input).dtype  # of an LSTM c's
    else:
        dtype = torch.get_autocast_dtype(place)
    if packed is not None and any(t is not None and t.dtype not in (dtype, torch.float64) for t in weights):
        raise RuntimeError(f"weight_dtype: expected None where autocast makes the weights {dtype}, got {packed.weight_dtype}")

    def cast(t: Any) -> Any:
        return t if t is None or t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype)

    states = None if call.states is None else [cast(t) for t in call.states]
    given, resets = [cast(t) for t in call.given], [cast(t) for t in call.reset_states]
    ih, hh, bias_ih, bias_hh, hr, v = [cast(w) for w in weights]
    call = call.changed(input=cast(call.input), states=states, given=given, reset_states=resets)
    return call.changed(weight_ih=ih, weight_hh=hh, bias_ih=bias_ih, bias_hh=bias_hh, weight_hr=hr, weight_v=v)


def sequence(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    weight_v: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_states: Seq[Tensor] | None = None,
    units: Tensor | None = None,
    module: int = 0,
    given: Seq[Tensor] = (),
    reverse: bool = False,
    engine: str = "auto",
    recompute: bool = False,
    return_states: bool = False,
    packed: Packed | Remembered | None = None,
) -> tuple[Tensor, ...]:
    """Run ``cell`` over a sequence in one direction.

    Args:
        cell: a name of :data:`CELLS`, for instance ``"lstm"``, ``"gru"``, ``"srn_tanh"``; the equations: :mod:`rnnkernels.reference`.
        input: ``[T, B, I]``, or with ``batch_sizes`` ``[N, I]``, the tokens step by step as in a ``PackedSequence``; float32, float64,
            bfloat16 or float16.
        states: one tensor a state before the first step, ``h [B, P]`` and for LSTM ``c [B, H]``; None: zeros.
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr: as in torch.nn: ``[gates·H, I]``, ``[gates·H, P]``, ``[gates·H]``,
            ``[gates·H]``, ``[P, H]``. weight_hh is None for a cell without a matrix, weight_hr for one without a projection, weight_ih for
            one that the input does not feed, whose input then only says how many steps and rows there are.
        weight_v: ``[vectors·H]``, for cells that multiply a state by a number a unit (peephole LSTM, IndRNN), None for others. The last
            blocks are those that nothing learns, thresholds of clipping, in the order of ``CELLS[cell].fixed``: their gradient is zero.
        batch_sizes: how many rows take part in each step, non-increasing, on the CPU.
        lengths: ``[B]``, int64 on the CPU, from 0 to T in any order: how many steps each row of a padded batch has. Results past them are
            zero; a row's final state is that after its own last step, with which ``reverse`` starts.
        reset_mask: ``[T, B]``, booleans on the CPU: the state that the marked step would take over from the one before it (with
            ``reverse``, that one from the marked one) is replaced, and nothing flows across.
        reset_states: by what, a tensor a state, ``[B, ·]`` for each row, ``[T, B, ·]`` by the token that is marked, or ``[·]`` for all;
            None: zeros. Gradients flow into them.
        units, module: ``[T]``, int64 on the CPU, for simple recurrent networks (Koutník 2014): only the units below ``units[t]`` take part
            in step t, the others keep their state; unit u reads only units from the start of its own block of ``module`` units on.
        given: for cells with slots that the caller feeds (masks, gates made elsewhere), tensors that have them side by side, ``k·H`` wide
            for k slots: ``[T, B, k·H]`` (``[N, k·H]``) for each token, ``[B, k·H]`` for each row, or ``[k·H]`` for all. Gradients flow into
            them, but for masks.
        reverse: run from the last step (a ragged row's own last step) to the first. The output keeps the input's order.
        engine: ``"auto"``; ``"cpu"``; ``"stepwise"``, a product by torch and one run of the cell a step, on any device; ``"persistent"``,
            the whole sequence in one launch on a GPU, where the weights fit; its float32 is exact, or TF32 where
            ``torch.backends.cuda.matmul.allow_tf32`` says so; ``"persistent_3xtf32"``, the same with float32 by three TF32 products on
            tensor cores, nearly as exact; ``"torch"``, torch.nn's own function (cuDNN on a GPU), for the cells it has. "auto" never takes
            it but where a table in ``ops/peer.py`` says that it is faster; ``"traced"``, the cell's operations one by one by torch, slow,
            on any device. Forward-mode and second derivatives of torch.nn's cells are kernels' too, of others the traced engine's.
        recompute: save the states alone for backward, which then makes the rest anew: less memory, more work.
        return_states: return the states beyond the first after each step too.
        packed: where the CPU engine keeps this cell's weights packed from call to call, and how narrow; for eager calls without gradients.

    Returns:
        ``(output, *final_states)``, the output ``[T, B, P]`` or ``[N, P]``; with ``return_states`` also ``c`` and the like after each step,
        ``[T, B, H]`` or ``[N, H]``.

    Raises:
        ValueError: an unknown cell or engine. RuntimeError: a tensor of the wrong rank, size, dtype or device, or an engine that cannot run
            it; the text names it and says why.

    >>> x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
    >>> y, h_n = sequence("gru", x, [h], torch.randn(12, 3), torch.randn(12, 4))
    >>> y.shape, torch.equal(y[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v)
    rows = Rows(batch_sizes, lengths, reset_mask, units)
    call = Call(cell, input, states, *weights, *rows, given, reset_states or (), module, reverse, engine, recompute, return_states)
    return run(call, packed)


def run(call: Call, packed: Packed | Remembered | None = None, is_step: bool = False) -> tuple[Tensor, ...]:
    """:func:`sequence` of its arguments as one value. ``is_step``: it is the step of a cell, to which autocast does something else."""
    found = _begun(call, packed, is_step)
    if not isinstance(found, _Eager):
        return found
    return noted(found.s, found.call, found.rows, packed) if is_listening() else found.finished()


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    """On the CPU, where it is on. ``torch.autocast(enabled=False)`` takes longer than a step."""
    torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cpu", True)


def _may_repeat(input: Tensor) -> bool:
    """Whether a call without autocast may go straight to the CPU's kernels, as far as can be told before its sizes are looked at."""
    if is_transformed() or torch._C._is_tracing() or is_listening():
        return False
    return type(input) is Tensor and input.is_cpu


def again(
    cell: str,
    input: Tensor,
    states: Seq[Tensor],
    weights: Seq[Tensor | None],
    engine: str = "auto",
    recompute: bool = False,
    packed: Packed | Remembered | None = None,
    reverse: bool = False,
) -> Seq[Tensor] | None:
    """:func:`sequence` of a padded batch on the CPU, if a call of the same shapes was found to be as it must be; or None, and somebody has
    to look at this one. States, none for zeros, and final states are ``[1, B, ·]``; of a cell's step of an input ``[B, I]`` they are
    ``[B, ·]``, and all there is. Of a small layer's call the way to the kernel is the longer part.
    """
    if torch.compiler.is_compiling():
        return None if packed is not None else _compiled(cell, input, states, weights, engine, recompute, reverse)
    is_step = input.dim() == 2
    if torch._C._is_any_autocast_enabled():
        if not _keeps_dtype(cell, is_step):
            return None
        with _no_autocast():
            return again(cell, input, states, weights, engine, recompute, packed, reverse)
    if not _may_repeat(input):
        return None
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*weights, input, *states))
    if training and cell in peer.STEPS and engine == "auto" and not recompute and (is_step or input.shape[0] == 1):
        hh, wide = weights[1], packed is None or packed.weight_dtype is None
        if wide and hh is not None and peer.steps_faster(cell, input, hh.shape[-1]):
            return _step_by_torch(cell, input, states, weights)
    key = input.shape, training, recompute, False
    known = None if packed is None else packed.repeats.get(key)
    if known is not None and packed is not None and known.is_repeated(cell, engine, input, weights, states):
        found: tuple[Tensor, ...]
        if not training:
            found = known.results(input, weights, states, packed)
        else:
            rows = states if is_step else [state[0] for state in states]
            found = repeated(known, packed, input, *weights_of(weights), *rows)
        return found
    s = _seen(cell, input, states, weights, engine, recompute, reverse)
    if s is None or (packed is not None and packed.weight_dtype is not None and (training or s.engine != "cpu")):
        return None
    six, rows, steps = weights_of(weights), states if is_step else [state[0] for state in states], input[None] if is_step else input
    if training:
        output, *final = Sequence.apply(s, NO_ROWS, steps, *six, *rows)  # type: ignore[no-untyped-call]
    else:
        output, final, _ = _inference(s, packed, (steps, rows, six, NO_ROWS, (), ()))
    if packed is not None and packed.repeats.takes and cpu.thread.waiting is None:
        keeps = keeping(s, input, packed)
        if training and Training.fits(s):
            packed.repeats[key] = Training(engine, s, input, weights, packed)
        elif not training and keeps is not None:
            packed.repeats[key] = Inference(engine, keeps, input, weights)
    return final if is_step else (output, *(state[None] for state in final))


def _compiled(
    cell: str, input: Tensor, states: Seq[Tensor], weights: Seq[Tensor | None], engine: str, recompute: bool, reverse: bool
) -> Seq[Tensor] | None:
    """:func:`again` of a sequence while torch.compile looks. Of what is read here it looks at each call whether that still holds; so little
    is read, and the operator sees to the rest.
    """
    dtype, device = input.dtype, input.device
    if engine in ("torch", "traced") or is_transformed() or torch._C._is_any_autocast_enabled() or input.shape[0] == 0:
        return None
    needs_grad = input.requires_grad
    for t in (*weights, *states):
        if t is not None:
            if t.dtype != dtype or t.device != device:
                return None
            needs_grad = needs_grad or t.requires_grad
    six, rows = [*weights, *[None] * (6 - len(weights))], [state[0] for state in states]
    training, around = needs_grad and torch.is_grad_enabled(), [None] * 4
    found = torch.ops.rnnkernels.sequence(cell, input, rows, *six, *around, [], [], 0, reverse, engine, recompute, False, training)
    return found[0], *[state[None] for state in found[1 : 1 + len(CELLS[cell].states)]]


def layer_again(
    cell: str,
    input: Tensor,
    states: Seq[Seq[Tensor]],
    weights: Seq[Seq[Tensor | None]],
    engine: str,
    recompute: bool,
    packed: Seq[Packed | Remembered] | None,
) -> Seq[Seq[Tensor]] | None:
    """:func:`again` of a layer's one direction or both."""
    if len(weights) == 1:
        one = again(cell, input, states[0], weights[0], engine, recompute, None if packed is None else packed[0])
        return None if one is None else [one]
    if torch.compiler.is_compiling():
        return _in_turn(cell, input, states, weights, engine, recompute, packed)
    if torch._C._is_any_autocast_enabled():
        if not _keeps_dtype(cell, False):
            return None
        with _no_autocast():
            return layer_again(cell, input, states, weights, engine, recompute, packed)
    if packed is None or cpu.thread.waiting is not None or not _may_repeat(input):
        return None
    leaves = (*weights[0], *weights[1], input, *states[0], *states[1])
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    if training and packed[0].weight_dtype is not None:
        return None
    key, repeats = (input.shape, training, recompute, True), packed[0].repeats
    known = repeats.get(key)
    if known is None or not known.is_repeated(cell, engine, input, weights, states):
        sizes = list[Sizes]()
        for initial, own, place, reverse in zip(states, weights, packed, (False, True), strict=True):
            s = _seen(cell, input, initial, own, engine, recompute, reverse)
            s = s if s is None or training else keeping(s, input, place)
            if s is None or s.engine != "cpu" or not repeats.takes:
                return None
            sizes.append(s)
        known = repeats[key] = Directions(engine, sizes, input, weights, training)
        if not known.is_repeated(cell, engine, input, weights, states):
            return None
    if not training:
        found: Seq[Seq[Tensor]] = known.results(input, weights, states, packed)
        return found
    if known.beside:
        return _beside(cell, input, states, weights, engine, recompute)
    return _in_turn(cell, input, states, weights, engine, recompute, packed)


def _in_turn(
    cell: str,
    input: Tensor,
    states: Seq[Seq[Tensor]],
    weights: Seq[Seq[Tensor | None]],
    engine: str,
    recompute: bool,
    packed: Seq[Packed | Remembered] | None,
) -> Seq[Seq[Tensor]] | None:
    """:func:`again` of both directions, one after the other."""
    both: list[Seq[Tensor]] = []
    for k, reverse in enumerate((False, True)):
        one = again(cell, input, states[k], weights[k], engine, recompute, None if packed is None else packed[k], reverse)
        if one is None:
            return None
        both.append(one)
    return both


def _beside(
    cell: str, input: Tensor, states: Seq[Seq[Tensor]], weights: Seq[Seq[Tensor | None]], engine: str, recompute: bool
) -> Seq[Seq[Tensor]] | None:
    """Both directions with gradients, as :func:`pair` runs them."""
    sizes, tensors = list[Sizes](), list[list[Tensor | None]]()
    for initial, own, reverse in zip(states, weights, (False, True), strict=True):
        s = _seen(cell, input, initial, own, engine, recompute, reverse)
        of_call = [input, *weights_of(own), *(state[0] for state in initial)]
        if s is None or s.engine != "cpu" or not any(t is not None and t.requires_grad for t in of_call):
            return None
        sizes.append(s)
        tensors.append(of_call)
    results = Both.apply((sizes[0], NO_ROWS, len(tensors[0])), (sizes[1], NO_ROWS), *tensors[0], *tensors[1])  # type: ignore[no-untyped-call]
    half = len(results) // 2
    return [(output, *(state[None] for state in finals)) for output, *finals in (results[:half], results[half:])]


def _seen(
    cell: str, input: Tensor, states: Seq[Tensor], weights: Seq[Tensor | None], engine: str, recompute: bool, reverse: bool
) -> Sizes | None:
    """The sizes of a call, as :func:`again` takes it, if one like it was found to be as it must be."""
    is_step = input.dim() == 2
    if any(state.dim() != input.dim() or not (is_step or state.shape[0] == 1) for state in states):
        return None
    rows = states if is_step else [state[0] for state in states]
    look = look_at((input[None] if is_step else input, *weights_of(weights), *rows), input.dtype)
    if not (look.plain and look.alike and look.dense):
        return None
    return seen(cell, input.dtype, len(rows), engine, recompute, look, reverse)


def _step_by_torch(cell: str, input: Tensor, states: Seq[Tensor], weights: Seq[Tensor | None]) -> Seq[Tensor] | None:
    """As :func:`again`, if all is as it must be."""
    x, rows = (input, states) if input.dim() == 2 else (input[0], [state.squeeze(0) for state in states])
    ih, hh, *biases = weights
    if ih is None or hh is None or len(biases) > 2:
        return None
    dtype, H, (B, I) = input.dtype, hh.shape[-1], x.shape  # noqa: E741
    if ih.shape != (H, I) or hh.shape != (H, H):
        return None
    for bias in biases:
        if bias is not None and bias.shape != (H,):
            return None
    for state in rows:
        if state.shape != (B, H):
            return None
    for t in (ih, hh, *biases, *rows):
        if t is not None and (t.dtype is not dtype or not t.is_cpu):
            return None
    state = peer.step(cell, x, rows, weights)
    return (state,) if input.dim() == 2 else (state[None], state.clone()[None])


# Input, states, weights, rows, given, resets, as engines take them.
_Arguments = tuple[Tensor, Seq[Tensor], Weights, Rows, Seq[Tensor], Seq[Tensor]]


def _inference(s: Sizes, packed: Packed | Remembered | None, arguments: _Arguments) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> output, final states, histories"""
    keeps = keeping(s, arguments[0], packed)
    if keeps is None:
        output, final, _, history = RUNS[s.engine].forward(s, False, *arguments)
    else:
        output, final, _, history = cpu.forward(keeps, False, *arguments, packed)
    return output, final, history


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
    compile_for(_C.isa(), cell)
    s = Sizes(spec, False, input.shape[0], input.shape[1], above.shape[0] // spec.input_gates, above.shape[1])
    return cpu.gains_chained(s, input.dtype, input.shape[2], len(weights), torch.get_num_threads())


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
        output, final, history = _inference(s, self.packed, (input, states, weights, self.rows, given, resets))
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
        call = _autocast(call, asked, is_step)
        input, weights = call.input, call.weights()
    if call.return_states and engine == "torch" and call.cell in CELLS and len(CELLS[call.cell].states) > 1:
        raise RuntimeError("return_states: torch.nn's functions do not give them; choose another engine")
    if engine == "torch" or (engine == "auto" and input.is_cuda and not call.return_states and _torch_is_faster(call)):
        s = checked(call.changed(engine="torch"), not torch.compiler.is_compiling())
        if is_listening():
            return noted(s._replace(engine="torch"), call, call.rows())
        # torch.nn's LSTM over a sequence would be cast; its GRU, and what autocast makes of that one's products, is torch's own affair.
        kept = is_step and input.is_cpu and torch.is_autocast_enabled("cpu") and _LSTM.fullmatch(call.cell)
        with _no_autocast() if kept else contextlib.nullcontext():
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
