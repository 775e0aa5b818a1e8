"""The cells as their equations read, and a loop over time: the oracle of the kernels, and their documentation.

Plain autograd differentiates everything here, as often as asked, in any dtype. Nothing here is fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    ``input_gates`` and ``hidden_gates`` count the row blocks of W and U, ``vectors`` those of weight_v.
    """

    step: Callable[..., tuple[Tensor, ...]]
    states: tuple[str, ...]
    input_gates: int
    hidden_gates: int
    projected: bool = False
    vectors: int = 0


Vectors = Sequence[Tensor]


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


def lstm(x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh(c'). Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000."""
    i, f, g, o = (x + u(h)).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm_peephole(x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """LSTM whose gates also see the cell state: i and f the old one, o the new one. Gers, Schraudolph & Schmidhuber 2002."""
    i, f, g, o = (x + u(h)).chunk(4, dim=-1)
    new = (f + v[1] * c).sigmoid() * c + (i + v[0] * c).sigmoid() * g.tanh()
    return (o + v[2] * new).sigmoid() * new.tanh(), new


def lstm_coupled(x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """c' = (1 − i) ⊙ c + i ⊙ g. The LSTM with coupled gates, CIFG, of Greff et al. 2017."""
    i, g, o = (x + u(h)).chunk(3, dim=-1)
    c = (1 - i.sigmoid()) * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def lstm_no_forget(x: Tensor, u: Product, v: Vectors, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """c' = c + i ⊙ g. The LSTM of Hochreiter & Schmidhuber 1997."""
    i, g, o = (x + u(h)).chunk(3, dim=-1)
    c = c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x: Tensor, u: Product, v: Vectors, h: Tensor) -> tuple[Tensor, ...]:
    """h' = z ⊙ h + (1 − z) ⊙ n, n = tanh(x_n + r ⊙ u_n). Cho 2014, with the reset after the matrix product as in torch.nn.GRU."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    u_r, u_z, u_n = u(h).chunk(3, dim=-1)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = (x_n + r * u_n).tanh()
    return (z * h + (1 - z) * n,)


def gru_reset_before(x: Tensor, u: Product, v: Vectors, h: Tensor) -> tuple[Tensor, ...]:
    """h' = z ⊙ h + (1 − z) ⊙ n, n = tanh(x_n + U_n (r ⊙ h)). Cho 2014."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    u_r, u_z = u(h, 0, 2).chunk(2, dim=-1)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = (x_n + u(r * h, 2, 3)).tanh()
    return (z * h + (1 - z) * n,)


ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid, "identity": lambda z: z}

CELLS: dict[str, Cell] = {
    **{f"srn_{name}": srn(f) for name, f in ACTIVATIONS.items()},
    "lstm": Cell(lstm, ("h", "c"), input_gates=4, hidden_gates=4),
    "gru": Cell(gru, ("h",), input_gates=3, hidden_gates=3),
    # Sak 2014: the loop below applies W_hr to the hidden state that the step returns.
    "lstm_projected": Cell(lstm, ("h", "c"), input_gates=4, hidden_gates=4, projected=True),
    "lstm_peephole": Cell(lstm_peephole, ("h", "c"), input_gates=4, hidden_gates=4, vectors=3),
    "lstm_coupled": Cell(lstm_coupled, ("h", "c"), input_gates=3, hidden_gates=3),
    "lstm_no_forget": Cell(lstm_no_forget, ("h", "c"), input_gates=3, hidden_gates=3),
    "gru_reset_before": Cell(gru_reset_before, ("h",), input_gates=3, hidden_gates=3),
    **{f"residual_{name}": residual(f) for name, f in ACTIVATIONS.items()},
    **{f"residual_input_{name}": residual_input(f) for name, f in ACTIVATIONS.items()},
    **{f"indrnn_{name}": indrnn(f) for name, f in ACTIVATIONS.items()},
}


def sequence(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    weight_v: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``cell`` over one sequence in one direction and return ``(output, *final_states)``.

    Padded: input ``[T, B, I]``, output ``[T, B, P]``. Ragged (``batch_sizes`` as PackedSequence has it): ``[N, I]`` and ``[N, P]``.
    States are ``[B, ·]``, in the cell's order, None for zeros. P is H or, projected, the rows of ``weight_hr``. Weights: as in torch.nn;
    weight_v stacks the cell's per-unit vectors.
    ``reverse`` runs from the last step (of each row) to the first; the output keeps the input's order. With ``return_states`` the states
    beyond the first after each step follow, in the output's shape.
    """
    spec = CELLS[cell]
    hidden = weight_ih.size(0) // spec.input_gates
    vectors = () if weight_v is None else torch.split(weight_v, hidden)

    def u(operand: Tensor, first: int = 0, last: int = spec.hidden_gates) -> Tensor:
        assert weight_hh is not None
        rows = slice(first * hidden, last * hidden)
        return linear(operand, weight_hh[rows], None if bias_hh is None else bias_hh[rows])

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
        before = [state[:active] for state in current]
        h, *others = spec.step(linear(inputs[t], weight_ih, bias_ih), u, vectors, *before)
        if weight_hr is not None:
            h = linear(h, weight_hr)
        outputs[t] = h
        for history, state in zip(histories, others, strict=True):
            history[t] = state
        current = tuple(torch.cat((new, state[active:])) for new, state in zip((h, *others), current, strict=True))
    join = torch.stack if batch_sizes is None else torch.cat
    return join(outputs), *current, *([join(history) for history in histories] if return_states else [])
