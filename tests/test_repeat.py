"""Calls that repeat one before: whatever is another, the results are those of a layer that has never been called."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ISAS
from torch import Tensor, nn

import rnnkernels
from rnnkernels import ops
from rnnkernels.ops import repeat

T, B, S = 6, 3, 20  # the input as wide as the state, so that a matrix may be transposed unnoticed
LAYERS: dict[str, Callable[[], Any]] = {
    "RNN": lambda: rnnkernels.RNN(S, S),
    "GRU batch_first": lambda: rnnkernels.GRU(S, S, batch_first=True),
    "LSTM": lambda: rnnkernels.LSTM(S, S),
    "LSTM projected": lambda: rnnkernels.LSTM(S, S, proj_size=5, bias=False),
    "LSTM of two layers": lambda: rnnkernels.LSTM(S, S, num_layers=2),
    "LSTM kept in bfloat16": lambda: rnnkernels.LSTM(S, S, weight_dtype=torch.bfloat16),
    "peephole": lambda: rnnkernels.PeepholeLSTM(S, S),
    "reset before": lambda: rnnkernels.GRUResetBefore(S, S),
    "IndRNN": lambda: rnnkernels.IndRNN(S, S),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def layer_of(kind: str) -> Any:
    torch.manual_seed(0)
    return LAYERS[kind]().eval()


def tensors(results: Any) -> list[Tensor]:
    output, final = results
    return [output, *(final if isinstance(final, tuple) else (final,))]


def run(layer: Any, x: Tensor, *args: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(layer(x, *args))


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that looked whether it repeats one: did it?"""
    seen, looks = list[bool](), repeat._Call.is_repeated

    def spy(self: Any, *args: Any) -> bool:
        seen.append(looks(self, *args))
        return seen[-1]

    monkeypatch.setattr(repeat._Call, "is_repeated", spy)
    return seen


def as_a_new_one(layer: Any, x: Tensor, *args: Any) -> None:
    for found, expected in zip(run(layer, x, *args), run(copy.deepcopy(layer), x, *args), strict=True):
        assert torch.equal(found, expected)
        assert found.shape == expected.shape
        assert found.stride() == expected.stride()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda layer: layer.weight_hh_l0.data.mul_(0.5),
    "by .data": lambda layer: setattr(layer.weight_ih_l0, "data", layer.weight_ih_l0 * 0.5),
    "its memory freed": lambda layer: [setattr(w, "data", w.data.clone()) for w in layer.parameters()],
    "transposed where it lies": lambda layer: setattr(layer.weight_hh_l0, "data", layer.weight_hh_l0.data.t()),
    "transposed in place": lambda layer: layer.weight_hh_l0.detach().t_(),
    "of fewer numbers": lambda layer: layer.weight_ih_l0.data.view(-1)[::2].zero_(),
    "another Parameter": lambda layer: setattr(layer, "weight_hh_l0", nn.Parameter(layer.weight_hh_l0 * 0.5)),
    "none of the Parameters": lambda layer: layer._parameters.update(weight_hh_l0=nn.Parameter(layer.weight_hh_l0 * 0.5)),
    "computed": lambda layer: nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0"),
    "no bias": lambda layer: layer._parameters.update(bias_ih_l0=None, bias_hh_l0=None),
    "its own engine": lambda layer: setattr(layer, "engine", "stepwise"),
    "zoneout": lambda layer: setattr(layer, "zoneout", 0.5),
    "recompute": lambda layer: setattr(layer, "recompute", True),
    "batch_first": lambda layer: setattr(layer, "batch_first", True),
    "clipped gradients": lambda layer: setattr(layer, "grad_clip", 1.0),
    "weight_dtype": lambda layer: setattr(layer, "weight_dtype", torch.int8),
    "another nonlinearity": lambda layer: setattr(layer, "mode", "RNN_RELU"),
    "one thread": lambda layer: torch.set_num_threads(1),
    "scalars": lambda layer: ops.set_isa("scalar"),
}


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "another": lambda x: x * 2,
    "not contiguous": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(T, B, S),
    "misaligned": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(T, B, S),
    "to be negated": lambda x: torch._neg_view(x),
    "zeros that nobody made": lambda x: torch._efficientzerotensor(x.shape),
    "more rows": lambda x: torch.cat([x, x], 1),
    "fewer steps": lambda x: x[:2],
    "one step": lambda x: x[:1],
    "nothing": lambda x: x[..., :0, :],
    "unbatched": lambda x: x[:, 0],
    "a Parameter": lambda x: nn.Parameter(x),
    "a subclass": lambda x: x.as_subclass(Subclass),
}


