"""What a call of :func:`rnnkernels.ops.sequence` must be: its arguments, and errors that name what is wrong with them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import engines
from .cells import CELLS, NO_ROWS, STORAGE, Cell, Rows, Sizes, Weights

__all__ = [
    "Call",
    "check_lengths",
    "check_reset_mask",
    "check_reset_states",
    "checked",
    "checked_once",
    "expect",
    "forget_seen",
    "hidden_size",
    "look_at",
    "seen",
    "widths",
]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
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


class Call(NamedTuple):
    """The arguments of the op, in its schema's order. ``states`` None: zeros."""

    cell: str
    input: Tensor
    states: Seq[Tensor] | None
    weight_ih: Tensor | None
    weight_hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    weight_v: Tensor | None
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    reset_mask: Tensor | None = None
    units: Tensor | None = None
    given: Seq[Tensor] = ()
    reset_states: Seq[Tensor] = ()
    module: int = 0
    reverse: bool = False
    engine: str = "auto"
    recompute: bool = False
    return_states: bool = False
    training: bool = False

    # No properties: torch.compile of torch 2.5 does not see into those of named tuples, nor into _replace.
    def weights(self) -> Weights:
        return Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr, self.weight_v)

    def changed(self, **fields: Any) -> Call:
        values: list[Any] = list(self)
        for name, value in fields.items():
            values[Call._fields.index(name)] = value
        return Call(*values)

    def rows(self) -> Rows:
        found = (self.batch_sizes, self.lengths, self.reset_mask, self.units)
        if self.batch_sizes is self.lengths is self.reset_mask is self.units is None:
            return NO_ROWS
        return Rows(*(None if t is None else t.contiguous() for t in found))


# Most calls repeat one that was found to be as it must be: their sizes by all that they are known by.
_seen: dict[tuple[Any, ...], Sizes] = {}
_SEEN = 1024


def forget_seen() -> None:
    """After a change of what calls can be run by."""
    _seen.clear()


class Look(NamedTuple):
    """What a call's tensors are, as far as kernels care."""

    plain: bool  # tensors and parameters as torch makes them, no subclasses
    alike: bool  # all on the CPU and of the input's dtype
    dense: bool  # all but the input lie in memory as kernels read them
    needs_grad: bool
    shapes: list[torch.Size | None]


def look_at(tensors: Seq[Tensor | None], dtype: torch.dtype) -> Look:
    """The input comes first."""
    shapes: list[torch.Size | None] = []
    plain, alike, lie, needs_grad = True, True, True, False
    for t in tensors:
        if t is None:
            shapes.append(None)
            continue
        plain = plain and (type(t) is torch.nn.Parameter or type(t) is Tensor)
        alike = alike and t.dtype is dtype and t.is_cpu
        lie = lie and (not shapes or (t.is_contiguous() and not t.is_neg() and not t._is_zerotensor()))
        needs_grad = needs_grad or t.requires_grad
        shapes.append(t.shape)
    return Look(plain, alike, lie, needs_grad, shapes)


# By what a padded call is known whose tensors are alike: its cell, dtype, options, and how many tensors of which shapes it has.
_Kind = tuple[Any, ...]


def _kind(call: Call, look: Look) -> _Kind:
    masks = [t.requires_grad for t in call.given] if call.given else ()
    counts = (None if call.states is None else len(call.states), len(call.given))
    options = (call.module, call.reverse, call.engine, call.recompute, call.return_states)
    rows = (call.lengths is None, call.reset_mask is None, call.units is None)
    return (CELLS.get(call.cell), call.input.dtype, counts, options, rows, *masks, *look.shapes)


def _plain_kind(cell: str, dtype: torch.dtype, states: int, engine: str, recompute: bool, look: Look, reverse: bool) -> _Kind:
    """That of a call of nothing but these, an input, weights and so many states."""
    return (CELLS.get(cell), dtype, (states or None, 0), (0, reverse, engine, recompute, False), (True, True, True), *look.shapes)


def checked_once(call: Call, look: Look) -> Sizes:
    """:func:`checked` of a call. Of one that is like another before, only what its rows hold is looked at."""
    if not look.alike or call.batch_sizes is not None:
        return checked(call, True)
    kind = _kind(call, look)
    sizes = _seen.get(kind)
    if sizes is None:
        sizes = checked(call, True)
        if len(_seen) >= _SEEN:
            _seen.clear()
        _seen[kind] = sizes
    elif sizes.cut:
        _check_cuts(call, sizes, True)
    return sizes


