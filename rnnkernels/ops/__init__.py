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
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from . import cpu, peer, steps
from .cells import CELLS, PERSISTENT, STORAGE, Cell, Sizes, Weights, grad_shapes, number, problem
from .load import load_kernels, load_page, modified, source_of

__all__ = ["CELLS", "ENGINES", "Cell", "Sequence", "build_info", "load_page", "modified", "plan", "sequence", "set_isa", "source_of"]

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
    task = problem(sizes._replace(engine=chosen), dtype, input_size, None, training)
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

    ``apply(sizes, batch_sizes, input, *weights, *states, *given) -> (output, *final_states)``, with ``sizes.returns`` also the states
    beyond the first after each token, ``[N, H]`` each.
    Saves 5·H numbers a token for LSTM, 4·H for GRU and H for SRN, besides input and output; with ``sizes.recompute`` only the states.
    """

    @staticmethod
    def forward(ctx: Any, s: Sizes, rows: Tensor | None, input: Tensor, *args: Tensor | None) -> Any:
        weights = Weights(*args[:_COUNT])
        states, given = _parted([t for t in args[_COUNT:] if t is not None], s.given)
        output, final, kept, history = _RUNS[s.engine].forward(s, True, input, states, weights, rows, given)
        ctx.sizes, ctx.own = s, not _hooked()
        ctx.set_materialize_grads(False)
        if not s.recompute:
            weights = weights._replace(bias_ih=None)  # not needed, so whoever changes it is free to
        ctx.save_for_backward(input, *weights, rows, output, kept, *states, *history, *given)
        return (output, *final, *(history[: len(s.cell.states) - 1] if s.returns else []))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *others: Tensor | None) -> Any:
        s: Sizes = ctx.sizes
        grad_final, grad_history = others[: len(s.cell.states)], others[len(s.cell.states) :]
        input, *saved = ctx.saved_tensors
        weights, (rows, output, kept, *rest) = Weights(*saved[:_COUNT]), saved[_COUNT:]
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
                overwrite,
            )
        if torch.is_grad_enabled():
            grads = _Once.apply(len(grads), *grads, grad_output, *others, input, *weights, *rest[:n], *given)  # type: ignore[no-untyped-call]
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
    weights: Weights,
    batch_sizes: Tensor | None,
    given: Seq[Tensor],
    reverse: bool,
    engine: str,
    recompute: bool,
    concrete: bool,
) -> Sizes:
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
    sizes = Sizes(spec, reverse, T, B, H, P, recompute=recompute, given=len(given))
    return sizes._replace(engine=_engine(engine, sizes, input.dtype, input.shape[-1], input.device)[0]) if concrete else sizes


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
        return engine, asked
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
    task = problem(s._replace(engine=chosen), dtype, input_size, None, True)
    why_not = next(filter(None, (_C.cuda_why_not(task, backward, _index(device)) for backward in (False, True))), "")
    if engine in PERSISTENT and why_not:
        raise RuntimeError(f"engine: {engine!r} cannot run this: {why_not}")
    return ("stepwise", why_not) if why_not else (chosen, "the weights fit on the chip" if engine == "auto" else asked)


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
    if return_states and engine == "torch" and cell in CELLS and len(CELLS[cell].states) > 1:
        raise RuntimeError("return_states: torch.nn's functions do not give them; choose another engine")
    if engine == "torch" or (
        engine == "auto" and input.is_cuda and not return_states and _torch_is_faster(cell, input, weights, batch_sizes, reverse)
    ):
        s = _checked(cell, input, states, weights, batch_sizes, given, reverse, engine, recompute, not torch.compiler.is_compiling())
        theirs: tuple[Tensor, ...] = peer.run(s, input, states, weights, batch_sizes)
        return theirs
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        _refuse_transforms(input, *weights, *(states or ()), *given)
    tensors: list[Any] = [input, *weights, *(states or ()), *given]
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
        return _traceable(cell, input, states, weights, batch_sizes, given, reverse, engine, recompute, return_states, needs_grad)
    s = _checked(cell, input, states, weights, batch_sizes, given, reverse, engine, recompute, True)
    if return_states:
        s = s._replace(returns=True)
    if needs_grad:
        result: tuple[Tensor, ...] = Sequence.apply(s, batch_sizes, *tensors)  # type: ignore[no-untyped-call]
        return _shaped(result, len(s.cell.states), input) if return_states else result
    dense = Weights(*tensors[1 : 1 + _COUNT])
    dense_states, dense_given = (tensors[1 + _COUNT :], given) if not given else _parted(tensors[1 + _COUNT :], s.given)
    output, final, _, history = _RUNS[s.engine].forward(s, False, input, dense_states, dense, batch_sizes, dense_given)
    return _shaped((output, *final, *history), len(final), input)


def _shaped(results: Seq[Tensor], count: int, input: Tensor) -> tuple[Tensor, ...]:
    """Histories, which come last, in the input's shape."""
    return (*results[: 1 + count], *(t.view(*input.shape[:-1], t.shape[-1]) for t in results[1 + count :]))


