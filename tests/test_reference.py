"""The reference cells against torch.nn in float64, and against finite differences."""

import pytest
import torch
from conftest import giving
from torch import Tensor
from torch.func import functional_call

from rnnkernels import reference

sequence = giving(reference.sequence)
T, B, I, H, P = 6, 4, 3, 5, 2  # noqa: E741
BATCH_SIZES = torch.tensor([4, 4, 3, 2, 1, 1])
TORCH = [cell for cell in reference.CELLS if cell in {*(f"srn_{name}" for name in reference.ACTIVATIONS), "lstm", "gru", "lstm_projected"}]
NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")

cells = pytest.mark.parametrize("cell", sorted(reference.CELLS))
ragged = pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
reverse = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
biased = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


def arguments(cell: str, *, ragged: bool, bias: bool) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Random input, states and weights; positive for srn_identity, so that torch's relu can stand witness for the identity."""
    facts = reference.CELLS[cell]
    width = P if facts.projected else H
    low = 0.05 if cell == "srn_identity" else -0.5

    def leaf(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float64).uniform_(low, 0.5).requires_grad_()

    x = leaf(int(BATCH_SIZES.sum()), I) if ragged else leaf(T, B, I)
    states = [leaf(B, width if name == "h" else H) for name in facts.states]
    inputs, gates = facts.input_gates * H, facts.hidden_gates * H
    weights = [
        leaf(inputs, I) if inputs else None,
        leaf(gates, width) if gates else None,
        leaf(inputs) if bias and inputs else None,
        leaf(gates) if bias and inputs and gates else None,
        leaf(P, H) if facts.projected else None,
        leaf(facts.vectors * H) if facts.vectors else None,
    ]
    if facts.fixed:
        weights[5].data[-len(facts.fixed) * H :] = 8  # out of reach: what is clipped has another gradient than its own
    return x, states, weights


def torch_sequence(
    cell: str, x: Tensor, states: list[Tensor], weights: list[Tensor | None], batch_sizes: Tensor | None, reverse: bool
) -> tuple[Tensor, ...]:
    """The same by torch.nn: one direction of a bidirectional layer whose two directions share their weights."""
    if cell == "srn_sigmoid":
        # σ(z) = (1 + tanh(z / 2)) / 2, so a logistic network is a tanh network with other weights and states 2s − 1.
        w, u, b, d, *_ = weights
        d = u.sum(1) / 4 + (0 if d is None else d / 2)
        halved = [w / 2, u / 4, torch.zeros_like(d) if b is None else b / 2, d]
        return tuple((1 + y) / 2 for y in torch_sequence("srn_tanh", x, [2 * s - 1 for s in states], halved, batch_sizes, reverse))
    family, *kind = cell.split("_")
    options: dict = {"bias": weights[2] is not None, "bidirectional": True, "device": "meta"}
    if family == "srn":
        layer = torch.nn.RNN(I, H, nonlinearity={"identity": "relu"}.get(*kind, *kind), **options)
    elif family == "gru":
        layer = torch.nn.GRU(I, H, **options)
    else:
        layer = torch.nn.LSTM(I, H, proj_size=P if kind else 0, **options)
    named = {name: weight for name, weight in zip(NAMES, weights, strict=False) if weight is not None}
    named = {f"{name}_l0{suffix}": weight for name, weight in named.items() for suffix in ("", "_reverse")}
    doubled = [torch.stack((state, state)) for state in states]
    hx = tuple(doubled) if len(doubled) == 2 else doubled[0]
    data = x if batch_sizes is None else torch.nn.utils.rnn.PackedSequence(x, batch_sizes)
    output, finals = functional_call(layer, named, (data, hx))
    output = output if batch_sizes is None else output.data
    finals = finals if isinstance(finals, tuple) else (finals,)
    return output.chunk(2, dim=-1)[reverse], *(final[int(reverse)] for final in finals)


def gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=y.dtype) for y in outputs]
    return torch.autograd.grad(outputs, leaves, cotangents)


