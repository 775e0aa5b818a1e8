"""What autograd sees of a cell over a sequence in eager mode: one call forward, one back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from . import parts
from .cells import NO_ROWS, Rows, Sizes, Weights, dense, grouped
from .engines import RUNS
from .packed import Packed, Remembered
from .repeat import Training
from .transforms import gradients, is_legacy_batched, is_transformed

_ROWS = len(Rows._fields)


def _hooked() -> bool:
    """Whether somebody else may hold what is saved now."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None


def _last_use() -> bool:
    """Whether this backward is the saved values' last use: then gradients may be written over them."""
    keep_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keep_graph is not None and not keep_graph()


def differentiated_again(grads: Iterable[Tensor | None]) -> bool:
    """Whether gradients have to be made of what can be differentiated or transformed."""
    return torch.is_grad_enabled() or is_transformed() or any(map(is_legacy_batched, grads))


class Sequence(torch.autograd.Function):
    """A cell over a sequence, as autograd sees it. Use :func:`sequence`, which checks its arguments.

    ``apply(sizes, rows, input, *weights, *states, *given, *resets) -> (output, *final_states)``, with ``sizes.returns`` also the states
    beyond the first after each token, ``[N, H]`` each.
    Saves 5·H numbers a token for LSTM, 4·H for GRU and H for SRN, besides input and output; with ``sizes.recompute`` only the states.
    """

    @staticmethod
    def forward(ctx: Any, s: Sizes, rows: Rows, input: Tensor, *args: Tensor | None) -> Any:
        weights, states, given, resets = grouped(s, args)
        output, final, kept, history = RUNS[s.engine].forward(s, True, input, states, weights, rows, given, resets)
        _save(ctx, s, rows, input, output, kept, weights, (*states, *history, *given, *resets))
        return (output, *final, *(history[: len(s.cell.states) - 1] if s.returns else []))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return (None, None, *_gradients(ctx, ctx.needs_input_grad[2:], *grads))


class Repeated(torch.autograd.Function):
    """That of a call that repeats one before: ``apply(known, keeper, input, *weights, *states) -> (output, *final_states)``, the latter
    ``[1, B, ·]``; of a cell's step, the states alone.
    """

    @staticmethod
    def forward(ctx: Any, known: Training, keeper: Packed | Remembered, input: Tensor, *args: Tensor | None) -> Any:
        weights, states, _, _ = grouped(known.sizes, args)
        output, final, kept, history = known.forward(input, states, weights, keeper)
        _save(ctx, known.sizes, NO_ROWS, input, output, kept, weights, (*states, *history), known)
        return tuple(final) if known.is_step else (output, *final)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        above = (None,) if ctx.known.is_step else ()
        return (None, None, *_gradients(ctx, ctx.needs_input_grad[2:], *above, *grads))


# What Function.apply does before looks for transforms, of which a call that repeats one is known to be none.
repeated: Any = super(torch.autograd.Function, Repeated).apply


def _save(
    ctx: Any,
    s: Sizes,
    rows: Rows,
    input: Tensor,
    output: Tensor,
    kept: Tensor | None,
    weights: Weights,
    others: Seq[Tensor],
    known: Training | None = None,
) -> None:
    ctx.sizes, ctx.own, ctx.known = s, not _hooked(), known
    ctx.set_materialize_grads(False)
    # Not needed for gradients, so whoever changes it is free to; a second derivative finds it here.
    ctx.bias_ih, ctx.bias_version = weights.bias_ih, None if weights.bias_ih is None else weights.bias_ih._version
    if not s.recompute:
        weights = weights._replace(bias_ih=None)
    ctx.save_for_backward(input, *rows, output, kept, *weights, *others)


