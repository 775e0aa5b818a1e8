"""Layers of cells that a user writes: one page of maths in C++, compiled when it is loaded."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import ops
from .modules.cells import CellBase
from .modules.shared import whole
from .variants import _Variant, _VariantCell

__all__ = ["load_cell"]


def _states(hx: Any, module: Any) -> Sequence[Tensor]:
    names = ops.CELLS[module._page].states
    if isinstance(hx, Tensor):
        raise TypeError(f"hx: expected a tuple of tensors ({', '.join(names)}), got a tensor")
    if len(hx) != len(names):
        raise RuntimeError(f"hx: expected {len(names)} tensors ({', '.join(names)}), got {len(hx)}")
    return tuple(hx)


class _Own:
    """What the layer and the step of a loaded cell share."""

    _page: str

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so that a pickle names the page and makes it again; a subclass is its module's matter.
        layer = _classes(self._page)
        if type(self) not in (layer, layer.Cell):
            return super().__reduce_ex__(protocol)
        return _restore, (ops.source_of(self._page), isinstance(self, CellBase)), super().__reduce_ex__(protocol)[2]


def _restore(source: str, step: bool) -> Any:
    layer = load_cell(source)
    return object.__new__(layer.Cell if step else layer)


class _OwnLayer(_Own, _Variant):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self._page, *args, **kwargs)


class _OwnTupleLayer(_OwnLayer):
    """A layer of a cell of several states."""

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.hidden_size,) * len(ops.CELLS[self._page].states)

    def _split(self, hx: Any, name: str = "hx") -> Sequence[Tensor]:
        return _states(hx, self)

    def _join(self, states: Sequence[Tensor]) -> Any:
        return tuple(states)

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        """Raise, with torch.nn's texts, unless the shapes agree."""
        self.check_input(input, batch_sizes)
        for state in hidden:
            self.check_hidden_size(state, self.get_expected_hidden_size(input, batch_sizes))

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        """The states with their rows in another order."""
        return hx if permutation is None else tuple(state.index_select(1, permutation) for state in _states(hx, self))


class _OwnStep(_Own, _VariantCell):
    pass


class _OwnTupleStep(_OwnStep):
    """A step of a cell of several states."""

    def _check_ranks(self, input: Tensor, hx: Any) -> None:
        super()._check_ranks(input, None)
        for index, state in enumerate(() if hx is None else _states(hx, self)):
            if state.dim() not in (1, 2):
                raise ValueError(f"{self._name}: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")

    def _split(self, hx: Any) -> Sequence[Tensor]:
        return _states(hx, self)

    @whole
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Return the states after the step; shapes and errors as :class:`rnnkernels.LSTMCell`."""
        return tuple(self._step(input, hx))


def load_cell(source: str | os.PathLike[str], *, cuda: bool | None = None) -> Any:
    r"""Compile a cell of one's own and return its layer class, whose attribute ``Cell`` is the class of a single step.

    A cell is one page of C++: a struct that says which linear maps feed it, and computes a step of a single unit from their sums; then
    the line ``RNN_CELL(name, HOT, struct)``. ``cells/contract.h`` among the installed headers says what a page is. It needs no backward:
    without one, gradients come from dual numbers. The first call takes some seconds of a C++17 compiler (``CXX``, or else c++); later ones
    find the result in a cache by content (``RNNKERNELS_CACHE``, or else ``~/.cache/rnnkernels``).

    The class takes what :class:`rnnkernels.GRU` takes, has the same parameters (``weight_v_l0`` are the page's vectors), runs on the same
    engines in the same dtypes, and so in ``python -m rnnkernels verify --load``. A cell of several states takes and returns hx as a tuple.

    Args:
        source: the page, or a path to it.
        cuda: whether to compile it for a GPU now, with nvcc (``CUDACXX``); otherwise that is done when it first runs on one. HOT pages
            run persistent there, COLD ones stepwise.

    Raises:
        FileNotFoundError: no such file. ValueError: not one RNN_CELL line, or a name that another cell has. RuntimeError: no compiler, or a
            page that does not compile, with the compiler's words.

    A unit with one gate (Zhou et al. 2016, the minimal gated unit, with the reset after the product):

    >>> import torch, rnnkernels
    >>> MinimalGatedUnit = rnnkernels.load_cell('''
    ... struct MinimalGated {
    ...   static constexpr Slot slots[] = {{"f", X | H}, {"n", X}, {"m", H}};
    ...   static constexpr const char* states[] = {"h"};
    ...   static constexpr PerUnit vectors[] = {{"b_hn", 2}};
    ...   template <int S, class V>
    ...   RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V*) {
    ...     const V f = sigmoid(a[0]), n = tanh(fma(f, a[2] + w[0], a[1]));
    ...     s1[0] = fma(f, n - s[0], s[0]);
    ...   }
    ... };
    ... RNN_CELL(minimal_gated, HOT, MinimalGated)
    ... ''')
    >>> layer = MinimalGatedUnit(3, 5, num_layers=2, bidirectional=True)
    >>> output, h_n = layer(torch.zeros(7, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 10]), torch.Size([4, 2, 5]))
    """
    return _classes(ops.load_page(source, cuda))


@functools.cache
def _classes(cell: str) -> Any:
    spec = ops.CELLS[cell]
    title = "".join(part.capitalize() for part in cell.split("_"))
    many = len(spec.states) > 1
    facts = {"_page": cell, "__module__": __name__}
    step = type(f"{title}Cell", (_OwnTupleStep if many else _OwnStep,), {**facts, "__doc__": f"One step of the loaded cell {cell!r}."})
    doc = f"A stack of the loaded cell {cell!r}; row blocks {', '.join(name for name, x, h, *_ in spec.slots if x or h)}."
    return type(title, (_OwnTupleLayer if many else _OwnLayer,), {**facts, "__doc__": doc, "Cell": step})
