"""One cell over one sequence: argument checks, memory, autograd and the torch.library ops. The only door to the compiled module.

:func:`sequence` is what layers are made of. In eager mode it goes through :class:`Sequence`, an ``autograd.Function``; under
``torch.compile``, ``torch.export``, on meta and fake tensors it goes through the ops ``torch.ops.rnnkernels.sequence`` and
``sequence_backward``. Both run the same code.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from . import cells, cpu, peer, steps
from .cells import CELLS, PERSISTENT, STORAGE, Cell, Rows, Sizes, Weights, grad_shapes, number, problem
from .load import heats, is_modified, load_kernels, load_page, modified, source_of

__all__ = [
    "CELLS",
    "ENGINES",
    "Call",
    "Cell",
    "Sequence",
    "Weights",
    "before_each_token",
    "build_info",
    "check_lengths",
    "check_reset_mask",
    "cuts_natively",
    "heats",
    "is_modified",
    "load_page",
    "modified",
    "plan",
    "sequence",
    "set_isa",
    "source_of",
    "widths",
]

ENGINES = ("auto", "cpu", "stepwise", *PERSISTENT, "torch")
_COUNT = len(Weights._fields)
_GRU = re.compile("gru(_candidate|_layer_norm|_gate_norm|_zoneout|_grad_clip|_dropout)*")
_RUNS: dict[str, Any] = {"cpu": cpu, "stepwise": steps, **dict.fromkeys(PERSISTENT, steps)}


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
    engine: str = "auto",
    device: torch.device | str = "cpu",
    reverse: bool = False,
    ragged: bool = False,
) -> dict[str, Any]:
    """What would run, and why: engine, isa, threads, schedule, bytes_workspace, reason; of the cpu engine also row_groups, unit_groups,
    units_per_panel, estimated_us.

    With ``training`` it tells of the backward pass. Raises ``ValueError`` for an unknown cell or engine, an unsupported dtype or a negative
    size, ``RuntimeError`` for an engine that cannot run it.
    """
    if cell not in CELLS or dtype not in STORAGE or min(steps, batch, input_size, hidden_size, output_size or 0) < 0:
        raise ValueError(
            f"plan: no such cell, dtype or size: {cell!r}, {dtype}, {steps}, {batch}, {input_size}, {hidden_size}, {output_size}"
        )
    sizes = Sizes(CELLS[cell], reverse, steps, batch, hidden_size, output_size or hidden_size)
    if engine == "torch" or (engine == "auto" and not ragged and peer.is_faster(sizes, dtype, torch.device(device))):
        peer.check(sizes.cell)
        why = "engine='torch' was asked for" if engine == "torch" else peer.WHY
        return {"engine": "torch", "isa": "torch", "threads": 1, "bytes_workspace": 0, "schedule": "torch.nn's own function", "reason": why}
    chosen, why = _engine(engine, sizes, dtype, input_size, torch.device(device))
    task = problem(sizes._replace(engine=chosen), dtype, input_size, Rows(), training)
    if chosen == "cpu":
        return _cpu_plan(sizes, task, training)
    on_gpu = torch.device(device).type == "cuda"
    facts = {"engine": chosen, "isa": "cuda" if on_gpu else "scalar", "threads": 1, "bytes_workspace": 0}
    if chosen == "stepwise":
        return {**facts, "schedule": "a product by torch and one run of the cell a step", "reason": why}
    index = _index(torch.device(device))
    exchange, unit_ctas, row_tiles, shared, _ = _C.tiling(task, training, *_C.cuda_device(index))
    how = {"near": "in clusters" if unit_ctas > 1 else "apart", "grid": "all together", "none": "apart"}[exchange]
    schedule = f"{unit_ctas} × {row_tiles} blocks of units × rows, {how}, {shared} bytes of shared memory each"
    return {**facts, "bytes_workspace": _C.cuda_workspace_bytes(task, training, index), "schedule": schedule, "reason": why}


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _cpu_plan(sizes: Sizes, task: _C.Problem, training: bool) -> dict[str, Any]:
    threads = torch.get_num_threads()
    rows, units, panel, ns = _C.schedule(task, training)
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
    bytes = _C.workspace_bytes(task, training)
    return {
        "engine": "cpu",
        "isa": _C.isa(),
        "threads": rows * units,
        "schedule": f"{rows} × {units} groups of rows × units, {panel} units a panel, {bytes} bytes of workspace",
        "row_groups": rows,
        "unit_groups": units,
        "units_per_panel": panel,
        "bytes_workspace": bytes,
        "estimated_us": ns / 1e3,
        "reason": f"{reason} (torch.get_num_threads() = {threads})",
    }


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


def _parted(tensors: Seq[Any], last: int) -> tuple[list[Any], list[Any]]:
    """All but the last so many, and these."""
    return list(tensors[: len(tensors) - last]), list(tensors[len(tensors) - last :])


class Sequence(torch.autograd.Function):
    """A cell over a sequence, as autograd sees it. Use :func:`sequence`, which checks its arguments.

    ``apply(sizes, rows, input, *weights, *states, *given, *resets) -> (output, *final_states)``, with ``sizes.returns`` also the states
    beyond the first after each token, ``[N, H]`` each.
    Saves 5·H numbers a token for LSTM, 4·H for GRU and H for SRN, besides input and output; with ``sizes.recompute`` only the states.
    """

    @staticmethod
    def forward(ctx: Any, s: Sizes, rows: Rows, input: Tensor, *args: Tensor | None) -> Any:
        weights = Weights(*args[:_COUNT])
        rest, resets = _parted([t for t in args[_COUNT:] if t is not None], s.resets)
        states, given = _parted(rest, s.given)
        output, final, kept, history = _RUNS[s.engine].forward(s, True, input, states, weights, rows, given, resets)
        ctx.sizes, ctx.own = s, not _hooked()
        ctx.set_materialize_grads(False)
        if not s.recompute:
            weights = weights._replace(bias_ih=None)  # not needed, so whoever changes it is free to
        ctx.save_for_backward(input, *weights, *rows, output, kept, *states, *history, *given, *resets)
        return (output, *final, *(history[: len(s.cell.states) - 1] if s.returns else []))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *others: Tensor | None) -> Any:
        s: Sizes = ctx.sizes
        grad_final, grad_history = others[: len(s.cell.states)], others[len(s.cell.states) :]
        input, *saved = ctx.saved_tensors
        weights, rows = Weights(*saved[:_COUNT]), Rows(*saved[_COUNT : _COUNT + len(Rows._fields)])
        output, kept, *rest = saved[_COUNT + len(Rows._fields) :]
        rest, resets = _parted(rest, s.resets)
        rest, given = _parted(rest, s.given)
        # The rest are initial states, if there were any, and histories.
        n = len(rest) - len(s.cell.states) + 1 - (s.cell.moments > 0)
        overwrite = ctx.own and _last_use()
        grad_states = [grad_output, *grad_history]
        with torch.no_grad():
            grads = _RUNS[s.engine].backward(
                s,
                ctx.needs_input_grad[2:],
                grad_states,
                grad_final,
                input,
                rest[:n],
                weights,
                rows,
                output,
                kept,
                rest[n:],
                given,
                resets,
                overwrite,
            )
        if torch.is_grad_enabled():
            leaves = (grad_output, *others, input, *weights, *rest[:n], *given, *resets)
            grads = _Once.apply(len(grads), *grads, *leaves)  # type: ignore[no-untyped-call]
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

    @property
    def weights(self) -> Weights:
        return Weights(self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr, self.weight_v)

    @property
    def rows(self) -> Rows:
        found = (self.batch_sizes, self.lengths, self.reset_mask, self.units)
        return Rows(*(None if t is None else t.contiguous() for t in found))


def _checked(call: Call, concrete: bool) -> Sizes:
    cell, input, states, batch_sizes = call.cell, call.input, call.states, call.batch_sizes
    weights, given = call.weights, call.given
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
    H = _hidden(spec, weights)
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
    if weight_ih is not None:
        _expect("weight_ih", weight_ih, (spec.input_gates * H, input.shape[-1]), input)
    if weight_hh is not None:
        _expect("weight_hh", weight_hh, (spec.hidden_gates * H, P), input)
    if weight_v is not None:
        _expect("weight_v", weight_v, (spec.learned * H,), input)
    for i, state in enumerate(states or ()):
        _expect(f"states[{i}] ({spec.states[i]})", state, (B, H if i else P), input)
    if bias_ih is not None:
        _expect("bias_ih", bias_ih, (spec.input_gates * H,), input)
    if bias_hh is not None:
        _expect("bias_hh", bias_hh, (spec.biased * H,), input)
    _check_given(spec, given, H, B, input)
    rows = call.rows
    if rows.cut:
        _check_cuts(spec, call, T, B, H, P, concrete)
    sizes = Sizes(
        spec, call.reverse, T, B, H, P, recompute=call.recompute, given=len(given), resets=len(call.reset_states), module=call.module
    )
    sizes = sizes._replace(returns=call.return_states, cut=rows.cut)
    return sizes._replace(engine=_engine(call.engine, sizes, input.dtype, input.shape[-1], input.device)[0]) if concrete else sizes


def check_lengths(lengths: Tensor, T: int, B: int, concrete: bool = True) -> None:
    """Raise unless ``lengths`` are integers from 0 to T, one a row; not ``concrete``: as far as shapes tell."""
    if lengths.shape != (B,) or lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype is torch.bool:
        raise RuntimeError(f"lengths: expected integers of shape ({B},), got {lengths.dtype} of shape {tuple(lengths.shape)}")
    if concrete and B:
        shortest, longest = torch.aminmax(lengths)
        if int(shortest) < 0 or int(longest) > T:
            raise ValueError(f"lengths: expected 0 to {T}, got {int(shortest)} to {int(longest)}")


def check_reset_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` are booleans of this shape."""
    if mask.shape != shape or mask.dtype is not torch.bool:
        raise RuntimeError(f"reset_mask: expected torch.bool of shape {shape}, got {mask.dtype} of shape {tuple(mask.shape)}")


