"""The cells as their equations read, and a loop over time: the oracle of the kernels, and their documentation.

Plain autograd differentiates everything here, as often as asked, in any dtype. Nothing here is fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["CELLS", "Cell", "sequence"]


Product = Callable[..., Tensor]
Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """What one step computes.

    ``step(x, u, v, *states)`` takes ``x = W x_t + b_ih``, the product ``u(h) = U h + b_hh`` (``u(h, first, last)``: of the row blocks first
    to last - 1), the per-unit vectors ``v``, and the states before the step; it returns those after it, the hidden state first.
    ``input_gates`` and ``hidden_gates`` count the row blocks of W and U, ``vectors`` those of weight_v. ``given`` names what the caller
    gives for each unit: ``reads(g, h)`` is what U reads in h's place, ``after(z, old, new)`` what becomes of a state, z its own zoneout.
    ``fixed`` names the thresholds of clipping, which are the last of weight_v's blocks and have no gradient. A step of a cell that is given
    "candidate" takes ``drop``, what becomes of its candidate, and one with "cell_clip" takes ``bound``, what becomes of c'.
    """

    step: Callable[..., tuple[Tensor, ...]]
    states: tuple[str, ...]
    input_gates: int
    hidden_gates: int
    projected: bool = False
    vectors: int = 0
    given: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    reads: Callable[[dict[str, Tensor], Tensor], Tensor] = lambda g, h: h
    after: Callable[[Tensor | None, Tensor, Tensor], Tensor] = lambda g, old, new: new


Vectors = Sequence[Tensor]


def same(t: Tensor) -> Tensor:
    return t


def srn(f: Activation) -> Cell:
    """h' = f(W x + b + U h). Simple recurrent network, Elman 1990."""

    def step(x: Tensor, u: Product, v: Vectors, h: Tensor) -> tuple[Tensor, ...]:
        return (f(x + u(h)),)

    return Cell(step, ("h",), input_gates=1, hidden_gates=1)


def residual(f: Activation) -> Cell:
    """h' = h + f(W x + b + U h)."""

    def step(x: Tensor, u: Product, v: Vectors, h: Tensor) -> tuple[Tensor, ...]:
        return (h + f(x + u(h)),)

    return Cell(step, ("h",), input_gates=1, hidden_gates=1)


def residual_input(f: Activation) -> Cell:
    """h' = h + f(W x + b)."""

    def step(x: Tensor, u: Product, v: Vectors, h: Tensor) -> tuple[Tensor, ...]:
        return (h + f(x),)

    return Cell(step, ("h",), input_gates=1, hidden_gates=0)


def indrnn(f: Activation) -> Cell:
    """h' = f(W x + b + u ⊙ h). Independently recurrent network, Li et al. 2018."""

    def step(x: Tensor, u: Product, v: Vectors, h: Tensor) -> tuple[Tensor, ...]:
        return (f(x + v[0] * h),)

    return Cell(step, ("h",), input_gates=1, hidden_gates=0, vectors=1)


def lstm(x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor, drop: Activation = same, bound: Activation = same) -> tuple[Tensor, ...]:
    """c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh(c'). Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000."""
    i, f, g, o = (x + u(h)).chunk(4, dim=-1)
    c = bound(f.sigmoid() * c + i.sigmoid() * drop(g.tanh()))
    return o.sigmoid() * c.tanh(), c


def lstm_peephole(
    x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor, drop: Activation = same, bound: Activation = same
) -> tuple[Tensor, ...]:
    """LSTM whose gates also see the cell state: i and f the old one, o the new one. Gers, Schraudolph & Schmidhuber 2002."""
    i, f, g, o = (x + u(h)).chunk(4, dim=-1)
    new = bound((f + v[1] * c).sigmoid() * c + (i + v[0] * c).sigmoid() * drop(g.tanh()))
    return (o + v[2] * new).sigmoid() * new.tanh(), new


