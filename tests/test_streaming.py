"""Streams: the bits of the whole sequence step by step, and the state, weights and errors around them."""

import copy
import os
import pickle
import time
from typing import Any

import pytest
import torch
from conftest import ISAS
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import rnnkernels
from rnnkernels import ops
from rnnkernels.modules.layer import LayerBase

T, I, H = 6, 7, 13  # noqa: E741
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "RNN relu without bias": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "GRU": ("GRU", {}),
    "GRU without bias": ("GRU", {"bias": False}),
    "LSTM": ("LSTM", {}),
    "LSTM projected": ("LSTM", {"proj_size": 3}),
    "LSTM projected without bias": ("LSTM", {"proj_size": 3, "bias": False}),
    "PeepholeLSTM": ("PeepholeLSTM", {}),
    "CoupledLSTM": ("CoupledLSTM", {}),
    "NoForgetLSTM": ("NoForgetLSTM", {}),
    "GRUResetBefore": ("GRUResetBefore", {}),
    "ResidualRNN": ("ResidualRNN", {}),
    "ResidualRNN without U": ("ResidualRNN", {"recurrent": False}),
    "IndRNN": ("IndRNN", {}),
    "DreamerGRU": ("DreamerGRU", {}),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
layers = pytest.mark.parametrize("name", LAYERS)
pairs = pytest.mark.parametrize("name", ["LSTM projected", "GRU", "IndRNN"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
engines = pytest.mark.parametrize("engine", ["auto", "stepwise", "torch"])


def make(name: str, **options: Any) -> Any:
    kind, more = LAYERS[name]
    torch.manual_seed(3)
    return getattr(rnnkernels, kind)(options.pop("input_size", I), options.pop("hidden_size", H), **more, **options)


def inputs(layer: Any, batch: int | None, steps: int = T) -> Tensor:
    shape = (steps, layer.input_size) if batch is None else (steps, batch, layer.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(layer.weight_ih_l0.dtype)


def states(layer: Any, batch: int | None) -> Any:
    """As hx, random."""
    generator = torch.Generator().manual_seed(2)
    lead = (layer.num_layers,) if batch is None else (layer.num_layers, batch)
    return layer._join([torch.randn(*lead, width, generator=generator).to(layer.weight_ih_l0.dtype) for width in layer._widths])


def flat(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def whole(layer: Any, x: Tensor, hx: Any = None) -> list[Tensor]:
    with torch.no_grad():
        output, final = layer.eval()(x, hx)
    return [output, *flat(final)]


def run(stream: Any, x: Tensor) -> list[Tensor]:
    return [torch.stack([stream.step(row) for row in x]), *flat(stream.state)]


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_every_layer_is_here() -> None:
    public = [getattr(rnnkernels, name) for name in rnnkernels.__all__]
    kinds = [kind for kind in public if isinstance(kind, type) and issubclass(kind, LayerBase)]
    assert {kind.__name__ for kind in kinds} - {"ClockworkRNN"} == {name for name, _ in LAYERS.values()}  # it has none, and says so


@pytest.mark.parametrize("depth", [1, 2], ids=["one layer", "two layers"])
@pytest.mark.parametrize("batch", [None, 1, 3], ids=["unbatched", "B 1", "B 3"])
@dtypes
@layers
@pytest.mark.usefixtures("poison")
def test_steps_have_the_bits_of_the_sequence(name: str, dtype: torch.dtype, batch: int | None, depth: int) -> None:
    layer = make(name, num_layers=depth, dtype=dtype)
    x, hx = inputs(layer, batch), states(layer, batch)
    same(run(layer.stream(batch), x), whole(layer, x))
    same(run(layer.stream(batch, hx), x), whole(layer, x, hx))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "sizes", "batch"),
    [
        ("LSTM", {"hidden_size": 300}, 1),
        ("LSTM projected", {"hidden_size": 300, "input_size": 500, "num_layers": 3}, 2),
        ("GRUResetBefore", {"hidden_size": 301, "num_layers": 2}, 1),
        ("GRU", {"hidden_size": 150, "num_layers": 2}, 17),
        ("IndRNN", {"hidden_size": 64, "num_layers": 2}, 300),
    ],
    ids=["LSTM", "LSTM projected, layers of unequal work", "GRUResetBefore", "GRU, rows shared", "IndRNN, many rows"],
)
@pytest.mark.usefixtures("restore", "poison")
def test_a_team_gives_the_same_bits(name: str, sizes: dict[str, int], batch: int, threads: int, isa: str) -> None:
    ops.set_isa(isa)
    torch.set_num_threads(threads)
    layer = make(name, **sizes)
    x = inputs(layer, batch)
    stream, found = layer.stream(batch), []
    for t, row in enumerate(x):
        if t == T // 2:
            time.sleep(5e-3)  # after a pause one thread steps alone
        found.append(stream.step(row))
    same([torch.stack(found), *flat(stream.state)], whole(layer, x))


@pytest.mark.usefixtures("restore")
def test_a_stream_keeps_its_instruction_set() -> None:
    layer = make("LSTM", num_layers=2)
    x = inputs(layer, 2)
    for isa in ISAS:
        ops.set_isa(isa)
        stream, expected = layer.stream(2), whole(layer, x)
        for other in ISAS:
            ops.set_isa(other)
            stream.refresh()
            stream.reset()
            same(run(stream, x), expected)


def test_a_child_of_fork_steps_on() -> None:
    layer = make("LSTM", hidden_size=300)
    x, stream = inputs(layer, 1), layer.stream(1)
    expected = whole(layer, x)[0]
    stream.step(x[0])
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(stream.step(x[1]), expected[1]) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("engine", ["auto", "stepwise"])
@layers
def test_on_a_gpu(name: str, engine: str) -> None:
    layer = make(name, num_layers=2)
    x, hx = inputs(layer, 3), states(layer, 3)
    expected = whole(layer, x, hx)
    layer.cuda().engine = engine
    stream = layer.stream(3, layer._join([state.cuda() for state in flat(hx)]))
    for a, b in zip(run(stream, x.cuda()), expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    stream.reset(torch.tensor([1], device="cuda"))
    assert torch.equal(flat(stream.state)[0][:, 1].cpu(), flat(hx)[0][:, 1])


@engines
@pytest.mark.parametrize("batch", [None, 3], ids=["unbatched", "B 3"])
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "LSTM projected"])
def test_every_engine_has_the_same_interface(name: str, batch: int | None, engine: str) -> None:
    layer = make(name, num_layers=2, dtype=torch.float64, engine=engine, dropout=0.5)
    x, hx = inputs(layer, batch), states(layer, batch)
    stream = layer.stream(batch, hx)
    expected = whole(layer, x, hx)
    layer.train()
    outputs = []
    for row in x:
        y = stream.step(row)
        outputs.append(y.clone())
        y.fill_(torch.nan)  # nobody else's memory
    for a, b in zip([torch.stack(outputs), *flat(stream.state)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        layer.weight_ih_l1.mul_(2)
    stream.reset()
    torch.testing.assert_close(run(stream, x)[0], whole(layer, x, hx)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@engines
@pytest.mark.parametrize("name", ["LSTM projected", "GRU"])
def test_states_go_in_and_out_as_copies(name: str, engine: str) -> None:
    layer = make(name, num_layers=2, engine=engine)
    x, hx = inputs(layer, 3), states(layer, 3)
    first, second = layer.stream(3), layer.stream(3)
    run(first, x[:3])
    second.state = first.state
    same(run(second, x[3:]), run(first, x[3:]))
    given = flat(hx)
    kept = [state.clone() for state in given]
    first.state = layer._join([state.transpose(0, 1).contiguous().transpose(0, 1) for state in given])
    same(flat(first.state), kept)
    for state in flat(first.state):
        state.fill_(torch.nan)
    same(flat(first.state), kept)
    first.state = hx
    second.state = hx
    for state in given:
        state.fill_(torch.nan)
    same(run(first, x), run(second, x))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@engines
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("name", ["LSTM projected", "GRU"])
def test_reset(name: str, given: bool, engine: str) -> None:
    layer = make(name, num_layers=2, engine=engine)
    x, hx = inputs(layer, 3), states(layer, 3) if given else None
    stream = layer.stream(3, hx)
    start = [state.clone() for state in flat(stream.state)]
    for state in flat(hx) if given else []:
        state.fill_(torch.nan)
    run(stream, x)
    after = flat(stream.state)
    for rows in (torch.tensor([True, False, True]), torch.tensor([2, 0]), torch.tensor([0, 2, 2])):
        stream.state = layer._join(after)
        stream.reset(rows)
        for state, was, now in zip(flat(stream.state), after, start, strict=True):
            assert torch.equal(state[:, 1], was[:, 1])
            assert torch.equal(state[:, [0, 2]], now[:, [0, 2]])
    stream.reset(torch.tensor([], dtype=torch.int64))
    assert torch.equal(flat(stream.state)[0][:, 1], after[0][:, 1])
    stream.reset()
    same(flat(stream.state), start)


@layers
def test_weights_changed_in_place_are_noticed(name: str) -> None:
    layer = make(name, num_layers=2)
    x, stream = inputs(layer, 2), layer.stream(2)
    run(stream, x[:3])
    before = layer._join([state.clone() for state in flat(stream.state)])
    layer(x)[0].square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    same(run(stream, x[3:]), whole(layer, x[3:], before))
    for parameter in layer.parameters():  # each alone
        with torch.no_grad():
            parameter.mul_(1.5)
        stream.reset()
        same(run(stream, x), whole(layer, x))
    layer.load_state_dict(make(name, num_layers=2).state_dict())
    stream.reset()
    same(run(stream, x), whole(layer, x))


@pairs
def test_what_is_not_noticed_waits_for_refresh(name: str) -> None:
    layer = make(name)
    x, stream = inputs(layer, 2), layer.stream(2)
    expected = whole(layer, x)
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)  # frees what the stream was made from
    same(run(stream, x), expected)
    stream.refresh()
    stream.reset()
    same(run(stream, x), whole(layer, x))
    layer.weight_ih_l0 = nn.Parameter(torch.randn_like(layer.weight_ih_l0).t().contiguous().t())
    stream.refresh()
    stream.reset()
    same(run(stream, x), whole(layer, x))


def test_weights_that_are_computed() -> None:
    layer = make("LSTM")
    parametrizations.weight_norm(layer, "weight_hh_l0")
    x, stream = inputs(layer, 2), layer.stream(2)
    same(run(stream, x), whole(layer, x))
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    stream.refresh()
    stream.reset()
    same(run(stream, x), whole(layer, x))


def test_inference_tensors() -> None:
    with torch.inference_mode():
        layer = make("GRU")
        x, stream = inputs(layer, 2), layer.stream(2)
        found = run(stream, x)
    same(found, whole(layer, x))


def test_nothing_is_recorded_and_nothing_cast() -> None:
    layer = make("LSTM")
    x, stream = inputs(layer, 2), layer.stream(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.stack([stream.step(row.requires_grad_()) for row in x.unbind()])
    same([found], whole(layer, x)[:1])
    assert not found.requires_grad
    turned = inputs(layer, 2).transpose(1, 2).contiguous().transpose(1, 2)
    stream.reset()
    same([torch.stack([stream.step(row) for row in turned])], [found])


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "one column more": (lambda s: s.step(torch.zeros(3, I + 1)), RuntimeError, r"x: expected shape \(3, 7\), got \(3, 8\)"),
    "one row less": (lambda s: s.step(torch.zeros(2, I)), RuntimeError, r"x: expected shape \(3, 7\), got \(2, 7\)"),
    "unbatched": (lambda s: s.step(torch.zeros(I)), RuntimeError, r"x: expected shape \(3, 7\), got \(7,\)"),
    "dtype": (lambda s: s.step(torch.zeros(3, I).double()), RuntimeError, "x: expected dtype torch.float32 .*, got torch.float64"),
    "device": (lambda s: s.step(torch.zeros(3, I, device="meta")), RuntimeError, "x: expected device cpu .*, got meta"),
    "state's rows": (
        lambda s: setattr(s, "state", (torch.zeros(1, 2, H), torch.zeros(1, 3, H))),
        RuntimeError,
        r"state: expected shape \(1, 3, 13\), got \(1, 2, 13\)",
    ),
    "state's dtype": (
        lambda s: setattr(s, "state", (torch.zeros(1, 3, H), torch.zeros(1, 3, H).half())),
        RuntimeError,
        "state: expected dtype torch.float32 .*, got torch.float16",
    ),
    "state no pair": (lambda s: setattr(s, "state", torch.zeros(1, 3, H)), TypeError, "state: expected two tensors, as hx, got a Tensor"),
    "mask": (lambda s: s.reset(torch.ones(2, dtype=torch.bool)), RuntimeError, r"rows: expected .* of shape \(3,\) .* got .*\(2,\)"),
    "rows' dtype": (lambda s: s.reset(torch.ones(2)), RuntimeError, "rows: expected .*torch.int64, got torch.float32"),
    "rows' range": (lambda s: s.reset(torch.tensor([0, 3])), IndexError, r"rows: expected indices from 0 to 2, got \[0, 3\]"),
    "state's part": (
        lambda s: setattr(s, "state", (torch.zeros(1, 3, H), None)),
        TypeError,
        "state: expected tensors, got Tensor, NoneType",
    ),
    "pickle": (lambda s: pickle.dumps(s), TypeError, "a Stream cannot be copied or pickled: make another"),
    "deepcopy": (lambda s: copy.deepcopy(s), TypeError, "a Stream cannot be copied or pickled: make another"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    layer = make("LSTM")
    stream, x = layer.stream(3), inputs(layer, 3)
    act, error, text = WRONG[case]
    with pytest.raises(error, match=text):
        act(stream)
    same(run(stream, x), whole(layer, x))


def test_errors_of_making_one() -> None:
    with pytest.raises(ValueError, match="bidirectional: expected False for a stream, .* got True"):
        make("GRU", bidirectional=True).stream(1)
    for size in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"batch_size: expected a positive int, or None for unbatched steps, got {size!r}"):
            make("GRU").stream(size)
    with pytest.raises(RuntimeError, match=r"hx: expected shape \(1, 2, 13\), got \(1, 13\)"):
        make("GRU").stream(2, torch.zeros(1, H))
    with pytest.raises(RuntimeError, match="'persistent' runs on a CUDA device"):
        make("GRU", engine="persistent").stream(2)
    with pytest.raises(RuntimeError, match="rows: expected None for an unbatched stream"):
        make("GRU").stream().reset(torch.tensor([0]))


@engines
def test_refresh_refuses_other_weights(engine: str) -> None:
    layer = make("GRU", num_layers=2, engine=engine)
    x, stream = inputs(layer, 2), layer.stream(2)
    expected = run(stream, x)
    layer.weight_ih_l1, layer.weight_ih_l0 = nn.Parameter(layer.weight_ih_l1[:, :-1].detach()), nn.Parameter(torch.zeros(3 * H, I))
    with pytest.raises(RuntimeError, match="weight_ih: expected shape"):
        stream.refresh()
    layer = make("GRU", num_layers=2, engine=engine)
    stream = layer.stream(2)
    layer.double()
    with pytest.raises(RuntimeError, match="weights of layer 0: expected .*float32.*, got .*float64.*: make another stream"):
        stream.refresh()
    layer.to("meta")
    with pytest.raises(RuntimeError, match="weights: expected device cpu .*, got meta"):
        stream.refresh()
    if engine == "auto":  # which has its own copy
        same(run(stream, x), expected)
