"""Inference calls that repeat one before: all of such a call but its memory is known, and of a small layer's call what is not the kernel
would be the longer part.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from math import prod
from time import perf_counter_ns

import torch
from torch import Tensor

from .. import _C
from . import cpu
from .cells import LARGE, Sizes, address, addresses, empty, stage_addresses, vectors, weights_of
from .packed import Pack, Packed, Remembered, keep

__all__ = ["Repeat"]


class Repeat:
    """A call of the CPU engine, of a whole batch from zeros and without gradients, as one was found to be as it must be: for an input of
    its shape, and weights that lie where they lay. What they hold is for the keeper of their panels to look at.
    """

    def __init__(self, engine: str, s: Sizes, input: Tensor, weights: Seq[Tensor | None]) -> None:
        cell, H, six = s.cell, s.hidden, weights_of(weights)
        self._cell, self._engine, self._dtype = cell.name, engine, input.dtype
        self._threads, self._generation = torch.get_num_threads(), cpu.generation()
        self._marks = [(0, None, type(None)) if w is None else (w.data_ptr(), w.shape, type(w)) for w in weights]
        self._tokens, self._output = s.steps * s.batch, (s.steps, s.batch, s.output)
        self._large = prod(self._output) * input.element_size() >= LARGE
        self._finals = [(1, s.batch, width) for width in s.widths]
        tasks, self._choice = cpu.tasks_of_whole_rows(s, input.dtype, input.shape[-1], False, False, False, self._threads, False)
        ih, bias_ih, bias_hh = address(six.ih), address(six.bias_ih), address(six.bias_hh)
        matrices, own = stage_addresses(cell, H, six.hh, six.hr), vectors(cell, H, six)

        def kernel(task: cpu.Task) -> _C.Forward:
            return _C.Forward(
                task.problem, 0, ih, bias_ih, bias_hh, 0, 0, matrices, own, [], [], 0, [], 0, task.bytes, [], 0, [], 0, Pack.ALL
            )

        self._ways = [(task, kernel(task)) for task in tasks]

    def results(
        self, cell: str, engine: str, input: Tensor, weights: Seq[Tensor | None], keeper: Packed | Remembered
    ) -> tuple[Tensor, ...] | None:
        """The output and the final states ``[1, B, ·]``; None: this call is another. The input has the shape of that which was seen."""
        dtype, thread, at = self._dtype, cpu.thread, input.data_ptr()
        if not at or input.dtype is not dtype or input.is_neg():  # no address: empty, or yet to be made
            return None
        if cell != self._cell or engine != self._engine or cpu.generation() != self._generation:
            return None
        if torch.get_num_threads() != self._threads or thread.waiting is not None or len(weights) != len(self._marks):
            return None
        for w, (there, shape, kind) in zip(weights, self._marks, strict=True):
            if type(w) is not kind:
                return None
            if w is None:
                continue
            if w.data_ptr() != there or w.shape != shape or w.dtype is not dtype or not w.is_contiguous() or w.is_neg():
                return None
        if not input.is_contiguous():
            input = input.contiguous()
            at = input.data_ptr()
        output = empty(input, self._output) if self._large else input.new_empty(*self._output)
        finals = [input.new_empty(*shape) for shape in self._finals]
        choice = self._choice
        way = 0 if choice is None else choice.forward()
        task, kernel = self._ways[way]
        workspace = thread.take(task.bytes)
        panels, pack, found = keeper.memory(task.packing, weights)
        started = perf_counter_ns()
        kernel.run(at, output.data_ptr(), addresses(finals), workspace.data_ptr(), panels.data_ptr(), pack)
        if found is not None:
            keep(found, task.packing, panels)
        if choice is not None and choice.asks:
            choice.took(way, False, perf_counter_ns() - started, self._tokens)
        return (output, *finals)
