"""Properties that hold for every shape and option, sought by hypothesis."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnkernels

KINDS = ["RNN", "GRU", "LSTM", "LSTM projected"]


@st.composite
def built(draw: st.DrawFn, **fixed: Any) -> tuple[Any, Any, Tensor, Any]:
    """Our layer and torch's with the same weights, an input [T, B, I] and an hx, all in float64."""
    kind = draw(st.sampled_from(KINDS))
    input_size, hidden_size = draw(st.integers(1, 9)), draw(st.integers(1, 19))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
        "dtype": torch.float64,
    }
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind == "LSTM projected":
        hidden_size += 1
        options["proj_size"] = draw(st.integers(1, hidden_size - 1))
    options |= fixed
    name = kind.split()[0]
    torch.manual_seed(draw(st.integers(0, 2**16)))
    theirs = getattr(nn, name)(input_size, hidden_size, **options)
    ours = getattr(rnnkernels, name)(input_size, hidden_size, **options)
    ours.load_state_dict(theirs.state_dict())
    batch = draw(st.integers(1, 7))
    x = torch.randn(draw(st.integers(1, 9)), batch, input_size, dtype=torch.float64)
    count = options["num_layers"] * (1 + options["bidirectional"])
    h = torch.randn(count, batch, theirs.proj_size or hidden_size, dtype=torch.float64)
    hx = (h, torch.randn(count, batch, hidden_size, dtype=torch.float64)) if name == "LSTM" else h
    return ours, theirs, x, hx


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def mapped(hx: Any, function: Any) -> Any:
    return tuple(map(function, hx)) if isinstance(hx, tuple) else function(hx)


def assert_close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-11)


def gradients(module: Any, x: Tensor, hx: Any) -> list[Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in flat((x, hx))]
    outputs = flat(module(leaves[0], tuple(leaves[1:]) if isinstance(hx, tuple) else leaves[1]))
    return list(torch.autograd.grad(sum(y.square().sum() for y in outputs), [*leaves, *module.parameters()]))


@given(built())
def test_equals_torch(case: tuple[Any, Any, Tensor, Any]) -> None:
    ours, theirs, x, hx = case
    assert_close(ours(x, hx), theirs(x, hx))
    assert_close(gradients(ours, x, hx), gradients(theirs, x, hx))


@given(built(), st.data())
def test_ragged_equals_each_row_alone(case: tuple[Any, Any, Tensor, Any], data: st.DataObject) -> None:
    ours, _, x, hx = case
    lengths = [data.draw(st.integers(1, len(x))) for _ in range(x.size(1))]
    packed = pack_sequence([x[:length, row] for row, length in enumerate(lengths)], enforce_sorted=False)
    output, finals = ours(packed, hx)
    padded, _ = pad_packed_sequence(output)
    for row, length in enumerate(lengths):
        alone, last = ours(x[:length, row], mapped(hx, lambda state, row=row: state[:, row]))
        assert_close((padded[:length, row], *[state[:, row] for state in flat(finals)]), (alone, last))


@given(built())
def test_ragged_of_equal_lengths_equals_padded(case: tuple[Any, Any, Tensor, Any]) -> None:
    ours, _, x, hx = case
    output, finals = ours(pack_padded_sequence(x, [len(x)] * x.size(1)), hx)
    assert_close((pad_packed_sequence(output)[0], finals), ours(x, hx))


@given(built(num_layers=1, bidirectional=True))
def test_the_reverse_direction_is_the_forward_one_on_flipped_time(case: tuple[Any, Any, Tensor, Any]) -> None:
    ours, _, x, hx = case
    name = type(ours).__name__
    options = {"nonlinearity": ours.nonlinearity} if name == "RNN" else {"proj_size": ours.proj_size} if name == "LSTM" else {}
    forward = getattr(rnnkernels, name)(ours.input_size, ours.hidden_size, bias=ours.bias, dtype=torch.float64, **options)
    state = {key.removesuffix("_reverse"): value for key, value in ours.state_dict().items() if key.endswith("_reverse")}
    forward.load_state_dict(state)
    output, finals = ours(x, hx)
    flipped, last = forward(x.flip(0), mapped(hx, lambda state: state[1:]))
    assert_close((output.chunk(2, dim=-1)[1], *[state[1:] for state in flat(finals)]), (flipped.flip(0), last))


@given(built(), st.data())
def test_rows_do_not_see_each_other(case: tuple[Any, Any, Tensor, Any], data: st.DataObject) -> None:
    ours, _, x, hx = case
    order = torch.tensor(data.draw(st.permutations(range(x.size(1)))))
    output, finals = ours(x, hx)
    shuffled, last = ours(x[:, order], mapped(hx, lambda state: state[:, order]))
    assert_close((output[:, order], *[state[:, order] for state in flat(finals)]), (shuffled, last))
    row = int(order[0])
    alone, last = ours(x[:, row], mapped(hx, lambda state: state[:, row]))
    assert_close((output[:, row], *[state[:, row] for state in flat(finals)]), (alone, last))


@given(built(bidirectional=False), st.data())
def test_a_carried_state_joins_two_halves(case: tuple[Any, Any, Tensor, Any], data: st.DataObject) -> None:
    ours, _, x, hx = case
    x = torch.cat((x, x.flip(0)))
    cut = data.draw(st.integers(1, len(x) - 1))
    first, carried = ours(x[:cut], hx)
    second, last = ours(x[cut:], carried)
    assert_close((torch.cat((first, second)), last), ours(x, hx))


@given(built(num_layers=1, bidirectional=False))
def test_a_cell_step_by_step_equals_the_layer(case: tuple[Any, Any, Tensor, Any]) -> None:
    ours, _, x, hx = case
    if ours.proj_size > 0:
        return
    name = type(ours).__name__
    options = {"nonlinearity": ours.nonlinearity} if name == "RNN" else {}
    cell = getattr(rnnkernels, f"{name}Cell")(ours.input_size, ours.hidden_size, ours.bias, dtype=torch.float64, **options)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in ours.state_dict().items()})
    states = mapped(hx, lambda state: state[0])
    outputs = []
    for step in x:
        states = cell(step, states)
        outputs.append(flat(states)[0])
    output, finals = ours(x, hx)
    assert_close((torch.stack(outputs), states), (output, mapped(finals, lambda state: state[0])))


@given(built())
def test_rerun_gives_the_same_bits(case: tuple[Any, Any, Tensor, Any]) -> None:
    ours, _, x, hx = case
    assert all(torch.equal(a, b) for a, b in zip(flat(ours(x, hx)), flat(ours(x, hx)), strict=True))
