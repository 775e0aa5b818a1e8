"""The weights of a layer: their names, shapes and initial values."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .modifiers import Modified
from .shared import named

WEIGHT_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_v")
RECURRENT_INITS: dict[str, Any] = {"uniform": None, "orthogonal": nn.init.orthogonal_, "identity": nn.init.eye_}


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


def no_norm_around(cell: ops.Cell) -> str | None:
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


class Weighted(Modified):
    """A layer whose weights may have other shapes and initial values than torch.nn's."""

    forget_bias: float | None = None
    recurrent_init: str = "uniform"
    learn_initial: bool = False
    _reshaped = False
    _argument_names: list[list[str]] | None = None
    _constructed = True  # until then the base class knows no better than torch.nn

    def _reshape_weights(self) -> None:
        """Where the cell's weights have other shapes than the base gave them, give them these."""
        if self.layer_norm not in (None, "gates", "gate"):
            raise ValueError(f"layer_norm: expected None, 'gates' (all at once) or 'gate' (each by itself), got {self.layer_norm!r}")
        if self.layer_norm is not None and not ops.CELLS[self._base_cell].hidden_gates:
            raise ValueError(f"layer_norm: expected None for a layer with no recurrent matrix, got {self.layer_norm!r}")
        if self.layer_norm is not None and (unfit := no_norm_around(ops.CELLS[self._base_cell])):
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
        if self.forget_bias is not None and (isinstance(self.forget_bias, bool) or not isinstance(self.forget_bias, int | float)):
            raise TypeError(f"forget_bias: expected a number, or None, got {self.forget_bias!r}")
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
                        RECURRENT_INITS[self.recurrent_init](block)

    def _reset_norms(self) -> None:
        cell = ops.modified(self._base_cell, self._norms())
        if any(name.startswith("gain") for name, *_ in ops.CELLS[cell].vectors):
            for _, _, _, _, _, weight_v, *norm_ih in self._own_weights():
                reset_norms(cell, self.hidden_size, weight_v, self.bias)
                for gain in norm_ih:
                    nn.init.ones_(gain)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        # torch.nn keeps this list and must notice when it goes stale; ours is read by name, each time.
        return named(self, self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        """The base class stores the list in several places; there is nothing to store."""

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
        groups = [named(self, names) for names in self._argument_names or self._all_weights]
        if self._argument_names is not None:
            return groups
        if self.proj_size > 0 and not self.bias:
            return [[weight_ih, weight_hh, None, None, weight_hr] for weight_ih, weight_hh, weight_hr in groups]
        return groups

    @property
    def _widths(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _initial_names(self) -> dict[str, int]:
        """The Parameters in hx's place, and how wide they are."""
        names = ops.CELLS[self._base_cell].states if self.learn_initial else ()
        return dict(zip((f"initial_{name}" for name in names), self._widths, strict=False))

    def _learned_initial(self, batch: int) -> list[Tensor]:
        return [state.unsqueeze(1).expand(-1, batch, -1) for state in named(self, list(self._initial_names()))]