class Subclass(Tensor):
    pass


@layers
@pytest.mark.parametrize("change", INPUTS)
def test_other_inputs(kind: str, change: str) -> None:
    layer, x = layer_of(kind), torch.randn(T, B, S)
    for _ in range(3):
        run(layer, x)
    if (change == "a subclass" and "kept" in kind) or (change == "nothing" and layer.batch_first):
        return  # these are refused
    for _ in range(2):
        as_a_new_one(layer, INPUTS[change](x))
        as_a_new_one(layer, x)


def test_a_weight_of_the_other_half_type() -> None:
    layer, x = layer_of("RNN").to(torch.float16), torch.randn(T, B, S).to(torch.float16)
    for _ in range(3):
        run(layer, x)
    layer.weight_hh_l0.data = layer.weight_hh_l0.data.view(torch.bfloat16)
    with pytest.raises(RuntimeError, match="bfloat16"):
        run(layer, x)


@pytest.mark.usefixtures("two_threads")
def test_what_is_known_ends_with_what_it_rests_on(repeated: list[bool]) -> None:
    layer, x = layer_of("RNN"), torch.randn(T, B, S)

    def last() -> bool:
        for _ in range(2):
            run(layer, x)
        repeated.clear()
        run(layer, x)
        return repeated == [True]

    def ended() -> bool:
        return repeated[0] and not any(repeated[1:])

    assert last()
    torch.set_num_threads(1)
    run(layer, x)
    assert ended()
    assert last()
    ops.set_isa("scalar")
    run(layer, x)
    assert ended()
    assert last()
    with torch.no_grad(), ops.cpu.side_by_side():  # a call that runs later reads what is there by then
        output, _ = layer(x)
    assert ended()
    assert torch.equal(output, run(layer, x)[0])


