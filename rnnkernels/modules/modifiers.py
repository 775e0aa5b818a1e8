"""What a layer may do to its cell: norms, zoneout, dropouts, clips."""

from collections.abc import Sequence

from torch import Tensor, nn

from .. import functional, ops
from .shared import SRNS

# Options of a layer that change its cell.
MODIFIERS = ("zoneout", "recurrent_dropout", "candidate_dropout", "layer_norm", "cell_norm", "cell_clip", "proj_clip", "grad_clip")

_CELLS = {mode: f"srn_{name}" for name, mode in SRNS.items()} | {"GRU": "gru", "LSTM": "lstm"}


class Modified(nn.RNNBase):
    """A layer that says which cell it runs, and what that is given."""

    # Defaults on the class serve modules unpickled from a state that has none.
    zoneout: float | Sequence[float] = 0.0
    recurrent_dropout: float = 0.0
    layer_norm: str | None = None
    cell_norm: bool = False
    cell_clip: float | None = None
    proj_clip: float | None = None
    grad_clip: float | None = None
    candidate_dropout: float = 0.0
    _lstm = False  # whether it has a cell state to clip and an output that can be projected
    _candidate = False  # whether it has a candidate that can be dropped: g of an LSTM, n of a GRU

    @property
    def _base_cell(self) -> str:
        return _CELLS[self.mode]

    def _norms(self) -> list[str]:
        return [] if self.layer_norm is None else ["layer_norm" if self.layer_norm == "gates" else "gate_norm"]

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
