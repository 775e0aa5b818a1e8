"""The same code as operators of torch.library: for torch.compile, torch.export, fake and meta tensors, and tensor subclasses."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .cells import CELLS, NO_ROWS, Rows, Sizes, Weights, dense, grad_shapes, number, parted
from .checks import Call, checked, checked_once, expect, hidden_size, look_at, widths
from .engines import RUNS
from .packed import Remembered, keeping
from .repeat import Inference, Training
from .transforms import Fold, Leaves, apart, one_sample, stacked

_COUNT = len(Weights._fields)

_library: Any = torch.library.Library("rnnkernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "sequence(str cell, Tensor input, Tensor[]? states, Tensor? weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? weight_v, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? units, Tensor[]? given,"
    " Tensor[]? reset_states, int module, bool reverse, str engine, bool recompute, bool return_states, bool training) -> Tensor[]"
)
_library.define(
    "sequence_backward(str cell, Tensor input, Tensor[]? states, Tensor? weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? weight_v, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? units, Tensor[]? given,"
    " Tensor[]? reset_states, int module, bool reverse, str engine, bool recompute, bool return_states, bool training, bool[] needs,"
    " Tensor?[] grad_states, Tensor?[] grad_final, Tensor output, Tensor? kept, Tensor[] history) -> Tensor[]"
)


def _call(args: Seq[Any]) -> Call:
    """The op's arguments. AOTInductor has None for an empty list."""
    cell, input, states, *rest = args[: len(Call._fields)]
    call = Call(cell, input, states or None, *rest)
    if call.given is None or call.reset_states is None:
        call = call._replace(given=call.given or (), reset_states=call.reset_states or ())
    return call


# What is known of calls that may repeat, for each cell and direction, by the first of the weights: a module's stay, those that are made
# for one call never come twice.
_known: Any = WeakTensorKeyDictionary()


def _place(call: Call) -> Remembered | None:
    """Where what is known of calls with these weights is, if this one may repeat one before."""
    weight = call.weight_hh if call.weight_ih is None else call.weight_ih
    if call.rows() is not NO_ROWS or call.given or call.recompute or call.return_states or weight is None or not call.input.is_cpu:
        return None
    if torch._C._is_any_autocast_enabled():  # of which a step's products by torch would hear
        return None
    own = _known.get(weight)
    if own is None:
        _known[weight] = {}
        return None
    found: Remembered = own.setdefault((call.cell, call.reverse), Remembered())
    return found


def _remember(place: Remembered, key: Any, call: Call, s: Sizes, dense_ones: bool) -> None:
    if not place.repeats.takes or s.engine != "cpu" or not dense_ones:
        return
    if not call.training:
        keeps = keeping(s, call.input, place)
        if keeps is not None:
            place.repeats[key] = Inference(call.engine, keeps, call.input, call.weights(), of_operator=True)
    elif Training.fits(s):
        place.repeats[key] = Training(call.engine, s, call.input, call.weights(), place, of_operator=True)


def _clear_unused(kept: Tensor, s: Sizes) -> None:
    """Places that forward does not fill: an op's results are the same each time."""
    if s.cell.kept < s.cell.room:
        kept[:, s.cell.kept * s.hidden :].zero_()


