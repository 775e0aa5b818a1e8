"""Weights that stay packed between calls of the CPU engine, for inference, the recurrent ones narrower where asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .cells import Weights, empty

__all__ = ["Packed", "weight_type"]

_NARROW = {torch.bfloat16: 1, torch.int8: 2}


def weight_type(weight_dtype: torch.dtype | None, dtype: torch.dtype) -> int:
    """As the compiled module numbers them; 0: the numbers that the engine computes with."""
    if weight_dtype is None or (weight_dtype == dtype and weight_dtype not in _NARROW):
        return 0
    if weight_dtype not in _NARROW or dtype == torch.float64:
        own = "torch.float64" if dtype == torch.float64 else f"{dtype} as the layer's, torch.bfloat16 or torch.int8"
        raise ValueError(f"weight_dtype: expected {own}, got {weight_dtype}")
    return _NARROW[weight_dtype]


class Packed:
    """The packed weights of one layer and direction.

    They are packed anew for other tensors, and after a change that torch counts; a write through ``.data`` it does not count. A copy starts
    with none.
    """

    def __init__(self, weight_dtype: torch.dtype) -> None:
        self.weight_dtype = weight_dtype
        self._of: tuple[Tensor, ...] = ()
        self._marks: list[tuple[int, int]] = []
        self._storages: list[torch.UntypedStorage] = []  # held, so that nothing else comes to lie where the weights lay
        self._found: dict[tuple[int, ...], Tensor] = {}

    def memory(self, task: _C.Problem, weights: Weights) -> tuple[Tensor, Callable[[], None] | None]:
        """Where they lie and, where they are yet to be packed, what to call once they are, so that no other thread finds them before."""
        matrices = tuple(w for w in (weights.ih, weights.hh, weights.hr) if w is not None)
        marks = [(w.data_ptr(), -1 if w.is_inference() else w._version) for w in matrices]
        same = len(matrices) == len(self._of) and all(a is b for a, b in zip(matrices, self._of, strict=True)) and marks == self._marks
        if not same or any(version < 0 for _, version in marks):  # inference tensors count no versions
            self._of, self._marks, self._found = matrices, marks, {}
            self._storages = [w.untyped_storage() for w in matrices]
        found, (bytes, shape) = self._found, _C.packing(task)
        if (memory := found.get(shape)) is not None:
            return memory, None
        memory = empty(torch.empty(0, dtype=torch.uint8, device="cpu"), (bytes,))
        # Should the weights have changed by then, this dictionary is nobody's any more.
        return memory, lambda: found.update({shape: memory})

    def __reduce__(self) -> Any:
        return type(self), (self.weight_dtype,)
