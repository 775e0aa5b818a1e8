"""A layer run step by step, for input that arrives as it goes: sensors, audio, tokens being generated."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import functional, ops
from .ops.stream import Stack, stack

__all__ = ["Stream"]

_version = operator.attrgetter("_version")


class _Normed:
    """A stack of layers whose input gates are normalised outside the engine: one call of the stack a step."""

    def __init__(
        self, cell: str, lead: tuple[int, ...], weights: Sequence[Sequence[Any]], engine: str, constants: Sequence[Tensor], layer_norm: str
    ) -> None:
        self._cell, self._lead, self._constants, self._engine, self._layer_norm = cell, lead, constants, engine, layer_norm
        like: Tensor = weights[0][0]
        H = weights[0][1].shape[0] // ops.CELLS[cell].hidden_gates
        self.widths = [weights[0][1].shape[1], *[H] * (len(ops.CELLS[cell].states) - 1)]
        self._states = [like.detach().new_zeros(len(weights), *(lead or (1,)), width) for width in self.widths]
        self.pack(weights)

    def pack(self, weights: Sequence[Sequence[Any]]) -> None:
        self._weights = weights

    def load(self, states: Sequence[Tensor] | None, rows: Sequence[int]) -> None:
        index = torch.tensor(rows, dtype=torch.int64, device=self._states[0].device)
        for i, kept in enumerate(self._states):
            if states is None:
                kept.index_fill_(1, index, 0)
            else:
                kept.index_copy_(1, index, states[i].index_select(1, index))

    def store(self) -> list[Tensor]:
        return [state.clone() for state in self._states]

    def run(self, x: Tensor) -> Tensor:
        given = [self._constants] * len(self._weights) if self._constants else None
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            y, *self._states = functional.stack(
                self._cell,
                x.reshape(1, -1, x.shape[-1]),
                self._states,
                self._weights,
                given=given,
                engine=self._engine,
                layer_norm=self._layer_norm,
            )
        return y.view(*self._lead, -1)


class Stream:
    """A stack of layers that takes one step at a time. Made by a layer's ``stream(batch_size, hx)``.

    Weights are packed once, states stay inside and change in place, nothing is recorded for autograd, dropout is not applied and autocast
    does not reach it. On a CPU the results have the bits that the layer gives for the whole sequence in one call (of two steps or more, and
    with the stream's instruction set); but not of layers with a layer norm, which run no quicker than by calls of the layer. On another
    device, and with ``engine="stepwise"`` or ``"torch"``, each step is one call of :func:`rnnkernels.ops.sequence` a layer; what would be a
    persistent launch is stepwise.

    A change of the weights in place (an optimizer's step, ``load_state_dict``, ``copy_``) is noticed at the next step. Not noticed, until
    :meth:`refresh`: writes through ``.data``, Parameters replaced (also by ``layer.to(dtype)``), weights that are computed from others
    (parametrizations, weight drop), and weights that are inference tensors.

    On a CPU it keeps the instruction set and the number of threads that it was made with. It cannot be copied or pickled, and is one
    thread's at a time.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.LSTM(3, 5)
    >>> stream, x = layer.stream(batch_size=2), torch.randn(4, 2, 3)
    >>> steps = torch.stack([stream.step(x[t]) for t in range(4)])
    >>> torch.equal(steps, layer(x)[0])
    True
    >>> h, c = stream.state
    >>> h.shape
    torch.Size([1, 2, 5])
    """

    def __init__(
        self,
        cell: str,
        weights: Callable[[], Sequence[Sequence[Any]]],
        batch_size: int | None,
        hx: Any,
        engine: str,
        split: Callable[[Any, str], Sequence[Tensor]],
        join: Callable[[Sequence[Tensor]], Any],
        constants: Sequence[Tensor] = (),
        layer_norm: str | None = None,
        parameters: Callable[[], Sequence[Sequence[Any]]] | None = None,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """``weights`` gives those of each layer as they are now; ``split`` and ``join`` take hx apart and make it; ``constants`` are what
        the cell is given at every step; ``layer_norm`` as :func:`rnnkernels.functional.stack` has it; ``parameters`` gives what ``weights``
        are made of, where they are made; ``weight_dtype`` as the layers have it.
        """
        if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
            raise ValueError(f"batch_size: expected a positive int, or None for unbatched steps, got {batch_size!r}")
        now = weights()
        like: Tensor = now[0][0]
        lead = () if batch_size is None else (batch_size,)
        self._weights, self._split, self._join, self._batch = weights, split, join, batch_size
        self._parameters = parameters or weights
        self._stack: Stack
        if layer_norm is None:
            self._stack = stack(cell, lead, now, engine, constants, weight_dtype)
        elif weight_dtype is not None:
            raise ValueError(f"weight_dtype: expected None for a stream of layers with a layer norm, got {weight_dtype}")
        else:
            self._stack = _Normed(cell, lead, now, engine, constants, layer_norm)
        self._run = self._stack.run
        self._shape, self._dtype, self._device = (*lead, like.shape[1]), like.dtype, like.device
        self._state_shapes = [(len(now), *lead, width) for width in self._stack.widths]
        self._initial = None if hx is None else [state.clone() for state in self._checked_states("hx", hx)]
        self._watch()
        self.reset()

    def step(self, x: Tensor) -> Tensor:
        """Run all layers for one step.

        Args:
            x: ``[B, I]``, or ``[I]`` unbatched, with the weights' dtype and device.

        Returns:
            The last layer's output, ``[B, P]`` or ``[P]``, a new tensor at each step.

        Raises:
            RuntimeError: a wrong shape, dtype or device of x. TypeError: x is no tensor.
        """
        if not isinstance(x, Tensor) or x.shape != self._shape or x.dtype is not self._dtype or x.device != self._device:
            self._refuse("x", x, self._shape)
        # Each version only grows, so their sum tells.
        if sum(map(_version, self._watched)) != self._versions:
            self.refresh()
        return self._run(x)

    @property
    def state(self) -> Any:
        """The states after the last step: a copy, in the shape of the layer's hx: ``[L, B, P]``, for LSTM and the like a pair of this and c
        ``[L, B, H]``; unbatched without B.

        Assigning takes a copy, and raises ``RuntimeError`` for a wrong shape, dtype or device, ``TypeError`` for what is no tensor, or no
        pair where one is expected. The engine carries float16 and bfloat16 states as float32; here they are rounded.
        """
        states = self._stack.store()
        return self._join([state.squeeze(1) for state in states] if self._batch is None else states)

    @state.setter
    def state(self, hx: Any) -> None:
        self._stack.load(self._checked_states("state", hx), range(self._batch or 1))

    def reset(self, rows: Tensor | None = None) -> None:
        """Put states back to what they were at the start, the hx given to ``stream`` or zeros.

        Args:
            rows: which rows: booleans ``[B]``, or int64 indices of any number from 0 to B - 1; None: all.

        Raises:
            RuntimeError: rows of a wrong shape or dtype, or of an unbatched stream. TypeError: rows that are no tensor. IndexError: an
                index out of range.
        """
        self._stack.load(self._initial, range(self._batch or 1) if rows is None else self._checked_rows(rows))

    def refresh(self) -> None:
        """Take the layer's weights as they are now. The states stay.

        Raises:
            RuntimeError: the weights have other sizes, another dtype or another device than when the stream was made.
        """
        now = self._weights()
        if now[0][0].device != self._device:
            raise RuntimeError(f"weights: expected device {self._device} as when the stream was made, got {now[0][0].device}")
        self._stack.pack(now)
        self._watch()

    def _watch(self) -> None:
        # Inference tensors count no versions.
        self._watched = [weight for layer in self._parameters() for weight in layer if weight is not None and not weight.is_inference()]
        self._versions = sum(map(_version, self._watched))

    def _refuse(self, name: str, tensor: Any, shape: tuple[int, ...]) -> NoReturn:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if tensor.shape != shape:
            raise RuntimeError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != self._dtype:
            raise RuntimeError(f"{name}: expected dtype {self._dtype} as the weights have, got {tensor.dtype}")
        raise RuntimeError(f"{name}: expected device {self._device} as the weights are on, got {tensor.device}")

    def _checked_states(self, name: str, hx: Any) -> list[Tensor]:
        """Raise, or return the states ``[L, B, ·]``."""
        states = self._split(hx, name)
        if not all(isinstance(state, Tensor) for state in states):
            raise TypeError(f"{name}: expected tensors, got {', '.join(type(state).__name__ for state in states)}")
        for state, shape in zip(states, self._state_shapes, strict=True):
            if state.shape != shape or state.dtype != self._dtype or state.device != self._device:
                self._refuse(name, state, shape)
        return [state.detach().unsqueeze(1) if self._batch is None else state.detach() for state in states]

    def _checked_rows(self, rows: Tensor) -> list[int]:
        if self._batch is None:
            raise RuntimeError("rows: expected None for an unbatched stream")
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows: expected a Tensor, got {type(rows).__name__}")
        if rows.dtype not in (torch.bool, torch.int64) or rows.dim() != 1 or (rows.dtype is torch.bool and len(rows) != self._batch):
            raise RuntimeError(
                f"rows: expected torch.bool of shape ({self._batch},) or 1-D torch.int64, got {rows.dtype} of shape {tuple(rows.shape)}"
            )
        indices: list[int] = (rows.nonzero().squeeze(1) if rows.dtype is torch.bool else rows).tolist()
        if any(not 0 <= index < self._batch for index in indices):
            raise IndexError(f"rows: expected indices from 0 to {self._batch - 1}, got {indices}")
        return indices

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Stream cannot be copied or pickled: make another with the layer's stream() and assign its state")
