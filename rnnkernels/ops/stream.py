"""A stack of layers kept ready to take one step at a time: by the CPU engine, or step by step through :func:`rnnkernels.ops.sequence`.

Weights are those of :func:`rnnkernels.functional.stack`, states one ``[L, B, ·]`` a state of the cell. Wrong weights raise as in
``ops.sequence``; nothing else is checked here.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _C
from . import sequence
from .cells import Rows, Sizes, Weights, address, dense, empty, place_given, problem, stage_blocks, vectors
from .checks import Call, checked
from .packed import check, weight_type

__all__ = ["Stack", "stack"]


class Stack(Protocol):
    """What every kind of stack is to its user."""

    widths: list[int]  # of the states

    def pack(self, weights: Seq[Seq[Any]]) -> None:
        """Take the weights as they are now."""

    def load(self, states: Seq[Tensor] | None, rows: Seq[int]) -> None:
        """Set the states of these rows; None: to zero."""

    def store(self) -> list[Tensor]:
        """All states, nobody else's memory."""

    def run(self, x: Tensor) -> Tensor:
        """One step of all layers, ``[B, I]`` to ``[B, P]``."""


def stack(
    cell: str,
    lead: tuple[int, ...],
    weights: Seq[Seq[Any]],
    engine: str,
    constants: Seq[Tensor] = (),
    weight_dtype: torch.dtype | None = None,
) -> Stack:
    """Its states are yet to be loaded. ``lead``: the dimensions of a step before its numbers, ``(B,)`` or, unbatched, none.

    ``constants``: what a cell that is given numbers has at every step, ``[k·H]`` for k slots. ``weight_dtype``: how the CPU engine holds
    the recurrent matrices.
    """
    layers = _layers(cell, lead, weights, engine, constants)
    if layers[0][0].engine == "cpu":
        return _Packed(cell, lead, layers, "cpu", constants, weight_dtype)
    if weight_dtype is not None:
        check(weight_dtype, layers[0][0].engine, weights[0][0].device)
    return _Stepped(cell, lead, layers, engine if engine in ("torch", "traced") else "stepwise", constants)


def _layers(cell: str, lead: tuple[int, ...], weights: Seq[Seq[Any]], engine: str, constants: Seq[Tensor]) -> list[tuple[Sizes, Weights]]:
    """Of each layer, the first one first; each is as wide as the next one's input."""
    layers: list[tuple[Sizes, Weights]] = []
    width = weights[0][0].shape[-1]
    for given in weights:
        of_layer = Weights(*given, *[None] * (len(Weights._fields) - len(given)))
        like = given[0].new_empty(1, *(lead or (1,)), width)
        sizes = checked(Call(cell, like, None, *of_layer, given=constants, engine=engine), concrete=True)
        layers.append((sizes, of_layer))
        width = sizes.output
    return layers


def _input_weight(weights: Weights) -> Tensor:
    assert weights.ih is not None
    return weights.ih


class _Stack:
    """What both kinds share: the layers that they were made of."""

    def __init__(self, cell: str, lead: tuple[int, ...], layers: Seq[tuple[Sizes, Weights]], engine: str, constants: Seq[Tensor]) -> None:
        self._cell, self._lead, self._engine, self._constants = cell, lead, engine, constants
        self._sizes, self._shapes = [s for s, _ in layers], [_input_weight(w).shape for _, w in layers]
        self._like = _input_weight(layers[0][1]).new_empty(0)
        self.widths = self._sizes[0].widths

    def _again(self, weights: Seq[Seq[Any]]) -> list[tuple[Sizes, Weights]]:
        layers = _layers(self._cell, self._lead, weights, self._engine, self._constants)
        for i, (s, now) in enumerate(layers):
            if (
                _input_weight(now).shape != self._shapes[i]
                or s.output != self._sizes[i].output
                or _input_weight(now).dtype != self._like.dtype
            ):
                was = f"weight_ih {tuple(self._shapes[i])} of {self._like.dtype}, output {self._sizes[i].output}"
                got = f"weight_ih {tuple(_input_weight(now).shape)} of {_input_weight(now).dtype}, output {s.output}"
                raise RuntimeError(f"weights of layer {i}: expected {was}, as when the stream was made, got {got}: make another stream")
        return layers


