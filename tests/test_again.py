"""Calls that repeat one before take a shorter way: the same bits, and whatever is not as it was is looked at as if it were the first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkernels
from rnnkernels import functional, ops

pytestmark = pytest.mark.usefixtures("poison")

T, B, I, H = 5, 2, 3, 4  # noqa: E741
LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": lambda **options: rnnkernels.RNN(I, H, **options),
    "GRU": lambda **options: rnnkernels.GRU(I, H, **options),
    "LSTM": lambda **options: rnnkernels.LSTM(I, H, **options),
    "no_bias": lambda **options: rnnkernels.LSTM(I, H, bias=False, **options),
    "projected": lambda **options: rnnkernels.LSTM(I, H, proj_size=2, **options),
    "clipped": lambda **options: rnnkernels.LSTM(I, H, cell_clip=0.1, **options),
    "peephole": lambda **options: rnnkernels.PeepholeLSTM(I, H, **options),
    "IndRNN": lambda **options: rnnkernels.IndRNN(I, H, **options),
    "recompute": lambda **options: rnnkernels.GRU(I, H, recompute=True, **options),
    "stepwise": lambda **options: rnnkernels.GRU(I, H, engine="stepwise", **options),
    "bfloat16 weights": lambda **options: rnnkernels.GRU(I, H, weight_dtype=torch.bfloat16, **options),
}


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells of the calls that went the whole way."""
    ops.set_isa(None)  # nothing is known yet
    found, stack = [], functional.stack

    def watched(cell: str, *args: Any, **options: Any) -> Any:
        found.append(cell)
        return stack(cell, *args, **options)

    monkeypatch.setattr(functional, "stack", watched)
    return found


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def results(layer: Any, x: Tensor, training: bool) -> list[Tensor]:
    with torch.set_grad_enabled(training):
        found = flat(layer(x))
    if training:
        found += torch.autograd.grad(sum(t.double().sum() for t in found), [x, *layer.parameters()])
    return [t.detach() for t in found]


CASES = [
    (name, training, dtype)
    for name in LAYERS
    for training in (False, True)
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if name != "bfloat16 weights" or not (training or dtype == torch.float64)
]


@pytest.mark.parametrize(
    ("name", "training", "dtype"), CASES, ids=[f"{name}-{'training' if t else 'inference'}-{str(d)[6:]}" for name, t, d in CASES]
)
def test_the_same_bits(name: str, training: bool, dtype: torch.dtype, stacks: list[str]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](dtype=dtype)
    x, other = (torch.randn(T, B, I, dtype=dtype, requires_grad=training) for _ in range(2))
    first = results(layer, x, training)
    assert len(stacks) == 1
    between = results(layer, other, training)
    again = results(layer, x, training)
    assert len(stacks) == 1
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], between[0])


INPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "transposed": lambda layer, x: layer(x.transpose(0, 1).contiguous().transpose(0, 1)),
    "strided": lambda layer, x: layer(torch.stack([x, x], -1)[..., 0]),
    "negated": lambda layer, x: layer(torch._neg_view(-x)),
    "batch_first": lambda layer, x: setattr(layer, "batch_first", True) or layer(x.transpose(0, 1))[0].transpose(0, 1),
}


