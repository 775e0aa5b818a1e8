"""The structurally constrained recurrent network: two sequences of the library's own cells."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, ops
from .cuts import Cut
from .modules.layer import LayerBase
from .modules.shared import checked_engine, pair, whole
from .variants import _with_nonlinearity

__all__ = ["SCRN", "SCRNCell"]


class _Scrn(nn.Module):
    """What SCRN and SCRNCell share: parameters and one step's equation as two sequences."""

    def __init__(
        self,
        hidden_size: int,
        context_size: int,
        bias: bool,
        nonlinearity: str,
        alpha: float,
        learn_alpha: bool,
        engine: str,
        factory: dict[str, Any],
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected 0 to 1, got {alpha}")
        for name, size in (("hidden_size", hidden_size), ("context_size", context_size)):
            if not isinstance(size, int):
                raise TypeError(f"{name} should be of type int, got: {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be greater than zero")
        self._cell = _with_nonlinearity("srn", nonlinearity)
        self.hidden_size, self.context_size, self.bias, self.nonlinearity = hidden_size, context_size, bias, nonlinearity
        self.engine, self._alpha, self._learn_alpha, self._factory = checked_engine(engine), alpha, learn_alpha, factory

    def _make(self, suffix: str, input_size: int) -> None:
        H, S = self.hidden_size, self.context_size
        shapes = {"weight_is": (S, input_size), "weight_ih": (H, input_size), "weight_sh": (H, S), "weight_hh": (H, H), "bias_ih": (H,)}
        for name, shape in shapes.items():
            absent = name == "bias_ih" and not self.bias
            self.register_parameter(name + suffix, None if absent else nn.Parameter(torch.empty(shape, **self._factory)))
        stays = torch.empty(S, **self._factory)
        if self._learn_alpha:
            self.register_parameter(f"alpha{suffix}", nn.Parameter(stays))
        else:
            self.register_buffer(f"alpha{suffix}", stays)

    def extra_repr(self) -> str:
        options = f"alpha={self._alpha}" + ", learn_alpha=True" * self._learn_alpha + ", bias=False" * (not self.bias)
        engine = f", engine={self.engine}" if self.engine != "auto" else ""
        return f"{self.input_size}, {self.hidden_size}, context_size={self.context_size}, {options}{engine}"

    def reset_parameters(self) -> None:
        """Draw the weights uniformly, as torch.nn's layers do, and set alpha to where it starts."""
        bound = self.hidden_size**-0.5
        for name, weight in (*self.named_parameters(), *self.named_buffers()):
            if name.startswith("alpha"):
                nn.init.constant_(weight, self._alpha)
            else:
                nn.init.uniform_(weight, -bound, bound)

    def _weights(self, suffix: str, place: int = 0, places: int = 1) -> tuple[list[Any], list[Any]]:
        """Of the context and of the hidden units, whose input is x and, side by side, the contexts of so many directions."""
        w_is, w_ih, w_sh, w_hh, bias, alpha = (
            getattr(self, name + suffix) for name in ("weight_is", "weight_ih", "weight_sh", "weight_hh", "bias_ih", "alpha")
        )
        contexts = [w_sh if i == place else torch.zeros_like(w_sh) for i in range(places)]
        context = [(1 - alpha).unsqueeze(1) * w_is, None, None, None, None, alpha]
        return context, [torch.cat([w_ih, *contexts], 1), w_hh, bias]


class SCRN(_Scrn):
    r"""A stack of structurally constrained recurrent networks (Mikolov et al. 2014): hidden units beside slow context units.

    .. math::
        s_t = (1 - \alpha) B x_t + \alpha \odot s_{t-1} \qquad h_t = f(P s_t + A x_t + R h_{t-1} + b)

    The context is a scan, all of it before the hidden units: neither waits for the other step by step. The network's own output
    :math:`f(U h_t + V s_t)` is a linear layer over what this one returns. With A, B, P, R = weight_ih, weight_is, weight_sh, weight_hh.

    Args:
        input_size, hidden_size, context_size: of x, h, s.
        num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn's layers; all but the sizes by keyword.
        nonlinearity: f, "sigmoid", "tanh", "relu" or "identity".
        alpha: how much of the context stays, from 0 to 1.
        learn_alpha: whether alpha is a parameter, a number a unit, or fixed.
        engine, recompute: see :func:`rnnkernels.ops.sequence`.

    Shape, with D = 2 if bidirectional else 1 and L = num_layers:
        * input: ``(T, B, I)``, ``(B, T, I)`` if batch_first, ``(T, I)`` unbatched, or a PackedSequence.
        * hx: a pair h ``(L · D, B, H)``, s ``(L · D, B, S)``, without B unbatched; zeros if None.
        * output: as the input with D · (H + S) in place of I: of each direction h and s side by side; then the pair of final states, as hx.

    Raises:
        ValueError: alpha outside of 0 to 1, a size below 1, an unknown engine or nonlinearity, an input that is not 2-D or 3-D.
        TypeError: a size that is no int. RuntimeError: wrong sizes, dtypes, devices.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.SCRN(3, 5, 2, num_layers=2)
    >>> output, (h, s) = layer(torch.zeros(7, 4, 3))
    >>> output.shape, h.shape, s.shape
    (torch.Size([7, 4, 7]), torch.Size([2, 4, 5]), torch.Size([2, 4, 2]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        context_size: int,
        *,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        nonlinearity: str = "sigmoid",
        alpha: float = 0.95,
        learn_alpha: bool = False,
        engine: str = "auto",
        recompute: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(hidden_size, context_size, bias, nonlinearity, alpha, learn_alpha, engine, {"device": device, "dtype": dtype})
        if not isinstance(num_layers, int):
            raise TypeError(f"num_layers should be of type int, got: {type(num_layers).__name__}")
        if num_layers < 1:
            raise ValueError("num_layers must be greater than zero")
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
            raise ValueError("dropout should be a number in range [0, 1] representing the probability of an element being zeroed")
        if dropout > 0 and num_layers == 1:
            warnings.warn(f"dropout falls between layers: expected 0 with num_layers=1, got {dropout}", stacklevel=2)
        self.input_size, self.num_layers, self.batch_first, self.dropout = input_size, num_layers, batch_first, float(dropout)
        self.bidirectional, self.recompute = bidirectional, recompute
        width = input_size
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                self._make(suffix, width)
            width = (hidden_size + context_size) * (2 if bidirectional else 1)
        self.reset_parameters()

    def _suffixes(self, layer: int) -> list[str]:
        return [f"_l{layer}{direction}" for direction in (("", "_reverse") if self.bidirectional else ("",))]

    def extra_repr(self) -> str:
        names = ("num_layers", "nonlinearity", "batch_first", "dropout", "bidirectional")
        return f"{super().extra_repr()}{''.join(f', {name}={getattr(self, name)}' for name in names)}"

    def _sequences(self) -> list[str]:
        directions, parts = ("forward", "reverse") if self.bidirectional else ("forward",), ("context", "hidden")
        return [f"layer {layer} {part} {way}" for layer in range(self.num_layers) for part in parts for way in directions]

    @property
    def _widths(self) -> tuple[int, ...]:
        return self.hidden_size, self.context_size

    def _split(self, hx: Any, name: str = "hx") -> tuple[Tensor, Tensor]:
        return pair(hx, "scrn", name)

    _cut: Any = LayerBase._cut  # it asks for no more than what is above

    def _prepared(self, input: Any, hx: Any) -> tuple[Tensor, list[Tensor] | None, Tensor | None]:
        """The input time-major, the states ``[L · D, B, ·]``, batch_sizes."""
        if isinstance(input, PackedSequence):
            x, batch_sizes, order, _ = input
            batch, batched = int(batch_sizes[0]), True
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"SCRN: Expected input to be 2D or 3D, got {input.dim()}D tensor instead")
            x, batch_sizes, order, batched = input, None, None, input.dim() == 3
            x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
            batch = x.size(1)
        if x.size(-1) != self.input_size:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {x.size(-1)}")
        if hx is None:
            return x, None, batch_sizes
        states = []
        K = self.num_layers * (2 if self.bidirectional else 1)
        for i, (state, width) in enumerate(zip(self._split(hx), self._widths, strict=True)):
            expected = (K, batch, width) if batched else (K, width)
            if state.shape != expected:
                raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {list(state.shape)}")
            state = state if batched else state.unsqueeze(1)
            states.append(state if order is None else state.index_select(1, order))
        return x, states, batch_sizes

    @whole
    def forward(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Any = None,
        return_states: bool = False,
    ) -> tuple[Any, ...]:
        """Run the layer; see the class for shapes and errors. The options are those of :meth:`rnnkernels.LSTM.forward`, reset_state a pair,
        the states returned h and s.
        """
        if not isinstance(return_states, bool):
            raise ValueError(f"return_states: expected True or False for a layer whose gates are no cell's, got {return_states!r}")
        x, states, batch_sizes = self._prepared(input, hx)
        cut = None
        if lengths is not None or reset_mask is not None or reset_state is not None:
            cut = self._cut(input, x, lengths, reset_mask, reset_state)
        D, H, S = 2 if self.bidirectional else 1, self.hidden_size, self.context_size
        finals: list[list[Tensor]] = [[], []]
        histories: list[list[Tensor]] = [[], []]
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                x = nn.functional.dropout(x, self.dropout)
            weights = [self._weights(suffix, d, D) for d, suffix in enumerate(self._suffixes(layer))]
            mine = slice(layer * D, (layer + 1) * D)

            def run(i: int, cell: str, below: Tensor, mine: slice = mine, weights: Any = weights) -> Tensor:
                resets = None if cut is None or cut.reset_states is None else cut.reset_states[i]
                of_layer = None if resets is None else [resets[:, mine] if resets.dim() == 4 else resets[mine]]
                output, final = functional.stack(
                    cell,
                    below,
                    None if states is None else [states[i][mine]],
                    [pair[1 - i] for pair in weights],
                    bidirectional=self.bidirectional,
                    batch_sizes=batch_sizes,
                    engine=self.engine,
                    recompute=self.recompute,
                    cut=None if cut is None else Cut(cut.lengths, cut.reset_mask, of_layer),
                )
                finals[i].append(final)
                return output

            context = run(1, "indrnn_identity", x)
            hidden = run(0, self._cell, torch.cat([x, context], -1))
            parts = [hidden.view(*hidden.shape[:-1], D, H), context.view(*context.shape[:-1], D, S)]
            x = torch.cat(parts, -1).flatten(-2)
            for history, part in zip(histories, parts, strict=True):
                history.append(part.movedim(-2, 0))
        last = [torch.cat(states) for states in finals]
        every = [torch.cat(states) for states in histories]
        if isinstance(input, PackedSequence):
            if input.unsorted_indices is not None:
                last = [state.index_select(1, input.unsorted_indices) for state in last]
            output: Any = PackedSequence(x, *input[1:])
        elif input.dim() == 2:
            output, last, every = x.squeeze(1), [s.squeeze(1) for s in last], [s.squeeze(2) for s in every]
        elif self.batch_first:
            output, every = x.transpose(0, 1), [s.transpose(1, 2) for s in every]
        else:
            output = x
        return (output, tuple(last), tuple(every)) if return_states else (output, tuple(last))


class SCRNCell(_Scrn):
    """One step of :class:`SCRN`.

    Args: input_size, hidden_size, context_size, bias, nonlinearity, alpha, learn_alpha, engine, device, dtype: as there.

    Shape: input ``(B, I)`` or ``(I)``; hx a pair h ``(B, H)``, s ``(B, S)`` or ``(H)``, ``(S)``, zeros if None. Returns (h', s'), as hx.

    Raises: ValueError: an input that is not 1-D or 2-D, and as the layer. RuntimeError: wrong sizes, dtypes, devices.

    >>> import torch, rnnkernels
    >>> h, s = rnnkernels.SCRNCell(3, 5, 2)(torch.zeros(4, 3))
    >>> h.shape, s.shape
    (torch.Size([4, 5]), torch.Size([4, 2]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        context_size: int,
        *,
        bias: bool = True,
        nonlinearity: str = "sigmoid",
        alpha: float = 0.95,
        learn_alpha: bool = False,
        engine: str = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(hidden_size, context_size, bias, nonlinearity, alpha, learn_alpha, engine, {"device": device, "dtype": dtype})
        self.input_size = input_size
        self._make("", input_size)
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nonlinearity={self.nonlinearity}"

    def _sequences(self) -> list[str]:
        return ["step context", "step hidden"]

    @whole
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return (h', s'); see the class for shapes and errors."""
        if input.dim() not in (1, 2):
            raise ValueError(f"SCRNCell: Expected input to be 1D or 2D, got {input.dim()}D instead")
        x = (input.unsqueeze(0) if input.dim() == 1 else input).unsqueeze(0)
        if x.size(-1) != self.input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {x.size(-1)} expected {self.input_size}")
        h, s = (None, None) if hx is None else pair(hx, "scrn_cell")
        for i, (state, width) in enumerate(zip((h, s), (self.hidden_size, self.context_size), strict=True)):
            if state is not None and state.shape != (*input.shape[:-1], width):
                raise RuntimeError(f"Expected hidden[{i}] size {(*input.shape[:-1], width)}, got {list(state.shape)}")
        states = [None if t is None else [t.unsqueeze(0) if input.dim() == 1 else t] for t in (h, s)]
        of_context, of_hidden = self._weights("")
        context, s = ops.sequence("indrnn_identity", x, states[1], *of_context, engine=self.engine)
        _, h = ops.sequence(self._cell, torch.cat([x, context], -1), states[0], *of_hidden, engine=self.engine)
        assert h is not None
        assert s is not None
        return (h.squeeze(0), s.squeeze(0)) if input.dim() == 1 else (h, s)