def seen(cell: str, dtype: torch.dtype, states: int, engine: str, recompute: bool, look: Look, reverse: bool = False) -> Sizes | None:
    """The sizes of a call of an input, weights and so many states, if one like it was found to be as it must be."""
    return _seen.get(_plain_kind(cell, dtype, states, engine, recompute, look, reverse))


def checked(call: Call, concrete: bool, values: bool = True) -> Sizes:
    """The sizes of a call that is as it must be. ``concrete``: that its sizes are numbers; ``values``: that what rows hold can be read."""
    cell, input, states, batch_sizes = call.cell, call.input, call.states, call.batch_sizes
    weights, given = call.weights(), call.given
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v = weights
    spec = CELLS.get(cell)
    if spec is None:
        raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    if input.dtype not in STORAGE:
        raise RuntimeError(f"input: expected dtype float32, float64, bfloat16 or float16, got {input.dtype}")
    if input.dim() != (3 if batch_sizes is None else 2):
        raise RuntimeError(
            f"input: expected {'3-D [T, B, I]' if batch_sizes is None else '2-D [N, I] with batch_sizes'}, got {input.dim()}-D"
        )
    wanted = (
        ("weight_ih", weight_ih, spec.input_gates),
        ("weight_hh", weight_hh, spec.hidden_gates),
        ("weight_hr", weight_hr, spec.projected),
        ("weight_v", weight_v, spec.learned),
    )
    for name, weight, has in wanted:
        if bool(has) != (weight is not None):
            raise RuntimeError(f"{name}: expected {'a tensor' if has else 'None'} for cell {cell!r}")
    if states is not None and len(states) != len(spec.states):
        raise RuntimeError(f"states: expected {len(spec.states)} ({', '.join(spec.states)}) for cell {cell!r}, got {len(states)}")
    H = hidden_size(spec, weights)
    P = H
    if weight_hr is not None:
        P = weight_hr.shape[0]
        if not 0 < P <= H:
            raise RuntimeError(f"weight_hr: expected at least 1 and at most hidden_size = {H} rows, got {P}")
        expect("weight_hr", weight_hr, (P, H), input)
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
    if weight_ih is not None:
        expect("weight_ih", weight_ih, (spec.input_gates * H, input.shape[-1]), input)
    if weight_hh is not None:
        expect("weight_hh", weight_hh, (spec.hidden_gates * H, P), input)
    if weight_v is not None:
        expect("weight_v", weight_v, (spec.learned * H,), input)
    for i, state in enumerate(states or ()):
        expect(f"states[{i}] ({spec.states[i]})", state, (B, H if i else P), input)
    if bias_ih is not None:
        expect("bias_ih", bias_ih, (spec.input_gates * H,), input)
    if bias_hh is not None:
        expect("bias_hh", bias_hh, (spec.biased * H,), input)
    if given or spec.given:
        _check_given(spec, given, H, B, input)
    sizes = Sizes(
        spec,
        call.reverse,
        T,
        B,
        H,
        P,
        recompute=call.recompute,
        returns=call.return_states,
        given=len(given),
        resets=len(call.reset_states),
        cut=Rows(batch_sizes, call.lengths, call.reset_mask, call.units).cut(),
        module=call.module,
    )
    if sizes.cut:
        _check_cuts(call, sizes, concrete and values)
    if not concrete:
        return sizes
    engine, _ = engines.choose(call.engine, sizes, input.dtype, input.shape[-1], input.device)
    return sizes if engine == sizes.engine else sizes._replace(engine=engine)


def check_lengths(lengths: Tensor, T: int, B: int, concrete: bool = True) -> bool:
    """Raise unless ``lengths`` are integers from 0 to T, one a row; not ``concrete``: as far as shapes tell.

    -> whether they are known to be T, all of them.
    """
    if lengths.shape != (B,) or lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype is torch.bool:
        raise RuntimeError(f"lengths: expected integers of shape ({B},), got {lengths.dtype} of shape {tuple(lengths.shape)}")
    if not concrete or B == 0:
        return concrete
    shortest, longest = map(int, torch.aminmax(lengths.to(torch.int64)))
    if shortest < 0 or longest > T:
        raise ValueError(f"lengths: expected 0 to {T}, got {shortest} to {longest}")
    return shortest == T


