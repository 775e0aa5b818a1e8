"""Layers and steps of cells that torch.nn lacks, in torch.nn's grammar.

Constructors, attributes, shapes, dtypes and errors are those of ``rnnkernels.GRU`` and ``GRUCell`` for cells of one state, of
``rnnkernels.LSTM`` and ``LSTMCell`` for those of two. Weights have torch.nn's names, ``weight_ih_l0`` and so on, their row blocks in the
order of the equation; a cell that multiplies states by a number a unit has ``weight_v_l0`` too.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn

from . import ops
from .modules import _Cell, _Layer, _named, _PairCell, _PairLayer

__all__ = [
    "CoupledLSTM",
    "CoupledLSTMCell",
    "GRUResetBefore",
    "GRUResetBeforeCell",
    "IndRNN",
    "IndRNNCell",
    "NoForgetLSTM",
    "NoForgetLSTMCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "ResidualRNN",
    "ResidualRNNCell",
]

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_v")


def _reshape(module: Any, cell: str, suffix: str = "") -> list[str]:
    """Give the weights that torch.nn's base has made for an SRN the shapes of `cell`'s; return the names of those that it has."""
    spec, H = ops.CELLS[cell], module.hidden_size
    made: Tensor = getattr(module, f"weight_ih{suffix}")
    biased = getattr(module, f"bias_ih{suffix}", None) is not None
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (spec.input_gates * H, made.shape[1])}
    if spec.hidden_gates:
        shapes["weight_hh"] = (spec.hidden_gates * H, H)
    if biased:
        shapes["bias_ih"] = (spec.input_gates * H,)
    if biased and spec.hidden_gates:
        shapes["bias_hh"] = (spec.hidden_gates * H,)
    if spec.learned:
        shapes["weight_v"] = (spec.learned * H,)
    for name in _NAMES:
        known = name + suffix in module._parameters
        module._parameters.pop(name + suffix, None)  # set anew, it comes last: torch.nn's order, layer by layer
        if name in shapes:
            setattr(module, name + suffix, nn.Parameter(made.new_empty(shapes[name])))
        elif known:
            module.register_parameter(name + suffix, None)
    return [name + suffix for name in shapes]


def _with_nonlinearity(family: str, nonlinearity: str) -> str:
    cell = f"{family}_{nonlinearity}"
    if cell not in ops.CELLS:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu', 'sigmoid' or 'identity'.")
    return cell


class _Variant(_Layer):
    """A layer of a cell of one state."""

    def __init__(self, cell: str, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError(f"proj_size argument is only supported for LSTM, not {type(self).__name__}")
        super().__init__("RNN_TANH", *args, **kwargs)
        self.mode = cell.upper()
        directions = ("", "_reverse") if self.bidirectional else ("",)
        suffixes = [f"_l{layer}{direction}" for layer, direction in itertools.product(range(self.num_layers), directions)]
        self._all_weights = [_reshape(self, cell, suffix) for suffix in suffixes]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._argument_names = [[name + suffix for name in _NAMES] for suffix in suffixes]
        self.reset_parameters()

    @property
    def _cell(self) -> str:
        return self.mode.lower()

    @property
    def _rank_text(self) -> str:  # type: ignore[override]
        return type(self).__name__ + ": Expected input to be 2D or 3D, got {}D tensor instead"

    def _weights(self) -> list[list[Any]]:
        return [_named(self, names) for names in self._argument_names]


class _PairVariant(_PairLayer, _Variant):
    """A layer of a cell of two states."""


class _VariantCell(_Cell):
    """A step of a cell of one state."""

    _weight_names = _NAMES
    _page: str

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *, engine: str = "auto"
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype, engine=engine)
        _reshape(self, self._cell)
        self.reset_parameters()

    @property
    def _cell(self) -> str:
        return self._page

    @property
    def _name(self) -> str:  # type: ignore[override]
        return type(self).__name__

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'; shapes and errors as :class:`rnnkernels.GRUCell`."""
        return self._step(input, hx)[0]


class _PairVariantCell(_PairCell, _VariantCell):  # type: ignore[misc]
    """A step of a cell of two states."""