def _op_forward(*args: Any) -> list[Tensor]:
    """output, final states, for training the kept values, if not to be recomputed, and, if asked for too, the other states' histories; for
    training moments, of a cell that has them
    """
    call = _call(args)
    weights, initial = call.weights(), call.states or ()
    place, key = _place(call), (call.input.shape, call.training, False, False)
    known = None if place is None else place.repeats.get(key)
    if place is not None and known is not None and known.is_repeated(call.cell, call.engine, call.input, weights, initial):
        if not call.training:
            return list(known.results(call.input, weights, initial, place))
        output, final, kept, history = known.forward(call.input, initial, weights, place)
        _clear_unused(kept, known.sizes)
        return [output, *final, kept, *history]
    look = look_at((call.input, *weights, *initial, *call.given, *call.reset_states), call.input.dtype)
    s = checked_once(call, look)
    if place is not None:
        _remember(place, key, call, s, look.plain and look.alike and look.dense)
    states, given, resets = ([dense(t) for t in tensors] for tensors in (call.states or (), call.given, call.reset_states))
    run = RUNS[s.engine].forward(s, call.training, call.input, states, weights.dense(), call.rows(), given, resets)
    output, final, kept, history = run
    if kept is not None:
        _clear_unused(kept, s)
    if call.lengths is not None and s.steps * s.batch:
        past = (torch.arange(s.steps).unsqueeze(1) >= call.lengths).flatten()
        for t in [kept, *history[len(s.cell.states) - 1 :]]:
            if t is not None:
                t[past] = 0
    if call.units is not None and kept is not None:
        past = torch.arange(s.hidden) >= call.units.unsqueeze(1)
        kept.view(s.steps, s.batch, s.hidden).masked_fill_(past.unsqueeze(1), 0)
    return [output, *final, *([] if kept is None else [kept]), *history]


def _op_forward_fake(*args: Any) -> list[Tensor]:
    call = _call(args)
    s, input = checked(call, False), call.input
    spec, H = s.cell, s.hidden
    N = input.shape[0] if call.batch_sizes is not None else input.shape[0] * input.shape[1]
    results = [input.new_empty(*input.shape[:-1], s.output), *(input.new_empty(s.batch, width) for width in s.widths)]
    if call.training and not call.recompute:
        results.append(input.new_empty(N, spec.room * H))
    if call.training or call.return_states:
        results += [input.new_empty(N, H) for _ in spec.states[1:]]
    if call.training and spec.moments:
        results.append(input.new_empty(N, spec.moments, dtype=number(input.dtype)))
    return results


class Back(NamedTuple):
    """What the backward op takes beyond a call's arguments."""

    needs: Seq[bool]
    grad_states: Seq[Tensor | None]
    grad_final: Seq[Tensor | None]
    output: Tensor
    kept: Tensor | None
    history: Seq[Tensor]


def _repeated_backward(call: Call, back: Back) -> list[Tensor | None] | None:
    """Of a call that repeats one before; or None, and it has to be looked at."""
    input, states, weights = call.input, call.states or (), call.weights()
    place = _place(call)
    known = None if place is None else place.repeats.get((input.shape, True, False, False))
    if known is None or back.kept is None or len(back.needs) != 1 + _COUNT + len(states):
        return None
    if not back.grad_states or any(grad is not None for grad in back.grad_states[1:]):
        return None
    above, left = back.grad_states[0], (back.output, back.kept, back.history)
    if not known.is_followed(call.cell, call.engine, input, weights, states, *left, above, back.grad_final):
        return None
    found: list[Tensor | None] | None = known.backward(back.needs, above, back.grad_final, input, states, weights, *left, False)
    return found


