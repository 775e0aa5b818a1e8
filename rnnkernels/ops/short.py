"""Calls like one that was found to be as it must be: a short way to the kernels, in eager mode and under torch.compile."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from . import cpu, peer
from .autocast import keeps_dtype, no_autocast
from .autograd import Both, Sequence, repeated
from .calls import inference
from .cells import CELLS, NO_ROWS, Sizes, weights_of
from .checks import look_at, seen
from .explained import is_listening
from .packed import Packed, Remembered, keeping
from .repeat import Directions, Inference, Training
from .transforms import is_transformed


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
        if not keeps_dtype(cell, is_step):
            return None
        with no_autocast():
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
        output, final, _ = inference(s, packed, (steps, rows, six, NO_ROWS, (), ()))
    if packed is not None and packed.repeats.takes and cpu.thread.waiting is None:
        keeps = keeping(s, input, packed)
        if training and Training.fits(s):
            packed.repeats[key] = Training(engine, s, input, weights, packed)
        elif not training and keeps is not None:
            packed.repeats[key] = Inference(engine, keeps, input, weights)
    return final if is_step else (output, *(state[None] for state in final))


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
        if not keeps_dtype(cell, False):
            return None
        with no_autocast():
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
    if not torch.compiler.is_compiling():  # or one would be done before it shows that the other cannot be
        for k, reverse in enumerate((False, True)):
            if _seen(cell, input, states[k], weights[k], engine, recompute, reverse) is None:
                return None
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


def _may_repeat(input: Tensor) -> bool:
    """Whether a call without autocast may go straight to the CPU's kernels, as far as can be told before its sizes are looked at."""
    if is_transformed() or torch._C._is_tracing() or is_listening():
        return False
    return type(input) is Tensor and input.is_cpu


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
