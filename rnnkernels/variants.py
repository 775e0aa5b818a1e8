"""Layers and steps of cells that torch.nn lacks, in torch.nn's grammar.

Constructors, attributes, shapes, dtypes and errors are those of ``rnnkernels.GRU`` and ``GRUCell`` for cells of one state, of
``rnnkernels.LSTM`` and ``LSTMCell`` for those of two; with ``proj_size``, h_t = W_hr q_t, q_t what the equation calls h_t (Sak 2014).
Weights have torch.nn's names, ``weight_ih_l0`` and so on, their row blocks in the order of the equation; a cell that multiplies states by a
number a unit has ``weight_v_l0`` too.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from .cuts import Clock, clock
from .modules.cells import CellBase, PairCellBase
from .modules.layer import OF_ONE, OF_TWO, LayerBase, PairLayerBase, signed
from .modules.modifiers import MODIFIERS
from .modules.shared import whole
from .modules.weights import WEIGHT_NAMES, reset_norms, reshape

__all__ = [
    "ClockworkRNN",
    "CoupledLSTM",
    "CoupledLSTMCell",
    "DreamerGRU",
    "DreamerGRUCell",
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


@functools.lru_cache(maxsize=64)
def _kept_clock(periods: Sequence[int], module: int, steps: int, first: int) -> Clock:
    with torch.inference_mode(False):  # for what that mode makes can never be saved for backward
        return clock(periods, module, steps, first)


def _with_nonlinearity(family: str, nonlinearity: str) -> str:
    cell = f"{family}_{nonlinearity}"
    if cell not in ops.CELLS:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu', 'sigmoid' or 'identity'.")
    return cell


def _with_own_options(module: Any, text: str) -> str:
    """The text of ``repr`` with what a variant's equation asks for, if torch.nn's base has not said it."""
    said = (name for name in ("nonlinearity", "recurrent") if name in vars(module) and f"{name}=" not in text)
    return text + "".join(f", {name}={getattr(module, name)}" for name in said)


class _Variant(LayerBase):
    """A layer of a cell of one state."""

    def __init__(self, cell: str, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs and not self._lstm:
            raise ValueError(f"proj_size argument is only supported for LSTM, not {type(self).__name__}")
        super().__init__(cell.upper(), *args, **kwargs)

    _reshaped = True

    @property
    def _base_cell(self) -> str:
        return self.mode.lower()

    def extra_repr(self) -> str:
        return _with_own_options(self, super().extra_repr())

    @property
    def _rank_text(self) -> str:  # type: ignore[override]
        return type(self).__name__ + ": Expected input to be 2D or 3D, got {}D tensor instead"


class _PairVariant(PairLayerBase, _Variant):
    """A layer of a cell of two states."""


class _VariantCell(CellBase):
    """A step of a cell of one state."""

    _weight_names = WEIGHT_NAMES
    _page: str

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None, dtype: Any = None, *, engine: str = "auto"
    ) -> None:
        super().__init__(input_size, hidden_size, bias, 1, device, dtype, engine=engine)
        reshape(self, self._cell)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return _with_own_options(self, super().extra_repr())

    @property
    def _cell(self) -> str:
        return self._page

    @property
    def _name(self) -> str:  # type: ignore[override]
        return type(self).__name__

    @whole
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'; shapes and errors as :class:`rnnkernels.GRUCell`."""
        return self._step(input, hx)[0]


class _PairVariantCell(PairCellBase, _VariantCell):  # type: ignore[misc]
    """A step of a cell of two states."""


class PeepholeLSTM(_PairVariant):
    r"""A stack of LSTMs whose gates see the cell state (Gers, Schraudolph & Schmidhuber 2002).

    Row blocks i, f, g, o; weight_v, ``[3 · H]``: p_i, p_f, p_o.

    .. math::
        i_t &= \sigma(W_i x_t + U_i h_{t-1} + b_i + p_i \odot c_{t-1}) \\
        f_t &= \sigma(W_f x_t + U_f h_{t-1} + b_f + p_f \odot c_{t-1}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        o_t &= \sigma(W_o x_t + U_o h_{t-1} + b_o + p_o \odot c_t) \qquad h_t = o_t \odot \tanh(c_t)

    Arguments by position and by keyword, shapes, dtypes and errors: as :class:`rnnkernels.LSTM`; ``cell_norm`` is refused.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.PeepholeLSTM(3, 5, num_layers=2)
    >>> output, (h_n, c_n) = layer(torch.zeros(7, 2, 3))
    >>> output.shape, layer.weight_v_l0.shape
    (torch.Size([7, 2, 5]), torch.Size([15]))
    """

    @signed(*OF_TWO)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("lstm_peephole", *args, **kwargs)


