"""A cell over a sequence as torch.func and higher derivatives see it.

Forward and backward are functions of autograd in their own right, and their rules are made of themselves: under vmap calls with the same
weights are one call with a larger batch, those with weights of their own a call for each. Forward-mode derivatives are a call of the cell
of the tangents (``tangents.py``), and those of backward are the gradients of that one; for cells that have no such cell both are the traced
engine's, or torch.nn's own function's.

Samples lie side by side within each row: row b of sample n is row b · samples + n, in ragged batches too.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import peer, products, tangents, traced
from .cells import Rows, Sizes, Weights, before_each_step, before_each_token, dense, grouped, number, parted
from .checks import check_lengths
from .engines import RUNS

__all__ = [
    "Fold",
    "Forward",
    "Leaves",
    "apart",
    "gradients",
    "is_batched",
    "is_forward_mode",
    "is_legacy_batched",
    "is_transformed",
    "one_sample",
    "stacked",
]

_ROWS, _WEIGHTS = len(Rows._fields), len(Weights._fields)


def is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_forward_mode() -> bool:
    """Whether tangents may have to be carried along."""
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()  # here torch.compile breaks its graph, and what follows runs as it is
    return any(layer.key() == torch._C._functorch.TransformType.Jvp for layer in stack)


def is_batched(t: Tensor | None) -> bool:
    """Whether vmap has hidden a dimension of it, so that its values are not for Python to read."""
    while t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def is_legacy_batched(t: Any) -> bool:
    """Whether the vmap of ``torch.autograd.grad(…, is_grads_batched=True)`` did, which knows no rules of ours."""
    return t is not None and torch._C._functorch.is_legacy_batchedtensor(t)


def _in_plain_sight(f: Callable[..., tuple[Tensor, ...]], tensors: Seq[Any]) -> tuple[Tensor, ...]:
    """``f`` of tensors that the legacy vmap may have batched."""
    batched = [is_legacy_batched(t) for t in tensors]
    if not any(batched):
        return f(*tensors)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    plain = [torch._remove_batch_dim(t, level, 1, 0) if b else t for t, b in zip(tensors, batched, strict=True)]
    made = torch.func.vmap(f, tuple(0 if b else None for b in batched))(*plain)
    return tuple(torch._add_batch_dim(t, 0, level) for t in made)


class Leaves(NamedTuple):
    """What a call depends on; flat, in this order, without the lists' own brackets."""

    rows: Rows
    input: Tensor
    weights: Weights
    states: list[Tensor]
    given: list[Tensor]
    resets: list[Tensor]

    @staticmethod
    def of(s: Sizes, flat: Seq[Any]) -> Leaves:
        return Leaves(Rows(*flat[:_ROWS]), flat[_ROWS], *grouped(s, flat[_ROWS + 1 :]))

    @property
    def flat(self) -> tuple[Any, ...]:
        return (*self.rows, self.input, *self.weights, *self.states, *self.given, *self.resets)

    def dense(self) -> Leaves:
        lists = ([dense(t) for t in tensors] for tensors in (self.states, self.given, self.resets))
        rows = Rows(*(None if t is None else dense(t) for t in self.rows))
        return Leaves(rows, dense(self.input), self.weights.dense(), *lists)


def _histories(s: Sizes) -> int:
    return len(s.cell.states) - 1


