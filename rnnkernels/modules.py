"""Layers and cells that stand in for torch.nn's, and ``explain``, which tells what would run them.

What torch.nn defines for all its recurrent modules (constructor checks, initial weights, state, sizes) is inherited from its two base
classes, so it cannot drift. They subclass those bases and not ``torch.nn.LSTM`` itself, because torch.compile refuses every instance of it.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, gates, ops
from .cuts import Clock, Cut
from .streaming import Stream

__all__ = ["GRU", "LSTM", "RNN", "Explanation", "GRUCell", "LSTMCell", "Plan", "RNNCell", "explain"]

_SRNS = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID", "identity": "RNN_IDENTITY"}
_CELLS = {mode: f"srn_{name}" for name, mode in _SRNS.items()} | {"GRU": "gru", "LSTM": "lstm"}


_RECURRENT_INITS: dict[str, Any] = {"uniform": None, "orthogonal": nn.init.orthogonal_, "identity": nn.init.eye_}


def _checked_engine(engine: str) -> str:
    if engine not in ops.ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ops.ENGINES))}, got {engine!r}")
    return engine


# A cell, the names of its weights, None for those that are not there, and whether thresholds come after them.
_Single = tuple[str, list[str | None], bool]
# Attributes that do not change them: what torch sets in whatever is cast, moved or compiled; a cache; and what the mode says as well. Any
# other may, and a compiled layer looks at these alone.
_NOT_OF_SINGLES = frozenset(
    ("training", "nonlinearity", "_packed", "_flat_weights", "_flat_weight_refs", "_is_torch_compile", "_compiled_call_impl")
)

_Forward = TypeVar("_Forward", bound=Callable[..., Any])


def whole(forward: _Forward) -> _Forward:
    """Let torch.fx take the module as one, as it takes torch.nn's by their name."""

    @functools.wraps(forward)
    def called(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(input, torch.fx.Proxy):
            tracer: Any = input.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input, *args), kwargs)
        return forward(self, input, *args, **kwargs)

    return called  # type: ignore[return-value]


def _named(module: nn.Module, names: Sequence[str]) -> list[Any]:
    # The dictionary is much quicker than getattr. What is not in it is None or an attribute that replaced a Parameter: weight drop,
    # weight_norm, a parametrization, a data-parallel replica.
    parameters = module._parameters
    return [getattr(module, name, None) if (weight := parameters.get(name)) is None else weight for name in names]


def _plain_states(cell: str, hx: Any, rank: int) -> Sequence[Tensor] | None:
    """Those of the cell, none for zeros; or None, and they have to be looked at."""
    if hx is None:
        return ()
    count = len(ops.CELLS[cell].states)
    states = hx if count > 1 else (hx,)
    plain = type(states) is tuple and len(states) == count and all(type(state) is Tensor and state.dim() == rank for state in states)
    return states if plain else None


def _check_agreement(input: Tensor, states: Sequence[Tensor], weight: Tensor) -> None:
    """Raise, with torch.nn's texts, unless input, states and weight share a device and, outside autocast, a dtype."""
    device, dtype = input.device, weight.dtype
    for tensor in (*states, weight):
        if tensor.device != device:
            name = "parameter" if tensor is weight else "hidden"
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {device} and {name} tensor at {tensor.device}"
            )
    for tensor in (input, *states):
        if tensor.dtype != dtype and not torch._C._is_any_autocast_enabled():
            found, expected = (t.type().split(".")[-1].removesuffix("Tensor") for t in (tensor, weight))
            raise RuntimeError(f"mat1 and mat2 must have the same dtype, but got {found} and {expected}")


def _check_ranks(states: Sequence[Tensor], rank: int) -> None:
    for state in states:
        if state.dim() != rank:
            case = "batched 3-D" if rank == 3 else "unbatched 2-D"
            ranks = ", ".join(f"{state.dim()}-D" for state in states)
            found = f"hx should also be {rank}-D but got {ranks} tensor"
            if len(states) == 2:
                found = f"hx and cx should also be {rank}-D but got ({ranks}) tensors"
            raise RuntimeError(f"For {case} input, {found}")


WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_v")


