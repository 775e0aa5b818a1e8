"""Compiled layers: their calls go to the operators, and such a call that repeats one before goes straight to the kernels."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

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


BAD: dict[str, tuple[Any, Any]] = {
    "hx of other layers": (torch.zeros(T, B, S), torch.zeros(3, B, S)),
    "hx of no layer": (torch.zeros(T, B, S), torch.zeros(0, B, S)),
    "hx of another batch": (torch.zeros(T, B, S), torch.zeros(1, B + 1, S)),
    "hx of another width": (torch.zeros(T, B, S), torch.zeros(1, B, S + 1)),
    "unbatched hx of other layers": (torch.zeros(T, S), torch.zeros(2, S)),
    "batched hx of an unbatched input": (torch.zeros(T, S), torch.zeros(1, B, S)),
    "another width": (torch.zeros(T, B, S + 1), None),
    "another dtype": (torch.zeros(T, B, S).double(), None),
    "hx of another dtype": (torch.zeros(T, B, S), torch.zeros(1, B, S).double()),
    "no steps": (torch.zeros(0, B, S), None),
    "of four dimensions": (torch.zeros(1, T, B, S), None),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("pair", [False, True], ids=["GRU", "LSTM"])
def test_errors_are_those_of_eager(bad: str, pair: bool) -> None:
    layer = rnnkernels.LSTM(S, S) if pair else rnnkernels.GRU(S, S)
    x, hx = BAD[bad]
    hx = (hx, hx) if pair and hx is not None else hx
    with pytest.raises((RuntimeError, ValueError)) as eager:
        layer(x, hx)
    torch._dynamo.reset()
    with pytest.raises(eager.type) as found:
        torch.compile(layer, backend="aot_eager")(x, hx)
    assert str(eager.value) in str(found.value)


def test_forward_mode_is_eager() -> None:
    layer, x, t = rnnkernels.LSTM(S, S), torch.randn(T, B, S), torch.randn(T, B, S)
    torch._dynamo.reset()
    run = torch.compile(layer, backend="eager", dynamic=False)
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, t)
        a, b = (forward_ad.unpack_dual(f(dual)[0]).tangent for f in (run, layer))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("called", [False, True], ids=["never called", "called before"])
def test_attributes_are_heard_of(called: bool) -> None:
    x = torch.randn(T, B, S)

    def is_eager(layer: Any, change: Callable[[Any], None]) -> None:
        run = compiled(layer)
        with torch.no_grad():
            if called:
                run(x)
            change(layer)
            for a, b in zip(tensors(run(x)), tensors(copy.deepcopy(layer)(x)), strict=True):
                assert torch.equal(a, b)

    zoned = rnnkernels.LSTM(S, S, zoneout=[0.0, 0.0]).eval()
    assert zoned.zoneout == (0.0, 0.0)
    is_eager(zoned, lambda layer: setattr(layer, "zoneout", [0.5, 0.1]))
    is_eager(rnnkernels.LSTM(S, S, cell_clip=0.01), lambda layer: delattr(layer, "cell_clip"))
    is_eager(rnnkernels.LSTM(S, S), lambda layer: setattr(layer, "cell_clip", 0.01))
    is_eager(rnnkernels.GRU(S, S), lambda layer: setattr(layer, "batch_first", True))
    is_eager(rnnkernels.GRU(S, S), lambda layer: layer.double().float())
    is_eager(rnnkernels.GRU(S, S, candidate_dropout=0.5), lambda layer: layer.eval())


def test_a_pickled_layer_of_a_modified_cell_runs_elsewhere(tmp_path: Path) -> None:
    layer = rnnkernels.GRU(S, S, grad_clip=1.0)
    (tmp_path / "layer").write_bytes(pickle.dumps(layer))
    code = "import pickle, sys, torch; pickle.load(open(sys.argv[1], 'rb'))(torch.zeros(2, 1, 20), torch.zeros(1, 1, 20))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "layer")], check=True)


def test_explain_sees_into_a_compiled_layer() -> None:
    layer, x = rnnkernels.LSTM(S, S), torch.randn(T, B, S)
    assert rnnkernels.explain(compiled(layer), x) == rnnkernels.explain(layer, x)


def test_a_repeated_call_checks_how_many_there_are() -> None:
    layer, x, h = rnnkernels.LSTM(S, S), torch.randn(T, B, S), torch.zeros(B, S)
    call = registered.Call("lstm", x, [h, h], *(w.detach() for w in layer.parameters()), None, None, training=True)
    for _ in range(3):
        output, _, _, kept, history = torch.ops.rnnkernels.sequence(*call)
    with pytest.raises(RuntimeError, match="states: expected 2"):
        torch.ops.rnnkernels.sequence(*call._replace(states=[h]))
    with pytest.raises(RuntimeError, match="needs, grad_final, history: expected 9, 2, 1"):
        torch.ops.rnnkernels.sequence_backward(*call, [True] * 9, [], [None, None], output, kept, [history])


EXPORTED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "zoneout": (lambda: rnnkernels.LSTM(S, S, zoneout=0.1), {}),
    "gates": (lambda: rnnkernels.LSTM(S, S), {"return_states": "gates"}),
    "resets a layer": (lambda: rnnkernels.GRU(S, S), {"reset_state": lambda T, B: torch.randn(1, S)}),
    "resets a row": (lambda: rnnkernels.GRU(S, S), {"reset_state": lambda T, B: torch.randn(1, B, S)}),
    "resets a step, gates, both directions": (
        lambda: rnnkernels.GRU(S, S, bidirectional=True),
        {"reset_state": lambda T, B: torch.randn(T, 2, B, S), "return_states": "gates"},
    ),
}


class Called(nn.Module):
    """A layer with options of its calls."""

    def __init__(self, layer: nn.Module, **options: Any) -> None:
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, x: Tensor, reset_mask: Tensor | None = None, reset_state: Tensor | None = None) -> Any:
        return self.layer(x, reset_mask=reset_mask, reset_state=reset_state, **self.options)


@pytest.mark.parametrize("kind", EXPORTED)
def test_an_export_is_for_any_sizes(kind: str) -> None:
    torch.manual_seed(0)
    make, options = EXPORTED[kind]
    model = Called(make().eval(), **{name: value for name, value in options.items() if name == "return_states"})
    state = options.get("reset_state")

    def inputs(T: int, B: int) -> tuple[Tensor, ...]:
        resets = () if state is None else (torch.rand(T, B) < 0.3, state(T, B))
        return torch.randn(T, B, S), *resets

    steps, rows = torch.export.Dim("T"), torch.export.Dim("B")
    dynamic: list[Any] = [{0: steps, 1: rows}]
    if state is not None:
        dynamic += [{0: steps, 1: rows}, {2: None, 3: {1: rows}, 4: {0: steps, 2: rows}}[state(T, B).dim()]]
    program = torch.export.export(model, inputs(T, B), dynamic_shapes=tuple(dynamic)).module()
    for sizes in ((T, B), (S, S), (2, 5)):
        given = inputs(*sizes)
        torch.testing.assert_close(program(*given), model(*given))