@layers
def test_modes_of_torch(kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(T, B, S)
    expected = run(copy.deepcopy(layer), x)
    for _ in range(3):
        run(layer, x)
    with torch.inference_mode():
        found = tensors(layer(x))
    assert all(t.is_inference() for t in found)
    assert all(map(torch.equal, found, expected))
    if "kept" in kind:
        return  # is for inference alone
    output = tensors(layer(x))[0]
    assert output.requires_grad
    assert torch.equal(output, expected[0])
    layer.requires_grad_(False)
    assert all(map(torch.equal, tensors(layer(x)), expected))
    layer(x.requires_grad_())[0].sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        explained = rnnkernels.explain(layer, x.detach())
        assert "cpu engine" in str(explained)
        mapped = torch.func.vmap(lambda one: layer(one)[0])(torch.stack([x.detach()] * 2))
        assert torch.allclose(mapped[1], expected[0], atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert tensors(layer(x.detach()))[0].dtype in (torch.bfloat16, torch.float32)
    assert all(map(torch.equal, run(layer, x.detach()), expected))


def test_a_functional_call_has_other_weights() -> None:
    layer, x = layer_of("LSTM"), torch.randn(T, B, S)
    run(layer, x)
    others = {name: weight.detach() * 0.5 for name, weight in layer.named_parameters()}
    halved = copy.deepcopy(layer)
    halved.load_state_dict(others)
    for _ in range(2):
        with torch.no_grad():
            found = torch.func.functional_call(layer, others, (x,))
        assert all(map(torch.equal, tensors(found), run(halved, x)))
        as_a_new_one(layer, x)


def test_many_shapes_are_few_at_a_time(repeated: list[bool]) -> None:
    layer = layer_of("GRU batch_first")
    for batch in (*range(1, 40), 1, 1):
        as_a_new_one(layer, torch.randn(batch, T, S))
    assert repeated[-1]
    assert 1 <= len(layer._kept()[0].repeats) <= layer._kept()[0].repeats.MOST


def test_weights_that_are_always_others_are_given_up(repeated: list[bool]) -> None:
    layer, x = layer_of("RNN"), torch.randn(T, B, S)
    repeats, others = layer._kept()[0].repeats, [torch.randn(S, S) for _ in range(2)]
    for _ in range(repeats.MADE):
        for other in others:
            layer.weight_hh_l0.data = other
            run(layer, x)
    assert not any(repeated[: repeats.MADE])
    assert not repeats.takes
    as_a_new_one(layer, x)


def train(layer: Any, x: Tensor, again: bool = False) -> list[Tensor]:
    """Results, and gradients of the input and all weights; ``again``: and those of a penalty on the latter."""
    x = x.detach().requires_grad_()
    weights = [x, *(w for w in layer.parameters() if w.requires_grad)]
    found = tensors(layer(x))
    total = torch.stack([(t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found]).sum()
    grads = torch.autograd.grad(total, weights, create_graph=again)
    more = torch.autograd.grad(torch.stack([g.square().sum() for g in grads]).sum(), weights, allow_unused=True) if again else ()
    return [t.detach() for t in (*found, *grads, *more) if t is not None]


def trains_as_a_new_one(layer: Any, x: Tensor, again: bool = False) -> None:
    ours, theirs = train(layer, x, again), train(copy.deepcopy(layer), x, again)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)
        assert found.shape == expected.shape


passes = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])


@layers
@passes
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("restore", "poison")
def test_the_same_bits(kind: str, training: bool, isa: str, dtype: torch.dtype, repeated: list[bool]) -> None:
    if "kept" in kind and (training or dtype is torch.float64):
        return  # narrower weights are for neither
    ops.set_isa(isa)
    layer, call = layer_of(kind).to(dtype), train if training else run
    inputs = torch.randn(2, T, B, S).to(dtype).unbind()
    expected = [call(copy.deepcopy(layer), x) for x in inputs]
    for _ in range(3):
        for x, results in zip(inputs, expected, strict=True):
            found = call(layer, x)
            for a, b in zip(found, results, strict=True):
                assert torch.equal(a, b)
                assert a.shape == b.shape
            for a in found:  # is nobody else's
                a.fill_(7)
    assert repeated.count(True) >= (0 if training and "projected" in kind else 5), "the first call alone is looked at whole"


@passes
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("restore")
def test_changes_of_the_layer(change: str, training: bool, repeated: list[bool]) -> None:
    layer, x, check = layer_of("RNN"), torch.randn(T, T, S), trains_as_a_new_one if training else as_a_new_one
    for _ in range(3):
        check(layer, x)
    assert repeated[-1]
    CHANGES[change](layer)
    if training and layer.weight_dtype is not None:
        return  # is for inference alone
    for _ in range(3):
        check(layer, x)


