"""What would run a call, and why, told by the calls themselves: they go their way as far as the kernels, and are noted there instead."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import cpu, parts, peer
from .cells import PERSISTENT, Rows, Sizes, problem
from .checks import Call
from .engines import choose, index_of
from .packed import Packed, Remembered, keeping
from .transforms import is_transformed

__all__ = ["Facts", "listening", "noted"]


class Facts(NamedTuple):
    """Of one sequence."""

    engine: str
    isa: str
    threads: int
    schedule: str
    why: str


class _Listener(threading.local):
    heard: list[Facts] | None = None


_listener = _Listener()


@contextlib.contextmanager
def listening() -> Iterator[list[Facts]]:
    """Inside, the calls of this thread are not run: what would run each is noted, and its results are zeros."""
    around, _listener.heard = _listener.heard, []
    try:
        yield _listener.heard
    finally:
        _listener.heard = around


def is_listening() -> bool:
    return _listener.heard is not None


def noted(s: Sizes, call: Call, rows: Rows, packed: Packed | Remembered | None = None, beside: bool = False) -> tuple[Tensor, ...]:
    """Zeros for the results of a call that would now run; ``beside``: at the same time as the other direction."""
    assert _listener.heard is not None
    input, weights = call.input, call.weights()
    keeps = None if call.training else keeping(s, input, packed)
    _listener.heard.append(_facts(s if keeps is None else keeps, call, rows, beside))
    *around, _ = input.shape
    states = [input.new_zeros(s.batch, width) for width in s.widths]
    histories = [input.new_zeros(*around, s.hidden) for _ in s.widths[1:]] if call.return_states else []
    results = (input.new_zeros(*around, s.output), *states, *histories)
    leaves = (input, *weights, *(call.states or ()), *call.given, *call.reset_states)
    if torch.is_grad_enabled() and not is_transformed() and any(t is not None and t.requires_grad for t in leaves):
        for t in results:
            t.requires_grad_()
    return results


def _facts(s: Sizes, call: Call, rows: Rows, beside: bool) -> Facts:
    device, dtype, input_size = call.input.device, call.input.dtype, call.input.shape[-1]
    if s.engine == "torch":
        why = peer.STEP_IS_FASTER if device.type == "cpu" else peer.CUDNN_IS_FASTER
        why = "engine='torch' was asked for" if call.engine == "torch" else why
        return Facts("torch", "torch", 1, "torch.nn's own function", why)
    _, why = choose(call.engine, s, dtype, input_size, device)
    if s.engine == "cpu":
        return _on_cpu(s, call, rows, beside)
    isa = "cuda" if device.type == "cuda" else "scalar"
    if s.engine == "traced":
        asked = why if call.engine == "traced" else "forward mode, for which this cell has no kernels"
        return Facts("traced", "torch", 1, "the page's operations by torch, step by step", asked)
    if s.engine == "stepwise":
        return Facts("stepwise", isa, 1, "a product by torch and one run of the cell a step", why)
    assert s.engine in PERSISTENT
    index, sequences = index_of(device), 2 if beside else 1
    task = problem(s, dtype, input_size, Rows(), call.training)
    exchange, unit_ctas, row_tiles, shared, _ = _C.tiling(task, call.training, *_C.cuda_device(index), sequences)
    how = {"near": "in clusters" if unit_ctas > 1 else "apart", "grid": "all together", "none": "apart"}[exchange]
    bytes = _C.cuda_workspace_bytes(task, call.training, index, sequences)
    schedule = f"{unit_ctas} × {row_tiles} blocks of units × rows, {how}, {shared} bytes of shared memory each, {bytes} bytes of workspace"
    return Facts(s.engine, isa, 1, schedule, f"{why}; in one launch with the other direction" if beside else why)


def _on_cpu(s: Sizes, call: Call, rows: Rows, beside: bool) -> Facts:
    dtype, input_size, chained = call.input.dtype, call.input.shape[-1], cpu.thread.chained
    if beside:
        task, choice = problem(s, dtype, input_size, rows, call.training, 1), None
    else:
        s = parts.longest(s, rows) if call.training else s
        (task, *_), _, choice, _ = cpu.turn_of(s, dtype, input_size, rows, call.training, call.training, looks=True)
    row_groups, unit_groups, panel, _ = _C.schedule(task, call.training)
    if s.complete:
        reason = "one step: both products by torch, the rest in one pass"
    elif beside:
        reason = "at the same time as the other direction, on a thread each"
    elif chained:
        reason = "at the same time as the other layers, some steps behind the one below, on a thread each"
    elif row_groups * unit_groups == 1:
        reason = "serial: a step is too short to share" if cpu.thread.threads > 1 else "serial: one thread"
    elif unit_groups == 1:
        reason = "the batch is split: no barrier"
    elif row_groups == 1:
        reason = "the units are split: each thread keeps its share of the weights, one barrier a step"
    else:
        reason = "batch and units are split"
    if choice is not None:
        reason += f"; the quickest of {choice.ways} ways when last tried" if choice.tried else f"; first of {choice.ways} ways to be tried"
    bytes = _C.workspace_bytes(task, call.training)
    schedule = f"{row_groups} × {unit_groups} groups of rows × units, {panel} units a panel, {bytes} bytes of workspace"
    return Facts("cpu", _C.isa(), row_groups * unit_groups, schedule, f"{reason} (torch.get_num_threads() = {torch.get_num_threads()})")
