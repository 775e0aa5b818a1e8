"""Weights that stay packed between calls of the CPU engine, for inference: unasked, and narrower where asked."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from .cells import Rows, Sizes, empty, problem

__all__ = ["Pack", "Packed", "Remembered", "check", "keep", "keeping", "weight_type"]

Packing = tuple[int, tuple[int, ...]]  # bytes of packed weights, and how they are cut

_NARROW = {torch.bfloat16: 1, torch.int8: 2}


def weight_type(weight_dtype: torch.dtype | None, dtype: torch.dtype) -> int:
    """As the compiled module numbers them; 0: the numbers that the engine computes with."""
    if weight_dtype is None or (weight_dtype == dtype and weight_dtype not in _NARROW):
        return 0
    if weight_dtype not in _NARROW or dtype == torch.float64:
        own = "torch.float64" if dtype == torch.float64 else f"{dtype} as the layer's, torch.bfloat16 or torch.int8"
        raise ValueError(f"weight_dtype: expected {own}, got {weight_dtype}")
    return _NARROW[weight_dtype]


def check(
    weight_dtype: torch.dtype, engine: str, device: torch.device, transformed: bool = False, training: bool = False, plain: bool = True
) -> None:
    """Raise unless weights may stay packed in such a call."""
    if engine not in ("auto", "cpu") or device.type != "cpu":
        raise RuntimeError(f"weight_dtype: expected None but for the CPU engine, got {weight_dtype} with engine {engine!r} on {device}")
    if transformed:
        raise RuntimeError(f"weight_dtype: expected None under a transform of torch.func or forward-mode derivatives, got {weight_dtype}")
    if training:
        raise RuntimeError(
            f"weight_dtype: {weight_dtype} is for inference, expected a call that needs no gradients: use torch.no_grad(), or None"
        )
    if not plain:
        raise RuntimeError(f"weight_dtype: {weight_dtype} is for eager calls on plain tensors: expected one, or None")


class Pack(enum.IntEnum):
    """What a call does about the packed weights that it is given, as the compiled module numbers it."""

    NEVER = 0
    ALL = 1
    NOTED = 2  # all, and it is noted of which weights each panel is made
    CHANGED = 3  # the panels whose weights are not those


# What nobody asked for is kept up to so many bytes a layer, direction and way to cut it.
_UNASKED = 64 << 20


@functools.lru_cache(maxsize=1024)
def _keeping(s: Sizes, dtype: torch.dtype, input_size: int, weight_dtype: torch.dtype | None) -> Sizes | None:
    keeps = s._replace(weight_type=weight_type(weight_dtype, dtype), keeps=True)
    if weight_dtype is None and _C.packing(problem(keeps, dtype, input_size, Rows(), False, 1))[0] > _UNASKED:
        return None
    return keeps


def keeping(s: Sizes, input: Tensor, packed: Packed | Remembered | None) -> Sizes | None:
    """The call as one that keeps packed weights; None: it is not to, and nobody has asked that it do."""
    if packed is None or s.engine != "cpu":
        return None
    return _keeping(s, input.dtype, input.shape[-1], packed.weight_dtype)


def _room(bytes: int) -> Tensor:
    return empty(torch.empty(0, dtype=torch.uint8, device="cpu"), (bytes,))


Found = dict[tuple[int, ...], Tensor]  # packed weights by how they are cut
_SHAPES = 2  # for batches that are cut differently


def keep(found: Found, packing: Packing, memory: Tensor) -> None:
    """What is packed now, and of the others the latest."""
    if len(found) >= _SHAPES:
        for old in list(found)[: len(found) + 1 - _SHAPES]:
            found.pop(old, None)
    found[packing[1]] = memory


_Key = tuple[torch.Size, bool, bool, bool]


class _Repeats(dict[_Key, Any]):
    """What is known of calls with these weights, by the input's shape, whether they train, whether they recompute and whether they are of
    two directions, of which these weights are the first's: a few, and no more once many were made in vain.
    """

    MOST, MADE = 16, 256

    def __init__(self) -> None:
        super().__init__()
        self._made = 0

    def __setitem__(self, key: _Key, repeat: Any) -> None:
        if len(self) >= self.MOST and key not in self:
            self.clear()
        self._made += 1
        super().__setitem__(key, repeat)

    @property
    def takes(self) -> bool:
        return self._made < self.MADE


class Remembered:
    """The packed weights of one layer and direction, kept unasked. A call looks at all weights and packs panels anew whose weights are not
    those that they were made of. It has the memory for itself meanwhile: another thread's call finds none. A copy starts with none.
    """

    weight_dtype = None

    def __init__(self) -> None:
        self._found: Found = {}
        self.repeats = _Repeats()

    def memory(self, packing: Packing, weights: Seq[Tensor | None]) -> tuple[Tensor, Pack, Found | None]:
        """Where they lie, what is to become of them, and where to :func:`keep` them once that is done, if anywhere."""
        bytes, shape = packing
        own = self._found.pop(shape, None)
        return (_room(bytes), Pack.NOTED, self._found) if own is None else (own, Pack.CHANGED, self._found)

    def __reduce__(self) -> Any:
        return type(self), ()


class _Kept(NamedTuple):
    matrices: tuple[Tensor, ...]
    marks: list[tuple[int, int]]
    storages: list[torch.UntypedStorage]  # held, so that nothing else comes to lie where the weights lay
    found: Found


class Packed:
    """The packed weights of one layer and direction, as asked for: for eager calls of the CPU engine without gradients and autocast; others
    raise. To look at all weights in each call, as :class:`Remembered` does, would take as long as narrow ones save.

    ``weight_dtype`` holds the recurrent weights: ``torch.bfloat16`` (relative error of each up to 2⁻⁸), ``torch.int8`` (with a factor for
    each row of U, error up to 1/254 of the row's largest), or the layer's own (nothing is rounded). The input's weights are not rounded.

    They are packed anew for other tensors, and after a change that torch counts. Not noticed, until the layer's ``flatten_parameters()``:
    writes through ``.data``, through numpy, through another tensor or in another process that shares their memory. Weights that are
    computed, not contiguous, or inference tensors are packed at each call. Up to two packings are kept, for batches that are cut
    differently. A copy starts with none.
    """

    def __init__(self, weight_dtype: torch.dtype) -> None:
        self.weight_dtype = weight_dtype
        self.repeats = _Repeats()
        self._kept = _Kept((), [], [], {})  # one record, read once and replaced at once, since calls may come from several threads

    def memory(self, packing: Packing, weights: Seq[Tensor | None]) -> tuple[Tensor, Pack, Found | None]:
        """As that of :class:`Remembered`; no other thread finds them before they are packed."""
        matrices = tuple(w for w in weights if w is not None and w.dim() == 2)
        marks = [(w.data_ptr(), -1 if w.is_inference() else w._version) for w in matrices]
        kept = self._kept
        same = len(matrices) == len(kept.matrices) and all(a is b for a, b in zip(matrices, kept.matrices, strict=True))
        if not same or marks != kept.marks or any(version < 0 for _, version in marks):  # inference tensors count no versions
            kept = self._kept = _Kept(matrices, marks, [w.untyped_storage() for w in matrices], {})
        found, (bytes, shape) = kept.found, packing
        if (memory := found.get(shape)) is not None:
            return memory, Pack.NEVER, None
        return _room(bytes), Pack.ALL, found

    def __reduce__(self) -> Any:
        return type(self), (self.weight_dtype,)