@pytest.mark.parametrize("how", INPUTS)
def test_inputs_however_they_lie(how: str, stacks: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = rnnkernels.GRU(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        expected, _ = layer(x)
        found = flat(INPUTS[how](layer, x))[0]
    assert torch.equal(found, expected)
    assert len(stacks) == 1


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch_first"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "projected", "recompute"])
def test_unbatched_input_is_a_batch_of_one_row(name: str, batch_first: bool, given: bool, training: bool, stacks: list[str]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name](batch_first=batch_first)
    x = torch.randn(T, I, requires_grad=training)
    states = [
        torch.randn(1, size, requires_grad=training) for size in (getattr(layer, "proj_size", 0) or H, H)[: 1 + (layer.mode == "LSTM")]
    ]

    def run(*shape: int) -> list[Tensor]:
        data, initial = x.view(*shape, I), [state.view(1, *([1] * (len(shape) - 1)), -1) for state in states]
        hx = None if not given else tuple(initial) if len(initial) > 1 else initial[0]
        with torch.set_grad_enabled(training):
            found = flat(layer(data, hx))
        if training:
            leaves = [x, *layer.parameters(), *(states if given else ())]
            found += torch.autograd.grad(sum(t.double().sum() for t in found), leaves)
        return [t.detach() for t in found]

    batch = run(*((1, T) if batch_first else (T, 1)))
    assert len(stacks) == 1
    for _ in range(2):
        alone = run(T)
        assert len(stacks) == 1
        assert alone[0].dim() == alone[1].dim() == 2
        assert all(torch.equal(a, b.view_as(a)) for a, b in zip(alone, batch, strict=True))
    with pytest.raises(RuntimeError, match="For unbatched 2-D input"):
        layer(x, torch.zeros(1, 1, H) if len(states) == 1 else (torch.zeros(1, 1, H),) * 2)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_cells_unbatched_step_is_a_batch_of_one_row(kind: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cell = getattr(rnnkernels, kind)(I, 2 * I)
    x, h = torch.randn(I, requires_grad=training), torch.randn(2 * I, requires_grad=training)

    def run(x: Tensor, h: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            found = flat(cell(x, (h, h) if kind == "LSTMCell" else h))
        assert all(t.shape == h.shape for t in found)
        grads = torch.autograd.grad(sum(t.double().sum() for t in found), [x, h, *cell.parameters()]) if training else ()
        return [t.detach().flatten() for t in (*found, *grads)]

    batch = run(x[None], h[None])
    monkeypatch.setattr(ops, "run", None)  # the long way
    for _ in range(2):
        assert all(map(torch.equal, batch, run(x, h)))


CHANGES: dict[str, Callable[[Any, Tensor], Any]] = {
    "another length": lambda layer, x: layer(torch.cat([x, x])),
    "lengths": lambda layer, x: layer(x, lengths=torch.tensor([T, 2])),
    "return_states": lambda layer, x: layer(x, return_states=True),
    "zoneout": lambda layer, x: setattr(layer, "zoneout", 0.5) or layer.eval()(x),
    "autocast": lambda layer, x: torch.autocast("cpu", torch.bfloat16)(layer)(x.bfloat16()),
    "vmap": lambda layer, x: torch.func.vmap(layer)(torch.stack([x, x])),
    "transposed weight": lambda layer, x: setattr(layer.weight_hh_l0, "data", layer.weight_hh_l0.data.t().contiguous().t()) or layer(x),
    "negated weight": lambda layer, x: setattr(layer.weight_hh_l0, "data", torch._neg_view(layer.weight_hh_l0.data)) or layer(x),
    "traced": lambda layer, x: setattr(layer, "engine", "traced") or layer(x),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_looked_at(change: str, stacks: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = rnnkernels.GRU(I, H), torch.randn(T, B, I)
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        layer(x)
        layer(x)
        assert len(stacks) == 1
        mine = flat(CHANGES[change](layer, x))
        assert len(stacks) == 2
        ops.set_isa(None)
        theirs = flat(CHANGES[change](fresh, x))
    assert len(mine) == len(theirs)
    assert all(map(torch.equal, mine, theirs))


def wrong_weight(layer: Any, x: Tensor) -> Any:
    layer.weight_hh_l0.data = torch.randn(3 * H, H + 1)
    return layer(x)


ERRORS: dict[str, Callable[[Any, Tensor], Any]] = {
    "input_size": lambda layer, x: layer(torch.randn(T, B, I + 1)),
    "dtype": lambda layer, x: layer(x.double()),
    "integers": lambda layer, x: layer(x.long()),
    "no steps": lambda layer, x: layer(x[:0]),
    "rank": lambda layer, x: layer(x[None]),
    "hx": lambda layer, x: layer(x, torch.zeros(1, B, H + 1)),
    "meta": lambda layer, x: layer(x.to("meta")),
    "weight's shape": wrong_weight,
    "weight's dtype": lambda layer, x: setattr(layer.weight_hh_l0, "data", layer.weight_hh_l0.data.double()) or layer(x),
    "weight's shape, where it lies": lambda layer, x: (
        setattr(layer.weight_hh_l0, "data", layer.weight_hh_l0.data.view(-1)),
        layer(x),
    ),
    "weight's rows, where they lie": lambda layer, x: (
        setattr(layer.weight_hh_l0, "data", layer.weight_hh_l0.data[:-1]),
        layer(x),
    ),
    "gates": lambda layer, x: layer(x, return_states="all"),
    "engine": lambda layer, x: setattr(layer, "engine", "persistent") or layer(x),
    "narrow weights in training": lambda layer, x: setattr(layer, "weight_dtype", torch.int8) or torch.enable_grad()(layer)(x),
    "narrow weights, stepwise": lambda layer, x: (
        setattr(layer, "engine", "stepwise"),
        layer(x),
        setattr(layer, "weight_dtype", torch.int8),
        layer(x),
    ),
    "grad_clip": lambda layer, x: setattr(layer, "grad_clip", -1.0) or layer(x),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_was_wrong_still_is(case: str, stacks: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = rnnkernels.GRU(I, H), torch.randn(T, B, I)
    fresh, raised = copy.deepcopy(layer), []
    with torch.no_grad():
        layer(x)
        layer(x)
        for one in (layer, fresh):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                ERRORS[case](one, x)
            raised.append((caught.type, str(caught.value)))
            ops.set_isa(None)
    assert raised[0] == raised[1]


def test_a_tensor_that_needs_a_gradient_gets_one(stacks: list[str]) -> None:
    layer, x = rnnkernels.LSTM(I, H).requires_grad_(False), torch.randn(T, B, I)
    assert not layer(x)[0].requires_grad
    x.requires_grad_()
    output, _ = layer(x)
    output.sum().backward()
    assert len(stacks) == 1
    assert x.grad is not None
    assert all(p.grad is None for p in layer.parameters())


def test_another_instruction_set(stacks: list[str]) -> None:
    layer, x = rnnkernels.LSTM(I, H), torch.randn(T, B, I)
    with torch.no_grad():
        layer(x)
        try:
            ops.set_isa("scalar")
            layer(x)
        finally:
            ops.set_isa(None)
    assert len(stacks) == 2


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_layers_of_a_stack(training: bool, stacks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, runs = rnnkernels.LSTM(I, H, num_layers=3), torch.randn(T, B, I, requires_grad=training), []
    run = ops.run
    monkeypatch.setattr(ops, "run", lambda call, packed=None: runs.append(call.cell) or run(call, packed))
    first, second = results(layer, x, training), results(layer, x, training)
    assert runs == ["lstm"] * 2  # the third layer's sizes are the second's
    assert all(map(torch.equal, first, second))
    initial = tuple(torch.zeros(3, B, H) for _ in range(2))
    with torch.set_grad_enabled(training):
        assert torch.equal(layer(x, initial)[0], first[0])
    assert len(runs) == 2


class Halved(torch.nn.Module):
    """A parametrization that counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.asked += 1
        return weight / 2


def test_weights_that_are_made_anew_are_asked_for_as_often(stacks: list[str]) -> None:
    layer, x = rnnkernels.GRU(I, H), torch.randn(T, B, I)
    halved = Halved()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight_hh_l0", halved)
    counts = []
    with torch.no_grad():
        for _ in range(3):
            before = halved.asked
            layer(x)
            counts.append(halved.asked - before)
    assert counts == [counts[0]] * 3
    assert len(stacks) == 3


def test_what_another_layer_may_take_is_not_this_ones(stacks: list[str]) -> None:
    layer, x = rnnkernels.GRU(I, H), torch.randn(T, B, I + 1)
    layer.weight_ih_l0.data = torch.randn(3 * H, I + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must be equal to input_size. Expected 3, got 4"):
            layer(x)
        rnnkernels.GRU(I + 1, H)(x)