def reshape(module: Any, cell: str, suffix: str = "", normed: str = "") -> list[str]:
    """Give the weights that torch.nn's base has made the shapes of `cell`'s; return the names of those that it has.

    ``normed``: the same cell with a layer norm, which has no bias at U, other vectors, and gains of the input's norm.
    """
    spec, final, H = ops.CELLS[cell], ops.CELLS[normed or cell], module.hidden_size
    P = getattr(module, "proj_size", 0)
    made: Tensor = getattr(module, f"weight_ih{suffix}")
    biased = getattr(module, f"bias_ih{suffix}", None) is not None
    shapes: dict[str, tuple[int, ...]] = {"weight_ih": (spec.input_gates * H, made.shape[1])}
    if spec.hidden_gates:
        shapes["weight_hh"] = (spec.hidden_gates * H, P or H)
    if biased:
        shapes["bias_ih"] = (spec.input_gates * H,)
    if biased and final.biased:
        shapes["bias_hh"] = (final.biased * H,)
    if P:
        shapes["weight_hr"] = (P, H)
    if final.learned:
        shapes["weight_v"] = (final.learned * H,)
    if normed:
        shapes["norm_ih"] = (spec.input_gates * H,)
    for name in (*WEIGHT_NAMES, "norm_ih"):
        known = name + suffix in module._parameters
        module._parameters.pop(name + suffix, None)  # set anew, it comes last: torch.nn's order, layer by layer
        if name in shapes:
            setattr(module, name + suffix, nn.Parameter(made.new_empty(shapes[name])))
        elif known:
            module.register_parameter(name + suffix, None)
    return [name + suffix for name in shapes]


def _no_norm_around(cell: ops.Cell) -> str | None:
    """Why what the cell's matrix gives cannot be normalised, or None."""
    if sum(end > begin for begin, end in cell.stage_rows) > 1:
        return "with two products by U, one after the other"
    # Its first stage sums over a row's units as many values as U has row blocks.
    return "that normalises what U gives already" if 0 < cell.hidden_gates <= cell.sums[0][0] else None


def reset_norms(cell: str, hidden_size: int, weight_v: Tensor, bias: bool) -> None:
    """Gains to one, shifts to zero, and so what was a bias of U where there are none."""
    learned = [name for name, _, learned, *_ in ops.CELLS[cell].vectors if learned]
    with torch.no_grad():
        for name, block in zip(learned, torch.split(weight_v, hidden_size), strict=False):
            if name.startswith(("gain", "shift")) or (name == "b_hn" and not bias):
                block.fill_(float(name.startswith("gain")))