def _torch_is_faster(cell: str, input: Tensor, weights: Weights, batch_sizes: Tensor | None, reverse: bool) -> bool:
    if cell not in CELLS or batch_sizes is not None or input.dim() != 3 or torch.compiler.is_compiling() or weights.ih is None:
        return False  # what is wrong with it is said elsewhere
    H = weights.ih.shape[0] // CELLS[cell].input_gates
    return peer.is_faster(Sizes(CELLS[cell], reverse, input.shape[0], input.shape[1], H, H), input.dtype, input.device)


def _traceable(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weights: Weights,
    batch_sizes: Tensor | None,
    given: Seq[Tensor],
    reverse: bool,
    engine: str,
    recompute: bool,
    return_states: bool,
    training: bool,
) -> tuple[Tensor, ...]:
    """The same through the registered op: for compilers, fake and meta tensors, and tensor subclasses."""
    if states is None:
        batch = input.shape[1] if batch_sizes is None else int(batch_sizes[0])
        H = _hidden(CELLS[cell], weights)
        P = H if weights.hr is None else weights.hr.shape[0]
        states = [input.new_zeros(batch, width) for width in [P] + [H] * (len(CELLS[cell].states) - 1)]
    s = _checked(cell, input, states, weights, batch_sizes, given, reverse, engine, recompute, False)
    results: list[Tensor] = torch.ops.rnnkernels.sequence(
        cell, input, list(states), *weights, batch_sizes, list(given), reverse, engine, recompute, return_states, training
    )
    n = len(s.cell.states)
    end = len(results) - (training and s.cell.moments > 0)
    histories = results[end - n + 1 : end] if return_states else []
    return _shaped([*results[: 1 + n], *histories], n, input)


# ---- torch.library: the same code for torch.compile, torch.export and fake tensors

_library: Any = torch.library.Library("rnnkernels", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "sequence(str cell, Tensor input, Tensor[] states, Tensor? weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh,"
    " Tensor? weight_hr, Tensor? weight_v, Tensor? batch_sizes, Tensor[] given, bool reverse, str engine, bool recompute,"
    " bool return_states, bool training) -> Tensor[]"
)
_library.define(
    "sequence_backward(str cell, bool[] needs, Tensor?[] grad_states, Tensor?[] grad_final, Tensor input, Tensor[] states,"
    " Tensor? weight_ih, Tensor? weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, Tensor? weight_v, Tensor? batch_sizes,"
    " Tensor[] given, bool reverse, str engine, Tensor output, Tensor? kept, Tensor[] history) -> Tensor[]"
)