class Forward(torch.autograd.Function):
    """``apply(sizes, *leaves) -> (output, *final_states, kept, *histories, *moments)``."""

    @staticmethod
    def forward(s: Sizes, *flat: Any) -> tuple[Tensor, ...]:
        leaves = Leaves.of(s, flat).dense()
        if leaves.rows.lengths is not None:  # what vmap hid from the caller
            check_lengths(leaves.rows.lengths, s.steps, s.batch)
        run = RUNS[s.engine].forward
        output, final, kept, history = run(s, True, leaves.input, leaves.states, leaves.weights, leaves.rows, leaves.given, leaves.resets)
        return (output, *final, kept, *history)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        s: Sizes = inputs[0]
        after = len(s.cell.states) + 1
        ctx.sizes = s
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[after], *output[after + 1 + _histories(s) :])
        ctx.save_for_backward(*inputs[1:], output[0], *output[after:])
        ctx.save_for_forward(*inputs[1:], output[0], *output[after:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        s: Sizes = ctx.sizes
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        n = len(s.cell.states)
        flat, made = parted(ctx.saved_tensors, _made(s))
        of_histories = grads[n + 2 : n + 2 + _histories(s)]
        grad_states = [grads[0], *(of_histories if any(grad is not None for grad in of_histories) else ())]
        needs = ctx.needs_input_grad[1 + _ROWS :]
        return (None, *[None] * _ROWS, *gradients(s, needs, flat, made, grad_states, grads[1 : 1 + n]))

    @staticmethod
    def jvp(ctx: Any, *args: Any) -> Any:
        s: Sizes = ctx.sizes
        flat, (output, _, *history) = parted(_primals(ctx.saved_tensors), _made(s))
        found = along(s, Leaves.of(s, flat), Leaves.of(s, args[1:]), [output, *history[: _histories(s)]])
        n = len(s.cell.states)
        return (*found[: 1 + n], None, *found[1 + n :], *[None] * (len(history) - _histories(s)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], s: Sizes, *flat: Any) -> Any:
        samples, dims = info.batch_size, in_dims[1:]
        if apart(dims):
            calls = [Forward.apply(s, *_select(flat, dims, i)) for i in range(samples)]  # type: ignore[no-untyped-call]
            return stacked(calls)
        fold = Fold(samples, s.batch, Leaves.of(s, flat), Leaves.of(s, dims))
        found = Forward.apply(s._replace(batch=s.batch * samples), *fold.leaves.flat)  # type: ignore[no-untyped-call]
        n = len(s.cell.states)
        lead = [fold.row_dim, *[0] * n, *[0] * (len(found) - 1 - n)]
        return tuple(torch.unflatten(t, d, (-1, samples)) for t, d in zip(found, lead, strict=True)), tuple(d + 1 for d in lead)


def _primals(tensors: Seq[Tensor | None]) -> list[Tensor | None]:
    """Of dual numbers. Within a rule tangents are not carried along, but transforms that the rule makes use of carry them again."""
    return [t if t is None else forward_ad.unpack_dual(t, level=0).primal for t in tensors]  # type: ignore[no-untyped-call]


def along(s: Sizes, leaves: Leaves, directions: Leaves, after: Seq[Tensor] | None = None) -> list[Tensor]:
    """The tangents of output, final states and histories along a direction, of which None is zero; ``after``: output and histories, if they
    are known.
    """
    s = s._replace(recompute=False)  # rules ask for what backward would make anew
    dtype, kind = leaves.input.dtype, number(leaves.input.dtype)
    if dtype is not kind:
        wide, way = (Leaves.of(s, [*t.rows, *(x if x is None else x.to(kind) for x in t.flat[_ROWS:])]) for t in (leaves, directions))
        return [t.to(dtype) for t in along(s, wide, way)]
    n = len(s.cell.states)
    if after is None:
        output, *rest = Forward.apply(s, *leaves.flat)  # type: ignore[no-untyped-call]
        after = [output, *rest[n + 1 : n + 1 + _histories(s)]]
    tokens, rows = leaves.input.shape[:-1], leaves.rows
    before = []
    for i, state in enumerate(after):
        first = leaves.states[i] if leaves.states else None
        if s.cut:
            first = leaves.input.new_zeros(s.batch, s.widths[i]) if first is None else first
            reset = leaves.resets[i] if leaves.resets else None
            steps = before_each_step(state.view(*tokens, s.widths[i]), first, s.reverse, rows.lengths, rows.resets, reset)
            before.append(steps.flatten(0, -2))
        else:
            before.append(before_each_token(s, state.flatten(0, -2), first, rows.sizes))
    x, x_tangent = (None if t is None else t.flatten(0, -2) for t in (leaves.input, directions.input))
    assert x is not None
    numbers = tangents.given(s, x, leaves.weights, before, x_tangent, directions.weights)
    own = Leaves(
        rows,
        leaves.input.new_empty(*tokens, 0),
        Weights(None, leaves.weights.hh, None, None, None, None),
        _or_zero(directions.states, leaves.states),
        [t.view(*tokens, t.shape[-1]) for t in numbers],
        _or_zero(directions.resets, leaves.resets),
    )
    output, *rest = Forward.apply(tangents.sizes_of(s, len(numbers), len(own.resets)), *own.flat)  # type: ignore[no-untyped-call]
    return [output, *rest[:n], *rest[n + 1 : n + 1 + _histories(s)]]


def _or_zero(tensors: Seq[Tensor | None], like: Seq[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if tensor is None else tensor for tensor, t in zip(tensors, like, strict=True)]


def apart(dims: Seq[Any]) -> bool:
    """Whether each sample needs a call of its own: its weights are its own, or which units take part."""
    weights = dims[_ROWS + 1 : _ROWS + 1 + _WEIGHTS]
    return any(d is not None for d in (*weights, dims[0], dims[_ROWS - 1]))


def stacked(calls: Seq[Seq[Tensor]]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The results of a call for each sample, as a rule of vmap gives them."""
    results = tuple(torch.stack(column) for column in zip(*calls, strict=True))
    return results, (0,) * len(results)


def one_sample(t: Tensor | None, dim: int | None) -> tuple[int, ...]:
    """The shape of one sample."""
    return () if t is None else tuple(n for i, n in enumerate(t.shape) if i != dim)


def _select(flat: Seq[Any], dims: Seq[Any], i: int) -> list[Any]:
    return [t if d is None else t.select(d, i) for t, d in zip(flat, dims, strict=True)]


class Fold:
    """A call for so many samples as one call, the samples side by side within the rows."""

    def __init__(self, samples: int, batch: int, leaves: Leaves, dims: Any) -> None:  # of the leaves, as they lie
        self.samples, self.ragged = samples, leaves.rows.sizes is not None
        self.row_dim = 0 if self.ragged else 1  # of a token's tensor, where its rows are
        self.tokens, self.batch = one_sample(leaves.input, dims.input)[:-1], batch
        r, d = leaves.rows, dims.rows
        rows = Rows(
            None if r.sizes is None else r.sizes * samples,
            self.of(r.lengths, d.lengths, 0),
            self.of(r.resets, d.resets, 1),
            r.units,
        )
        self.leaves = Leaves(
            rows,
            self.of(leaves.input, dims.input, self.row_dim),
            leaves.weights,
            [self.of(t, d, 0) for t, d in zip(leaves.states, dims.states, strict=True)],
            [self.numbers(t, d) for t, d in zip(leaves.given, dims.given, strict=True)],
            [self.numbers(t, d) for t, d in zip(leaves.resets, dims.resets, strict=True)],
        )

    def of(self, t: Any, dim: int | None, at: int) -> Any:
        """The tensor, if there is one, with each row's samples in dimension ``at``, which counts rows."""
        if t is None:
            return None
        if dim is None:
            shape = (*t.shape[: at + 1], self.samples, *t.shape[at + 1 :])
            return t.unsqueeze(at + 1).expand(shape).flatten(at, at + 1)
        return t.movedim(dim, at + 1).flatten(at, at + 1)

    def numbers(self, t: Tensor, dim: int | None) -> Tensor:
        """What is given for each token, each row, or all rows; the latter becomes each row's."""
        shape = one_sample(t, dim)
        if shape[:-1] == self.tokens:
            return self.of(t, dim, self.row_dim)  # type: ignore[no-any-return]
        if len(shape) == 1:
            t = t.expand(self.batch, -1) if dim is None else t.movedim(dim, 0).expand(self.batch, -1, -1)
            return self.of(t, None if dim is None else 1, 0)  # type: ignore[no-any-return]
        return self.of(t, dim, 0)  # type: ignore[no-any-return]

    def back(self, grad: Tensor, like: tuple[int, ...]) -> tuple[Tensor, int]:
        """A gradient of what was folded, of each sample, and the dimension where these are; ``like``: the shape of one sample's."""
        if len(like) == 1 and grad.dim() == 2:  # it was the same for all rows
            return torch.unflatten(grad, 0, (-1, self.samples)).sum(0), 0
        at = self.row_dim if tuple(like[:-1]) == self.tokens else 0
        return torch.unflatten(grad, at, (-1, self.samples)), at + 1


def gradients(
    s: Sizes,
    needs: Seq[bool],
    flat: Seq[Any],
    made: Seq[Any],
    grad_states: Seq[Tensor | None],
    grad_final: Seq[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that can be differentiated and transformed, in the order of ``needs``: of input, weights, states, given, resets, as far as
    they are wanted. ``flat``: the call's leaves; ``made``: output, kept, histories and moments.
    """
    wanted = tuple(bool(need and t is not None) for need, t in zip(needs, flat[_ROWS:], strict=True))

    def back(*upstream: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = Backward.apply(s, wanted, len(grad_states), *flat, *made, *upstream)  # type: ignore[no-untyped-call]
        return found

    found = iter(_in_plain_sight(back, (*grad_states, *grad_final)) if any(wanted) else ())
    return [next(found) if need else None for need in wanted]


class Backward(torch.autograd.Function):
    """``apply(sizes, needs, states with a gradient, *leaves, output, kept, *histories, *moments, *grad_states, *grad_final)`` -> the
    gradients that are needed.
    """

    @staticmethod
    def forward(s: Sizes, needs: tuple[bool, ...], count: int, *args: Any) -> tuple[Tensor, ...]:
        grads, _ = _run_back(s, needs, *_parts(s, count, args))
        return _present(needs, grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sizes, ctx.needs, ctx.count = inputs[:3]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[3:])
        ctx.save_for_forward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        leaves, made, grad_states, grad_final = _parts(ctx.sizes, ctx.count, ctx.saved_tensors)
        upstream, asked = (*grad_states, *grad_final), ctx.needs_input_grad[3 + _ROWS :]
        wanted = [*asked[: len(ctx.needs)], *asked[len(ctx.needs) + len(made) :]]
        cotangents: list[Any] = [None] * len(ctx.needs)
        for i, grad in zip((i for i, need in enumerate(ctx.needs) if need), grads, strict=True):
            cotangents[i] = grad
        second = _second(ctx.sizes, leaves, upstream, ctx.count, cotangents, wanted)
        return (*[None] * (3 + _ROWS), *second[: len(ctx.needs)], *[None] * len(made), *second[len(ctx.needs) :])

    @staticmethod
    def jvp(ctx: Any, *args: Any) -> Any:
        """The derivative of Jᵀ v: along a direction of what J depends on, and Jᵀ of v's own."""
        s, needs, count = ctx.sizes, ctx.needs, ctx.count
        leaves, made, grad_states, grad_final = _parts(s, count, _primals(ctx.saved_tensors))
        directions, _, *upstream_tangents = _parts(s, count, args[3:])
        upstream, along_it = (*grad_states, *grad_final), directions.flat[_ROWS:]
        of_leaves = _second(s, leaves, upstream, count, along_it, [*needs, *[False] * len(upstream)])
        of_upstream = gradients(s, needs, leaves.flat, made, *upstream_tangents)
        pairs = zip(of_leaves[: len(needs)], of_upstream, leaves.flat[_ROWS:], needs, strict=True)
        return tuple(_added(a, b, t) for a, b, t, need in pairs if need)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], s: Sizes, needs: tuple[bool, ...], count: int, *args: Any) -> Any:
        samples, dims = info.batch_size, in_dims[3:]
        of_weights = needs[1 : 1 + _WEIGHTS]
        # Where rows are cut, what a matrix multiplied is not for torch to find again; and what is to be differentiated once more must be
        # made of what can be.
        again = is_forward_mode() or (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args))
        if apart(dims) or again or (s.cut and any(of_weights)):
            calls = [Backward.apply(s, needs, count, *_select(args, dims, i)) for i in range(samples)]  # type: ignore[no-untyped-call]
            return stacked(calls)
        leaves, made, grad_states, grad_final = _parts(s, count, args)
        leaf_dims, made_dims, state_dims, final_dims = _parts(s, count, dims)
        fold, of_all = Fold(samples, s.batch, leaves, leaf_dims), s._replace(batch=s.batch * samples)
        at = [fold.row_dim, *[0] * (len(made) - 1)]
        folded = [fold.of(t, d, a) for t, d, a in zip(made, made_dims, at, strict=True)]
        # The gradients of histories, like these, have their tokens in a row.
        upstream = [fold.of(t, d, a) for t, d, a in zip(grad_states, state_dims, [fold.row_dim, *[0] * count], strict=False)]
        finals = [fold.of(t, d, 0) for t, d in zip(grad_final, final_dims, strict=True)]
        found = _Samples.apply(of_all, needs, count, samples, *fold.leaves.flat, *folded, *upstream, *finals)  # type: ignore[no-untyped-call]
        shapes = [one_sample(t, d) for t, d in zip(leaves.flat[_ROWS:], leaf_dims.flat[_ROWS:], strict=True)]
        at_need = [i for i, need in enumerate(needs) if need]
        each = [(grad, 0) if 1 <= i <= _WEIGHTS else fold.back(grad, shapes[i]) for i, grad in zip(at_need, found, strict=True)]
        return tuple(grad for grad, _ in each), tuple(dim for _, dim in each)


class _Samples(torch.autograd.Function):
    """As :class:`Backward`, of a call of so many samples: gradients of the weights for each of them."""

    @staticmethod
    def forward(s: Sizes, needs: tuple[bool, ...], count: int, samples: int, *args: Any) -> tuple[Tensor, ...]:
        leaves, made, grad_states, grad_final = _parts(s, count, args)
        if s.recompute:  # backward would make the kept values anew and not give them away
            s, own = s._replace(recompute=False), leaves.dense()
            output, _, kept, history = RUNS[s.engine].forward(s, True, own.input, own.states, own.weights, own.rows, own.given, own.resets)
            made = [output, kept, *history]
        others = (needs[0], *[False] * _WEIGHTS, *needs[1 + _WEIGHTS :])
        grads, gates = _run_back(s, others, leaves, made, grad_states, grad_final)
        N = gates.shape[0]
        output, kept, *history = made
        y, sizes = output.reshape(N, s.output), leaves.rows.sizes
        of_weights: list[Tensor | None] = [None] * _WEIGHTS
        if needs[1]:
            of_weights[0] = products.grad_ih(s, gates, leaves.input.reshape(N, -1), samples)
        if needs[2]:
            before = before_each_token(s, y, leaves.states[0] if leaves.states else None, sizes)
            of_weights[1] = products.grad_hh(s, gates, kept, before, samples)
        if needs[3] or needs[4]:
            of_weights[2:4] = products.bias_grads(s, gates, samples)
        if needs[5]:
            of_weights[4] = products.grad_hr(s, gates, kept, samples)
        if needs[6]:
            of_weights[5] = products.grad_vectors(s, gates, kept, leaves.states, [y, *history], sizes, samples)
        return _present(needs, [grads[0], *of_weights, *grads[1 + _WEIGHTS :]])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep: what is to be differentiated does not come here."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        calls = [_Samples.apply(*args[:4], *_select(args[4:], in_dims[4:], i)) for i in range(info.batch_size)]  # type: ignore[no-untyped-call]
        return stacked(calls)


def _parts(s: Sizes, count: int, args: Seq[Any]) -> tuple[Leaves, list[Any], list[Any], list[Any]]:
    """Leaves, what forward made, gradients of the states after each token, and of the final ones."""
    rest, grad_final = parted(args, len(s.cell.states))
    rest, grad_states = parted(rest, count)
    flat, made = parted(rest, _made(s))
    return Leaves.of(s, flat), made, grad_states, grad_final


def _made(s: Sizes) -> int:
    """How many tensors forward leaves for backward: output, kept, histories, moments."""
    return 2 + _histories(s) + (s.cell.moments > 0)


def _run_back(
    s: Sizes, needs: Seq[bool], leaves: Leaves, made: Seq[Any], grad_states: Seq[Tensor | None], grad_final: Seq[Tensor | None]
) -> tuple[list[Tensor | None], Tensor]:
    own = leaves.dense()
    output, kept, *history = (None if t is None else dense(t) for t in made)
    found: tuple[list[Tensor | None], Tensor] = RUNS[s.engine].backward(
        s,
        needs,
        grad_states,
        grad_final,
        own.input,
        own.states,
        own.weights,
        own.rows,
        output,
        kept,
        history,
        own.given,
        own.resets,
        False,
    )
    return found


def _present(needs: Seq[bool], grads: Seq[Tensor | None]) -> tuple[Tensor, ...]:
    """Those that are needed, in memory of their own."""
    found = (grad for grad, need in zip(grads, needs, strict=True) if need)
    return tuple(grad.clone() if grad._is_view() else grad for grad in found if grad is not None)


def _added(a: Tensor | None, b: Tensor | None, like: Tensor) -> Tensor:
    return a + b if a is not None and b is not None else a if a is not None else b if b is not None else torch.zeros_like(like)


def _vjp(f: Callable[..., Seq[Tensor]], primals: Seq[Tensor], cotangents: Seq[Tensor]) -> tuple[Seq[Tensor], Seq[Tensor]]:
    """What ``f`` makes of ``primals``, and their cotangents, both to be differentiated once more."""
    if is_transformed():
        pair: tuple[Any, Any] = torch.func.vjp(lambda *args: tuple(f(*args)), *primals)  # type: ignore[assignment]
        made, pull = pair
        return made, pull(tuple(cotangents))
    # As torch.func has it, but where hooks for saved tensors are set, which that forbids.
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in primals]
        made = f(*own)
        pairs = [(t, grad) for t, grad in zip(made, cotangents, strict=True) if t.requires_grad]
    found = torch.autograd.grad(
        [t for t, _ in pairs], own, [grad for _, grad in pairs], create_graph=again, allow_unused=True, materialize_grads=True
    )
    return made if again else [t.detach() for t in made], found


def _second(
    s: Sizes, leaves: Leaves, upstream: Seq[Tensor | None], count: int, directions: Seq[Tensor | None], wanted: Seq[bool]
) -> list[Tensor | None]:
    """With J the derivative of a call, v the gradients that came back to it and u a direction for each of its leaves: the gradients of
    ⟨v, J u⟩, of the leaves and of v, as far as they are ``wanted``. ⟨u, Jᵀ v⟩ is the same number, so this is what a derivative of gradients
    asks for, where u came back to them.
    """
    values = [*leaves.flat[_ROWS:], *upstream]
    chosen = [i for i, (t, want) in enumerate(zip(values, wanted, strict=True)) if want and t is not None]
    # A penalty is often on the input's gradient alone.
    if not chosen or all(d is None for d in directions) or all(v is None for v in upstream):
        return [None] * len(values)
    by = _by_gradients if tangents.cell_of(s.cell, s.module) is None else _by_tangents
    found = dict(zip(chosen, by(s, leaves, upstream, count, directions, chosen), strict=True))
    return [found.get(i) for i in range(len(values))]


def _by_tangents(
    s: Sizes, leaves: Leaves, upstream: Seq[Tensor | None], count: int, directions: Seq[Tensor | None], chosen: Seq[int]
) -> list[Tensor]:
    """From J u, the tangents, which for v are all there is to it."""
    rows, flat, states = leaves.flat[:_ROWS], leaves.flat[_ROWS:], len(s.cell.states)
    given = {i: v for i, v in enumerate(upstream, len(flat)) if v is not None}
    of_leaves = [i for i in chosen if i < len(flat)]

    def along_it(*args: Tensor) -> list[Tensor]:
        own = _with(flat, of_leaves, args)
        output, *rest = along(s, Leaves.of(s, [*rows, *own]), Leaves.of(s, [*[None] * _ROWS, *directions]))
        every = [output, *rest[states : states + count - 1], *rest[:states]]
        return [every[i - len(flat)] for i in given]

    made, grads = _vjp(along_it, [flat[i] for i in of_leaves], list(given.values())) if of_leaves else (along_it(), [])
    found = dict(zip(given, made, strict=True))
    return [*grads, *(found[i] for i in chosen if i >= len(flat))]


def _by_gradients(
    s: Sizes, leaves: Leaves, upstream: Seq[Tensor | None], count: int, directions: Seq[Tensor | None], chosen: Seq[int]
) -> list[Tensor]:
    """From Jᵀ v by torch's operations."""
    rows, flat = leaves.flat[:_ROWS], [*leaves.flat[_ROWS:], *upstream]
    back_at = [i for i, v in enumerate(upstream) if v is not None]
    used = [i for i, d in enumerate(directions) if d is not None]

    def outputs(values: Seq[Any], args: Seq[Tensor]) -> list[Tensor]:
        own = Leaves.of(s, [*rows, *_with(values[: len(directions)], used, args)])
        if count == 1 and not is_transformed() and peer.differentiates_sooner(s, own.input.dtype, own.input.device):
            every = list(peer.run(s, own.input, own.states or None, own.weights, own.rows.sizes))
        else:
            output, *rest = traced.run(s, own.input, own.states, own.weights, own.rows, own.given, own.resets)
            finals, histories = rest[: len(s.cell.states)], rest[len(s.cell.states) :]
            every = [output, *histories[: count - 1], *finals]
        return [every[i] for i in back_at]

    def first(*args: Tensor) -> Seq[Tensor]:
        values = _with(flat, chosen, args)
        v = [values[len(directions) + i] for i in back_at]
        return _vjp(lambda *own: outputs(values, own), [values[i] for i in used], v)[1]

    return list(_vjp(first, [flat[i] for i in chosen], [directions[i] for i in used])[1])  # type: ignore[misc]


def _with(values: Seq[Any], at: Seq[int], args: Seq[Tensor]) -> list[Any]:
    """The values with others at these places."""
    full = list(values)
    for i, t in zip(at, args, strict=True):
        full[i] = t
    return full
