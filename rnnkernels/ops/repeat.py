"""Calls of whole batches that repeat one before: all of such a call but its memory is known. Of a small layer's call what is not the
kernel would be the longer part.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence as Seq
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import cpu
from .cells import Sizes, Weights, address, addresses, dense, empty, grad_shapes, stage_addresses, vectors, weights_of
from .choice import Choice
from .packed import Pack, Packed, Remembered, keep, keeping

__all__ = ["Directions", "Inference", "Training"]


_Mark = tuple[int, torch.Size | None, type]  # where a weight lies, its shape and its kind


class _Call:
    """What a call of the CPU engine must be to repeat the one that was seen: its input has the same shape, and its weights lie where they
    lay. What these hold is for others to look at. A cell's step ``[B, I]`` from states ``[B, ·]`` has no output but them; of a sequence
    ``[T, B, I]``, states are ``[1, B, ·]``, of an operator's ``[B, ·]``.
    """

    def __init__(
        self,
        engine: str,
        s: Sizes,
        kept: Sizes,
        input: Tensor,
        weights: Seq[Tensor | None],
        training: bool,
        beside: bool = False,
        of_operator: bool = False,
    ) -> None:
        """``kept``: as the forward pass has them, which may keep packed weights. ``beside``: another such call, on a thread each."""
        cell, H, six = s.cell, s.hidden, weights_of(weights)
        self.sizes, self._engine, self._dtype, self.is_step = s, engine, input.dtype, input.dim() == 2
        self._complete = s.complete
        self._threads, self._generation = torch.get_num_threads(), cpu.generation()
        self._marks: list[_Mark] = [(0, None, type(None)) if w is None else (w.data_ptr(), w.shape, type(w)) for w in weights]
        self._tokens, self._output = s.steps * s.batch, (*(() if self.is_step else (s.steps,)), s.batch, s.output)
        self._finals = [(*(() if self.is_step or of_operator else (1,)), s.batch, width) for width in s.widths]
        ih, bias_ih, bias_hh = address(six.ih), address(six.bias_ih), address(six.bias_hh)
        matrices, own = stage_addresses(cell, H, six.hh, six.hr), vectors(cell, H, six)
        row = cell.room * H

        def kernel(task: cpu.Task) -> _C.Forward:
            return _C.Forward(
                task.problem, 0, ih, bias_ih, bias_hh, 0, row, matrices, own, [], [], 0, [], 0, task.bytes, [], 0, [], 0, Pack.ALL
            )

        tasks, self._choice = self._tasks(kept, input, training, False, 1 if beside else self._threads)
        self._forward = [(task, kernel(task)) for task in tasks]

    @staticmethod
    def _tasks(s: Sizes, input: Tensor, training: bool, backward: bool, threads: int) -> tuple[list[cpu.Task], Choice | None]:
        """One for each team that may run it, and which does."""
        return cpu.tasks_of_whole_rows(s, input.dtype, input.shape[-1], training, backward, s.complete, threads, False)

    def _as_now(self) -> bool:
        """Whether what was known of the engine holds, and a call runs when it is made."""
        if torch.get_num_threads() != self._threads or cpu.generation() != self._generation or cpu.thread.waiting is not None:
            return False
        return self.sizes.steps > 1 or self.sizes.complete == self._complete

    def _way(self, backward: bool) -> int:
        choice = self._choice
        return 0 if choice is None else choice.backward() if backward else choice.forward()

    def _run(self, way: int, backward: bool, kernel: Any, *arguments: Any) -> None:
        started = perf_counter_ns()
        kernel.run(*arguments)
        choice = self._choice
        if choice is not None and choice.asks:
            choice.took(way, backward, perf_counter_ns() - started, self._tokens)

    def _go_forward(
        self,
        input: Tensor,
        initial: Seq[Tensor],
        gates: int,
        output: Tensor,
        finals: Seq[Tensor],
        history: Seq[int],
        weights: Seq[Tensor | None],
        keeper: Packed | Remembered | None,
    ) -> None:
        way = self._way(False)
        task, kernel = self._forward[way]
        workspace = cpu.thread.take(task.bytes)
        panels, pack, found = (None, Pack.ALL, None) if keeper is None else keeper.memory(task.packing, weights)
        memory = (workspace.data_ptr(), address(panels), pack)
        call = (input.data_ptr(), addresses(initial), gates, output.data_ptr(), addresses(finals), history, *memory)
        done = None if found is None or panels is None else functools.partial(keep, found, task.packing, panels)
        if cpu.thread.waiting is not None:
            cpu.thread.run(kernel.placed(*call), done, input, initial, output, finals, weights, workspace, panels)
            return
        self._run(way, False, kernel, *call)
        if done is not None:
            done()

    def is_repeated(self, cell: str, engine: str, input: Tensor, weights: Seq[Tensor | None], states: Seq[Tensor]) -> bool:
        """Whether this is such a call, of an input of the shape that was seen; from zeros, if there are no states."""
        return self._is_repeated(cell, engine, input, weights, states, self._marks)

    def _is_repeated(
        self, cell: str, engine: str, input: Tensor, weights: Seq[Tensor | None], states: Seq[Tensor], marks: Seq[_Mark]
    ) -> bool:
        dtype = self._dtype
        if input.dtype is not dtype or not input.data_ptr() or input.is_neg():  # no address: empty, or yet to be made
            return False
        if cell != self.sizes.cell.name or engine != self._engine or len(weights) != len(marks) or not self._as_now():
            return False
        for w, (there, shape, kind) in zip(weights, marks, strict=True):
            if type(w) is not kind:
                return False
            if w is None:
                continue
            if w.data_ptr() != there or w.shape != shape or w.dtype is not dtype or not w.is_contiguous() or w.is_neg():
                return False
        if not states:
            return True
        if len(states) != len(self._finals):
            return False
        for state, width in zip(states, self._finals, strict=True):
            if type(state) is not Tensor or state.shape != width or state.dtype is not dtype or not state.is_cpu:
                return False
            if not state.data_ptr() or state.is_neg():
                return False
        return True


class Inference(_Call):
    """One without gradients, whose weights stay packed."""

    def __init__(
        self, engine: str, s: Sizes, input: Tensor, weights: Seq[Tensor | None], beside: bool = False, of_operator: bool = False
    ) -> None:
        super().__init__(engine, s, s, input, weights, False, beside, of_operator)

    def results(self, input: Tensor, weights: Seq[Tensor | None], states: Seq[Tensor], keeper: Packed | Remembered) -> tuple[Tensor, ...]:
        """The output and the final states, of a step these alone."""
        input = input.contiguous()
        initial = [state.contiguous() for state in states]
        output = empty(input, self._output)
        first, *others = self._finals  # of which a step's first is all the output there is
        finals = [output if self.is_step else input.new_empty(*first), *(input.new_empty(*shape) for shape in others)]
        self._go_forward(input, initial, 0, output, finals, (), weights, keeper)
        return tuple(finals) if self.is_step else (output, *finals)


class Directions:
    """Two calls that read the same input, a layer's two directions. With gradients what is known of each is its own's to keep."""

    def __init__(self, engine: str, sizes: Seq[Sizes], input: Tensor, weights: Seq[Seq[Tensor | None]], training: bool) -> None:
        self._threads = torch.get_num_threads()
        self.beside = cpu.gains_side_by_side(sizes[0], input, training)  # are they sooner done at the same time?
        of_both = () if training else zip(sizes, weights, strict=True)
        self._both = [Inference(engine, s, input, own, self.beside) for s, own in of_both]

    def is_repeated(self, cell: str, engine: str, input: Tensor, weights: Seq[Seq[Tensor | None]], states: Seq[Seq[Tensor]]) -> bool:
        """As that of each."""
        if torch.get_num_threads() != self._threads:
            return False
        return all(one.is_repeated(cell, engine, input, w, h) for one, w, h in zip(self._both, weights, states, strict=False))

    def results(
        self, input: Tensor, weights: Seq[Seq[Tensor | None]], states: Seq[Seq[Tensor]], keepers: Seq[Packed | Remembered]
    ) -> list[tuple[Tensor, ...]]:
        """The output and the final states of each."""
        calls = zip(self._both, weights, states, keepers, strict=True)
        with cpu.side_by_side() if self.beside else contextlib.nullcontext():
            return [one.results(input, own, initial, keeper) for one, own, initial, keeper in calls]


class Training(_Call):
    """One with gradients, and its backward pass."""

    @staticmethod
    def fits(s: Sizes) -> bool:
        """Whether there is nothing to do but to run kernels and, of a step, torch's products."""
        return s.engine == "cpu" and not (s.recompute or s.cell.moments or s.cell.projected)

    def __init__(
        self,
        engine: str,
        s: Sizes,
        input: Tensor,
        weights: Seq[Tensor | None],
        keeper: Packed | Remembered | None,
        of_operator: bool = False,
    ) -> None:
        # Many a step is run with the same weights, a sequence with those that the one before it has changed.
        kept = keeping(s, input, keeper) if s.steps == 1 and not s.complete else None
        super().__init__(engine, s, s if kept is None else kept, input, weights, True, False, of_operator)
        self._keeps = kept is not None

        def kernel(task: cpu.Task) -> _C.Backward:
            return _C.Backward(task.problem, 0, 0, [], [], [], 0, [], [], [], [], 0, 0, 0, 0, [], 0, 0, [], 0, task.bytes, 0, [], [])

        self._kept = (self._tokens, s.cell.room * s.hidden)
        self._history = [(self._tokens, s.hidden)] * (len(s.cell.states) - 1)
        self._grads = grad_shapes(s, input, weights_of(weights))
        tasks, _ = self._tasks(s, input, True, True, self._threads)
        self._backward = [(task, kernel(task)) for task in tasks]

    def forward(
        self, input: Tensor, states: Seq[Tensor], weights: Weights, keeper: Packed | Remembered
    ) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        """-> output, final states, kept values, histories"""
        input = input.contiguous()
        initial = [state.contiguous() for state in states]
        kept, output = empty(input, self._kept), empty(input, self._output)
        # A step's too are apart from the output: the caller may change them, and backward reads it.
        finals = [input.new_empty(*shape) for shape in self._finals]
        history = [empty(input, shape) for shape in self._history]
        if self._complete:
            cpu.complete_step(self.sizes.cell, self.sizes.hidden, kept, input.flatten(0, -2), initial[0] if initial else None, weights)
        histories = (0, *addresses(history))
        self._go_forward(input, initial, kept.data_ptr(), output, finals, histories, weights, keeper if self._keeps else None)
        return output, finals, kept, history

    def is_followed(
        self,
        cell: str,
        engine: str,
        input: Tensor,
        weights: Weights,
        states: Seq[Tensor],
        output: Tensor,
        kept: Tensor,
        history: Seq[Tensor],
        grad_output: Tensor | None,
        grad_final: Seq[Tensor | None],
    ) -> bool:
        """Whether this is the backward pass of such a call, which has no need of bias_ih, and what forward left lies as it left it."""
        if len(history) != len(self._history) or len(grad_final) != len(self._finals):
            return False
        for grad, shape in zip((grad_output, *grad_final), (self._output, *self._finals), strict=True):
            if grad is not None and (grad.shape != shape or grad.dtype is not self._dtype or not grad.is_cpu):
                return False
        left = [(output, self._output), (kept, self._kept), *zip(history, self._history, strict=True)]
        for t, shape in left:
            if t.shape != shape or t.dtype is not self._dtype or not t.is_cpu or not t.is_contiguous() or t.is_neg():
                return False
        at, marks = Weights._fields.index("bias_ih"), self._marks
        return self._is_repeated(cell, engine, input, (*weights[:at], *weights[at + 1 :]), states, (*marks[:at], *marks[at + 1 :]))

    def backward(
        self,
        needs: Seq[bool],
        grad_output: Tensor | None,
        grad_final: Seq[Tensor | None],
        input: Tensor,
        states: Seq[Tensor],
        weights: Weights,
        output: Tensor,
        kept: Tensor,
        history: Seq[Tensor],
        overwrite: bool,
    ) -> list[Tensor | None] | None:
        """Gradients of the input, the weights and the initial states; None: what was known holds no more."""
        if not self._as_now():
            return None
        cell, H = self.sizes.cell, self.sizes.hidden
        input = input.contiguous()
        gates = kept if overwrite else empty(kept, self._kept)
        above = None if grad_output is None else dense(grad_output)
        finals = [None if g is None else dense(g) for g in grad_final]
        grads = [empty(input, shape) if need else None for shape, need in zip(self._grads, needs, strict=False)]
        x, ih, hh, bias_ih, bias_hh, hr, v = grads
        before = [state.contiguous() for state in states]
        initial = [torch.empty_like(state) if need else None for state, need in zip(before, needs[len(grads) :], strict=True)]
        way = self._way(True)
        task, kernel = self._backward[way]
        workspace = cpu.thread.take(task.bytes)
        self._run(
            way,
            True,
            kernel,
            kept.data_ptr(),
            gates.data_ptr(),
            output.data_ptr(),
            input.data_ptr(),
            workspace.data_ptr(),
            (address(weights.ih), *stage_addresses(cell, H, weights.hh, weights.hr)),
            vectors(cell, H, weights),
            addresses(before),
            (0, *addresses(history)),
            (address(above),),
            list(map(address, finals)),
            list(map(address, initial)),
            (address(ih), *stage_addresses(cell, H, hh, hr)),
            (address(x), address(bias_ih), address(bias_hh)),
            cpu.grad_vectors(cell, H, v),
        )
        if self._complete:
            after = (output.flatten(0, -2), *history)
            cpu.complete_backward(self.sizes, grads, initial, gates, kept, input.flatten(0, -2), before, weights, after)
        return [*grads, *initial]