def _op_backward(*args: Any) -> list[Tensor]:
    """Gradients in the order of `needs`; an empty tensor where none is needed."""
    call, back = _call(args), Back(*args[len(Call._fields) :])
    input, states, output, kept, history = call.input, call.states or (), back.output, back.kept, back.history
    repeated = _repeated_backward(call, back)
    if repeated is not None:
        return [input.new_empty(0) if grad is None else grad for grad in repeated]
    s = checked(call, True)
    N = s.steps * s.batch if call.batch_sizes is None else input.shape[0]
    others, n = len(call.given) + len(call.reset_states), len(s.cell.states)
    counts = (1 + _COUNT + len(states) + others, n, n - 1 + (s.cell.moments > 0))
    if (len(back.needs), len(back.grad_final), len(history)) != counts or not 1 <= len(back.grad_states) <= n:
        raise RuntimeError("needs, grad_final, history: expected {}, {}, {} of them".format(*counts))
    expect("output", output, (*input.shape[:-1], s.output), input)
    if kept is not None:
        expect("kept", kept, (N, s.cell.room * s.hidden), input)
    wide = [(N, s.hidden)] * (n - 1)
    if s.cell.moments and (history[-1].shape != (N, s.cell.moments) or history[-1].dtype != number(input.dtype)):
        raise RuntimeError(
            f"history: expected moments of shape {(N, s.cell.moments)}, got {tuple(history[-1].shape)} of {history[-1].dtype}"
        )
    for name, tensors, shapes in (
        ("grad_states", back.grad_states, [output.shape, *wide]),
        ("grad_final", back.grad_final, [(s.batch, width) for width in s.widths]),
        ("history", history[: len(wide)], wide),
    ):
        for tensor, shape in zip(tensors, shapes, strict=False):
            if tensor is not None:
                expect(name, tensor, shape, input)
    grads, _ = RUNS[s.engine].backward(
        s,
        back.needs,
        back.grad_states,
        back.grad_final,
        input,
        [dense(state) for state in states],
        call.weights().dense(),
        call.rows(),
        dense(output),
        None if kept is None else dense(kept),
        [dense(h) for h in history],
        [dense(t) for t in call.given],
        [dense(t) for t in call.reset_states],
        False,
    )
    # An op's results are memory of their own, and a given number's gradient lies among the gates'.
    first = counts[0] - others
    return [input.new_empty(0) if grad is None else grad if i < first else dense(grad) for i, grad in enumerate(grads)]


