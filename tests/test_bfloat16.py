"""bfloat16 where the processor multiplies two at once: what an odd number of them leaves half of a word for, and what the law of the bits
asks besides (docs/architecture.md, "A sequence, step by step"). On other instruction sets the same must hold.
"""

from __future__ import annotations

import pytest
import torch
from conftest import ISAS
from torch import Tensor

import rnnkernels
from rnnkernels import ops

pytestmark = pytest.mark.usefixtures("restore")

KINDS = ["LSTM", "GRU", "RNN", "GRUResetBefore"]
by_isa = pytest.mark.parametrize("isa", ISAS)
by_kind = pytest.mark.parametrize("kind", KINDS)
# (T, B, I, H): depths of the products forward, backward and over tokens that are odd, even, one, and beyond a vector of pairs.
odd = pytest.mark.parametrize(
    "sizes", [(5, 3, 1, 1), (6, 2, 7, 5), (3, 3, 33, 31), (4, 9, 16, 17), (2, 40, 65, 64)], ids=lambda s: "T{} B{} I{} H{}".format(*s)
)


def made(kind: str, sizes: tuple[int, int, int, int], isa: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    T, B, inputs, hidden = sizes
    torch.manual_seed(0)
    ops.set_isa(isa)
    layer = getattr(rnnkernels, kind)(inputs, hidden, dtype=torch.bfloat16)
    return layer, torch.randn(T, B, inputs).bfloat16(), torch.randn(T, B, hidden).bfloat16()


def run(layer: torch.nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """Output, final h, dx and the parameters' gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_(True)
    output, state = layer(x)
    output.backward(g)
    assert x.grad is not None
    return [
        output.detach(),
        state[0].detach() if isinstance(state, tuple) else state.detach(),
        x.grad,
        *(p.grad for p in layer.parameters()),
    ]


@by_isa
@by_kind
@odd
def test_what_lies_beside_a_row_is_not_read(kind: str, sizes: tuple[int, int, int, int], isa: str, poison: None) -> None:
    """A row of NaN, among the inputs or among the gradients, is between other rows in memory and nowhere in their results."""
    layer, x, g = made(kind, sizes, isa)
    clean = run(layer, x, g)
    for row in range(sizes[1]):
        others = [b for b in range(sizes[1]) if b != row]
        for bad in (x, g):
            kept = bad[:, row].clone()
            bad[:, row] = torch.nan
            found = run(layer, x, g)
            bad[:, row] = kept
            for was, now in zip(clean[:3], found[:3], strict=True):
                assert torch.equal(was[..., others, :], now[..., others, :])
    future = x.clone()
    future[-1] = torch.nan
    with torch.no_grad():
        assert torch.equal(layer(future)[0][:-1], clean[0][:-1])


@by_isa
@by_kind
@odd
def test_a_row_alone_has_the_same_bits(kind: str, sizes: tuple[int, int, int, int], isa: str) -> None:
    layer, x, g = made(kind, sizes, isa)
    together = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        together[threads] = run(layer, x, g)
        with torch.no_grad():
            assert torch.equal(layer(x)[0], together[threads][0])
    assert all(torch.equal(one, two) for one, two in zip(*together.values(), strict=True))
    for row in range(0, sizes[1], 4):
        alone = run(layer, x[:, row : row + 1], g[:, row : row + 1])
        assert torch.equal(alone[0], together[1][0][:, row : row + 1])
        assert torch.equal(alone[1], together[1][1][:, row : row + 1])


@by_isa
@pytest.mark.parametrize("weight", [1.0, -3.0, 2.0**-133, torch.inf, torch.nan], ids=str)
def test_numbers_at_the_ends_of_the_range(weight: float, isa: str) -> None:
    """One product of one number: what is below the normal numbers may count as zero, nothing else may differ."""
    ops.set_isa(isa)
    layer = rnnkernels.RNN(1, 1, nonlinearity="relu", bias=False, dtype=torch.bfloat16)

    def flushed(number: Tensor) -> Tensor:
        return torch.where(number.abs() < 2.0**-126, 0.0, number)

    w = torch.tensor(weight).bfloat16().double()
    with torch.no_grad():
        layer.weight_ih_l0.fill_(weight)
        layer.weight_hh_l0.fill_(0)
        for x in torch.tensor([0.0, 1.0, 3.0, 2.0**-126, 2.0**-133, 2.0**127, torch.inf], dtype=torch.float64):
            found = layer(x.bfloat16().expand(1, 1, 1))[0].squeeze().double()
            allowed = [number.relu().bfloat16().double() for number in (w * x, flushed(w * x), flushed(w) * flushed(x))]
            assert any(torch.equal(found.nan_to_num(nan=-1), number.nan_to_num(nan=-1)) for number in allowed), (x, found, allowed)