def _check_cuts(spec: Cell, call: Call, T: int, B: int, H: int, P: int, concrete: bool) -> None:
    input = call.input
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
        _check_reset_states(spec, call.reset_states, [P] + [H] * (len(spec.states) - 1), input)
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


def _hidden(spec: Cell, weights: Weights) -> int:
    """The hidden size, which the first matrix tells."""
    name, weight, blocks = ("weight_ih", weights.ih, spec.input_gates) if spec.input_gates else ("weight_hh", weights.hh, spec.hidden_gates)
    assert weight is not None
    if weight.dim() != 2 or weight.shape[0] % blocks or weight.shape[0] == 0:
        raise RuntimeError(
            f"{name}: expected shape ({blocks}·hidden_size, {'input' if spec.input_gates else 'hidden'}_size), got {tuple(weight.shape)}"
        )
    return weight.shape[0] // blocks


def _check_given(spec: Cell, given: Seq[Tensor], H: int, B: int, input: Tensor) -> None:
    names = ", ".join(spec.slots[i][0] for i in spec.given)
    slots = 0
    for i, t in enumerate(given):
        width = t.shape[-1] if t.dim() else 0
        if width == 0 or width % H:
            raise RuntimeError(f"given[{i}]: expected a last dimension of a multiple of hidden_size = {H}, got shape {tuple(t.shape)}")
        shapes = [(*input.shape[:-1], width), (B, width), (width,)]
        if t.shape not in shapes:
            raise RuntimeError(f"given[{i}]: expected shape {shapes[0]}, {shapes[1]} or {shapes[2]}, got {tuple(t.shape)}")
        _expect(f"given[{i}]", t, tuple(t.shape), input)
        if t.requires_grad and any(spec.slots[slot][4] for slot in spec.given[slots : slots + width // H]):
            raise RuntimeError(f"given[{i}]: expected a mask that requires no gradient, for there is none")
        slots += width // H
    if slots != len(spec.given):
        wanted = f"numbers for {len(spec.given)} slots ({names})" if names else "nothing"
        raise RuntimeError(f"given: expected {wanted} for cell {spec.name!r}, got them for {slots}")


def _engine(engine: str, s: Sizes, dtype: torch.dtype, input_size: int, device: torch.device) -> tuple[str, str]:
    """Which engine runs it, and why. Raise if that which was asked for cannot."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    asked = f"engine={engine!r} was asked for"
    if engine == "torch":
        peer.check(s.cell)
        if s.cut:
            raise RuntimeError("engine: 'torch' takes no lengths, reset_mask or units")
        return engine, asked
    if s.cut and not cuts_natively(engine, device):
        raise RuntimeError(f"engine: lengths, reset_mask and units are for the engine 'cpu' on CPU tensors, got {engine!r} on {device}")
    if device.type == "cpu":
        if engine in PERSISTENT:
            raise RuntimeError(f"engine: {engine!r} runs on a CUDA device, and input is on the CPU")
        return ("cpu", "the CPU's engine") if engine == "auto" else (engine, asked)
    if device.type != "cuda" or not hasattr(_C, "cuda_why_not"):
        what = "has no CUDA part" if device.type == "cuda" else "computes on CPU and CUDA devices"
        raise RuntimeError(f"input: no engine for device {device}: this build {what}")
    if engine == "cpu":
        raise RuntimeError(f"engine: 'cpu' cannot run on input's device {device}")
    if too_old := _too_old(*torch.cuda.get_device_capability(device)):
        raise RuntimeError(f"input: no engine for device {device}: {too_old}")
    load_kernels(s.cell.name)
    if engine == "stepwise":
        return engine, asked
    chosen = "persistent" if engine == "auto" else engine
    task = problem(s._replace(engine=chosen), dtype, input_size, Rows(), True)
    why_not = next(filter(None, (_C.cuda_why_not(task, backward, _index(device)) for backward in (False, True))), "")
    if engine in PERSISTENT and why_not:
        raise RuntimeError(f"engine: {engine!r} cannot run this: {why_not}")
    return ("stepwise", why_not) if why_not else (chosen, "the weights fit on the chip" if engine == "auto" else asked)


def before_each_token(cell: Cell, after: Tensor, initial: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """A state before each token of a ragged batch, ``[N, ·]``, from that after each."""
    width = after.shape[1]
    return cells.before_each_token(Sizes(cell, reverse, len(batch_sizes), initial.shape[0], width, width), after, initial, batch_sizes)


def cuts_natively(engine: str, device: torch.device) -> bool:
    """Whether lengths, reset_mask and units may go to :func:`sequence`; elsewhere ``functional`` cuts the batch into segments."""
    return engine in ("auto", "cpu") and device.type == "cpu"


def _check_reset_states(spec: Cell, states: Seq[Tensor], widths: Seq[int], input: Tensor) -> None:
    if len(states) != len(spec.states):
        raise RuntimeError(f"reset_states: expected {len(spec.states)} ({', '.join(spec.states)}), got {len(states)}")
    T, B = input.shape[:2]
    for i, (t, width) in enumerate(zip(states, widths, strict=True)):
        if t.shape not in ((width,), (B, width), (T, B, width)):
            raise RuntimeError(f"reset_states[{i}]: expected shape {(width,)}, {(B, width)} or {(T, B, width)}, got {tuple(t.shape)}")
        _expect(f"reset_states[{i}] ({spec.states[i]})", t, tuple(t.shape), input)


@functools.cache
def _too_old(major: int, minor: int) -> str:
    """Why a device of this compute capability cannot run the CUDA part of this build; empty: it can."""
    built = _C.build()["cuda"]["architectures"]
    oldest = min(int(number) for number in re.findall(r"\d+", built))
    if major * 10 + minor >= oldest:
        return ""
    return f"it has compute capability {major}.{minor}, and this build is for {oldest // 10}.{oldest % 10} and later ({built})"


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
            the last but where a table in ``ops/peer.py`` says that it is faster.
        recompute: save the states alone for backward, which then makes the rest anew: less memory, more work.
        return_states: return the states beyond the first after each step too.

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
    place = input.device.type
    if (place == "cpu" or place == "cuda") and torch.is_autocast_enabled(place):
        # As torch.nn, whose GRU keeps the input's dtype on a CPU.
        dtype = input.dtype if place == "cpu" and _GRU.fullmatch(cell) else torch.get_autocast_dtype(place)
        input, *cast = (_autocast(t, dtype) for t in (input, *weights))
        given = [_autocast(t, dtype) for t in given]
        weights = Weights(*cast)
        states = None if states is None else [_autocast(state, dtype) for state in states]
        reset_states = None if reset_states is None else [_autocast(state, dtype) for state in reset_states]
    if return_states and engine == "torch" and cell in CELLS and len(CELLS[cell].states) > 1:
        raise RuntimeError("return_states: torch.nn's functions do not give them; choose another engine")
    if engine == "torch" or (
        engine == "auto" and input.is_cuda and not return_states and _torch_is_faster(cell, input, weights, batch_sizes, reverse)
    ):
        call = Call(cell, input, states, *weights, batch_sizes, lengths, reset_mask, units, given, reverse=reverse, engine="torch")
        s = _checked(call, not torch.compiler.is_compiling())
        theirs: tuple[Tensor, ...] = peer.run(s, input, states, weights, batch_sizes)
        return theirs
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_transforms(input, *weights, *(states or ()), *given, *(reset_states or ()))
    if reset_mask is not None and not reverse:
        states = _first_states(cell, input, states, weights, lengths, reset_mask, reset_states)
    resets = reset_states or ()
    tensors: list[Any] = [input, *weights, *(states or ()), *given, *resets]
    plain, needs_grad = not (torch.compiler.is_compiling() or input.is_meta), False
    for i, t in enumerate(tensors):
        if t is not None:
            plain = plain and (type(t) is Tensor or type(t) is torch.nn.Parameter)
            needs_grad = needs_grad or t.requires_grad
            if i and not t.is_contiguous():
                tensors[i] = t.contiguous()
    needs_grad = needs_grad and torch.is_grad_enabled()
    call = Call(
        cell,
        input,
        states,
        *weights,
        batch_sizes,
        lengths,
        reset_mask,
        units,
        given,
        resets,
        module,
        reverse,
        engine,
        recompute,
        return_states,
        needs_grad,
    )
    if not plain:
        return _traceable(call)
    s = _checked(call, True)
    if needs_grad:
        result: tuple[Tensor, ...] = Sequence.apply(s, call.rows, *tensors)  # type: ignore[no-untyped-call]
        return _shaped(result, len(s.cell.states), input) if return_states else result
    dense = Weights(*tensors[1 : 1 + _COUNT])
    dense_states, dense_resets = _parted(tensors[1 + _COUNT :], s.resets)
    dense_states, dense_given = _parted(dense_states, s.given)
    output, final, _, history = _RUNS[s.engine].forward(s, False, input, dense_states, dense, call.rows, dense_given, dense_resets)
    return _shaped((output, *final, *history), len(final), input)


def _first_states(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weights: Weights,
    lengths: Tensor | None,
    reset_mask: Tensor,
    reset_states: Seq[Tensor] | None,
) -> list[Tensor]:
    """The states of the first step, which may be marked too."""
    if cell not in CELLS or input.dim() != 3 or reset_mask.shape != input.shape[:2] or input.shape[0] == 0:
        return list(states or ())  # what is wrong with it is said elsewhere
    spec = CELLS[cell]
    if reset_states is not None:
        _check_reset_states(spec, reset_states, widths(cell, *weights), input)
    if states is not None and len(states) != len(spec.states):
        return list(states)
    marked = reset_mask[0] if lengths is None else reset_mask[0] & (lengths > 0)
    given = states or _zeros(cell, input, None, weights)
    if reset_states is None:
        return [state.masked_fill(marked.unsqueeze(1), 0) for state in given]
    pairs = zip(given, reset_states, strict=True)
    return [torch.where(marked.unsqueeze(1), reset[0] if reset.dim() == 3 else reset, state) for state, reset in pairs]


def widths(cell: str, *weights: Tensor | None) -> list[int]:
    """Of the cell's states."""
    H = _hidden(CELLS[cell], Weights(*weights))
    hr = Weights(*weights).hr
    return [H if hr is None else hr.shape[0]] + [H] * (len(CELLS[cell].states) - 1)


def _zeros(cell: str, input: Tensor, batch_sizes: Tensor | None, weights: Weights) -> list[Tensor]:
    """Initial states."""
    batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
    return [input.new_zeros(batch, width) for width in widths(cell, *weights)]


def _shaped(results: Seq[Tensor], count: int, input: Tensor) -> tuple[Tensor, ...]:
    """Histories, which come last, in the input's shape."""
    return (*results[: 1 + count], *(t.view(*input.shape[:-1], t.shape[-1]) for t in results[1 + count :]))


def _torch_is_faster(cell: str, input: Tensor, weights: Weights, batch_sizes: Tensor | None, reverse: bool) -> bool:
    if cell not in CELLS or batch_sizes is not None or input.dim() != 3 or torch.compiler.is_compiling() or weights.ih is None:
        return False  # what is wrong with it is said elsewhere
    H = weights.ih.shape[0] // CELLS[cell].input_gates
    return peer.is_faster(Sizes(CELLS[cell], reverse, input.shape[0], input.shape[1], H, H), input.dtype, input.device)


def _traceable(call: Call) -> tuple[Tensor, ...]:
    """The same through the registered op: for compilers, fake and meta tensors, and tensor subclasses."""
    if call.states is None:
        call = call._replace(states=_zeros(call.cell, call.input, call.batch_sizes, call.weights))
    s = _checked(call, False)
    results: list[Tensor] = torch.ops.rnnkernels.sequence(*call)
    n = len(s.cell.states)
    end = len(results) - (call.training and s.cell.moments > 0)
    histories = results[end - n + 1 : end] if call.return_states else []
    return _shaped([*results[: 1 + n], *histories], n, call.input)


# ---- torch.library: the same code for torch.compile, torch.export and fake tensors

_library: Any = torch.library.Library("rnnkernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "sequence(str cell, Tensor input, Tensor[] states, Tensor? weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? weight_v, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? units, Tensor[] given,"
    " Tensor[] reset_states, int module, bool reverse, str engine, bool recompute, bool return_states, bool training) -> Tensor[]"
)
_library.define(
    "sequence_backward(str cell, Tensor input, Tensor[] states, Tensor? weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? weight_v, Tensor? batch_sizes, Tensor? lengths, Tensor? reset_mask, Tensor? units, Tensor[] given,"
    " Tensor[] reset_states, int module, bool reverse, str engine, bool recompute, bool return_states, bool training, bool[] needs,"
    " Tensor?[] grad_states, Tensor?[] grad_final, Tensor output, Tensor? kept, Tensor[] history) -> Tensor[]"
)


def _op_forward(*args: Any) -> list[Tensor]:
    """output, final states, for training the kept values, if not to be recomputed, and, if asked for too, the other states' histories; for
    training moments, of a cell that has them
    """
    call = Call(*args)
    s = _checked(call, True)
    states, given, resets = ([t.contiguous() for t in tensors] for tensors in (call.states or (), call.given, call.reset_states))
    run = _RUNS[s.engine].forward(s, call.training, call.input, states, call.weights.dense(), call.rows, given, resets)
    output, final, kept, history = run
    # Places that forward does not fill: an op's results are the same each time.
    if kept is not None and s.cell.kept < s.cell.room:
        kept[:, s.cell.kept * s.hidden :].zero_()
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
    call = Call(*args)
    spec, input, states = CELLS[call.cell], call.input, call.states or ()
    H = _hidden(spec, call.weights)
    P = H if call.weight_hr is None else call.weight_hr.shape[0]
    N = input.shape[0] if call.batch_sizes is not None else input.shape[0] * input.shape[1]
    results = [input.new_empty(*input.shape[:-1], P), *(input.new_empty(state.shape) for state in states)]
    if call.training and not call.recompute:
        results.append(input.new_empty(N, spec.room * H))
    if call.training or call.return_states:
        results += [input.new_empty(N, H) for _ in states[1:]]
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


def _op_backward(*args: Any) -> list[Tensor]:
    """Gradients in the order of `needs`; an empty tensor where none is needed."""
    call, back = Call(*args[: len(Call._fields)]), Back(*args[len(Call._fields) :])
    input, states, output, kept, history = call.input, call.states or (), back.output, back.kept, back.history
    s = _checked(call, True)
    N = s.steps * s.batch if call.batch_sizes is None else input.shape[0]
    others = len(call.given) + len(call.reset_states)
    counts = (1 + _COUNT + len(states) + others, len(states), len(states) - 1 + (s.cell.moments > 0))
    if (len(back.needs), len(back.grad_final), len(history)) != counts or not 1 <= len(back.grad_states) <= len(states):
        raise RuntimeError("needs, grad_final, history: expected {}, {}, {} of them".format(*counts))
    _expect("output", output, (*input.shape[:-1], s.output), input)
    if kept is not None:
        _expect("kept", kept, (N, s.cell.room * s.hidden), input)
    wide = [(N, s.hidden)] * (len(states) - 1)
    if s.cell.moments and (history[-1].shape != (N, s.cell.moments) or history[-1].dtype != number(input.dtype)):
        raise RuntimeError(
            f"history: expected moments of shape {(N, s.cell.moments)}, got {tuple(history[-1].shape)} of {history[-1].dtype}"
        )
    for name, tensors, shapes in (
        ("grad_states", back.grad_states, [output.shape, *wide]),
        ("grad_final", back.grad_final, [state.shape for state in states]),
        ("history", history[: len(wide)], wide),
    ):
        for tensor, shape in zip(tensors, shapes, strict=False):
            if tensor is not None:
                _expect(name, tensor, shape, input)
    grads = _RUNS[s.engine].backward(
        s,
        back.needs,
        back.grad_states,
        back.grad_final,
        input,
        [state.contiguous() for state in states],
        call.weights.dense(),
        call.rows,
        output.contiguous(),
        None if kept is None else kept.contiguous(),
        [h.contiguous() for h in history],
        [t.contiguous() for t in call.given],
        [t.contiguous() for t in call.reset_states],
        False,
    )
    # An op's results are memory of their own, and a given number's gradient lies among the gates'.
    first = counts[0] - others
    return [input.new_empty(0) if grad is None else grad if i < first else grad.contiguous() for i, grad in enumerate(grads)]


def _op_backward_fake(*args: Any) -> list[Tensor]:
    call, needs = Call(*args[: len(Call._fields)]), args[len(Call._fields)]
    s = Sizes(CELLS[call.cell], call.reverse, 0, 0, _hidden(CELLS[call.cell], call.weights), 0)
    shapes = grad_shapes(s, call.input, call.weights)
    shapes += [t.shape for t in (*(call.states or ()), *call.given, *call.reset_states)]
    return [call.input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    call = Call(*inputs)
    states = call.states or ()
    n = len(states)
    if call.training:
        kept, history = None if call.recompute else output[1 + n], output[(1 if call.recompute else 2) + n :]
        if not call.recompute:
            call = call._replace(bias_ih=None)
        leaves = (inputs[1], *inputs[3 : 3 + _COUNT], *states, *call.given, *call.reset_states)
        ctx.needs = [t is not None and t.requires_grad for t in leaves]
        ctx.counts = (n, len(call.given), len(call.reset_states), len(history))
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
    n = len(states)
    end = len(grads) - (CELLS[ctx.call.cell].moments > 0)
    call = ctx.call._replace(
        input=input, states=states, given=given, reset_states=resets, **dict(zip(Call._fields[3:13], fields, strict=True))
    )
    grad_states = [grads[0], *grads[end - n + 1 : end]]
    results = torch.ops.rnnkernels.sequence_backward(*call, ctx.needs, grad_states, grads[1 : 1 + n], y, kept, history)
    needed = [grad if need else None for grad, need in zip(results, ctx.needs, strict=True)]
    input_grad, *of_weights = needed[: 1 + _COUNT]
    rest = needed[1 + _COUNT :]
    of_rest, of_resets = _parted(rest, len(resets))
    of_states, of_given = _parted(of_rest, len(given))
    none = [None] * (len(Rows._fields))
    return (None, input_grad, of_states, *of_weights, *none, of_given, of_resets, *[None] * (len(Call._fields) - 15))


for _name, _run, _fake in (("sequence", _op_forward, _op_forward_fake), ("sequence_backward", _op_backward, _op_backward_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"rnnkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("rnnkernels::sequence", _op_autograd, setup_context=_op_setup, lib=_library)
torch.library.register_autograd("rnnkernels::sequence_backward", _refuse_second_derivative, lib=_library)