FROZEN: dict[str, tuple[str, ...]] = {
    "a matrix": ("weight_hh_l0",),
    "biases": ("bias_ih_l0", "bias_hh_l0"),
    "all but a bias": ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("kind", ["GRU batch_first", "LSTM"])
def test_frozen_weights(frozen: str, kind: str) -> None:
    layer, x = layer_of(kind), torch.randn(T, B, S)
    for _ in range(3):
        trains_as_a_new_one(layer, x)
    for name in FROZEN[frozen]:
        getattr(layer, name).requires_grad_(False)
    for _ in range(3):
        trains_as_a_new_one(layer, x)


@pytest.mark.parametrize("kind", ["RNN", "GRU batch_first", "LSTM"])
def test_gradients_however_they_come(kind: str) -> None:
    layer, x = layer_of(kind).double(), torch.randn(T, B, S).double()
    for _ in range(3):
        trains_as_a_new_one(layer, x)
    trains_as_a_new_one(layer, x, again=True)
    fresh = copy.deepcopy(layer)
    for pick in (lambda y, *h: y[2], lambda y, *h: h[-1], lambda y, *h: y.transpose(0, 1)[0] * h[0].sum(), lambda y, *h: y.sum().expand(3)):
        ours, theirs = (torch.autograd.grad(pick(*tensors(one(x))).sum(), list(one.parameters())) for one in (layer, fresh))
        assert all(map(torch.equal, ours, theirs))
    y = layer(x)[0]
    first, second = (torch.autograd.grad(y.sum(), list(layer.parameters()), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.autograd.graph.save_on_cpu():
        y = layer(x)[0]
    assert all(map(torch.equal, torch.autograd.grad(y.sum(), list(layer.parameters())), first))
    torch.autograd.gradcheck(lambda x: layer(x)[0], (x[:2].detach().requires_grad_(),))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("change", ["threads", "instruction set", "weights"])
def test_what_changes_between_forward_and_backward(change: str) -> None:
    layer, x = layer_of("LSTM"), torch.randn(T, B, S)
    expected = train(layer, x)[3:]
    for _ in range(3):
        train(layer, x)
    x = x.requires_grad_()
    found = tensors(layer(x))
    total = torch.stack([(t.double() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in found]).sum()
    if change == "threads":
        torch.set_num_threads(1)
    elif change == "instruction set":
        ops.set_isa("scalar")
    else:  # what was there is freed; what is there now has the same numbers
        for w in layer.parameters():
            w.data = w.data.clone()
        spoil = [torch.full_like(w, torch.nan) for w in layer.parameters()]
        assert spoil
    for grad, of in zip(torch.autograd.grad(total, [x, *layer.parameters()]), expected, strict=True):
        torch.testing.assert_close(grad, of)


def test_a_weight_changed_in_place_before_backward_is_told() -> None:
    layer, x = layer_of("GRU batch_first"), torch.randn(T, B, S)
    for _ in range(3):
        train(layer, x)
    output, _ = layer(x)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def states_of(layer: Any) -> Any:
    """Neither zeros nor contiguous."""
    own = [torch.randn(1, width, B).transpose(1, 2) for width in ([S, S] if isinstance(layer, rnnkernels.LSTM) else [S])]
    return tuple(own) if len(own) > 1 else own[0]


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "LSTM kept in bfloat16", "reset before"])
@pytest.mark.parametrize("steps", [1, T])
def test_states_that_are_given(kind: str, steps: int, repeated: list[bool]) -> None:
    layer, x = layer_of(kind), torch.randn(steps, B, S)
    for _ in range(3):
        as_a_new_one(layer, x)
        as_a_new_one(layer, x, states_of(layer))
    assert any(repeated)
    for wrong in (torch.zeros(1, B, S + 1), torch.zeros(2, B, S), torch.zeros(1, B + 1, S), torch.zeros(B, S)):
        with pytest.raises(RuntimeError, match=r"[Ee]xpected|should also be"):
            run(layer, x, (wrong, wrong) if kind.startswith("LSTM") else wrong)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "reset before"])