class _Packed(_Stack):
    """By the CPU engine: weights packed once, states kept as numbers, so that half types lose nothing from step to step."""

    def __init__(
        self,
        cell: str,
        lead: tuple[int, ...],
        layers: Seq[tuple[Sizes, Weights]],
        engine: str,
        constants: Seq[Tensor],
        weight_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(cell, lead, layers, engine, constants)
        # Not by the engine's name: its single steps leave their products to torch.
        kind = weight_type(weight_dtype, self._like.dtype)
        own = [s._replace(engine="stream", weight_type=kind) for s, _ in layers]
        tasks = [problem(s, self._like.dtype, _input_weight(w).shape[1], Rows(), False) for s, (_, w) in zip(own, layers, strict=True)]
        self._native = _C.Stream(tasks)
        self._workspace = empty(torch.empty(0, dtype=torch.uint8, device="cpu"), (self._native.bytes,))
        self._native.place(self._workspace.data_ptr())
        self._output = self._like.new_empty(*lead, self._sizes[-1].output)
        self._step = self._native.step
        self._take(layers)

    def pack(self, weights: Seq[Seq[Any]]) -> None:
        self._take(self._again(weights))

    def _take(self, layers: Seq[tuple[Sizes, Weights]]) -> None:
        for i, (s, of_layer) in enumerate(layers):
            dense = of_layer.dense()
            blocks = stage_blocks(s.cell, s.hidden, dense.hh, dense.hr)
            addresses = [address(block) for block in blocks], vectors(s.cell, s.hidden, dense)
            given = place_given(s, self._constants, ())
            self._native.pack(i, address(dense.ih), address(dense.bias_ih), address(dense.bias_hh), *addresses, given)

    def load(self, states: Seq[Tensor] | None, rows: Seq[int]) -> None:
        given = [dense(state) for state in states or ()]
        self._native.load([state.data_ptr() for state in given], rows)

    def store(self) -> list[Tensor]:
        states = [self._like.new_empty(len(self._sizes), self._sizes[0].batch, width) for width in self.widths]
        self._native.store([state.data_ptr() for state in states])
        return states

    def run(self, x: Tensor) -> Tensor:
        x, y = dense(x), torch.empty_like(self._output)
        self._step(x.data_ptr(), y.data_ptr())
        return y


class _Stepped(_Stack):
    """One call of ``ops.sequence`` a layer and step, on any device; the states are kept in the weights' dtype."""

    def __init__(self, cell: str, lead: tuple[int, ...], layers: Seq[tuple[Sizes, Weights]], engine: str, constants: Seq[Tensor]) -> None:
        super().__init__(cell, lead, layers, engine, constants)
        self._weights = [w for _, w in layers]
        self._states = [[self._like.new_empty(s.batch, width) for width in self.widths] for s in self._sizes]

    def pack(self, weights: Seq[Seq[Any]]) -> None:
        self._weights = [w for _, w in self._again(weights)]

    def load(self, states: Seq[Tensor] | None, rows: Seq[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self._like.device)
        for layer, kept in enumerate(self._states):
            for i, state in enumerate(kept):
                if states is None:
                    state.index_fill_(0, index, 0)
                else:
                    state.index_copy_(0, index, states[i][layer].index_select(0, index))

    def store(self) -> list[Tensor]:
        return [torch.stack(column) for column in zip(*self._states, strict=True)]

    def run(self, x: Tensor) -> Tensor:
        y = x.reshape(1, -1, x.shape[-1])
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            for i, of_layer in enumerate(self._weights):
                y, *self._states[i] = sequence(self._cell, y, self._states[i], *of_layer, given=self._constants, engine=self._engine)
        return y.view(*self._lead, -1)