class PeepholeLSTM(_PairVariant):
    r"""A stack of LSTMs whose gates see the cell state (Gers, Schraudolph & Schmidhuber 2002).

    Row blocks i, f, g, o; weight_v: p_i, p_f, p_o.

    .. math::
        i_t &= \sigma(W_i x_t + U_i h_{t-1} + b_i + p_i \odot c_{t-1}) \\
        f_t &= \sigma(W_f x_t + U_f h_{t-1} + b_f + p_f \odot c_{t-1}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        o_t &= \sigma(W_o x_t + U_o h_{t-1} + b_o + p_o \odot c_t) \qquad h_t = o_t \odot \tanh(c_t)

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.PeepholeLSTM(3, 5, num_layers=2)
    >>> output, (h_n, c_n) = layer(torch.zeros(7, 2, 3))
    >>> output.shape, layer.weight_v_l0.shape
    (torch.Size([7, 2, 5]), torch.Size([15]))
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("lstm_peephole", *args, **kwargs)


class CoupledLSTM(_PairVariant):
    r"""A stack of LSTMs whose input gate is the forget gate's complement (CIFG; Greff et al. 2017). Row blocks i, g, o.

    .. math:: c_t = (1 - i_t) \odot c_{t-1} + i_t \odot g_t \qquad h_t = o_t \odot \tanh(c_t)

    >>> import torch, rnnkernels
    >>> rnnkernels.CoupledLSTM(3, 5)(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("lstm_coupled", *args, **kwargs)


class NoForgetLSTM(_PairVariant):
    r"""A stack of LSTMs without a forget gate (Hochreiter & Schmidhuber 1997). Row blocks i, g, o.

    .. math:: c_t = c_{t-1} + i_t \odot g_t \qquad h_t = o_t \odot \tanh(c_t)

    >>> import torch, rnnkernels
    >>> rnnkernels.NoForgetLSTM(3, 5)(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("lstm_no_forget", *args, **kwargs)


class GRUResetBefore(_Variant):
    r"""A stack of gated recurrent units that reset before the matrix product, as published (Cho et al. 2014).

    Row blocks r, z, n, as torch.nn.GRU, whose weights it can load; two products a step, one after the other.

    .. math::
        n_t = \tanh(W_n x_t + b_{in} + U_n (r_t \odot h_{t-1}) + b_{hn}) \qquad h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.GRUResetBefore(3, 5)
    >>> _ = layer.load_state_dict(torch.nn.GRU(3, 5).state_dict())
    >>> layer(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("gru_reset_before", *args, **kwargs)


class ResidualRNN(_Variant):
    r"""A stack of residual simple recurrent networks; without a matrix U if not ``recurrent``.

    .. math:: h_t = h_{t-1} + f(W x_t + b + U h_{t-1}) \qquad\text{or}\qquad h_t = h_{t-1} + f(W x_t + b)

    Args:
        nonlinearity: f, "tanh", "relu", "sigmoid" or "identity" (keyword only).
        recurrent: whether there is a U (keyword only).

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.ResidualRNN(3, 5, nonlinearity="relu", recurrent=False)
    >>> layer(torch.zeros(7, 2, 3))[0].shape, [name for name, _ in layer.named_parameters()]
    (torch.Size([7, 2, 5]), ['weight_ih_l0', 'bias_ih_l0'])
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", recurrent: bool = True, **kwargs: Any) -> None:
        super().__init__(_with_nonlinearity("residual" if recurrent else "residual_input", nonlinearity), *args, **kwargs)
        self.nonlinearity, self.recurrent = nonlinearity, recurrent


class IndRNN(_Variant):
    r"""A stack of independently recurrent networks (Li et al. 2018); weight_v: u.

    .. math:: h_t = f(W x_t + b + u \odot h_{t-1})

    Args:
        nonlinearity: f, "relu", "tanh", "sigmoid" or "identity" (keyword only).

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.IndRNN(3, 5)
    >>> layer(torch.zeros(7, 2, 3))[0].shape, [name for name, _ in layer.named_parameters()]
    (torch.Size([7, 2, 5]), ['weight_ih_l0', 'bias_ih_l0', 'weight_v_l0'])
    """

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        super().__init__(_with_nonlinearity("indrnn", nonlinearity), *args, **kwargs)
        self.nonlinearity = nonlinearity


class PeepholeLSTMCell(_PairVariantCell):
    """One step of :class:`PeepholeLSTM`.

    >>> import torch, rnnkernels
    >>> h, c = rnnkernels.PeepholeLSTMCell(3, 5)(torch.zeros(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    _page = "lstm_peephole"


class CoupledLSTMCell(_PairVariantCell):
    """One step of :class:`CoupledLSTM`.

    >>> import torch, rnnkernels
    >>> rnnkernels.CoupledLSTMCell(3, 5)(torch.zeros(3))[0].shape
    torch.Size([5])
    """

    _page = "lstm_coupled"


class NoForgetLSTMCell(_PairVariantCell):
    """One step of :class:`NoForgetLSTM`.

    >>> import torch, rnnkernels
    >>> rnnkernels.NoForgetLSTMCell(3, 5)(torch.zeros(3))[0].shape
    torch.Size([5])
    """

    _page = "lstm_no_forget"


class GRUResetBeforeCell(_VariantCell):
    """One step of :class:`GRUResetBefore`.

    >>> import torch, rnnkernels
    >>> rnnkernels.GRUResetBeforeCell(3, 5)(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    _page = "gru_reset_before"


class ResidualRNNCell(_VariantCell):
    """One step of :class:`ResidualRNN`.

    >>> import torch, rnnkernels
    >>> rnnkernels.ResidualRNNCell(3, 5, nonlinearity="relu")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", recurrent: bool = True, **kwargs: Any) -> None:
        self._page = _with_nonlinearity("residual" if recurrent else "residual_input", nonlinearity)
        super().__init__(*args, **kwargs)
        self.nonlinearity, self.recurrent = nonlinearity, recurrent


class IndRNNCell(_VariantCell):
    """One step of :class:`IndRNN`.

    >>> import torch, rnnkernels
    >>> rnnkernels.IndRNNCell(3, 5, nonlinearity="tanh")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        self._page = _with_nonlinearity("indrnn", nonlinearity)
        super().__init__(*args, **kwargs)
        self.nonlinearity = nonlinearity