class _Layer(nn.RNNBase):
    """What RNN, GRU and LSTM share: everything but the shape of hx."""

    # Defaults on the class serve modules unpickled from a state that has none.
    engine: str = "auto"
    recompute: bool = False
    forget_bias: float | None = None
    recurrent_init: str = "uniform"
    zoneout: float | Sequence[float] = 0.0
    recurrent_dropout: float = 0.0
    layer_norm: str | None = None
    cell_norm: bool = False
    cell_clip: float | None = None
    proj_clip: float | None = None
    grad_clip: float | None = None
    candidate_dropout: float = 0.0
    learn_initial: bool = False
    weight_dtype: torch.dtype | None = None
    _packed: list[ops.Packed | ops.Remembered] | None = None
    _singles: tuple[_Single | None, _Single | None] | None = None
    _reshaped = False
    _lstm = False  # whether it has a cell state to clip and an output that can be projected
    _candidate = False  # whether it has a candidate that can be dropped: g of an LSTM, n of a GRU
    _argument_names: list[list[str]] | None = None
    _constructed = True  # until then the base class knows no better than torch.nn
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
        _checked_engine(engine)
        if recurrent_init not in _RECURRENT_INITS:
            raise ValueError(f"recurrent_init must be one of {', '.join(map(repr, _RECURRENT_INITS))}, got {recurrent_init!r}")
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

    def _reshape_weights(self) -> None:
        """Where the cell's weights have other shapes than the base gave them, give them these."""
        if self.layer_norm not in (None, "gates", "gate"):
            raise ValueError(f"layer_norm: expected None, 'gates' (all at once) or 'gate' (each by itself), got {self.layer_norm!r}")
        if self.layer_norm is not None and not ops.CELLS[self._base_cell].hidden_gates:
            raise ValueError(f"layer_norm: expected None for a layer with no recurrent matrix, got {self.layer_norm!r}")
        if self.layer_norm is not None and (unfit := _no_norm_around(ops.CELLS[self._base_cell])):
            raise ValueError(f"layer_norm: expected None for a layer {unfit}, got {self.layer_norm!r}")
        if not self._reshaped and self.layer_norm is None and not self.cell_norm:
            return
        normed = ops.modified(self._base_cell, self._norms()) if self.layer_norm else ""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        suffixes = [f"_l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]
        self._all_weights = [reshape(self, self._base_cell, suffix, normed) for suffix in suffixes]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        names = (*WEIGHT_NAMES, "norm_ih") if normed else WEIGHT_NAMES
        self._argument_names = [[name + suffix for name in names] for suffix in suffixes]
        self.reset_parameters()

    def _norms(self) -> list[str]:
        return [] if self.layer_norm is None else ["layer_norm" if self.layer_norm == "gates" else "gate_norm"]

    def reset_parameters(self) -> None:
        """Draw all weights anew: as torch.nn, then as ``forget_bias`` and ``recurrent_init`` have it."""
        super().reset_parameters()
        self._reset_beyond_torch()

    def _reset_beyond_torch(self) -> None:
        if not self._constructed:
            return
        self._reset_norms()
        for name in self._initial_names():
            nn.init.zeros_(getattr(self, name))
        if self.forget_bias is None and self.recurrent_init == "uniform":
            return
        slots = [name for name, fed, *_ in ops.CELLS[self._base_cell].slots if fed]
        if self.forget_bias is not None and ("f" not in slots or not self.bias):
            raise ValueError(f"forget_bias: expected None for a layer without a forget gate or without biases, got {self.forget_bias}")
        with torch.no_grad():
            for _, weight_hh, *biases in self._own_weights():
                if self.forget_bias is not None:
                    bias_ih, bias_hh = biases[:2]
                    rows = slice(slots.index("f") * self.hidden_size, (slots.index("f") + 1) * self.hidden_size)
                    bias_ih[rows].fill_(self.forget_bias)
                    if bias_hh is not None:
                        bias_hh[rows].zero_()
                if weight_hh is not None and self.recurrent_init != "uniform":
                    for block in weight_hh.split(self.hidden_size):
                        _RECURRENT_INITS[self.recurrent_init](block)

    def _reset_norms(self) -> None:
        cell = ops.modified(self._base_cell, self._norms())
        if any(name.startswith("gain") for name, *_ in ops.CELLS[cell].vectors):
            for _, _, _, _, _, weight_v, *norm_ih in self._own_weights():
                reset_norms(cell, self.hidden_size, weight_v, self.bias)
                for gain in norm_ih:
                    nn.init.ones_(gain)

    @property
    def _base_cell(self) -> str:
        return _CELLS[self.mode]

    def _modifiers(self, training: bool) -> tuple[str, tuple[float, ...]]:
        """The cell that runs, and how probably each of its states keeps its old value."""
        base, clips = self._base_cell, self._clips()
        if not (self.zoneout or self.recurrent_dropout or self.candidate_dropout or self.layer_norm or self.proj_size or clips):
            return base, ()
        spec = ops.CELLS[base]
        zones = tuple(self.zoneout) if isinstance(self.zoneout, Sequence) else (self.zoneout,) * len(spec.states)
        if len(zones) != len(spec.states) or not all(isinstance(p, int | float) and 0 <= p <= 1 for p in zones):
            states = ", ".join(spec.states)
            raise ValueError(f"zoneout: expected a number from 0 to 1, or one for each state ({states}), got {self.zoneout!r}")
        for name, p in (("recurrent_dropout", self.recurrent_dropout), ("candidate_dropout", self.candidate_dropout)):
            if not (isinstance(p, int | float) and 0 <= p < 1):
                raise ValueError(f"{name}: expected a number from 0 to below 1, got {p!r}")
        if self.recurrent_dropout > 0 and (self.proj_size or not spec.hidden_gates):
            why = "a projection" if self.proj_size else "no recurrent matrix"
            raise ValueError(f"recurrent_dropout: expected 0 for a layer with {why}, got {self.recurrent_dropout}")
        if self.candidate_dropout > 0 and not self._candidate:
            raise ValueError(f"candidate_dropout: expected 0 for a layer that is no LSTM or GRU, got {self.candidate_dropout}")
        wrappers = [
            *["candidate"] * (self.candidate_dropout > 0 and training),
            *["cell_clip"] * ("cell_clip" in clips),
            *self._norms(),
            *["projected"] * (self.proj_size > 0),
            *["proj_clip"] * ("proj_clip" in clips),
            *["zoneout"] * any(zones),
            *["grad_clip"] * ("grad_clip" in clips),
            *["dropout"] * (self.recurrent_dropout > 0 and training),
        ]
        return ops.modified(base, wrappers), zones if any(zones) else ()

    def _clips(self) -> dict[str, float]:
        """The thresholds, in the order in which cells take them."""
        if self.cell_clip is self.proj_clip is self.grad_clip is None:
            return {}
        found = {"cell_clip": self.cell_clip, "proj_clip": self.proj_clip, "grad_clip": self.grad_clip}
        clips = {name: v for name, v in found.items() if v is not None}
        for name, v in clips.items():
            if not (isinstance(v, int | float) and not isinstance(v, bool) and v > 0):
                raise ValueError(f"{name}: expected a number above 0, or None, got {v!r}")
        if "cell_clip" in clips and (self.cell_norm or not self._lstm):
            why = "with cell_norm" if self.cell_norm else "without an LSTM's cell state"
            raise ValueError(f"cell_clip: expected None for a layer {why}, got {self.cell_clip}")
        if "proj_clip" in clips and not self.proj_size:
            raise ValueError(f"proj_clip: expected None for a layer without proj_size, got {self.proj_clip}")
        return clips

    @property
    def _cell(self) -> str:
        return self._modifiers(self.training)[0]

    def _given(self, cell: str, zones: tuple[float, ...], data: Tensor, batch_sizes: Tensor | None) -> list[list[Tensor]] | None:
        """What each layer and direction is given: masks drawn anew in training, expectations otherwise."""
        spec = ops.CELLS[cell]
        names = [spec.slots[slot][0] for slot in spec.given if spec.slots[slot][4]]
        if not names:
            return None
        H, batch = self.hidden_size, data.size(1) if batch_sizes is None else int(batch_sizes[0])

        def draw(name: str) -> Tensor:
            if name == "dropout":
                keeps = 1 - self.recurrent_dropout
                return functional.mask(data, (batch, H), keeps) / keeps
            if name == "candidate":
                keeps = 1 - self.candidate_dropout
                return functional.mask(data, (*data.shape[:-1], H), keeps) / keeps
            if not name.startswith("zoneout_"):
                raise RuntimeError(f"the cell {cell!r} is given {name!r}, which a layer knows nothing of: call rnnkernels.ops.sequence")
            p = zones[int(name.removeprefix("zoneout_"))]
            return functional.mask(data, (*data.shape[:-1], H), p) if self.training else data.new_full((H,), p)

        return [[draw(name) for name in names] for _ in range(self.num_layers * (2 if self.bidirectional else 1))]

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        # torch.nn keeps this list and must notice when it goes stale; ours is read by name, each time.
        return _named(self, self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """The base class stores the list in several places; there is nothing to store."""

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
        masked = ("recompute", "weight_dtype", "learn_initial", "zoneout", "recurrent_dropout", "candidate_dropout")
        bounded = ("layer_norm", "cell_norm", "cell_clip", "proj_clip", "grad_clip")
        modifiers = {name: getattr(self, name) for name in masked + bounded}
        return super().extra_repr() + engine + "".join(f", {name}={value}" for name, value in modifiers.items() if value)

    @whole
    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset_mask: Tensor | None = None,
        reset_state: Any = None,
        return_states: bool | str = False,
    ) -> tuple[Any, ...]:
        """Run the layer; see the class for shapes and errors.

        Args:
            lengths: ``[B]``, integers from 0 to T, in any order, on any device: how many steps each row has. Outputs past them are
                zero, the final state is that after a row's last step, and the reverse direction starts there.
            reset_mask: ``[T, B]`` booleans (``[B, T]`` if batch_first, ``[T]`` unbatched): the state before a marked step is replaced by
                ``reset_state``, and nothing flows across, neither forward nor, in the reverse direction, back over the same boundary.
            reset_state: as hx; each of its tensors ``[L · D, H]``, as hx ``[L · D, B, H]``, or one for each step that may be marked
                ``[T, L · D, B, H]``. Zeros if None. Gradients flow into it.

            return_states: also return, third, every state of the cell after each step, a tuple of tensors ``[L · D, T, B, ·]``
                (``[L · D, B, T, ·]`` if batch_first, ``[L · D, T, ·]`` unbatched, ``[L · D, N, ·]`` for a PackedSequence), through which
                gradients flow. "gates": these and after them the cell's gates, activated, in the order of their row blocks: i, f, g, o of
                an LSTM (what it has of them), r, z, n of a GRU; not of modified cells.

        Raises, beyond what the class says: ``ValueError`` for lengths or reset_mask beside a PackedSequence, reset_state without
        reset_mask, lengths out of range; ``RuntimeError`` for wrong shapes or dtypes of the three.
        """
        return self._run(input, hx, lengths, reset_mask, reset_state, return_states)

    def _run(
        self,
        input: Any,
        hx: Any,
        lengths: Tensor | None,
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
        states = _plain_states(cell, hx, input.dim())
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

    def _cut(self, input: Any, data: Tensor, lengths: Tensor | None, reset_mask: Tensor | None, reset_state: Any) -> Cut | None:
        """What was asked for inside the sequence, checked and time-major; None: nothing that makes a difference."""
        if isinstance(input, PackedSequence):
            raise ValueError("lengths and reset_mask go with a padded input, got a PackedSequence: pad it with pad_packed_sequence")
        if reset_state is not None and reset_mask is None:
            raise ValueError("reset_state: expected a reset_mask beside it, got None")
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
        resets = None if reset_state is None else self._split(reset_state)
        K = self.num_layers * (2 if self.bidirectional else 1)
        for state, width in zip(resets or (), self._widths, strict=False):
            shapes = [(K, width), (K, B, width), (T, K, B, width)]
            if state.shape not in shapes:
                raise RuntimeError(f"reset_state: expected shape {shapes[0]}, {shapes[1]} or {shapes[2]}, got {tuple(state.shape)}")
        return Cut(lengths, reset_mask, resets)

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _initial_names(self) -> dict[str, int]:
        """The Parameters in hx's place, and how wide they are."""
        names = ops.CELLS[self._base_cell].states if self.learn_initial else ()
        return dict(zip((f"initial_{name}" for name in names), self._widths, strict=False))

    def _learned_initial(self, batch: int) -> list[Tensor]:
        return [state.unsqueeze(1).expand(-1, batch, -1) for state in _named(self, list(self._initial_names()))]

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
                _check_ranks(states, 3 if batched else 2)
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
        _check_agreement(data, states or (), weights[0][0])
        return data, states, batch_sizes, weights

    def _weights(self) -> list[list[Any]]:
        """What each layer and direction takes: its parameters, and in weight_v the thresholds, which nothing learns."""
        groups, clips = self._own_weights(), self._clips()
        if not clips:
            return groups
        like = groups[0][0]
        fixed = torch.cat([like.detach().new_full((self.hidden_size,), v) for v in clips.values()])
        at, taken = 5, []
        for group in groups:
            before, v, after = [*group, *[None] * at][:at], group[at] if len(group) > at else None, group[at + 1 :]
            taken.append([*before, fixed if v is None else torch.cat([v, fixed]), *after])
        return taken

    def _own_weights(self) -> list[list[Any]]:
        groups = [_named(self, names) for names in self._argument_names or self._all_weights]
        if self._argument_names is not None:
            return groups
        if self.proj_size > 0 and not self.bias:
            return [[weight_ih, weight_hh, None, None, weight_hr] for weight_ih, weight_hh, weight_hr in groups]
        return groups

    def _sequences(self) -> list[str]:
        """What it runs, one after the other."""
        directions = ("forward", "reverse") if self.bidirectional else ("forward",)
        return [f"layer {layer} {direction}" for layer in range(self.num_layers) for direction in directions]

    def _split(self, hx: Any) -> Sequence[Tensor]:
        return (hx,)

    def _join(self, states: Sequence[Tensor]) -> Any:
        return states[0]


class RNN(_Layer):
    r"""A stack of simple recurrent networks (Elman 1990), as ``torch.nn.RNN``.

    .. math:: h_t = f(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.RNN, in
            this order. ``nonlinearity`` is also "sigmoid" or "identity", besides "tanh" and "relu".
        engine, recompute: keyword only; see :func:`rnnkernels.ops.sequence`.
        weight_dtype: keyword only, for inference on a CPU: ``torch.bfloat16``, ``torch.int8`` or the layer's own: what the recurrent
            weights are in while they stay packed from call to call; see :class:`rnnkernels.ops.Packed`. None: the layer's own, and changes
            that torch does not count are noticed too.
        learn_initial: keyword only: whether the states that a call without hx starts from are Parameters (initial_h and so on,
            ``[L · D, ·]``, zeros at first) instead of zeros.
        forget_bias, recurrent_init: keyword only: what the forget gate's bias starts from (None: as torch.nn), and what each block of U
            does: "uniform" as torch.nn, "orthogonal" (Saxe 2013), "identity" (IRNN, Le 2015).
        zoneout: keyword only: how probably each unit keeps its old value at a step (Krueger 2017), one number or one for each state; out of
            training, the expectation. recurrent_dropout: how probably U does not see a unit of h, for a whole sequence (Gal 2016).
            Masks come from torch's generator. Combinations that are not in the library are compiled when first used, as ``load_cell`` does.
        layer_norm: keyword only: "gates" normalises W x and U h, each over all gates, "gate" each over every gate by itself (Ba 2016), with
            gains norm_ih and weight_v and the shift bias_ih.
        grad_clip: keyword only: v, above 0: the gradient of h_t, all that others ask of it together, is clipped to [-v, v] at every step of
            backward (after Graves 2013, who clips that of the pre-activations); None: not. Forward is the same.

    Shape, with D = 2 if bidirectional else 1 and L = num_layers:
        * input: ``(T, B, I)``, ``(B, T, I)`` if batch_first, ``(T, I)`` unbatched, or a PackedSequence.
        * hx: ``(L · D, B, H)``, or ``(L · D, H)`` unbatched; zeros if None.
        * output: as the input with D · H in place of I; h_n: as hx.

    Dtypes: float64, float32, bfloat16, float16; input, hx and weights share one. Parameters are named and laid out as torch.nn's.

    Raises:
        ValueError: a wrong option; input not 2-D or 3-D; input and weights of different dtypes.
        TypeError: an option of the wrong type.
        RuntimeError: T = 0; wrong sizes; wrong rank, dtype or device of hx.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.RNN(3, 5, nonlinearity="sigmoid")
    >>> output, h_n = layer(torch.zeros(7, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """

    nonlinearity: str
    _rank_text = "RNN: Expected input to be 2D or 3D, got {}D tensor instead"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in _SRNS:
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh', 'relu', 'sigmoid' or 'identity'.")
        super().__init__(_SRNS[nonlinearity], *args, **kwargs)
        self.nonlinearity = nonlinearity


class GRU(_Layer):
    r"""A stack of gated recurrent units (Cho 2014, reset after the matrix product), as ``torch.nn.GRU``.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU, in this order.
        engine, recompute: keyword only; see :func:`rnnkernels.ops.sequence`.
        weight_dtype: keyword only, for inference on a CPU: ``torch.bfloat16``, ``torch.int8`` or the layer's own: what the recurrent
            weights are in while they stay packed from call to call; see :class:`rnnkernels.ops.Packed`. None: the layer's own, and changes
            that torch does not count are noticed too.
        learn_initial: keyword only: whether the states that a call without hx starts from are Parameters (initial_h and so on,
            ``[L · D, ·]``, zeros at first) instead of zeros.
        forget_bias, recurrent_init: keyword only: what the forget gate's bias starts from (None: as torch.nn), and what each block of U
            does: "uniform" as torch.nn, "orthogonal" (Saxe 2013), "identity" (IRNN, Le 2015).
        zoneout: keyword only: how probably each unit keeps its old value at a step (Krueger 2017), one number or one for each state; out of
            training, the expectation. recurrent_dropout: how probably U does not see a unit of h, for a whole sequence (Gal 2016).
            Masks come from torch's generator. Combinations that are not in the library are compiled when first used, as ``load_cell`` does.
        layer_norm: keyword only: "gates" normalises W x and U h, each over all gates, "gate" each over every gate by itself (Ba 2016), with
            gains norm_ih and weight_v and the shift bias_ih.
        candidate_dropout: keyword only: how probably a step drops a unit of its candidate n (Semeniuta 2016), h_t = z_t h_{t-1} +
            (1 - z_t) m_t n_t, with a mask m_t drawn for each step and scaled by 1 / (1 - p); nothing in eval.
        grad_clip: keyword only: v, above 0: the gradient of h_t, all that others ask of it together, is clipped to [-v, v] at every step of
            backward (after Graves 2013, who clips that of the pre-activations); None: not. Forward is the same.

    Shapes, dtypes and errors: as :class:`RNN`.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.GRU(3, 5, bidirectional=True, batch_first=True)
    >>> output, h_n = layer(torch.zeros(2, 7, 3))
    >>> output.shape, h_n.shape
    (torch.Size([2, 7, 10]), torch.Size([2, 2, 5]))
    """

    _rank_text = "GRU: Expected input to be 2D or 3D, got {}D instead"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    _candidate = True


class _PairLayer(_Layer):
    """A layer of an LSTM, of two states, h and c."""

    _lstm = _candidate = True

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.proj_size or self.hidden_size, self.hidden_size)

    # torch.nn's own, so that sizes and texts are its by construction.
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _split(self, hx: Any) -> Sequence[Tensor]:
        return _pair(hx, "lstm")

    def _join(self, states: Sequence[Tensor]) -> Any:
        return tuple(states)


class LSTM(_PairLayer):
    r"""A stack of LSTMs (Hochreiter & Schmidhuber 1997, forget gate of Gers 2000, projection of Sak 2014), as ``torch.nn.LSTM``.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i*} x_t + b_{i*} + W_{h*} h_{t-1} + b_{h*}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t) \quad\text{or, with proj\_size,}\quad W_{hr} (o_t \odot \tanh(c_t))

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as torch.nn.LSTM, in
            this order.
        engine, recompute: keyword only; see :func:`rnnkernels.ops.sequence`.
        weight_dtype: keyword only, for inference on a CPU: ``torch.bfloat16``, ``torch.int8`` or the layer's own: what the recurrent
            weights are in while they stay packed from call to call; see :class:`rnnkernels.ops.Packed`. None: the layer's own, and changes
            that torch does not count are noticed too.
        learn_initial: keyword only: whether the states that a call without hx starts from are Parameters (initial_h and so on,
            ``[L · D, ·]``, zeros at first) instead of zeros.
        forget_bias, recurrent_init: keyword only: what the forget gate's bias starts from (None: as torch.nn), and what each block of U
            does: "uniform" as torch.nn, "orthogonal" (Saxe 2013), "identity" (IRNN, Le 2015).
        zoneout: keyword only: how probably each unit keeps its old value at a step (Krueger 2017), one number or one for each state; out of
            training, the expectation. recurrent_dropout: how probably U does not see a unit of h, for a whole sequence (Gal 2016).
            Masks come from torch's generator. Combinations that are not in the library are compiled when first used, as ``load_cell`` does.
        layer_norm: keyword only: "gates" normalises W x and U h, each over all gates, "gate" each over every gate by itself (Ba 2016), with
            gains norm_ih and weight_v and the shift bias_ih. cell_norm: keyword only: normalises the cell state on its way out.
        candidate_dropout: keyword only: how probably a step drops a unit of its candidate g (Semeniuta 2016), c_t = f_t c_{t-1} +
            i_t m_t g_t, with a mask m_t drawn for each step and scaled by 1 / (1 - p); nothing in eval.
        cell_clip, proj_clip: keyword only: v, above 0: c_t, before it goes into the output, is clipped to [-v, v] (TensorFlow's LSTMCell,
            cuDNN's cudnnRNNSetClip), so that h_t = o_t tanh(clip(f_t c_{t-1} + i_t g_t)); and h_t = clip(W_hr ...), of a layer with
            proj_size. Gradients pass where nothing was clipped. None: not.
        grad_clip: keyword only: v, above 0: the gradient of h_t, all that others ask of it together, is clipped to [-v, v] at every step of
            backward (after Graves 2013, who clips that of the pre-activations); None: not. Forward is the same.
            Thresholds are no parameters; assigning another takes effect at the next call.

    Shapes, dtypes and errors: as :class:`RNN`, but hx is a pair (h_0, c_0) and the layer returns ``output, (h_n, c_n)``; with P =
    proj_size or else hidden_size, the output is D · P wide, h ``(L · D, B, P)`` and c ``(L · D, B, H)``.

    >>> import torch, rnnkernels
    >>> layer = rnnkernels.LSTM(3, 5, proj_size=2)
    >>> output, (h_n, c_n) = layer(torch.zeros(7, 1, 3))
    >>> output.shape, h_n.shape, c_n.shape
    (torch.Size([7, 1, 2]), torch.Size([1, 1, 2]), torch.Size([1, 1, 5]))
    """

    _rank_text = "LSTM: Expected input to be 2D or 3D, got {}D instead"

    def __init__(self, *args: Any, cell_norm: bool = False, **kwargs: Any) -> None:
        self.__dict__["cell_norm"] = cell_norm  # the base asks for the cell before it lets attributes be set
        super().__init__("LSTM", *args, **kwargs)

    @property
    def _base_cell(self) -> str:
        return "lstm_cell_norm" if self.cell_norm else "lstm"


def _pair(hx: Any, name: str) -> tuple[Tensor, Tensor]:
    if isinstance(hx, Tensor):
        raise TypeError(f"{name}(): argument 'hx' (position 2) must be tuple of Tensors, not Tensor")
    if len(hx) != 2:
        raise RuntimeError(f"{name} expects two hidden states")
    return hx[0], hx[1]


class _Cell(nn.RNNCellBase):
    """What RNNCell, GRUCell and LSTMCell share: one step of a sequence."""

    engine: str = "auto"
    _name: str
    _packed: ops.Remembered | None = None
    _weight_names: tuple[str, ...] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, num_chunks: int, device: Any, dtype: Any, *, engine: str = "auto"
    ) -> None:
        _checked_engine(engine)
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
        weights, hidden_size = _named(self, self._weight_names), self.hidden_size
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
        _check_agreement(input, states or (), weights[0])
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
        states = _plain_states(self._cell, hx, input.dim())
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


