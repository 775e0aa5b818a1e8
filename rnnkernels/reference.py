"""The cells as their equations read, and a loop over time: the oracle of the kernels, and their documentation.

Plain autograd differentiates everything here, as often as asked, in any dtype. Nothing here is fast.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["CELLS", "Cell", "sequence"]


@dataclass(frozen=True)
class Cell:
    """What one step computes.

    ``step(x, u, *states)`` takes ``x = W x_t + b_ih``, ``u = U h_{t-1} + b_hh`` and the states before the step, and returns those after it,
    the hidden state first. ``input_gates`` and ``hidden_gates`` count the row blocks of W and U.
    """

    step: Callable[..., tuple[Tensor, ...]]
    states: tuple[str, ...]
    input_gates: int
    hidden_gates: int
    projected: bool = False


def srn(activation: Callable[[Tensor], Tensor]) -> Cell:
    """h' = f(W x + b + U h). Simple recurrent network, Elman 1990."""

    def step(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return (activation(x + u),)

    return Cell(step, states=("h",), input_gates=1, hidden_gates=1)


def lstm(x: Tensor, u: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """c' = f ⊙ c + i ⊙ g, h' = o ⊙ tanh(c'). Hochreiter & Schmidhuber 1997, with the forget gate of Gers 2000."""
    i, f, g, o = (x + u).chunk(4, dim=-1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru(x: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """h' = z ⊙ h + (1 − z) ⊙ n, n = tanh(x_n + r ⊙ u_n). Cho 2014, with the reset after the matrix product as in torch.nn.GRU."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    u_r, u_z, u_n = u.chunk(3, dim=-1)
    r = (x_r + u_r).sigmoid()
    z = (x_z + u_z).sigmoid()
    n = (x_n + r * u_n).tanh()
    return (z * h + (1 - z) * n,)


CELLS: dict[str, Cell] = {
    "srn_tanh": srn(torch.tanh),
    "srn_relu": srn(torch.relu),
    "srn_sigmoid": srn(torch.sigmoid),
    "srn_identity": srn(lambda z: z),
    "lstm": Cell(lstm, states=("h", "c"), input_gates=4, hidden_gates=4),
    "gru": Cell(gru, states=("h",), input_gates=3, hidden_gates=3),
    # Sak 2014: the loop below applies W_hr to the hidden state that the step returns.
    "lstm_projected": Cell(lstm, states=("h", "c"), input_gates=4, hidden_gates=4, projected=True),
}


def sequence(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """Run ``cell`` over one sequence in one direction and return ``(output, *final_states)``.

    Padded: input ``[T, B, I]``, output ``[T, B, P]``. Ragged (``batch_sizes`` as PackedSequence has it): ``[N, I]`` and ``[N, P]``.
    States are ``[B, ·]``, in the cell's order, None for zeros. P is H or, projected, the rows of ``weight_hr``. Weights: as in torch.nn.
    ``reverse`` runs from the last step (of each row) to the first; the output keeps the input's order.
    """
    step = CELLS[cell].step
    inputs = input.unbind() if batch_sizes is None else torch.split(input, batch_sizes.tolist())
    outputs = list(inputs)
    order = range(len(inputs))
    if states is None:
        widths = [weight_hh.size(1)] + [weight_hh.size(0) // CELLS[cell].hidden_gates] * (len(CELLS[cell].states) - 1)
        states = [input.new_zeros(len(inputs[0]), width) for width in widths]
    current = tuple(states)
    for t in reversed(order) if reverse else order:
        # The rows that have a step t are a prefix. The others have either ended, or, in reverse, not begun: they keep their state.
        active = len(inputs[t])
        before = [state[:active] for state in current]
        h, *others = step(linear(inputs[t], weight_ih, bias_ih), linear(before[0], weight_hh, bias_hh), *before)
        if weight_hr is not None:
            h = linear(h, weight_hr)
        outputs[t] = h
        current = tuple(torch.cat((new, state[active:])) for new, state in zip((h, *others), current, strict=True))
    return torch.stack(outputs) if batch_sizes is None else torch.cat(outputs), *current
