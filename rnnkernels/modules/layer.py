"""What RNN, GRU and LSTM share: construction, the way of a call, streams."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import functional, gates, ops
from ..cuts import Clock, Cut
from ..streaming import Stream
from .modifiers import MODIFIERS
from .shared import check_agreement, check_ranks, checked_engine, pair, plain_states, whole
from .weights import RECURRENT_INITS, WEIGHT_NAMES, Weighted

# A cell, the names of its weights, None for those that are not there, and whether thresholds come after them.
_Single = tuple[str, list[str | None], bool]
# Attributes that do not change them: what torch sets in whatever is cast, moved or compiled; a cache; and what the mode says as well. Any
# other may, and a compiled layer looks at these alone.
_NOT_OF_SINGLES = frozenset(
    ("training", "nonlinearity", "_packed", "_flat_weights", "_flat_weight_refs", "_is_torch_compile", "_compiled_call_impl")
)


class LayerBase(Weighted):
    """What RNN, GRU and LSTM share: everything but the shape of hx."""

    engine: str = "auto"
    recompute: bool = False
    weight_dtype: torch.dtype | None = None
    _packed: list[ops.Packed | ops.Remembered] | None = None
    _singles: tuple[_Single | None, _Single | None] | None = None
    _rank_text: str

    def __init__(
        self,
        mode: str,
        /,
        *args: Any,
        engine: str = "auto",
        recompute: bool = False,
        forget_bias: float | None = None,
        recurrent_init: str = "uniform",
        zoneout: float | Sequence[float] = 0.0,
        recurrent_dropout: float = 0.0,
        layer_norm: str | None = None,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        grad_clip: float | None = None,
        candidate_dropout: float = 0.0,
        learn_initial: bool = False,
        weight_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        checked_engine(engine)
        if recurrent_init not in RECURRENT_INITS:
            raise ValueError(f"recurrent_init must be one of {', '.join(map(repr, RECURRENT_INITS))}, got {recurrent_init!r}")
        # The base reads the shapes of the weights off the mode, and knows those of torch.nn.
        self.__dict__["_constructed"] = False
        super().__init__(mode if mode in ("LSTM", "GRU") else "RNN_TANH", *args, **kwargs)
        if self.proj_size > 0 and not self._lstm:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        self.mode, self.layer_norm = mode, layer_norm
        del self._constructed
        self._reshape_weights()
        self.engine, self.recompute, self.learn_initial, self.weight_dtype = engine, recompute, learn_initial, weight_dtype
        if weight_dtype is not None:
            ops.weight_type(weight_dtype, getattr(self, self._flat_weights_names[0]).dtype)
        for name, width in self._initial_names().items():
            like: Tensor = getattr(self, self._flat_weights_names[0])
            self.register_parameter(name, nn.Parameter(like.new_empty(self.num_layers * (2 if self.bidirectional else 1), width)))
        self.forget_bias, self.recurrent_init = forget_bias, recurrent_init
        self.zoneout, self.recurrent_dropout, self.candidate_dropout = zoneout, recurrent_dropout, candidate_dropout
        self.cell_clip, self.proj_clip, self.grad_clip = cell_clip, proj_clip, grad_clip
        for training in (True, False):  # to be refused now, or compiled, and not at the first call, which may be traced
            self._modifiers(training)
        self._reset_beyond_torch()
        self._find_singles()

    def flatten_parameters(self) -> None:
        """Forget weights that ``weight_dtype`` keeps packed. There is nothing else to do: the kernels take the layer's where they lie."""
        if self.weight_dtype is not None:
            self._packed = None

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _kept(self) -> Sequence[ops.Packed | ops.Remembered] | None:
        """Where each layer's and direction's packed weights stay."""
        if self.weight_dtype is None and torch.compiler.is_compiling():
            return None
        kept = self._packed  # read once: another thread may forget them
        if kept is None or kept[0].weight_dtype != self.weight_dtype:
            places = range(self.num_layers * (2 if self.bidirectional else 1))
            self._packed = kept = [ops.Remembered() if self.weight_dtype is None else ops.Packed(self.weight_dtype) for _ in places]
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A cell that is a modified one is to be composed anew in another process.
        super().__setstate__({name: value for name, value in state.items() if name not in ("_flat_weights", "_singles")})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        engine = f", engine={self.engine}" if self.engine != "auto" else ""
        modifiers = {name: getattr(self, name) for name in ("recompute", "weight_dtype", "learn_initial", *MODIFIERS)}
        return super().extra_repr() + engine + "".join(f", {name}={value}" for name, value in modifiers.items() if value)

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
    ) -> tuple[Any, ...]:
        """Run the layer; see the class for shapes and errors.

        Args:
            lengths: ``[B]``, integers from 0 to T, in any order, on any device, or a list of them: how many steps each row has. Outputs
                past them are zero, the final state is that after a row's last step, and the reverse direction starts there.
            reset_mask: ``[T, B]`` booleans (``[B, T]`` if batch_first, ``[T]`` unbatched): the state before a marked step is replaced by
                ``reset_state``, and nothing flows across, neither forward nor, in the reverse direction, back over the same boundary.
            reset_state: as hx; each of its tensors ``[L · D, H]``, as hx ``[L · D, B, H]``, or one for each step that may be marked
                ``[T, L · D, B, H]``. Zeros if None. Gradients flow into it.

            return_states: also return, third, every state of the cell after each step, a tuple of tensors ``[L · D, T, B, ·]``
                (``[L · D, B, T, ·]`` if batch_first, ``[L · D, T, ·]`` unbatched, ``[L · D, N, ·]`` for a PackedSequence), through which
                gradients flow. "gates": these and after them the cell's gates, activated, in the order of their row blocks: i, f, g, o of
                an LSTM (what it has of them), r, z, n of a GRU; not of a cell without gates, Dreamer's, or a modified one but for a
                projection.

        Raises, beyond what the class says: ``ValueError`` for lengths or reset_mask beside a PackedSequence, reset_state without
        reset_mask, lengths out of range, "gates" of a cell that has none to give; ``RuntimeError`` for wrong shapes or dtypes of the
        three; ``TypeError`` for what is no tensor.
        """
        return self._run(input, hx, lengths, reset_mask, reset_state, return_states)

    def _run(
        self,
        input: Any,
        hx: Any,
        lengths: Tensor | Sequence[int] | None,
        reset_mask: Tensor | None,
        reset_state: Any,
        return_states: bool | str,
        clock: Callable[[int], Clock] | None = None,
    ) -> tuple[Any, ...]:
        """``clock``: that of so many steps."""
        if lengths is reset_mask is reset_state is clock is None and return_states is False:
            found = self._again(input, hx)
            if found is not None:
                return found
        data, states, batch_sizes, weights = self._prepare(input, hx)
        cut = None
        if lengths is not None or reset_mask is not None or reset_state is not None:
            cut = self._cut(input, data, lengths, reset_mask, reset_state)
        cell, zones = self._modifiers(self.training)
        if return_states is not False:
            gates.check(cell, return_states)
        given = self._given(cell, zones, data, batch_sizes) if ops.CELLS[cell].given else None
        output, *finals = functional.stack(
            cell,
            data,
            states,
            weights,
            bidirectional=self.bidirectional,
            dropout=self.dropout,
            training=self.training,
            batch_sizes=batch_sizes,
            engine=self.engine,
            recompute=self.recompute,
            return_states=return_states,
            given=given,
            layer_norm=self.layer_norm,
            cut=cut,
            clock=None if clock is None else clock(data.size(0) if batch_sizes is None else len(batch_sizes)),
            packed=self._kept(),
        )
        count = len(ops.CELLS[cell].states)
        finals, histories = finals[:count], finals[count:]
        if isinstance(input, PackedSequence):
            packed = PackedSequence(output, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            final = self.permute_hidden(self._join(finals), input.unsorted_indices)
            return (packed, final, tuple(histories)) if return_states else (packed, final)
        if input.dim() == 2:
            output, finals = output.squeeze(1), [state.squeeze(1) for state in finals]
            histories = [history.squeeze(2) for history in histories]
        elif self.batch_first:
            output, histories = output.transpose(0, 1), [history.transpose(1, 2) for history in histories]
        return (output, self._join(finals), tuple(histories)) if return_states else (output, self._join(finals))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, tuple(value) if name == "zoneout" and isinstance(value, list) else value)  # or it could change unnoticed
        if name not in _NOT_OF_SINGLES:
            self.__dict__["_singles"] = None

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.__dict__["_singles"] = None

    def _find_singles(self) -> tuple[_Single | None, _Single | None]:
        """:meth:`_single` in eval and in training, kept until what it depends on is set."""
        self.__dict__["_singles"] = found = self._single(False), self._single(True)
        return found

    def _single(self, training: bool) -> _Single | None:
        """Of a layer of one sequence that is given nothing, the cell, the names of the weights in their order, and whether thresholds come
        with them.
        """
        if self.num_layers > 1 or self.bidirectional or self.learn_initial or self.layer_norm is not None:
            return None
        cell, _ = self._modifiers(training)
        if ops.CELLS[cell].given:
            return None
        own = self._all_weights[0]
        order = [name + "_l0" for name in WEIGHT_NAMES] if self._argument_names is None else self._argument_names[0]
        last = max(order.index(name) for name in own)
        return cell, [name if name in own else None for name in order[: last + 1]], bool(self._clips())

    def _again(self, input: Any, hx: Any) -> tuple[Any, ...] | None:
        """What :meth:`_run` gives, at less cost, where the layer is one sequence and such a call was made before."""
        singles = self._singles
        if singles is None:
            singles = (self._single(False), self._single(True)) if torch.compiler.is_compiling() else self._find_singles()
        single = singles[self.training]
        if single is None or type(input) is not Tensor or input.dim() not in (2, 3) or input.size(-1) != self.input_size:
            return None
        (cell, names, clips), parameters = single, self._parameters
        try:
            weights = [None if name is None else parameters[name] for name in names]
        except KeyError:  # it is made anew whenever it is asked for: once a call
            return None
        if clips:
            weights = self._weights()[0]
        states = plain_states(cell, hx, input.dim())
        if states is None:
            return None
        if torch.compiler.is_compiling():  # eager, a call with other states does not repeat one that was found to be right
            rows = () if input.dim() == 2 else (input.size(0 if self.batch_first else 1),)
            if any(state.shape != (1, *rows, width) for state, width in zip(states, self._widths, strict=False)):
                return None
        batched, kept = input.dim() == 3, self._kept()
        turns, place = batched and self.batch_first, None if kept is None else kept[0]
        data = input.transpose(0, 1) if turns else input if batched else input.unsqueeze(1)
        states = states if batched else [state.unsqueeze(1) for state in states]
        found = ops.again(cell, data, states, weights, self.engine, self.recompute, place)
        if found is None:
            return None
        output, *finals = found if batched else [result.squeeze(1) for result in found]
        return output.transpose(0, 1) if turns else output, self._join(finals)

    def stream(self, batch_size: int | None = None, hx: Any = None) -> Stream:
        """A :class:`~rnnkernels.streaming.Stream`, which runs this layer step by step with the weights packed once, for inference.

        Args:
            batch_size: B; None: steps are unbatched.
            hx: the states it starts from and is reset to, as forward's hx; zeros if None.

        Raises:
            ValueError: a bidirectional layer, which needs the sequence's end; batch_size not positive. RuntimeError: hx of a wrong shape,
                dtype or device; weights or an engine that cannot run. TypeError: hx that is no pair where one is expected.

        >>> import torch, rnnkernels
        >>> stream = rnnkernels.GRU(3, 5, num_layers=2).stream(batch_size=4)
        >>> stream.step(torch.zeros(4, 3)).shape, stream.state.shape
        (torch.Size([4, 5]), torch.Size([2, 4, 5]))
        >>> stream.reset(torch.tensor([True, False, False, True]))
        """
        if self.bidirectional:
            raise ValueError("bidirectional: expected False for a stream, which has no future to run back from, got True")
        cell, zones = self._modifiers(training=False)
        like = self._weights()[0][0]
        spec = ops.CELLS[cell]
        masks = [spec.slots[slot][0] for slot in spec.given if spec.slots[slot][4]]
        expected = [zones[int(name.removeprefix("zoneout_"))] for name in masks]
        constants = [like.detach().new_full((self.hidden_size,), p) for p in expected]
        if hx is None and self.learn_initial:
            initial = self._learned_initial(batch_size or 1)
            hx = self._join([state.squeeze(1) for state in initial] if batch_size is None else initial)
        ours = self._weights, batch_size, hx, self.engine, self._split, self._join
        return Stream(cell, *ours, constants, self.layer_norm, self._own_weights, self.weight_dtype)

    def _cut(
        self, input: Any, data: Tensor, lengths: Tensor | Sequence[int] | None, reset_mask: Tensor | None, reset_state: Any
    ) -> Cut | None:
        """What was asked for inside the sequence, checked and time-major; None: nothing that makes a difference."""
        if isinstance(input, PackedSequence):
            raise ValueError("lengths and reset_mask go with a padded input, got a PackedSequence: pad it with pad_packed_sequence")
        if reset_state is not None and reset_mask is None:
            raise ValueError("reset_state: expected a reset_mask beside it, got None")
        if isinstance(lengths, Sequence):  # as pack_padded_sequence takes them
            lengths = torch.as_tensor(lengths)
        for name, t in (("lengths", lengths), ("reset_mask", reset_mask)):
            if t is not None and not isinstance(t, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        T, B = data.shape[:2]
        concrete = not torch.compiler.is_compiling()
        if lengths is not None and ops.check_lengths(lengths, T, B, concrete):
            lengths = None
        if reset_mask is not None:
            ops.check_reset_mask(reset_mask, (T,) if input.dim() == 2 else (B, T) if self.batch_first else (T, B))
            reset_mask = reset_mask.unsqueeze(1) if input.dim() == 2 else reset_mask.t() if self.batch_first else reset_mask
            if concrete and reset_state is None and not reset_mask.any():
                reset_mask = None
        if lengths is None and reset_mask is None:
            return None
        resets = None if reset_state is None else self._split(reset_state, "reset_state")
        K = self.num_layers * (2 if self.bidirectional else 1)
        for state, width in zip(resets or (), self._widths, strict=False):
            shapes = [(K, width), (K, B, width), (T, K, B, width)]
            if not ops.is_one_of(state.shape, shapes):
                raise RuntimeError(f"reset_state: expected shape {shapes[0]}, {shapes[1]} or {shapes[2]}, got {tuple(state.shape)}")
        return Cut(lengths, reset_mask, resets)

    def _prepare(self, input: Any, hx: Any) -> tuple[Tensor, Sequence[Tensor] | None, Tensor | None, list[list[Any]]]:
        """Check what forward was given; return the input time-major, the states as a sequence, batch_sizes, and the weights."""
        states = None
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, _ = input
            if hx is not None:
                states = self._split(self.permute_hidden(hx, sorted_indices))
        else:
            data, batch_sizes = input, None
            batched = data.dim() == 3
            if not batched:
                if data.dim() != 2:
                    raise ValueError(self._rank_text.format(data.dim()))
                data = data.unsqueeze(0 if self.batch_first else 1)
            if hx is not None:
                states = self._split(hx)
                check_ranks(states, 3 if batched else 2)
                if not batched:
                    states = [state.unsqueeze(1) for state in states]
        if states is None:
            self.check_input(data, batch_sizes)
            if self.learn_initial:
                states = self._learned_initial(data.size(0 if self.batch_first else 1) if batch_sizes is None else int(batch_sizes[0]))
        else:
            self.check_forward_args(data, self._join(states), batch_sizes)
        if batch_sizes is None:
            if self.batch_first:
                data = data.transpose(0, 1)
            if data.size(0) == 0:
                raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        weights = self._weights()
        check_agreement(data, states or (), weights[0][0])
        return data, states, batch_sizes, weights

    def _sequences(self) -> list[str]:
        """What it runs, one after the other."""
        directions = ("forward", "reverse") if self.bidirectional else ("forward",)
        return [f"layer {layer} {direction}" for layer in range(self.num_layers) for direction in directions]

    def _split(self, hx: Any, name: str = "hx") -> Sequence[Tensor]:
        return (hx,)

    def _join(self, states: Sequence[Tensor]) -> Any:
        return states[0]


class PairLayerBase(LayerBase):
    """A layer of an LSTM, of two states, h and c."""

    _lstm = _candidate = True

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    # torch.nn's own, so that sizes and texts are its by construction.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _split(self, hx: Any, name: str = "hx") -> Sequence[Tensor]:
        return pair(hx, "lstm", name)

    def _join(self, states: Sequence[Tensor]) -> Any:
        return tuple(states)


_Init = TypeVar("_Init", bound=Callable[..., None])
_DEFAULTS = {
    "num_layers": 1,
    "nonlinearity": "tanh",
    "bias": True,
    "batch_first": False,
    "dropout": 0.0,
    "bidirectional": False,
    "proj_size": 0,
}
OF_ONE = ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
OF_TWO = (*OF_ONE, "proj_size")


def signed(*names: str) -> Callable[[_Init], _Init]:
    """Let ``help`` and editors see what a constructor takes that hands on all it is given: these by position, torch.nn's device and dtype,
    its own and :class:`LayerBase`'s by keyword.
    """

    def decorate(init: _Init) -> _Init:
        kind = inspect.Parameter
        either, keyword = kind.POSITIONAL_OR_KEYWORD, kind.KEYWORD_ONLY
        found = [kind(name, either) for name in ("self", "input_size", "hidden_size")]
        found += [kind(name, either, default=_DEFAULTS[name]) for name in names]
        # By position torch.nn has proj_size before them, of layers too that take none.
        found += [kind(name, either if "proj_size" in names else keyword, default=None) for name in ("device", "dtype")]
        found += [p for of in (init, LayerBase.__init__) for p in inspect.signature(of).parameters.values() if p.kind is keyword]
        init.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
        return init

    return decorate