def _op_forward(
    cell: str,
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    weight_v: Tensor | None,
    batch_sizes: Tensor | None,
    given: Seq[Tensor],
    reverse: bool,
    engine: str,
    recompute: bool,
    return_states: bool,
    training: bool,
) -> list[Tensor]:
    """output, final states, for training the kept values, if not to be recomputed, and, if asked for too, the other states' histories; for
    training moments, of a cell that has them
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v)
    s = _checked(cell, input, states, weights, batch_sizes, given, reverse, engine, recompute, True)
    s = s._replace(returns=return_states)
    rows = None if batch_sizes is None else batch_sizes.contiguous()
    dense = [state.contiguous() for state in states]
    numbers = [t.contiguous() for t in given]
    output, final, kept, history = _RUNS[s.engine].forward(s, training, input, dense, weights.dense(), rows, numbers)
    if kept is not None and s.cell.kept < s.cell.room:
        kept[:, s.cell.kept * s.hidden :].zero_()  # places that only backward fills: an op's results are the same each time
    return [output, *final, *([] if kept is None else [kept]), *history]


def _op_forward_fake(
    cell: str,
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    weight_v: Tensor | None,
    batch_sizes: Tensor | None,
    given: Seq[Tensor],
    reverse: bool,
    engine: str,
    recompute: bool,
    return_states: bool,
    training: bool,
) -> list[Tensor]:
    spec = CELLS[cell]
    H = _hidden(spec, Weights(weight_ih, weight_hh, None, None, None, None))
    P = H if weight_hr is None else weight_hr.shape[0]
    N = input.shape[0] if batch_sizes is not None else input.shape[0] * input.shape[1]
    results = [input.new_empty(*input.shape[:-1], P), *(input.new_empty(state.shape) for state in states)]
    if training and not recompute:
        results.append(input.new_empty(N, spec.room * H))
    if training or return_states:
        results += [input.new_empty(N, H) for _ in states[1:]]
    if training and spec.moments:
        results.append(input.new_empty(N, spec.moments, dtype=number(input.dtype)))
    return results


def _op_backward(
    cell: str,
    needs: Seq[bool],
    grad_states: Seq[Tensor | None],
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    weight_v: Tensor | None,
    batch_sizes: Tensor | None,
    given: Seq[Tensor],
    reverse: bool,
    engine: str,
    output: Tensor,
    kept: Tensor | None,
    history: Seq[Tensor],
) -> list[Tensor]:
    """Gradients in the order of `needs`; an empty tensor where none is needed."""
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v)
    s = _checked(cell, input, states, weights, batch_sizes, given, reverse, engine, kept is None, True)
    N = s.steps * s.batch if batch_sizes is None else input.shape[0]
    counts = (1 + _COUNT + len(states) + len(given), len(states), len(states) - 1 + (s.cell.moments > 0))
    if (len(needs), len(grad_final), len(history)) != counts or not 1 <= len(grad_states) <= len(states):
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
        ("grad_states", grad_states, [output.shape, *wide]),
        ("grad_final", grad_final, [state.shape for state in states]),
        ("history", history[: len(wide)], wide),
    ):
        for tensor, shape in zip(tensors, shapes, strict=False):
            if tensor is not None:
                _expect(name, tensor, shape, input)
    grads = _RUNS[s.engine].backward(
        s,
        needs,
        grad_states,
        grad_final,
        input,
        [state.contiguous() for state in states],
        weights.dense(),
        None if batch_sizes is None else batch_sizes.contiguous(),
        output.contiguous(),
        None if kept is None else kept.contiguous(),
        [h.contiguous() for h in history],
        [t.contiguous() for t in given],
        False,
    )
    # An op's results are memory of their own, and a given number's gradient lies among the gates'.
    return [
        input.new_empty(0) if grad is None else grad if i < counts[0] - len(given) else grad.contiguous() for i, grad in enumerate(grads)
    ]


def _op_backward_fake(
    cell: str,
    needs: Seq[bool],
    grad_states: Seq[Tensor | None],
    grad_final: Seq[Tensor | None],
    input: Tensor,
    states: Seq[Tensor],
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_hr: Tensor | None,
    weight_v: Tensor | None,
    batch_sizes: Tensor | None,
    given: Seq[Tensor],
    reverse: bool,
    engine: str,
    output: Tensor,
    kept: Tensor | None,
    history: Seq[Tensor],
) -> list[Tensor]:
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v)
    s = Sizes(CELLS[cell], reverse, 0, 0, _hidden(CELLS[cell], weights), 0)
    shapes = [*grad_shapes(s, input, weights), *(state.shape for state in states), *(t.shape for t in given)]
    return [input.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]


def _op_setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    cell, input, states, *weights, batch_sizes, given, reverse, engine, recompute, _, training = inputs
    n = len(states)
    ctx.given = len(given)
    ctx.cell, ctx.reverse, ctx.engine, ctx.states, ctx.training = cell, reverse, engine, n, training
    if not training:
        return
    y, kept, history = output[0], None if recompute else output[1 + n], output[(1 if recompute else 2) + n :]
    ctx.needs = [t is not None and t.requires_grad for t in (input, *weights, *states, *given)]
    ih, hh, bias_ih, *others = weights
    ctx.save_for_backward(input, ih, hh, bias_ih if recompute else None, *others, batch_sizes, y, kept, *states, *history, *given)


def _op_autograd(ctx: Any, grads: list[Tensor | None]) -> Any:
    if not ctx.training:
        raise RuntimeError("training: expected True for an op that is differentiated, got False")
    n = ctx.states
    input, *saved = ctx.saved_tensors
    weights, (batch_sizes, y, kept, *rest) = saved[:_COUNT], saved[_COUNT:]
    rest, given = _parted(rest, ctx.given)
    end = len(grads) - (CELLS[ctx.cell].moments > 0)
    results = torch.ops.rnnkernels.sequence_backward(
        ctx.cell,
        ctx.needs,
        [grads[0], *grads[end - n + 1 : end]],
        grads[1 : 1 + n],
        input,
        rest[:n],
        *weights,
        batch_sizes,
        given,
        ctx.reverse,
        ctx.engine,
        y,
        kept,
        rest[n:],
    )
    needed = [grad if need else None for grad, need in zip(results, ctx.needs, strict=True)]
    input_grad, *others = needed[: 1 + _COUNT]
    grad_initial, grad_given = _parted(needed[1 + _COUNT :], ctx.given)
    return (None, input_grad, grad_initial, *others, None, grad_given, None, None, None, None, None)


for _name, _run, _fake in (("sequence", _op_forward, _op_forward_fake), ("sequence_backward", _op_backward, _op_backward_fake)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _run, _key)
    torch.library.register_fake(f"rnnkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("rnnkernels::sequence", _op_autograd, setup_context=_op_setup, lib=_library)
torch.library.register_autograd("rnnkernels::sequence_backward", _refuse_second_derivative, lib=_library)