def test_gradients_of_states_that_are_given(kind: str, repeated: list[bool]) -> None:
    layer, x = layer_of(kind).double(), torch.randn(T, B, S).double()

    def grads(one: Any, hx: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [state.detach().double().contiguous().requires_grad_() for state in hx]
        found = tensors(one(x, tuple(leaves) if len(leaves) > 1 else leaves[0]))
        total = torch.stack([t.square().sum() for t in found]).sum()
        return list(torch.autograd.grad(total, [*leaves, *one.parameters()]))

    for _ in range(3):
        hx = states_of(layer)
        hx = hx if isinstance(hx, tuple) else (hx,)
        assert all(map(torch.equal, grads(layer, hx), grads(copy.deepcopy(layer), hx)))
    assert any(repeated)


@pytest.mark.parametrize("name", ["RNNCell", "GRUCell", "LSTMCell"])
def test_cells_that_step_again(name: str, repeated: list[bool]) -> None:
    torch.manual_seed(0)
    cell, x = getattr(rnnkernels, name)(S, S), torch.randn(B, S)
    theirs = getattr(nn, name)(S, S)
    theirs.load_state_dict(cell.state_dict())
    hx: Any = torch.randn(B, S)
    hx = (hx, torch.randn(B, S)) if name == "LSTMCell" else hx
    with torch.no_grad():
        for _ in range(4):
            for given in (None, hx):
                found, expected = cell(x, given), theirs(x, given)
                torch.testing.assert_close(found, expected)
        assert any(repeated)
        cell.weight_hh.data.mul_(0.5)
        theirs.weight_hh.mul_(0.5)
        torch.testing.assert_close(cell(x, hx), theirs(x, hx))
        with pytest.raises(RuntimeError):
            cell(x, torch.zeros(B, S + 1) if name != "LSTMCell" else (torch.zeros(B, S + 1), torch.zeros(B, S)))


CELLS: dict[str, Callable[[], Any]] = {
    "RNNCell": lambda: rnnkernels.RNNCell(S, S, engine="cpu"),
    "GRUCell": lambda: rnnkernels.GRUCell(S, S),
    "LSTMCell": lambda: rnnkernels.LSTMCell(S, S),
    "LSTMCell without biases": lambda: rnnkernels.LSTMCell(S, S, bias=False),
    "PeepholeLSTMCell": lambda: rnnkernels.PeepholeLSTMCell(S, S),
    "GRUResetBeforeCell": lambda: rnnkernels.GRUResetBeforeCell(S, S),
    "DreamerGRUCell": lambda: rnnkernels.DreamerGRUCell(S, S),
    "IndRNNCell": lambda: rnnkernels.IndRNNCell(S, S),
}
cells = pytest.mark.parametrize("kind", CELLS)


def cell_of(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A cell, and a state to start from, as the cell takes it."""
    torch.manual_seed(0)
    cell, h, c = CELLS[kind]().to(dtype), torch.randn(B, S).to(dtype), torch.randn(B, S).to(dtype)
    return cell, (h, c) if "LSTM" in kind else h


def three_steps(cell: Any, x: Tensor, hx: Any, again: bool = False) -> list[Tensor]:
    """The last state, and gradients of the input, the first state and all weights; ``again``: and those of a penalty on these."""
    first = [t.detach().requires_grad_() for t in (hx if isinstance(hx, tuple) else (hx,))]
    x, state = x.detach().requires_grad_(), tuple(first) if len(first) > 1 else first[0]
    for _ in range(3):
        state = cell(x, state)
    last = state if isinstance(state, tuple) else (state,)
    leaves = [x, *first, *cell.parameters()]
    grads = torch.autograd.grad(sum(t.double().square().sum() for t in last), leaves, create_graph=again)
    more = torch.autograd.grad(sum(g.double().square().sum() for g in grads), leaves, allow_unused=True) if again else ()
    return [t.detach() for t in (*last, *grads, *more) if t is not None]


@cells
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("restore", "poison")
def test_cells_that_train_again(kind: str, isa: str, dtype: torch.dtype, repeated: list[bool]) -> None:
    ops.set_isa(isa)
    cell, hx = cell_of(kind, dtype)
    for x in torch.randn(4, B, S).to(dtype):
        found, expected = three_steps(cell, x, hx), three_steps(copy.deepcopy(cell), x, hx)
        assert all(map(torch.equal, found, expected))
        repeated.clear()
    three_steps(cell, x, hx)
    assert repeated == [True] * (3 if kind != "DreamerGRUCell" else 0), "all steps but those of a norm, which has moments, go the short way"


@cells
def test_cells_that_train_again_as_the_whole_way(kind: str) -> None:
    """Against the op, which knows nothing of calls that repeat one; and derivatives of derivatives."""
    cell, hx = cell_of(kind, torch.float64)
    x = torch.randn(B, S, dtype=torch.float64)
    three_steps(cell, x, hx)
    found = three_steps(cell, x, hx, again=True)
    with torch.autograd.graph.save_on_cpu():
        assert all(map(torch.equal, three_steps(cell, x, hx), found))
    name, weights = cell._cell, [getattr(cell, n, None) for n in cell._weight_names]

    def whole(x: Tensor, state: Any) -> Any:
        _, *last = ops.sequence(name, x[None], list(state) if isinstance(state, tuple) else [state], *weights, engine="cpu")
        return tuple(last) if len(last) > 1 else last[0]

    whole.parameters = cell.parameters  # type: ignore[attr-defined]
    for a, b in zip(found, three_steps(whole, x, hx, again=True), strict=True):
        torch.testing.assert_close(a, b)


def test_a_cell_sees_its_weights_change_between_steps_that_train(repeated: list[bool]) -> None:
    cell, hx = cell_of("LSTMCell")
    x = torch.randn(B, S)
    optimizer = torch.optim.SGD(cell.parameters(), 0.1)
    for _ in range(4):
        assert all(map(torch.equal, three_steps(cell, x, hx), three_steps(copy.deepcopy(cell), x, hx)))
        h, c = cell(x, cell(x, hx))
        (h.sum() + c.square().sum()).backward()
        optimizer.step()
    assert any(repeated)
    h, _ = cell(x, hx)
    with torch.no_grad():
        cell.weight_hh.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "not contiguous": lambda h: h.t().contiguous().t(),
    "to be negated": lambda h: torch._neg_view(h),
    "expanded": lambda h: h[:1].expand(B, S),
    "a Parameter": lambda h: nn.Parameter(h),
    "of one row more": lambda h: torch.cat([h, h[:1]]),
    "of another dtype": lambda h: h.double(),
}


@pytest.mark.parametrize("change", STATES)
@pytest.mark.parametrize("kind", ["RNNCell", "GRUCell"])
@pytest.mark.parametrize("engine", ["cpu", "auto"])
def test_other_states_of_a_step_that_trains(kind: str, change: str, engine: str) -> None:
    cell, hx = cell_of(kind)
    cell.engine = engine
    x = torch.randn(B, S)
    for _ in range(2):
        three_steps(cell, x, hx)
    if change.startswith("of"):
        with pytest.raises(RuntimeError):
            cell(x, STATES[change](hx))
        return
    theirs = getattr(nn, kind)(S, S)
    theirs.load_state_dict(cell.state_dict())
    for found, expected in zip(three_steps(cell, x, STATES[change](hx)), three_steps(theirs, x, STATES[change](hx)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_small_step_with_gradients_is_torchs(nonlinearity: str, bias: bool) -> None:
    """Where its own takes less time; explained as such, and not where somebody asks for something else."""
    ours, theirs = (package.RNNCell(S, S, bias, nonlinearity) for package in (rnnkernels, nn))
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(B, S), torch.randn(B, S)
    for _ in range(2):
        assert all(map(torch.equal, three_steps(ours, x, h), three_steps(theirs, x, h)))
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x[0]), theirs(x[0]))
    (plan,) = rnnkernels.explain(ours, x, h).plans
    assert (plan.engine, plan.why) == ("torch", ops.peer.STEP_IS_FASTER)
    large, many = rnnkernels.RNNCell(S, 1 << 14, False), torch.randn((1 << 14) // S + 1, S)
    engines = [
        rnnkernels.explain(ours.requires_grad_(False), x, h),
        rnnkernels.explain(ours.requires_grad_(True).to(torch.bfloat16), x.bfloat16(), h.bfloat16()),
        rnnkernels.explain(ours.to(torch.float32), many),
        rnnkernels.explain(large, x),
        rnnkernels.explain(rnnkernels.RNNCell(S, S, engine="cpu"), x),
        rnnkernels.explain(rnnkernels.GRUCell(S, S), x),
    ]
    assert [explained.plans[0].engine for explained in engines] == ["cpu"] * len(engines)


@pytest.mark.usefixtures("poison")
def test_a_step_is_not_torchs_where_a_row_may_not_depend_on_its_batch() -> None:
    cell = rnnkernels.RNNCell(S, S)
    assert rnnkernels.explain(cell, torch.randn(B, S)).plans[0].engine == "cpu"


def test_a_layers_single_step_is_torchs_too() -> None:
    layer, theirs = rnnkernels.RNN(S, S), nn.RNNCell(S, S)
    theirs.load_state_dict({name.removesuffix("_l0"): w for name, w in layer.state_dict().items()})
    x, h = torch.randn(1, B, S), torch.randn(1, B, S)
    for given in (None, h):
        for _ in range(3):
            output, final = layer(x, given)
            expected = theirs(x[0], None if given is None else given[0])
            assert torch.equal(output[0], expected)
            assert torch.equal(final[0], expected)
    assert rnnkernels.explain(layer, x).plans[0].engine == "torch"
    assert rnnkernels.explain(layer, torch.cat([x, x])).plans[0].engine == "cpu"
    assert rnnkernels.explain(layer, x, reset_mask=torch.ones(1, B, dtype=torch.bool)).plans[0].engine == "cpu"
    narrow = rnnkernels.RNN(S, S, weight_dtype=torch.bfloat16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="is for inference"):
            narrow(x)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("change", ["threads", "instruction set"])
@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell", "LSTM"])
def test_states_that_do_not_lie_as_kernels_read_them_and_what_changes_before_backward(kind: str, change: str) -> None:
    torch.manual_seed(0)
    ours, theirs = (getattr(package, kind)(S, S, dtype=torch.float64) for package in (rnnkernels, nn))
    theirs.load_state_dict(ours.state_dict())
    around = (T,) if kind == "LSTM" else ()
    x = torch.randn(*around, B, S, dtype=torch.float64)

    def grads(layer: Any, state: Tensor, meanwhile: Callable[[], Any]) -> list[Tensor]:
        h = (state if kind != "LSTM" else state[None]).detach().requires_grad_()
        last = layer(x, (h, h) if "LSTM" in kind else h)
        meanwhile()
        while isinstance(last, tuple):
            last = last[0]
        return list(torch.autograd.grad(last.square().sum(), [h, *layer.parameters()]))

    for state in (torch.randn(S, B, dtype=torch.float64).t(), torch.randn(1, S, dtype=torch.float64).expand(B, S)):
        torch.set_num_threads(2)
        ops.set_isa(None)
        for _ in range(3):
            grads(ours, torch.randn(B, S, dtype=torch.float64), lambda: None)
        found = grads(ours, state, lambda: torch.set_num_threads(1) if change == "threads" else ops.set_isa("scalar"))
        for a, b in zip(found, grads(theirs, state, lambda: None), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell"])
def test_a_state_may_be_changed_in_place_as_torchs(kind: str) -> None:
    cell, theirs = getattr(rnnkernels, kind)(S, S), getattr(nn, kind)(S, S)
    theirs.load_state_dict(cell.state_dict())
    x = torch.randn(B, S)
    for _ in range(4):
        found = []
        for one in (cell, theirs):
            state = one(x)
            h = state[0] if isinstance(state, tuple) else state
            h[0] = 0
            found.append(torch.autograd.grad(h.square().sum(), list(one.parameters())))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_the_output_and_the_last_state_of_one_step_are_apart(kind: str) -> None:
    layer, x = getattr(rnnkernels, kind)(S, S), torch.randn(1, B, S)
    for training in (True, False) * 4:
        with torch.set_grad_enabled(training):
            output, *finals = tensors(layer(x))
        assert len({t.data_ptr() for t in (output, *finals)}) == 1 + len(finals)
        if training:
            finals[0][:, 0] = 0
            output.sum().backward()


def test_a_stack_is_of_sequences_alone() -> None:
    layer = rnnkernels.RNN(S, S)
    layer(torch.randn(1, B, S))
    with pytest.raises(RuntimeError, match="input: expected 3-D"):
        rnnkernels.functional.stack("srn_tanh", torch.randn(B, S), None, layer._weights(), packed=layer._kept())