def _op_backward_fake(*args: Any) -> list[Tensor]:
    call, needs = _call(args), args[len(Call._fields)]
    s = Sizes(CELLS[call.cell], call.reverse, 0, 0, hidden_size(CELLS[call.cell], call.weights()), 0)
    shapes = grad_shapes(s, call.input, call.weights())
    shapes += [t.shape for t in (*(call.states or ()), *call.given, *call.reset_states)]
    return [call.input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    call = _call(inputs)
    states, n = call.states or (), len(CELLS[call.cell].states)
    ctx.set_materialize_grads(False)  # or kept values would be given zeros as large as they are
    if call.training:
        kept, history = None if call.recompute else output[1 + n], output[(1 if call.recompute else 2) + n :]
        if not call.recompute:
            call = call._replace(bias_ih=None)
        leaves = (inputs[1], *inputs[3 : 3 + _COUNT], *states, *call.given, *call.reset_states)
        ctx.needs = [t is not None and t.requires_grad for t in leaves]
        ctx.from_zeros = inputs[2] is None
        ctx.counts = (len(states), len(call.given), len(call.reset_states), len(history))
        ctx.save_for_backward(call.input, *call[3:13], output[0], kept, *states, *call.given, *call.reset_states, *history)
    # Tensors are the context's to keep; the rest is not.
    ctx.call = call._replace(input=None, states=None, given=(), reset_states=(), **dict.fromkeys(Call._fields[3:13]))  # type: ignore[arg-type]


def _op_autograd(ctx: Any, grads: list[Tensor | None]) -> Any:
    if not ctx.call.training:
        raise RuntimeError("training: expected True for an op that is differentiated, got False")
    input, *saved = ctx.saved_tensors
    fields, (y, kept, *rest) = saved[:10], saved[10:]
    parts = []
    for count in ctx.counts:
        part, rest = rest[:count], rest[count:]
        parts.append(part)
    states, given, resets, history = parts
    n = len(CELLS[ctx.call.cell].states)
    end = len(grads) - (CELLS[ctx.call.cell].moments > 0)
    call = ctx.call._replace(
        input=input, states=states, given=given, reset_states=resets, **dict(zip(Call._fields[3:13], fields, strict=True))
    )
    grad_states = [grads[0], *grads[end - n + 1 : end]]
    results = torch.ops.rnnkernels.sequence_backward(*call, ctx.needs, grad_states, grads[1 : 1 + n], y, kept, history)
    needed = [grad if need else None for grad, need in zip(results, ctx.needs, strict=True)]
    input_grad, *of_weights = needed[: 1 + _COUNT]
    rest = needed[1 + _COUNT :]
    of_rest, of_resets = parted(rest, len(resets))
    of_states, of_given = parted(of_rest, len(given))
    none = [None] * (len(Rows._fields))
    return (
        None,
        input_grad,
        None if ctx.from_zeros else of_states,
        *of_weights,
        *none,
        of_given,
        of_resets,
        *[None] * (len(Call._fields) - 15),
    )


def _refuse_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise NotImplementedError("second derivatives through torch.compile or a tensor subclass are not supported: run eagerly")


def _samples_of(t: Any, dim: Any, i: int) -> Any:
    """Sample i of an argument, a tensor or a list of them."""
    if isinstance(t, list | tuple) and isinstance(dim, list | tuple):
        return [_samples_of(one, d, i) for one, d in zip(t, dim, strict=True)]
    return t if dim is None else t.select(dim, i)


def _in_a_loop(op: Any) -> Any:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results, dims = stacked([op(*(_samples_of(t, d, i) for t, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)])
        return list(results), list(dims)

    return rule


def _op_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """As :meth:`Forward.vmap`: one call with a larger batch, where the weights are the same."""
    call, dims = _call(args), Call(*in_dims[: len(Call._fields)])
    if not call.states:
        call, dims = call._replace(states=_zeros(call, dims)), dims._replace(states=None)
    leaves = _leaves(call)
    lists: dict[str, Any] = {name: _each(getattr(call, name), getattr(dims, name)) for name in ("states", "given", "reset_states")}
    at: Any = _leaves(dims._replace(**lists))
    if apart(at.flat):
        return _in_a_loop(torch.ops.rnnkernels.sequence)(info, in_dims, *args)
    samples = info.batch_size
    fold = Fold(samples, one_sample(leaves.states[0], at.states[0])[0], leaves, at)
    own = fold.leaves
    folded = call._replace(input=own.input, states=own.states, given=own.given, reset_states=own.resets)
    found = torch.ops.rnnkernels.sequence(
        *folded._replace(batch_sizes=own.rows.sizes, lengths=own.rows.lengths, reset_mask=own.rows.resets)
    )
    lead = [fold.row_dim, *[0] * (len(found) - 1)]
    return [torch.unflatten(t, d, (-1, samples)) for t, d in zip(found, lead, strict=True)], [d + 1 for d in lead]


def _zeros(call: Call, dims: Call) -> list[Tensor]:
    """Initial states of a sample of a padded batch."""
    x, *weights = (_samples_of(t, d, 0) for t, d in zip((call.input, *call.weights()), (dims.input, *dims.weights()), strict=True))
    return [x.new_zeros(x.shape[1], width) for width in widths(call.cell, *weights)]


def _each(tensors: Any, dims: Any) -> list[Any]:
    return list(dims) if isinstance(dims, list | tuple) else [None] * len(tensors or ())


def _leaves(call: Call) -> Leaves:
    rows = Rows(call.batch_sizes, call.lengths, call.reset_mask, call.units)
    return Leaves(rows, call.input, call.weights(), list(call.states or ()), list(call.given), list(call.reset_states))


for _name, _run, _fake in (("sequence", _op_forward, _op_forward_fake), ("sequence_backward", _op_backward, _op_backward_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"rnnkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("rnnkernels::sequence", _op_autograd, setup_context=_op_setup, lib=_library)
torch.library.register_autograd("rnnkernels::sequence_backward", _refuse_second_derivative, lib=_library)
torch.library.register_vmap("rnnkernels::sequence", _op_vmap, lib=_library)
torch.library.register_vmap("rnnkernels::sequence_backward", _in_a_loop(torch.ops.rnnkernels.sequence_backward), lib=_library)