def _gradients(ctx: Any, needs: Seq[bool], grad_output: Tensor | None, *others: Tensor | None) -> Seq[Tensor | None]:
    """Of the tensors that :class:`Sequence` takes; within a ``side_by_side`` they may be there only after it."""
    s: Sizes = ctx.sizes
    if grad_output is None and all(grad is None for grad in others):  # as after a second derivative, which reads the output's values alone
        return (None,) * len(needs)
    grad_final: Seq[Tensor | None] = others[: len(s.cell.states)]
    grad_history = others[len(s.cell.states) :]
    input, *saved = ctx.saved_tensors
    rows, (output, kept) = Rows(*saved[:_ROWS]), saved[_ROWS : _ROWS + 2]
    weights, rest, given, resets = grouped(s, saved[_ROWS + 2 :])
    # The rest are initial states, if there were any, and histories.
    n = len(rest) - len(s.cell.states) + 1 - (s.cell.moments > 0)
    overwrite = ctx.own and _last_use()
    grad_states = [grad_output, *grad_history]
    again = differentiated_again((*grad_states, *grad_final))
    known: Training | None = ctx.known
    if known is not None and not again:
        found = known.backward(needs, grad_output, grad_final, input, rest[:n], weights, output, kept, rest[n:], overwrite)
        if found is not None:
            return found
        rest = [*map(dense, rest[:n]), *rest[n:]]  # as whoever goes the whole way has them

    def of_sequence(input: Tensor, output: Tensor, grad_final: Seq[Tensor | None]) -> Seq[Tensor | None]:
        if again:
            if ctx.bias_ih is not None and ctx.bias_ih._version != ctx.bias_version:
                raise RuntimeError("bias_ih: it was changed in place since forward, and a derivative of gradients needs it as it was")
            own = (*rows, input, *weights._replace(bias_ih=ctx.bias_ih), *rest[:n], *given, *resets)
            return gradients(s, needs, own, (output, kept, *rest[n:]), grad_states, grad_final)
        if kept is None and parts.fits(s, rows):
            return parts.backward(s, needs, grad_states, grad_final, input, rest[:n], weights, output, rest[n:], given)
        grads: list[Tensor | None]
        made = (output, kept, rest[n:])
        grads, _ = RUNS[s.engine].backward(
            s, needs, grad_states, grad_final, input, rest[:n], weights, rows, *made, given, resets, overwrite
        )
        return grads

    if known is not None and known.is_step:
        of_input, *of_others = of_sequence(input[None], output[None], grad_final)
        return [of_input if of_input is None else of_input.squeeze(0), *of_others]
    return of_sequence(input, output, grad_final if known is None else [None if g is None else g.squeeze(0) for g in grad_final])


class _Half:
    """What :class:`Sequence` finds in the place of autograd's context where two calls are one."""

    sizes: Sizes
    saved_tensors: tuple[Tensor | None, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """As the whole has it."""


class Both(torch.autograd.Function):
    """Two calls of :class:`Sequence` for the same engine, side by side: ``apply((sizes, rows, tensors), (sizes, rows), *tensors)``, the
    first's tensors so many, -> the results of both.
    """

    @staticmethod
    def forward(ctx: Any, one: tuple[Sizes, Rows, int], other: tuple[Sizes, Rows], *tensors: Any) -> Any:
        (s, rows, count), halves = one, (_Half(), _Half())
        with RUNS[s.engine].side_by_side():
            first = Sequence.forward(halves[0], s, rows, *tensors[:count])
            results = (*first, *Sequence.forward(halves[1], *other, *tensors[count:]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*halves[0].saved_tensors, *halves[1].saved_tensors)
        ctx.counts = count, len(halves[0].saved_tensors), len(first)
        for half in halves:
            del half.saved_tensors
        ctx.halves = halves
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (count, saved, results), (one, other) = ctx.counts, ctx.halves
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[2:]
        one.saved_tensors, other.saved_tensors = tensors[:saved], tensors[saved:]
        again = differentiated_again(grads)
        with contextlib.nullcontext() if again else RUNS[one.sizes.engine].side_by_side():
            first = _gradients(one, needs[:count], *grads[:results])
            second = _gradients(other, needs[count:], *grads[results:])
        del one.saved_tensors, other.saved_tensors
        return (None, None, *first, *second)