def lstm_coupled(
    x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor, drop: Activation = same, bound: Activation = same
) -> tuple[Tensor, ...]:
    """c' = (1 − i) ⊙ c + i ⊙ g. The LSTM with coupled gates, CIFG, of Greff et al. 2017."""
    i, g, o = (x + u(h)).chunk(3, dim=-1)
    c = bound((1 - i.sigmoid()) * c + i.sigmoid() * drop(g.tanh()))
    return o.sigmoid() * c.tanh(), c


def lstm_no_forget(
    x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor, drop: Activation = same, bound: Activation = same
) -> tuple[Tensor, ...]:
    """c' = c + i ⊙ g. The LSTM of Hochreiter & Schmidhuber 1997."""
    i, g, o = (x + u(h)).chunk(3, dim=-1)
    c = bound(c + i.sigmoid() * drop(g.tanh()))
    return o.sigmoid() * c.tanh(), c


def gru(x: Tensor, u: Product, v: Vectors, h: Tensor, drop: Activation = same) -> tuple[Tensor, ...]:
    """h' = z ⊙ h + (1 − z) ⊙ n, n = tanh(x_n + r ⊙ u_n). Cho 2014, with the reset after the matrix product as in torch.nn.GRU."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    u_r, u_z, u_n = u(h).chunk(3, dim=-1)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = drop((x_n + r * u_n).tanh())
    return (z * h + (1 - z) * n,)


def gru_reset_before(x: Tensor, u: Product, v: Vectors, h: Tensor, drop: Activation = same) -> tuple[Tensor, ...]:
    """h' = z ⊙ h + (1 − z) ⊙ n, n = tanh(x_n + U_n (r ⊙ h)). Cho 2014."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    u_r, u_z = u(h, 0, 2).chunk(2, dim=-1)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = drop((x_n + u(r * h, 2, 3)).tanh())
    return (z * h + (1 - z) * n,)


def zoneout(cell: Cell) -> Cell:
    """s' = z ⊙ s + (1 − z) ⊙ s̃ for each state, s̃ what the cell makes of it. Krueger et al. 2017."""
    names = tuple(f"zoneout_{i}" for i in range(len(cell.states)))
    order = (*names[1:], names[0]) if cell.projected else names
    return replace(cell, given=(*cell.given, *order), after=lambda z, old, new: new if z is None else z * old + (1 - z) * new)


def dropout(cell: Cell) -> Cell:
    """U reads m ⊙ h, m one mask for all steps. Gal & Ghahramani 2016."""
    return replace(cell, given=(*cell.given, "dropout"), reads=lambda g, h: g["dropout"] * h)


def candidate(cell: Cell) -> Cell:
    """The candidate, g of an LSTM and n of a GRU, becomes m ⊙ g, m a mask for each token. Semeniuta, Severyn & Barth 2016."""
    return replace(cell, given=(*cell.given, "candidate"))


def projected(cell: Cell) -> Cell:
    """h' becomes W_hr h'. Sak, Senior & Beaufays 2014: the loop below applies W_hr to the hidden state that the step returns."""
    return replace(cell, projected=True)


def clipped(cell: Cell, what: str) -> Cell:
    """Within [−v, v] at every step are kept: c', before it goes into the output ("cell_clip"); W_hr h' ("proj_clip"); the gradient of h'
    ("grad_clip", after Graves 2013, who clips that of the pre-activations).
    """
    return replace(cell, fixed=(*cell.fixed, what), vectors=cell.vectors + 1)


def clip(t: Tensor, v: Tensor) -> Tensor:
    return t.clamp(-v[: t.size(-1)], v[: t.size(-1)])