@pytest.mark.parametrize("cell", TORCH)
@ragged
@reverse
@biased
def test_agrees_with_torch(cell: str, ragged: bool, reverse: bool, bias: bool) -> None:
    x, states, weights = arguments(cell, ragged=ragged, bias=bias)
    batch_sizes = BATCH_SIZES if ragged else None
    ours = sequence(cell, x, states, *weights, batch_sizes=batch_sizes, reverse=reverse)
    theirs = torch_sequence(cell, x, states, weights, batch_sizes, reverse)
    leaves = [leaf for leaf in (x, *states, *weights) if leaf is not None]
    for a, b in zip((*ours, *gradients(ours, leaves)), (*theirs, *gradients(theirs, leaves)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def rows(t: Tensor | None, *which: int) -> Tensor:
    """Row blocks, −1 − i for block i with its sign turned."""
    assert t is not None
    blocks = t.split(H)
    return torch.cat([blocks[i] if i >= 0 else -blocks[-1 - i] for i in which])


def in_terms_of_others(cell: str, x: Tensor, states: list[Tensor], weights: list[Tensor | None]) -> tuple[Tensor, ...]:
    """Cells that torch.nn lacks, by those that it has and other weights."""
    w, u, b, d, _, v = weights
    family, _, kind = cell.rpartition("_")
    if cell == "lstm_coupled":  # 1 − σ(î) = σ(−î)
        w, u, b, d = (rows(t, 0, -1, 1, 2) for t in (w, u, b, d))
        return sequence("lstm", x, states, w, u, b, d)
    if cell == "lstm_no_forget":  # σ(1000) = 1
        w, u, b, d = (rows(t, 0, 0, 1, 2) for t in (w, u, b, d))
        return sequence("lstm", x, states, w, u, torch.cat([b[:H], b[H : 2 * H] + 1000, b[2 * H :]]), d)
    if family == "indrnn":
        return sequence(f"srn_{kind}", x, states, w, v.diag(), b)
    if cell == "residual_identity":
        return sequence("srn_identity", x, states, w, u + torch.eye(H, dtype=u.dtype), b, d)
    f = reference.ACTIVATIONS[kind]
    assert family == "residual_input"
    output = states[0] + f(torch.nn.functional.linear(x, w, b)).cumsum(0)
    return output, output[-1]


@pytest.mark.parametrize(
    "cell", [c for c in reference.CELLS if c.startswith(("indrnn", "residual_i")) or c in ("lstm_coupled", "lstm_no_forget")]
)
def test_is_another_cell_in_disguise(cell: str) -> None:
    x, states, weights = arguments(cell, ragged=False, bias=True)
    for a, b in zip(sequence(cell, x, states, *weights), in_terms_of_others(cell, x, states, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_peephole_lstm_without_peepholes_is_an_lstm() -> None:
    x, states, weights = arguments("lstm_peephole", ragged=True, bias=True)
    ours = sequence("lstm_peephole", x, states, *weights[:5], torch.zeros(3 * H, dtype=x.dtype), batch_sizes=BATCH_SIZES)
    theirs = sequence("lstm", x, states, *weights[:5], batch_sizes=BATCH_SIZES)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_two_grus_agree_where_nothing_is_reset() -> None:
    x, states, (w, u, b, d, *_) = arguments("gru", ragged=False, bias=True)
    open_gate = torch.cat([b[:H] + 1000, b[H:]])
    ours = sequence("gru_reset_before", x, states, w, u, open_gate, d)
    for a, b in zip(ours, sequence("gru", x, states, w, u, open_gate, d), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@cells
@ragged
@reverse
def test_gradients_are_those_of_finite_differences(cell: str, ragged: bool, reverse: bool) -> None:
    x, states, weights = arguments(cell, ragged=ragged, bias=True)
    batch_sizes = BATCH_SIZES if ragged else None

    def run(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return sequence(cell, x, rest[: len(states)], *rest[len(states) :], batch_sizes=batch_sizes, reverse=reverse)

    torch.autograd.gradcheck(run, (x, *states, *weights), fast_mode=True)
    if not ragged and not reverse:  # torch's own derivatives of the same few functions
        torch.autograd.gradgradcheck(run, (x, *states, *weights), fast_mode=True)


@cells
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_the_dtype(cell: str, dtype: torch.dtype) -> None:
    x, states, weights = arguments(cell, ragged=False, bias=True)
    outputs = sequence(cell, x.to(dtype), [s.to(dtype) for s in states], *[None if w is None else w.to(dtype) for w in weights])
    assert [y.dtype for y in outputs] == [dtype] * len(outputs)


@cells
def test_leaves_its_arguments_alone(cell: str) -> None:
    x, states, weights = arguments(cell, ragged=True, bias=True)
    tensors = [t for t in (x, *states, *weights) if t is not None]
    before = [tensor.detach().clone() for tensor in tensors]
    outputs = sequence(cell, x, states, *weights, batch_sizes=BATCH_SIZES)
    for output in outputs:
        output.detach().zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