def check_reset_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` are booleans of this shape."""
    if mask.shape != shape or mask.dtype is not torch.bool:
        raise RuntimeError(f"reset_mask: expected torch.bool of shape {shape}, got {mask.dtype} of shape {tuple(mask.shape)}")


def _check_cuts(call: Call, s: Sizes, concrete: bool) -> None:
    input, spec, T, B, H = call.input, s.cell, s.steps, s.batch, s.hidden
    if call.batch_sizes is not None:
        raise RuntimeError("batch_sizes: expected None beside lengths, reset_mask or units, which are for padded batches")
    for name, t in (("lengths", call.lengths), ("reset_mask", call.reset_mask), ("units", call.units)):
        if t is not None and t.device.type != "cpu":
            raise RuntimeError(f"{name}: expected a CPU tensor, got one on {t.device}")
    if call.lengths is not None:
        check_lengths(call.lengths, T, B, concrete)
        if call.lengths.dtype is not torch.int64:
            raise RuntimeError(f"lengths: expected torch.int64, got {call.lengths.dtype}")
    if call.reset_mask is not None:
        check_reset_mask(call.reset_mask, (T, B))
    if call.reset_states:
        check_reset_states(spec, call.reset_states, s.widths, input)
    if call.units is None:
        return
    if len(spec.slots) != 1 or not spec.hidden_gates or call.module < 1:
        raise RuntimeError(f"units: expected a cell of one slot with a matrix and a module of at least 1, got {spec.name!r}, {call.module}")
    if call.units.shape != (T,) or call.units.dtype is not torch.int64:
        raise RuntimeError(f"units: expected torch.int64 of shape ({T},), got {call.units.dtype} of shape {tuple(call.units.shape)}")
    if concrete:
        fewest, most = map(int, torch.aminmax(call.units))
        if fewest < 0 or most > H:
            raise ValueError(f"units: expected 0 to {H}, got {fewest} to {most}")


def hidden_size(spec: Cell, weights: Weights) -> int:
    """The hidden size, which the first matrix tells."""
    name, weight, blocks = ("weight_ih", weights.ih, spec.input_gates) if spec.input_gates else ("weight_hh", weights.hh, spec.hidden_gates)
    assert weight is not None
    if weight.dim() != 2 or weight.shape[0] % blocks or weight.shape[0] == 0:
        raise RuntimeError(
            f"{name}: expected shape ({blocks}·hidden_size, {'input' if spec.input_gates else 'hidden'}_size), got {tuple(weight.shape)}"
        )
    return weight.shape[0] // blocks


def is_one_of(shape: Seq[int], shapes: Seq[tuple[int, ...]]) -> bool:
    """Whether it is. Sizes of shapes of another rank are not looked at: to an exporter each look is a condition on what may come."""
    return any(len(shape) == len(other) and shape == other for other in shapes)


def widths(cell: str, *weights: Tensor | None) -> list[int]:
    """Of the cell's states."""
    H = hidden_size(CELLS[cell], Weights(*weights))
    hr = Weights(*weights).hr
    return [H if hr is None else hr.shape[0]] + [H] * (len(CELLS[cell].states) - 1)


def _check_given(spec: Cell, given: Seq[Tensor], H: int, B: int, input: Tensor) -> None:
    names = ", ".join(spec.slots[i][0] for i in spec.given)
    slots = 0
    for i, t in enumerate(given):
        width = t.shape[-1] if t.dim() else 0
        if width == 0 or width % H:
            raise RuntimeError(f"given[{i}]: expected a last dimension of a multiple of hidden_size = {H}, got shape {tuple(t.shape)}")
        shapes = [(*input.shape[:-1], width), (B, width), (width,)]
        if not is_one_of(t.shape, shapes):
            raise RuntimeError(f"given[{i}]: expected shape {shapes[0]}, {shapes[1]} or {shapes[2]}, got {tuple(t.shape)}")
        expect(f"given[{i}]", t, tuple(t.shape), input)
        if t.requires_grad and any(spec.slots[slot][4] for slot in spec.given[slots : slots + width // H]):
            raise RuntimeError(f"given[{i}]: expected a mask that requires no gradient, for there is none")
        slots += width // H
    if slots != len(spec.given):
        wanted = f"numbers for {len(spec.given)} slots ({names})" if names else "nothing"
        raise RuntimeError(f"given: expected {wanted} for cell {spec.name!r}, got them for {slots}")


def check_reset_states(spec: Cell, states: Seq[Tensor], widths: Seq[int], input: Tensor) -> None:
    if len(states) != len(spec.states):
        raise RuntimeError(f"reset_states: expected {len(spec.states)} ({', '.join(spec.states)}), got {len(states)}")
    T, B = input.shape[:2]
    for i, (t, width) in enumerate(zip(states, widths, strict=True)):
        if not is_one_of(t.shape, [(width,), (B, width), (T, B, width)]):
            raise RuntimeError(f"reset_states[{i}]: expected shape {(width,)}, {(B, width)} or {(T, B, width)}, got {tuple(t.shape)}")
        expect(f"reset_states[{i}] ({spec.states[i]})", t, tuple(t.shape), input)