def lstm_cell_norm(x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor, drop: Activation = same) -> tuple[Tensor, ...]:
    """LSTM with h' = o ⊙ tanh(γ ⊙ N(c') + β). Ba, Kiros & Hinton 2016."""
    i, f, g, o = (x + u(h)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * drop(g.tanh())
    return o.sigmoid() * torch.nn.functional.layer_norm(c, c.shape[-1:], v[0], v[1]).tanh(), c


def gru_dreamer(x: Tensor, u: Product, v: Vectors, h: Tensor, drop: Activation = same) -> tuple[Tensor, ...]:
    """r, n, u = γ ⊙ N(W x + U h + b) + β; h' = σ(u − 1) ⊙ tanh(σ(r) ⊙ n) + (1 − σ(u − 1)) ⊙ h. Hafner et al. 2020."""
    z = x + u(h)
    r, n, gate = torch.nn.functional.layer_norm(z, z.shape[-1:], torch.cat(list(v[:3])), torch.cat(list(v[3:])), 1e-3).chunk(3, dim=-1)
    gate = (gate - 1).sigmoid()
    return (gate * drop((r.sigmoid() * n).tanh()) + (1 - gate) * h,)


def layer_norm(cell: Cell, names: str, by_gate: bool, shifted: bool = False) -> Cell:
    """U h becomes γ ⊙ N(U h), of each gate or of all at once (and, shifted, + b in the last block); x is given. Ba, Kiros & Hinton 2016."""
    n = cell.hidden_gates

    def step(x: Tensor, u: Product, v: Vectors, *states: Tensor, **modifiers: Activation) -> tuple[Tensor, ...]:
        def normed(h: Tensor) -> Tensor:
            product = u(h)
            blocks = product.unflatten(-1, (n, -1)) if by_gate else product.unsqueeze(-2)  # type: ignore[no-untyped-call]
            result = torch.nn.functional.layer_norm(blocks, blocks.shape[-1:]).flatten(-2) * torch.cat(list(v[:n]))
            if shifted:
                result = result + torch.cat([torch.zeros_like(v[n]).repeat(n - 1), v[n]])
            return result

        return cell.step(x, normed, v[n + shifted :], *states, **modifiers)

    return replace(cell, step=step, input_gates=0, vectors=n + shifted + cell.vectors, given=(*names, *cell.given))


def tangent(cell: Cell, names: str) -> Cell:
    """ds' = J (da, ds), J the derivative of the cell's step: tangents of its states from those of its pre-activations a. Given are, slot by
    slot, da without U dh, and a, then the states before the step.
    """
    alone = len(names) // 2 - cell.input_gates  # the last so many slots are fed by U alone

    def step(x: Tensor, u: Product, v: Vectors, *tangents: Tensor) -> tuple[Tensor, ...]:
        H = tangents[0].size(-1)
        blocks = [cell.input_gates * H, alone * H]
        dx, du, x, ux, *states = torch.split(x, [*blocks, *blocks, *[H] * len(cell.states)], -1)

        def rest(t: Tensor) -> Tensor:
            return torch.cat([t.new_zeros(*t.shape[:-1], (cell.hidden_gates - alone) * H), t], -1)

        def of(x: Tensor, product: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
            return cell.step(x, lambda h: product, v, *states)

        made: tuple[Tensor, ...] = torch.func.jvp(of, (x, rest(ux), *states), (dx, u(tangents[0]) + rest(du), *tangents))[1]
        return made

    return replace(cell, step=step, input_gates=0, given=(*names, *cell.states))


ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda z: z}

CELLS: dict[str, Cell] = {
    **{f"srn_{name}": srn(f) for name, f in ACTIVATIONS.items()},
    "lstm": Cell(lstm, ("h", "c"), input_gates=4, hidden_gates=4),
    "gru": Cell(gru, ("h",), input_gates=3, hidden_gates=3),
    "lstm_peephole": Cell(lstm_peephole, ("h", "c"), input_gates=4, hidden_gates=4, vectors=3),
    "lstm_coupled": Cell(lstm_coupled, ("h", "c"), input_gates=3, hidden_gates=3),
    "lstm_no_forget": Cell(lstm_no_forget, ("h", "c"), input_gates=3, hidden_gates=3),
    "gru_reset_before": Cell(gru_reset_before, ("h",), input_gates=3, hidden_gates=3),
    **{f"residual_{name}": residual(f) for name, f in ACTIVATIONS.items()},
    **{f"residual_input_{name}": residual_input(f) for name, f in ACTIVATIONS.items()},
    **{f"indrnn_{name}": indrnn(f) for name, f in ACTIVATIONS.items()},
}

CELLS["lstm_projected"] = projected(CELLS["lstm"])
CELLS["lstm_cell_norm"] = Cell(lstm_cell_norm, ("h", "c"), input_gates=4, hidden_gates=4, vectors=2)
CELLS["gru_dreamer"] = Cell(gru_dreamer, ("h",), input_gates=3, hidden_gates=3, vectors=6)
for _name, _gates in {"lstm": "ifgo", "lstm_cell_norm": "ifgo", "lstm_peephole": "ifgo", "gru": "rzn", "srn_tanh": "z"}.items():
    CELLS[f"{_name}_layer_norm"] = layer_norm(CELLS[_name], _gates, by_gate=False, shifted=_name == "gru")
for _name, _gates in {"lstm": "ifgo", "lstm_cell_norm": "ifgo", "gru": "rzn"}.items():
    CELLS[f"{_name}_gate_norm"] = layer_norm(CELLS[_name], _gates, by_gate=True, shifted=_name == "gru")
for _name in ("lstm", "lstm_projected", "lstm_peephole", "gru", "gru_reset_before", "srn_tanh"):
    CELLS[f"{_name}_zoneout"] = zoneout(CELLS[_name])
for _name in ("lstm", "lstm_peephole", "gru", "gru_reset_before", "srn_tanh", "lstm_zoneout"):
    CELLS[f"{_name}_dropout"] = dropout(CELLS[_name])
for _name in ("lstm_peephole", "lstm_layer_norm"):
    CELLS[f"{_name}_projected"] = projected(CELLS[_name])
for _name in ("lstm", "gru"):
    CELLS[f"{_name}_candidate"] = candidate(CELLS[_name])
CELLS["lstm_cell_clip"] = clipped(CELLS["lstm"], "cell_clip")
for _name in ("srn_tanh", "lstm"):
    CELLS[f"{_name}_projected_proj_clip"] = clipped(projected(CELLS[_name]), "proj_clip")
    CELLS[f"{_name}_grad_clip"] = clipped(CELLS[_name], "grad_clip")

for _name, _gates in {"lstm": "ifgoIFGO", "gru": "rznmRZNM", "srn_tanh": "zZ", "srn_relu": "zZ"}.items():
    CELLS[f"{_name}_tangent"] = tangent(CELLS[_name], _gates)


def sequence(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    weight_v: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_states: Sequence[Tensor] | None = None,
    units: Tensor | None = None,
    module: int = 0,
    given: Sequence[Tensor] = (),
    reverse: bool = False,
    return_states: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``cell`` over one sequence in one direction and return ``(output, *final_states)``.

    Padded: input ``[T, B, I]``, output ``[T, B, P]``. Ragged (``batch_sizes`` as PackedSequence has it): ``[N, I]`` and ``[N, P]``.
    States are ``[B, ·]``, in the cell's order, None for zeros. P is H or, projected, the rows of ``weight_hr``. Weights: as in torch.nn;
    weight_v stacks the cell's per-unit vectors, at the end the thresholds, which are constants. ``given`` numbers lie as the input, for
    each row ``[B, k·H]``, or for all ``[k·H]``.
    ``reverse`` runs from the last step (of each row) to the first; the output keeps the input's order. With ``return_states`` the states
    beyond the first after each step follow, in the output's shape.

    Padded only: row b has ``lengths[b]`` steps. Before a step that ``reset_mask [T, B]`` marks (with ``reverse``: after it, since time runs
    back) states become ``reset_states``, each ``[·]``, ``[B, ·]`` or, by the marked token, ``[T, B, ·]``; None: zeros. At step t only the
    units below ``units[t]`` change, and U is block upper triangular, ``module`` units a block.
    """
    spec = CELLS[cell]
    hidden = weight_ih.size(0) // spec.input_gates if weight_ih is not None else weight_hh.size(0) // spec.hidden_gates  # type: ignore[union-attr]
    vectors = () if weight_v is None else torch.split(weight_v, hidden)
    if units is not None and weight_hh is not None:
        block = torch.arange(hidden) // module
        weight_hh = weight_hh * (block.unsqueeze(1) <= block)

    def marked(t: int, states: Sequence[Tensor]) -> list[Tensor]:
        """The states that step t finds."""
        boundary = t + reverse
        if reset_mask is None or boundary == len(input):
            return list(states)
        mark = (reset_mask[boundary] if lengths is None else reset_mask[boundary] & (lengths > boundary)).unsqueeze(1)
        replacing = reset_states or [state.new_zeros(state.size(1)) for state in states]
        return [torch.where(mark, r[boundary] if r.dim() == 3 else r, state) for r, state in zip(replacing, states, strict=True)]

    learned = len(vectors) - len(spec.fixed)
    limits = {name: v.detach() for name, v in zip(spec.fixed, vectors[learned:], strict=True)}

    g: dict[str, Tensor] = {}
    modifiers: dict[str, Activation] = {}
    if "candidate" in spec.given:
        modifiers["drop"] = lambda n: g["candidate"] * n
    if "cell_clip" in limits:
        modifiers["bound"] = lambda c: clip(c, limits["cell_clip"])

    def u(operand: Tensor, first: int = 0, last: int = spec.hidden_gates) -> Tensor:
        assert weight_hh is not None
        rows = slice(first * hidden, last * hidden)
        return linear(spec.reads(g, operand), weight_hh[rows], None if bias_hh is None else bias_hh[rows])

    def given_at(t: int, active: int) -> list[Tensor]:
        found = []
        for numbers in given:
            if numbers.shape[:-1] == input.shape[:-1]:
                numbers = numbers[t] if batch_sizes is None else torch.split(numbers, batch_sizes.tolist())[t]
            found.append(numbers.expand(active, -1) if numbers.dim() == 1 else numbers[:active])
        return found

    inputs = input.unbind() if batch_sizes is None else torch.split(input, batch_sizes.tolist())
    outputs = list(inputs)
    order = range(len(inputs))
    if states is None:
        widths = [hidden if weight_hr is None else weight_hr.size(0)] + [hidden] * (len(spec.states) - 1)
        states = [input.new_zeros(len(inputs[0]), width) for width in widths]
    current = tuple(states)
    histories = [list(inputs) for _ in spec.states[1:]]
    for t in reversed(order) if reverse else order:
        # The rows that have a step t are a prefix. The others have either ended, or, in reverse, not begun: they keep their state.
        active = len(inputs[t])
        before = marked(t, [state[:active] for state in current])
        g.update(zip(spec.given, (block for numbers in given_at(t, active) for block in torch.split(numbers, hidden, dim=-1)), strict=True))
        x = (
            linear(inputs[t], weight_ih, bias_ih)
            if weight_ih is not None
            else torch.cat([g[name] for name in spec.given if len(name) == 1], -1)
        )
        h, *others = spec.step(x, u, vectors[:learned], *before, **modifiers)
        if weight_hr is not None:
            h = linear(h, weight_hr)
        if "proj_clip" in limits:
            h = clip(h, limits["proj_clip"])
        masks = [g.get(f"zoneout_{i}") for i in range(len(spec.states))]
        made = zip(masks, before, (h, *others), strict=True)
        h, *others = (spec.after(None if z is None else z[:, : old.size(1)], old, new) for z, old, new in made)
        if "grad_clip" in limits and h.requires_grad:
            h.register_hook(lambda grad: None if grad is None else clip(grad, limits["grad_clip"]))  # type: ignore[no-untyped-call]
        if units is not None:
            here = torch.arange(hidden) < units[t]
            h, *others = (torch.where(here, new, old) for new, old in zip((h, *others), before, strict=True))
        outputs[t] = h
        for history, state in zip(histories, others, strict=True):
            history[t] = state
        if lengths is not None:
            here = (lengths > t).unsqueeze(1)
            for history in (outputs, *histories):
                history[t] = torch.where(here, history[t], 0)
            h, *others = (torch.where(here, new, old) for new, old in zip((h, *others), current, strict=True))
        current = tuple(torch.cat((new, state[active:])) for new, state in zip((h, *others), current, strict=True))
    join = torch.stack if batch_sizes is None else torch.cat
    return join(outputs), *current, *([join(history) for history in histories] if return_states else [])
