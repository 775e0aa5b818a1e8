"""Cells that stand in for torch.nn's, and what they share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .shared import SRNS, check_agreement, checked_engine, named, pair, plain_states, whole


class CellBase(nn.RNNCellBase):
    """What RNNCell, GRUCell and LSTMCell share: one step of a sequence."""

    engine: str = "auto"
    _name: str
    _packed: ops.Remembered | None = None
    _weight_names: tuple[str, ...] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, num_chunks: int, device: Any, dtype: Any, *, engine: str = "auto"
    ) -> None:
        checked_engine(engine)
        super().__init__(input_size, hidden_size, bias, num_chunks, device=device, dtype=dtype)
        self.engine = engine

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", engine={self.engine}" if self.engine != "auto" else "")

    @property
    def _cell(self) -> str:
        raise NotImplementedError

    def _sequences(self) -> list[str]:
        return ["step"]

    def _check_ranks(self, input: Tensor, hx: Any) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(f"{self._name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"{self._name}: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")

    def _split(self, hx: Any) -> Sequence[Tensor]:
        return (hx,)

    def _prepare(self, input: Tensor, hx: Any) -> tuple[Tensor, Sequence[Tensor] | None, list[Any]]:
        """Check what forward was given; return the input ``(B, I)``, the states ``(B, H)``, if any, and the weights."""
        self._check_ranks(input, hx)
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
        weights, hidden_size = named(self, self._weight_names), self.hidden_size
        batch, input_size = input.shape
        if input_size != weights[0].size(1):
            raise RuntimeError(f"input has inconsistent input_size: got {input_size} expected {weights[0].size(1)}")
        if hx is None:
            states: Sequence[Tensor] | None = None
        else:
            states = self._split(hx)
            if unbatched:
                states = [state.unsqueeze(0) for state in states]
            for index, state in enumerate(states):
                if state.size(0) != batch:
                    raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {state.size(0)}")
                if state.size(1) != hidden_size:
                    raise RuntimeError(f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {hidden_size}")
        check_agreement(input, states or (), weights[0])
        return input, states, weights

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _again(self, input: Any, hx: Any) -> Sequence[Tensor] | None:
        """What :meth:`_step` gives for a batch, at less cost, where such a step was made before."""
        if torch.compiler.is_compiling() or type(input) is not Tensor or input.dim() not in (1, 2):
            return None
        weights, parameters = [], self._parameters
        for name in self._weight_names:
            weights.append(weight := parameters.get(name))
            if weight is None and name not in parameters and getattr(self, name, None) is not None:
                return None  # it is made anew whenever it is asked for: once a step
        states = plain_states(self._cell, hx, input.dim())
        if states is None:
            return None
        place = self._packed
        if place is None:
            place = self._packed = ops.Remembered()
        if input.dim() == 2:
            return ops.again(self._cell, input, states, weights, self.engine, False, place)
        rows = [state.unsqueeze(0) for state in states]
        found = ops.again(self._cell, input.unsqueeze(0), rows, weights, self.engine, False, place)
        return None if found is None else [state.squeeze(0) for state in found]

    def _step(self, input: Tensor, hx: Any) -> Sequence[Tensor]:
        found = self._again(input, hx)
        if found is not None:
            return found
        data, states, weights = self._prepare(input, hx)
        six = ops.Weights(*weights, *[None] * (len(ops.Weights._fields) - len(weights)))
        _, *finals = ops.run(ops.Call(self._cell, data.unsqueeze(0), states, *six, engine=self.engine), is_step=True)
        return [state.squeeze(0) for state in finals] if input.dim() == 1 else finals


class RNNCell(CellBase):
    r"""One step of a simple recurrent network (Elman 1990), as ``torch.nn.RNNCell``.

    .. math:: h' = f(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    Args:
        input_size, hidden_size, bias, nonlinearity, device, dtype: as torch.nn.RNNCell. ``nonlinearity`` is also "sigmoid" or "identity".
        engine: keyword only; see :func:`rnnkernels.ops.sequence`.

    Shape:
        * input: ``(B, I)``, or ``(I)`` unbatched. hx: ``(B, H)`` or ``(H)``; zeros if None. Returns h', as hx.

    Dtypes: float64, float32, bfloat16, float16; input, hx and weights share one.

    Raises:
        ValueError: a wrong engine; input or hx not 1-D or 2-D.
        RuntimeError: an unknown nonlinearity, in forward; wrong sizes, dtypes or devices.

    >>> import torch, rnnkernels
    >>> rnnkernels.RNNCell(3, 5, nonlinearity="relu")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    nonlinearity: str
    _name = "RNNCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        engine: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype, engine=engine)
        self.nonlinearity = nonlinearity

    @property
    def _cell(self) -> str:
        if self.nonlinearity not in SRNS:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"srn_{self.nonlinearity}"

    @whole
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'; see the class for shapes and errors."""
        return self._step(input, hx)[0]


class GRUCell(CellBase):
    r"""One step of a gated recurrent unit (Cho 2014, reset after the matrix product), as ``torch.nn.GRUCell``.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.GRUCell.
        engine: keyword only; see :func:`rnnkernels.ops.sequence`.

    Shapes, dtypes and errors: as :class:`RNNCell`.

    >>> import torch, rnnkernels
    >>> rnnkernels.GRUCell(3, 5)(torch.zeros(3)).shape
    torch.Size([5])
    """

    _name = "GRUCell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *, engine: str = "auto"
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 3, device, dtype, engine=engine)

    @property
    def _cell(self) -> str:
        return "gru"

    @whole
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'; see the class for shapes and errors."""
        return self._step(input, hx)[0]


class PairCellBase(CellBase):
    """A step of a cell of two states, h and c."""

    def _check_ranks(self, input: Tensor, hx: Any) -> None:
        super()._check_ranks(input, None)
        for index, state in enumerate(() if hx is None else hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"{self._name}: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")

    def _split(self, hx: Any) -> Sequence[Tensor]:
        return pair(hx, "lstm_cell")

    @whole
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return (h', c'); see the class for shapes and errors."""
        h, c = self._step(input, hx)
        return h, c


class LSTMCell(PairCellBase):
    r"""One step of an LSTM (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000), as ``torch.nn.LSTMCell``.

    .. math::
        i, f, o &= \sigma(W_{i*} x + b_{i*} + W_{h*} h + b_{h*}) \\
        g &= \tanh(W_{ig} x + b_{ig} + W_{hg} h + b_{hg}) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    Args:
        input_size, hidden_size, bias, device, dtype: as torch.nn.LSTMCell.
        engine: keyword only; see :func:`rnnkernels.ops.sequence`.

    Shapes, dtypes and errors: as :class:`RNNCell`, but hx is a pair (h, c) and so is what the cell returns.

    >>> import torch, rnnkernels
    >>> h, c = rnnkernels.LSTMCell(3, 5)(torch.zeros(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    _name = "LSTMCell"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *, engine: str = "auto"
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 4, device, dtype, engine=engine)

    @property
    def _cell(self) -> str:
        return "lstm"
