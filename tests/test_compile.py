"""Compiled layers: their calls go to the operators, and such a call that repeats one before goes straight to the kernels."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkernels
from rnnkernels.ops import registered, repeat

T, B, S = 6, 3, 20
LAYERS: dict[str, Callable[[], Any]] = {
    "RNN": lambda: rnnkernels.RNN(S, S),
    "GRU batch_first": lambda: rnnkernels.GRU(S, S, batch_first=True),
    "LSTM": lambda: rnnkernels.LSTM(S, S),
    "LSTM without bias": lambda: rnnkernels.LSTM(S, S, bias=False),
    "LSTM projected": lambda: rnnkernels.LSTM(S, S, proj_size=5),
    "LSTM of two layers": lambda: rnnkernels.LSTM(S, S, num_layers=2, dropout=0.5).eval(),
    "LSTM bidirectional": lambda: rnnkernels.LSTM(S, S, bidirectional=True),
    "LSTM recomputed": lambda: rnnkernels.LSTM(S, S, recompute=True),
    "LSTM with a layer norm": lambda: rnnkernels.LSTM(S, S, layer_norm="gates"),
    "LSTM with thresholds": lambda: rnnkernels.LSTM(S, S, cell_clip=0.3),
    "peephole": lambda: rnnkernels.PeepholeLSTM(S, S),
    "reset before": lambda: rnnkernels.GRUResetBefore(S, S),
    "IndRNN": lambda: rnnkernels.IndRNN(S, S),
}
layers = pytest.mark.parametrize("kind", LAYERS)
# What calls of the others repeat: not those that are given numbers, or weights made anew for each call, or made anew for backward.
NEVER = ("LSTM recomputed", "LSTM with a layer norm", "LSTM with thresholds")
NOT_IN_TRAINING = (*NEVER, "LSTM projected")


def layer_of(kind: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind]()


def compiled(layer: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    output, *finals = results
    return [output, *(t for final in finals for t in (final if isinstance(final, tuple) else (final,)))]


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of an operator's, forward or back, that looked whether it repeats one: did it?"""
    seen, looks = list[bool](), repeat._Call._is_repeated

    def spy(self: Any, *args: Any) -> bool:
        seen.append(looks(self, *args))
        return seen[-1]

    monkeypatch.setattr(repeat._Call, "_is_repeated", spy)
    return seen


@layers
def test_inference_is_eager(kind: str, repeated: list[bool]) -> None:
    layer = layer_of(kind)
    run, x = compiled(layer), torch.randn(T, B, S)
    with torch.no_grad():
        for i in range(4):
            repeated.clear()
            found = tensors(run(x))
            assert i < 2 or kind in NEVER or (repeated and all(repeated))
            for a, b in zip(found, tensors(copy.deepcopy(layer)(x)), strict=True):
                assert torch.equal(a, b)
            layer.weight_ih_l0.mul_(1.1)


