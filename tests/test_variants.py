"""Layers and steps of cells that torch.nn lacks: torch.nn's grammar around the reference's numbers."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

import rnnkernels
from rnnkernels import reference

SIZE, H = 3, 5
LAYERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "PeepholeLSTM": ("PeepholeLSTM", "lstm_peephole", {}),
    "CoupledLSTM": ("CoupledLSTM", "lstm_coupled", {}),
    "NoForgetLSTM": ("NoForgetLSTM", "lstm_no_forget", {}),
    "GRUResetBefore": ("GRUResetBefore", "gru_reset_before", {}),
    "ResidualRNN": ("ResidualRNN", "residual_tanh", {}),
    "ResidualRNN input relu": ("ResidualRNN", "residual_input_relu", {"nonlinearity": "relu", "recurrent": False}),
    "IndRNN": ("IndRNN", "indrnn_relu", {}),
    "IndRNN tanh": ("IndRNN", "indrnn_tanh", {"nonlinearity": "tanh"}),
}
layers = pytest.mark.parametrize("name", LAYERS)


def make(name: str, *args: Any, **options: Any) -> torch.nn.Module:
    kind, _, more = LAYERS[name]
    torch.manual_seed(3)
    return getattr(rnnkernels, kind)(*args, dtype=torch.float64, **more, **options)


def weights_of(layer: torch.nn.Module, suffix: str) -> list[Tensor | None]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_v")
    return [getattr(layer, name + suffix, None) for name in names]


def expected(cell: str, layer: Any, x: Tensor, states: list[Tensor] | None, batch_sizes: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """The stack by the reference; states [K, B, H]."""
    finals: list[tuple[Tensor, ...]] = []
    for depth in range(layer.num_layers):
        outputs = []
        for direction in ("", "_reverse") if layer.bidirectional else ("",):
            initial = None if states is None else [state[len(finals)] for state in states]
            weights = weights_of(layer, f"_l{depth}{direction}")
            y, *last = reference.sequence(cell, x, initial, *weights, batch_sizes=batch_sizes, reverse=bool(direction))
            outputs.append(y)
            finals.append(tuple(last))
        x = torch.cat(outputs, -1)
    return x, [torch.stack(column) for column in zip(*finals, strict=True)]


def as_list(hx: Any) -> list[Tensor]:
    return list(hx) if isinstance(hx, tuple) else [hx]


@layers
def test_stacks_are_the_references(name: str) -> None:
    cell = LAYERS[name][1]
    count = len(reference.CELLS[cell].states)
    for bias, depth, both, given in itertools.product((True, False), (1, 2), (False, True), (False, True)):
        layer = make(name, SIZE, H, num_layers=depth, bias=bias, bidirectional=both)
        x = torch.randn(4, 2, SIZE, dtype=torch.float64, requires_grad=True)
        states = [torch.randn(depth * (1 + both), 2, H, dtype=torch.float64, requires_grad=True) for _ in range(count)] if given else None
        hx = None if states is None else tuple(states) if count > 1 else states[0]
        output, last = layer(x, hx)
        truth, finals = expected(cell, layer, x, states, None)
        leaves = [x, *layer.parameters(), *(states or ())]
        for a, b in zip((output, *as_list(last)), (truth, *finals), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        ours = torch.autograd.grad(output.square().sum() + sum(s.sum() for s in as_list(last)), leaves)
        theirs = torch.autograd.grad(truth.square().sum() + sum(s.sum() for s in finals), leaves)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@layers
def test_layouts(name: str) -> None:
    cell = LAYERS[name][1]
    layer = make(name, SIZE, H, bidirectional=True)
    x = torch.randn(4, 2, SIZE, dtype=torch.float64)
    output, last = layer(x)
    first = make(name, SIZE, H, bidirectional=True, batch_first=True)
    assert torch.equal(first(x.transpose(0, 1))[0], output.transpose(0, 1))
    single, last_of_one = layer(x[:, 0])
    torch.testing.assert_close(single, output[:, 0], rtol=1e-12, atol=1e-12)
    assert [s.shape for s in as_list(last_of_one)] == [s[:, 0].shape for s in as_list(last)]
    rows = [torch.randn(n, SIZE, dtype=torch.float64) for n in (2, 4, 1)]
    packed = pack_sequence(rows, enforce_sorted=False)
    found, last = layer(packed)
    truth, finals = expected(cell, layer, packed.data, None, packed.batch_sizes)
    torch.testing.assert_close(found.data, truth, rtol=1e-12, atol=1e-12)
    for a, b in zip(as_list(last), finals, strict=True):
        torch.testing.assert_close(a, b.index_select(1, packed.unsorted_indices), rtol=1e-12, atol=1e-12)


@layers
def test_state_and_copies(name: str) -> None:
    layer = make(name, SIZE, H, num_layers=2)
    names = list(layer.state_dict())
    assert names == [n for group in layer._all_weights for n in group]
    assert [w.shape for group in layer.all_weights for w in group] == [p.shape for p in layer.parameters()]
    other = make(name, SIZE, H, num_layers=2)
    other.reset_parameters()
    other.load_state_dict(layer.state_dict())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    x = torch.randn(4, 2, SIZE, dtype=torch.float64)
    for copied in (other, copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x)[0], layer(x)[0])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], rtol=1e-12, atol=1e-12)
    assert "engine" in str(rnnkernels.explain(layer, x))


@layers
def test_a_step_is_a_sequence_of_one(name: str) -> None:
    kind, cell, more = LAYERS[name]
    torch.manual_seed(3)
    step = getattr(rnnkernels, f"{kind}Cell")(SIZE, H, dtype=torch.float64, **more)
    x = torch.randn(2, SIZE, dtype=torch.float64)
    states = [torch.randn(2, H, dtype=torch.float64) for _ in reference.CELLS[cell].states]
    found = as_list(step(x, tuple(states) if len(states) > 1 else states[0]))
    _, *truth = reference.sequence(cell, x.unsqueeze(0), states, *weights_of(step, ""))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert as_list(step(x[0]))[0].shape == (H,)
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        step(torch.zeros(2, SIZE + 1, dtype=torch.float64))


@layers
def test_bad_input(name: str) -> None:
    layer = make(name, SIZE, H)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 4D"):
        layer(torch.zeros(1, 1, 1, SIZE, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="input.size"):
        layer(torch.zeros(2, 1, SIZE + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="proj_size"):
        make(name, SIZE, H, proj_size=2)
    with pytest.raises(ValueError, match="engine must be one of"):
        make(name, SIZE, H, engine="warp")


@pytest.mark.parametrize("kind", ["IndRNN", "IndRNNCell", "ResidualRNN", "ResidualRNNCell"])
def test_an_unknown_nonlinearity_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="Unknown nonlinearity 'swish'"):
        getattr(rnnkernels, kind)(SIZE, H, nonlinearity="swish")