class RNNCell(_Cell):
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
        if self.nonlinearity not in _SRNS:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"srn_{self.nonlinearity}"

    @whole
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """Return h'; see the class for shapes and errors."""
        return self._step(input, hx)[0]


class GRUCell(_Cell):
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


class _PairCell(_Cell):
    """A step of a cell of two states, h and c."""

    def _check_ranks(self, input: Tensor, hx: Any) -> None:
        super()._check_ranks(input, None)
        for index, state in enumerate(() if hx is None else hx):
            if state.dim() not in (1, 2):
                raise ValueError(f"{self._name}: Expected hx[{index}] to be 1D or 2D, got {state.dim()}D instead")

    def _split(self, hx: Any) -> Sequence[Tensor]:
        return _pair(hx, "lstm_cell")

    @whole
    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return (h', c'); see the class for shapes and errors."""
        h, c = self._step(input, hx)
        return h, c


class LSTMCell(_PairCell):
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


@dataclass(frozen=True)
class Plan:
    """What would run one layer in one direction, and why."""

    name: str
    engine: str
    isa: str
    threads: int
    schedule: str
    why: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.engine} engine, {self.isa}, {self.threads} thread{'s' * (self.threads != 1)}, {self.schedule}: {self.why}"
        )


@dataclass(frozen=True)
class Explanation:
    """What would run a module on an input: a plan per layer × direction, in the order of the weights. ``str`` gives a line for each."""

    plans: tuple[Plan, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.plans))


def explain(module: nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Explanation:
    """Tell what would compute ``module(input, hx, **options)``, without its kernels; where gradients are asked for, of the backward pass.

    The module's forward goes its way (no hooks, no numbers drawn from torch's generators) up to each sequence, which is noted and not run.

    Args:
        module: a layer or cell of this package.
        input, hx, options: what its forward would take; shapes, dtypes and errors as there.

    Raises:
        TypeError: ``module`` is not a layer or cell of this package.

    >>> import torch, rnnkernels
    >>> explanation = rnnkernels.explain(rnnkernels.GRU(3, 5, bidirectional=True), torch.zeros(7, 2, 3))
    >>> [plan.name for plan in explanation.plans]
    ['layer 0 forward', 'layer 0 reverse']
    """
    module = getattr(module, "_orig_mod", module)  # of one under torch.compile, which would run kernels
    names = getattr(module, "_sequences", None)
    if names is None:
        raise TypeError(f"explain takes a layer or cell of rnnkernels, got {type(module).__module__}.{type(module).__qualname__}")
    data = input.data if isinstance(input, PackedSequence) else input
    with torch.random.fork_rng([data.device] if data.is_cuda else []), ops.listening() as heard:
        module.forward(input, hx, **options)
    # Where no row has a step there is nothing to run.
    return Explanation(tuple(Plan(name, *facts) for name, facts in zip(names(), heard, strict=True)) if heard else ())