@layers
def test_training_is_eager(kind: str, repeated: list[bool]) -> None:
    layer = layer_of(kind)
    run, optimizer = compiled(layer), torch.optim.SGD(layer.parameters(), 0.1)
    for i in range(4):
        x, other = torch.randn(T, B, S, requires_grad=True), copy.deepcopy(layer)
        repeated.clear()
        found = tensors(run(x))
        sum((t * t).sum() for t in found).backward()
        assert i < 2 or kind in NOT_IN_TRAINING or (len(repeated) > 1 and all(repeated))
        y = x.detach().clone().requires_grad_()
        expected = tensors(other(y))
        sum((t * t).sum() for t in expected).backward()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        for a, b in zip((x, *layer.parameters()), (y, *other.parameters()), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)  # torch may add several gradients in another order
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_cells_in_a_loop_are_eager(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    cell = getattr(rnnkernels, kind + "Cell")(S, S)

    def steps(x: Tensor) -> Tensor:
        state = None
        for one in x:
            state = cell(one, state)
        return state[0] if isinstance(state, tuple) else state

    run = compiled(steps)
    for _ in range(3):
        x = torch.randn(T, B, S, requires_grad=training)
        with torch.set_grad_enabled(training):
            a, b = run(x), steps(x)
        torch.testing.assert_close(a, b)
        if training:
            torch.testing.assert_close(torch.autograd.grad(a.sum(), x), torch.autograd.grad(b.sum(), x))


# What is another in the third call, of the op's arguments by their names.
CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "shorter": lambda call: call.update(input=call["input"][:-1]),
    "not contiguous": lambda call: call.update(input=torch.randn(B, T, S).transpose(0, 1)),
    "conjugate-like negative": lambda call: call.update(input=torch._neg_view(call["input"])),
    "weights elsewhere": lambda call: call["weight_hh"].set_(call["weight_hh"].clone()),
    "weights transposed": lambda call: call["weight_hh"].set_(call["weight_hh"].t()),
    "no bias": lambda call: call.update(bias_hh=None),
    "other states": lambda call: call.update(states=[torch.randn(B, S)]),
    "states transposed": lambda call: call.update(states=[torch.randn(S, B).t()]),
    "reversed": lambda call: call.update(reverse=True),
    "another cell": lambda call: call.update(cell="srn_relu"),
    "stepwise": lambda call: call.update(engine="stepwise"),
    "lengths": lambda call: call.update(lengths=torch.tensor([T, 1, 2])),
    "one thread": lambda call: torch.set_num_threads(1),
    "float64": lambda call: call.update(
        {name: t.double() for name, t in call.items() if isinstance(t, Tensor)}, states=[t.double() for t in call["states"]]
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_operator_sees_what_is_another(change: str, training: bool, restore: None) -> None:
    torch.manual_seed(0)
    call = dict(zip(registered.Call._fields, registered.Call("srn_tanh", *[None] * 8), strict=True))  # type: ignore[arg-type]
    call |= {"input": torch.randn(T, B, S), "states": [torch.randn(B, S)], "weight_ih": torch.randn(S, S), "weight_hh": torch.randn(S, S)}
    call |= {"bias_ih": torch.randn(S), "bias_hh": torch.randn(S), "training": training}

    def run() -> list[Tensor]:
        found = torch.ops.rnnkernels.sequence(*call.values())
        if not training:
            return list(found)
        states, leaves = call["states"], [call[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        needs = [True, *(t is not None for t in leaves), False, False, *(True for _ in states)]
        back = (needs, [torch.ones_like(found[0])], [None], found[0], found[2], [])
        return [*found, *torch.ops.rnnkernels.sequence_backward(*call.values(), *back)]

    for _ in range(3):
        run()
    CHANGES[change](call)
    again = run()
    call.update({name: t.clone() for name, t in call.items() if isinstance(t, Tensor)})
    for a, b in zip(again, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["output", "kept", "grad_states", "grad_final"])
def test_a_repeated_backward_checks_its_arguments(name: str) -> None:
    layer, x, h = rnnkernels.RNN(S, S), torch.randn(T, B, S), torch.zeros(B, S)
    weights = [w.detach() for w in layer.parameters()]
    call = registered.Call("srn_tanh", x, [h], *weights, None, None, training=True)
    for _ in range(3):
        output, _, kept = torch.ops.rnnkernels.sequence(*call)
    back = {"needs": [True] * 5 + [False] * 2 + [True], "grad_states": [output], "grad_final": [h], "output": output, "kept": kept}
    torch.ops.rnnkernels.sequence_backward(*call, *back.values(), [])
    wrong = back[name]
    back[name] = [t[:-1] for t in wrong] if isinstance(wrong, list) else wrong[:-1]
    with pytest.raises(RuntimeError, match=rf"{name}.*: expected shape"):
        torch.ops.rnnkernels.sequence_backward(*call, *back.values(), [])


def test_what_is_known_of_weights_goes_with_them() -> None:
    before = len(registered._known)
    layer, x = rnnkernels.LSTM(S, S), torch.randn(T, B, S)
    run = compiled(layer)
    with torch.no_grad():
        for _ in range(3):
            run(x)
    assert len(registered._known) == before + 1
    del layer, run
    torch._dynamo.reset()
    assert len(registered._known) == before


def test_kept_values_get_no_gradient_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    given, looks = list[Any](), registered._repeated_backward

    def spy(call: Any, back: Any) -> Any:
        given.append([grad is None for grad in (*back.grad_states, *back.grad_final)])
        return looks(call, back)

    monkeypatch.setattr(registered, "_repeated_backward", spy)
    layer = rnnkernels.LSTM(S, S)
    compiled(nn.Sequential(layer))(torch.randn(T, B, S))[0].sum().backward()
    assert given == [[False, True, False, False]]  # of the output, of c after each step, of the final states