class CoupledLSTM(_PairVariant):
    r"""A stack of LSTMs whose forget gate is the input gate's complement (CIFG; Greff et al. 2017). Row blocks i, g, o.

    .. math::
        i_t, o_t &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= (1 - i_t) \odot c_{t-1} + i_t \odot g_t \qquad h_t = o_t \odot \tanh(c_t)

    Arguments by position and by keyword, shapes, dtypes and errors: as :class:`rnnkernels.LSTM`; ``forget_bias`` and ``cell_norm`` are
    refused.

    >>> import torch, rnnkernels
    >>> rnnkernels.CoupledLSTM(3, 5)(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    @signed(*OF_TWO)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("lstm_coupled", *args, **kwargs)


class NoForgetLSTM(_PairVariant):
    r"""A stack of LSTMs without a forget gate (Hochreiter & Schmidhuber 1997). Row blocks i, g, o.

    .. math::
        i_t, o_t &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= c_{t-1} + i_t \odot g_t \qquad h_t = o_t \odot \tanh(c_t)

    Arguments by position and by keyword, shapes, dtypes and errors: as :class:`rnnkernels.LSTM`; ``forget_bias`` and ``cell_norm`` are
    refused.

    >>> import torch, rnnkernels
    >>> rnnkernels.NoForgetLSTM(3, 5)(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    @signed(*OF_TWO)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("lstm_no_forget", *args, **kwargs)


class DreamerGRU(_Variant):
    r"""A stack of Dreamer's gated recurrent units, with one layer norm over all gates (Hafner et al. 2020).

    Row blocks r, n, u; weight_v, ``[6 · H]``: the norm's gains and shifts.

    .. math::
        \hat r_t, \hat n_t, \hat u_t &= \gamma \odot N(W x_t + U h_{t-1} + b) + \beta \qquad u_t = \sigma(\hat u_t - 1) \\
        h_t &= u_t \odot \tanh(\sigma(\hat r_t) \odot \hat n_t) + (1 - u_t) \odot h_{t-1}

    Arguments by position and by keyword, shapes, dtypes and errors: as :class:`rnnkernels.GRU`; ``layer_norm``, which it has already, is
    refused.

    >>> import torch, rnnkernels
    >>> rnnkernels.DreamerGRU(3, 5)(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    @signed(*OF_ONE)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("gru_dreamer", *args, **kwargs)

    _candidate = True


class GRUResetBefore(_Variant):
    r"""A stack of gated recurrent units that reset before the matrix product, as published (Cho et al. 2014).

    Row blocks r, z, n, as torch.nn.GRU, whose weights it can load; two products a step, one after the other.

    .. math::
        r_t, z_t &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn}) \qquad h_t = (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Arguments by position and by keyword, shapes, dtypes and errors: as :class:`rnnkernels.GRU`; ``layer_norm`` is refused.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.GRUResetBefore(3, 5)
    >>> _ = layer.load_state_dict(torch.nn.GRU(3, 5).state_dict())
    >>> layer(torch.zeros(7, 2, 3))[0].shape
    torch.Size([7, 2, 5])
    """

    @signed(*OF_ONE)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("gru_reset_before", *args, **kwargs)

    _candidate = True


class ResidualRNN(_Variant):
    r"""A stack of residual simple recurrent networks; without a matrix U if not ``recurrent``.

    .. math:: h_t = h_{t-1} + f(W x_t + b + U h_{t-1}) \qquad\text{or}\qquad h_t = h_{t-1} + f(W x_t + b)

    Args:
        nonlinearity: f, "tanh", "relu", "sigmoid" or "identity" (keyword only). ``ValueError`` for another.
        recurrent: whether there is a U (keyword only).

    Other arguments, shapes, dtypes and errors: as :class:`rnnkernels.RNN`, whose nonlinearity is not among the arguments by position.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.ResidualRNN(3, 5, nonlinearity="relu", recurrent=False)
    >>> layer(torch.zeros(7, 2, 3))[0].shape, [name for name, _ in layer.named_parameters()]
    (torch.Size([7, 2, 5]), ['weight_ih_l0', 'bias_ih_l0'])
    """

    @signed(*OF_ONE)
    def __init__(self, *args: Any, nonlinearity: str = "tanh", recurrent: bool = True, **kwargs: Any) -> None:
        super().__init__(_with_nonlinearity("residual" if recurrent else "residual_input", nonlinearity), *args, **kwargs)
        self.nonlinearity, self.recurrent = nonlinearity, recurrent


class IndRNN(_Variant):
    r"""A stack of independently recurrent networks (Li et al. 2018); weight_v, ``[H]``: u.

    .. math:: h_t = f(W x_t + b + u \odot h_{t-1})

    Args:
        nonlinearity: f, "relu", "tanh", "sigmoid" or "identity" (keyword only). ``ValueError`` for another.

    Other arguments, shapes, dtypes and errors: as :class:`rnnkernels.RNN`, whose nonlinearity is not among the arguments by position;
    ``recurrent_dropout`` and ``layer_norm``, which are for a matrix U, are refused.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.IndRNN(3, 5)
    >>> layer(torch.zeros(7, 2, 3))[0].shape, [name for name, _ in layer.named_parameters()]
    (torch.Size([7, 2, 5]), ['weight_ih_l0', 'bias_ih_l0', 'weight_v_l0'])
    """

    @signed(*OF_ONE)
    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        super().__init__(_with_nonlinearity("indrnn", nonlinearity), *args, **kwargs)
        self.nonlinearity = nonlinearity


class ClockworkRNN(_Variant):
    r"""A stack of clockwork recurrent networks (Koutník et al. 2014): modules of units, each with a period of its own.

    At step t the modules whose period divides t compute; the units of the others keep their state. A module reads itself and the slower
    ones, so U is block upper triangular, with :math:`H^2/2 + H k/2` weights for modules of k units; what weight_hh holds below its blocks
    counts for nothing, starts as zeros and gets no gradient. With periods each of which divides the next, on a CPU, only the modules that
    are due are computed; other periods, packed sequences and other engines compute all and hold what is not due.

    .. math:: h_t^{(i)} = \begin{cases} f(W^{(i)} x_t + b^{(i)} + \sum_{j \geq i} U^{(ij)} h_{t-1}^{(j)}) & t \bmod T_i = 0 \\
        h_{t-1}^{(i)} & \text{otherwise} \end{cases}

    Args:
        periods: T_1 < T_2 < …, one a module; hidden_size must be a multiple of their number (keyword only). Default: eight, from 1 to 128.
        nonlinearity: f, "tanh", "relu", "sigmoid" or "identity" (keyword only).

    Other arguments, shapes, dtypes and errors: as :class:`rnnkernels.RNN`. Modifiers of cells are refused (``ValueError``), and ``stream``
    too: take single steps by calls with ``first_step``.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.ClockworkRNN(3, 6, periods=(1, 2, 4))
    >>> output, h_n = layer(torch.zeros(7, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 6]), torch.Size([1, 2, 6]))
    """

    periods: tuple[int, ...]

    @signed(*OF_ONE)
    def __init__(
        self, *args: Any, periods: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128), nonlinearity: str = "tanh", **kwargs: Any
    ) -> None:
        periods = tuple(periods)
        if not periods or not all(type(p) is int and p > 0 for p in periods) or any(a >= b for a, b in itertools.pairwise(periods)):
            raise ValueError(f"periods: expected rising positive integers, got {periods}")
        self._refuse(kwargs)  # before the base has the cell compiled
        self.__dict__["periods"] = periods  # the base draws the weights
        super().__init__(_with_nonlinearity("srn", nonlinearity), *args, **kwargs)
        if self.hidden_size % len(periods):
            raise ValueError(f"hidden_size: expected a multiple of the {len(periods)} modules, one a period, got {self.hidden_size}")
        self.nonlinearity = nonlinearity

    def _refuse(self, options: Mapping[str, Any]) -> None:
        for name in MODIFIERS:
            if value := options.get(name):
                raise ValueError(f"{name}: expected none for a ClockworkRNN, whose units take turns, got {value!r}")

    def _modifiers(self, training: bool) -> tuple[str, tuple[float, ...]]:
        self._refuse(vars(self))
        return super()._modifiers(training)

    def _reset_beyond_torch(self) -> None:
        super()._reset_beyond_torch()
        if self._constructed and self.hidden_size % len(self.periods) == 0:
            with torch.no_grad():
                for _, weight_hh, *_ in self._own_weights():
                    weight_hh *= self._clock(1, 0).connected(weight_hh)

    def _clock(self, steps: int, first: int) -> Clock:
        make = clock if torch.compiler.is_compiling() else _kept_clock
        return make(self.periods, self.hidden_size // len(self.periods), steps, first)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, periods={self.periods}"

    @whole
    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Any = None,
        return_states: bool | str = False,
        first_step: int = 0,
    ) -> tuple[Any, ...]:
        """Run the layer; as :meth:`rnnkernels.RNN.forward`. ``first_step``: what the clock shows at the first step, for a sequence that
        comes in parts. A reset does not turn the clock back.

        Raises ``ValueError`` for a first_step below zero, ``TypeError`` for one that is no integer.
        """
        if type(first_step) is not int and not isinstance(first_step, torch.SymInt):
            try:
                first_step = operator.index(first_step)  # of a tensor the number that it has now
            except TypeError:
                raise TypeError(f"first_step: expected an int, got {first_step!r}") from None
        if first_step < 0:
            raise ValueError(f"first_step: expected 0 or more, got {first_step}")
        return self._run(input, hx, lengths, reset_mask, reset_state, return_states, lambda steps: self._clock(steps, first_step))

    def stream(self, batch_size: int | None = None, hx: Any = None) -> Any:
        """Raise ``ValueError``: call the layer with ``first_step`` instead."""
        raise ValueError("ClockworkRNN: a stream shows its cell no clock; call the layer step by step with first_step")


class PeepholeLSTMCell(_PairVariantCell):
    """One step of :class:`PeepholeLSTM`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.LSTMCell`.

    >>> import torch, rnnkernels
    >>> h, c = rnnkernels.PeepholeLSTMCell(3, 5)(torch.zeros(2, 3))
    >>> h.shape, c.shape
    (torch.Size([2, 5]), torch.Size([2, 5]))
    """

    _page = "lstm_peephole"


class CoupledLSTMCell(_PairVariantCell):
    """One step of :class:`CoupledLSTM`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.LSTMCell`.

    >>> import torch, rnnkernels
    >>> rnnkernels.CoupledLSTMCell(3, 5)(torch.zeros(3))[0].shape
    torch.Size([5])
    """

    _page = "lstm_coupled"


class NoForgetLSTMCell(_PairVariantCell):
    """One step of :class:`NoForgetLSTM`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.LSTMCell`.

    >>> import torch, rnnkernels
    >>> rnnkernels.NoForgetLSTMCell(3, 5)(torch.zeros(3))[0].shape
    torch.Size([5])
    """

    _page = "lstm_no_forget"


class GRUResetBeforeCell(_VariantCell):
    """One step of :class:`GRUResetBefore`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.GRUCell`.

    >>> import torch, rnnkernels
    >>> rnnkernels.GRUResetBeforeCell(3, 5)(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    _page = "gru_reset_before"


class DreamerGRUCell(_VariantCell):
    """One step of :class:`DreamerGRU`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.GRUCell`.

    >>> import torch, rnnkernels
    >>> rnnkernels.DreamerGRUCell(3, 5)(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    _page = "gru_dreamer"

    def reset_parameters(self) -> None:
        """Draw the weights anew; gains start at one, shifts at zero."""
        super().reset_parameters()
        weight_v = getattr(self, "weight_v", None)  # torch.nn's base draws before the cell's own weights are there
        if weight_v is not None:
            reset_norms(self._page, self.hidden_size, weight_v, True)


class ResidualRNNCell(_VariantCell):
    """One step of :class:`ResidualRNN`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.RNNCell`; ``nonlinearity`` and ``recurrent`` by keyword.

    >>> import torch, rnnkernels
    >>> rnnkernels.ResidualRNNCell(3, 5, nonlinearity="relu")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(self, *args: Any, nonlinearity: str = "tanh", recurrent: bool = True, **kwargs: Any) -> None:
        self._page = _with_nonlinearity("residual" if recurrent else "residual_input", nonlinearity)
        super().__init__(*args, **kwargs)
        self.nonlinearity, self.recurrent = nonlinearity, recurrent


class IndRNNCell(_VariantCell):
    """One step of :class:`IndRNN`, with its weights.

    Arguments, shapes, dtypes and errors: as :class:`rnnkernels.RNNCell`; ``nonlinearity``, "relu" unless given, by keyword.

    >>> import torch, rnnkernels
    >>> rnnkernels.IndRNNCell(3, 5, nonlinearity="tanh")(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(self, *args: Any, nonlinearity: str = "relu", **kwargs: Any) -> None:
        self._page = _with_nonlinearity("indrnn", nonlinearity)
        super().__init__(*args, **kwargs)
        self.nonlinearity = nonlinearity
