"""The layers and cells as objects: constructors, attributes, state, weights, errors. torch.nn is the witness throughout."""

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

import rnnkernels
from rnnkernels import ops

# Switching oneDNN off and on makes torch warn of GPUs.
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration")

T, B, I, H = 5, 2, 3, 4  # noqa: E741
LAYERS = ["RNN", "GRU", "LSTM"]
CELLS = ["RNNCell", "GRUCell", "LSTMCell"]

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *[(name, {}) for name in (*LAYERS, *CELLS)],
    *[(name, {"bias": False}) for name in (*LAYERS, *CELLS)],
    *[(name, {"dtype": torch.float64}) for name in (*LAYERS, *CELLS)],
    *[(name, {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}) for name in LAYERS],
    ("RNN", {"nonlinearity": "relu"}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 2}),
    ("LSTM", {"proj_size": 2, "bias": False, "bidirectional": True, "num_layers": 2}),
]
variants = pytest.mark.parametrize(
    ("name", "options"), VARIANTS, ids=[" ".join((name, *(f"{k}={v}" for k, v in options.items()))) for name, options in VARIANTS]
)
layers = pytest.mark.parametrize("name", LAYERS)
cells = pytest.mark.parametrize("name", CELLS)
modules = pytest.mark.parametrize("name", LAYERS + CELLS)


def twins(name: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's, from one seed."""
    built = []
    for package in (rnnkernels, nn):
        torch.manual_seed(0)
        built.append(getattr(package, name)(*(args or (I, H)), **options))
    return built[0], built[1]


def example(module: Any) -> Tensor:
    dtype = next(module.parameters()).dtype
    shape = (B, I) if isinstance(module, nn.RNNCellBase) else (T, B, I)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def assert_same_outputs(ours: Any, theirs: Any, *args: Any) -> None:
    args = args or (example(theirs),)
    for a, b in zip(flat(ours(*args)), flat(theirs(*args)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def outcome(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.type, str(caught.value)


# ---- construction and attributes


@variants
def test_one_seed_gives_the_same_parameters(name: str, options: dict[str, Any]) -> None:
    ours, theirs = twins(name, **options)
    a, b = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key])
    torch.manual_seed(3)
    ours.reset_parameters()
    torch.manual_seed(3)
    theirs.reset_parameters()
    assert all(torch.equal(a[key], b[key]) for key in a)


@variants
def test_attributes_are_those_of_torch(name: str, options: dict[str, Any]) -> None:
    ours, theirs = twins(name, **options)
    assert repr(ours) == repr(theirs)
    for key, value in vars(theirs).items():
        if not key.startswith("_"):
            assert getattr(ours, key) == value, key
    if name in LAYERS:
        assert isinstance(ours, nn.RNNBase)
        assert ours._all_weights == theirs._all_weights
        assert ours._flat_weights_names == theirs._flat_weights_names
        for a, b in zip(ours._flat_weights, theirs._flat_weights, strict=True):
            assert torch.equal(a, b)
        assert [len(group) for group in ours.all_weights] == [len(group) for group in theirs.all_weights]
        assert ours.flatten_parameters() is None
    else:
        assert isinstance(ours, nn.RNNCellBase)


@layers
def test_layer_is_not_a_subclass_that_torch_compile_refuses(name: str) -> None:
    assert not issubclass(getattr(rnnkernels, name), (nn.RNN, nn.GRU, nn.LSTM))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("RNN", (3, 4, 2, "relu", False, True, 0.25, True)),
        ("RNN", (3, 4, 2, "tanh", True, True, 0.25, True, 0, "cpu", torch.float64)),
        ("GRU", (3, 4, 2, False, True, 0.25, True)),
        ("LSTM", (3, 4, 2, False, True, 0.25, True, 2, "cpu", torch.float64)),
        ("RNNCell", (3, 4, False, "relu", "cpu", torch.float64)),
        ("GRUCell", (3, 4, False, "cpu", torch.float64)),
        ("LSTMCell", (3, 4, False, "cpu", torch.float64)),
    ],
)
def test_positional_order(name: str, args: tuple[Any, ...]) -> None:
    ours, theirs = twins(name, *args)
    assert repr(ours) == repr(theirs)
    assert [(k, v.dtype) for k, v in ours.named_parameters()] == [(k, v.dtype) for k, v in theirs.named_parameters()]


BAD_OPTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "nothing": ((), {}),
    "no hidden_size": ((3,), {}),
    "unknown keyword": ((3, 4), {"colour": 1}),
    "mode twice": ((3, 4), {"mode": "GRU"}),
    "float input_size": ((3.0, 4), {}),
    "zero input_size": ((0, 4), {}),
    "str hidden_size": ((3, "4"), {}),
    "zero hidden_size": ((3, 0), {}),
    "zero num_layers": ((3, 4, 0), {}),
    "int bias": ((3, 4), {"bias": 1}),
    "int batch_first": ((3, 4), {"batch_first": 1}),
    "dropout above one": ((3, 4), {"dropout": 1.5}),
    "bool dropout": ((3, 4), {"dropout": True}),
    "str dropout": ((3, 4), {"dropout": "a"}),
    "negative proj_size": ((3, 4), {"proj_size": -1}),
    "wide proj_size": ((3, 4), {"proj_size": 4}),
}


@layers
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_constructor_errors(name: str, case: str) -> None:
    args, options = BAD_OPTIONS[case]
    try:
        getattr(nn, name)(*args, **options)
    except (TypeError, ValueError):
        assert outcome(lambda: getattr(rnnkernels, name)(*args, **options)) == outcome(lambda: getattr(nn, name)(*args, **options))
    else:
        pytest.skip(f"torch {torch.__version__} takes it, and these checks are inherited")


def test_nonlinearity_given_twice() -> None:
    ours, theirs = (outcome(lambda p=p: p.RNN(3, 4, 1, "tanh", nonlinearity="relu")) for p in (rnnkernels, nn))
    assert ours == theirs


@cells
@pytest.mark.parametrize("args", [(3, -1), (3, "4"), (3, 4.0)], ids=repr)
def test_cell_constructor_errors(name: str, args: tuple[Any, ...]) -> None:
    assert outcome(lambda: getattr(rnnkernels, name)(*args)) == outcome(lambda: getattr(nn, name)(*args))


@layers
def test_dropout_of_a_single_layer_warns(name: str) -> None:
    texts = []
    for package in (rnnkernels, nn):
        with pytest.warns(UserWarning, match="dropout option adds dropout") as caught:
            getattr(package, name)(3, 4, dropout=0.5)
        texts.append([str(warning.message) for warning in caught])
    assert texts[0] == texts[1]


# ---- what is ours


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "identity"])
def test_more_nonlinearities(nonlinearity: str) -> None:
    layer = rnnkernels.RNN(I, H, nonlinearity=nonlinearity)
    cell = rnnkernels.RNNCell(I, H, nonlinearity=nonlinearity)
    torch.manual_seed(0)
    ours = rnnkernels.RNN(I, H, 1, nonlinearity)
    torch.manual_seed(0)
    assert torch.equal(ours.weight_hh_l0, nn.RNN(I, H).weight_hh_l0)
    assert (layer.nonlinearity, layer.mode) == (nonlinearity, f"RNN_{nonlinearity.upper()}")
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x = torch.randn(1, B, I)
    z = x[0] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0
    expected = z.sigmoid() if nonlinearity == "sigmoid" else z
    torch.testing.assert_close(layer(x)[0][0], expected)
    torch.testing.assert_close(cell(x[0]), expected)
    assert pickle.loads(pickle.dumps(layer)).mode == layer.mode


def test_unknown_nonlinearity() -> None:
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'sin'. Select from 'tanh', 'relu', 'sigmoid' or 'identity'."):
        rnnkernels.RNN(3, 4, nonlinearity="sin")
    ours, theirs = twins("RNNCell", nonlinearity="sin")
    assert outcome(lambda: ours(example(ours))) == outcome(lambda: theirs(example(theirs)))


@modules
def test_engine(name: str) -> None:
    make = getattr(rnnkernels, name)
    assert make(3, 4).engine == "auto"
    named = make(3, 4, engine="cpu")
    assert named.engine == "cpu"
    assert repr(named).endswith("engine=cpu)")
    assert copy.deepcopy(named).engine == "cpu"
    with pytest.raises(ValueError, match="engine must be one of 'auto', .*, got 'warp'"):
        make(3, 4, engine="warp")


# ---- state


@variants
def test_state_dict_goes_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = twins(name, **options)
    fresh = getattr(rnnkernels, name)(I, H, **options)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_outputs(fresh.eval(), theirs.eval())
    theirs.load_state_dict(rnnkernels_state := getattr(rnnkernels, name)(I, H, **options).state_dict(), strict=True)
    assert list(rnnkernels_state) == list(ours.state_dict())


@modules
def test_load_with_assign(name: str) -> None:
    ours = getattr(rnnkernels, name)(I, H, device="meta")
    theirs = getattr(nn, name)(I, H)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert_same_outputs(ours, theirs)


@modules
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(name: str, how: str) -> None:
    ours, theirs = twins(name)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    elif how == "deepcopy":
        copied = copy.deepcopy(ours)
    else:
        torch.save(ours, buffer := io.BytesIO())
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert_same_outputs(copied, theirs)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_same_outputs(copied, theirs)


@layers
def test_state_of_a_torch_module_unpickles_into_ours(name: str) -> None:
    ours, theirs = twins(name)
    bare = type(ours).__new__(type(ours))
    bare.__setstate__(theirs.__getstate__())
    assert bare.engine == "auto"
    assert_same_outputs(bare, theirs)
    # Nothing may hold on to weights that have been replaced.
    assert "_flat_weights" not in vars(bare)


@layers
def test_pickles_older_than_proj_size_and_names(name: str) -> None:
    ours, theirs = twins(name, num_layers=2, bidirectional=True)
    state = ours.__getstate__()
    state["all_weights"] = [list(group) for group in ours.all_weights]
    for key in ("proj_size", "_all_weights", "_flat_weights_names", "engine"):
        del state[key]
    bare = type(ours).__new__(type(ours))
    bare.__setstate__(state)
    assert (bare.proj_size, bare.engine, bare._all_weights) == (0, "auto", ours._all_weights)
    assert_same_outputs(bare, theirs)


# ---- weights are read anew


def assign_parameter(module: Any, name: str) -> Any:
    setattr(module, name, nn.Parameter(getattr(module, name).detach() * 2))
    return module


def write_data(module: Any, name: str) -> Any:
    getattr(module, name).data.mul_(2)
    return module


def weight_drop(module: Any, name: str) -> Any:
    weight = getattr(module, name)
    delattr(module, name)
    setattr(module, name, weight.detach() * 3)
    return module


def old_weight_norm(module: Any, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module, name)
    with torch.no_grad():
        getattr(module, f"{name}_g").mul_(2)
    return module


def old_spectral_norm(module: Any, name: str) -> Any:
    torch.manual_seed(4)
    return nn.utils.spectral_norm(module, name)


def weight_norm(module: Any, name: str) -> Any:
    parametrizations.weight_norm(module, name)
    with torch.no_grad():
        getattr(module.parametrizations, name).original0.mul_(2)
    return module


def spectral_norm(module: Any, name: str) -> Any:
    torch.manual_seed(4)
    return parametrizations.spectral_norm(module, name)


def tie(module: Any, name: str) -> Any:
    other = copy.deepcopy(module)
    setattr(module, name, getattr(other, name))
    with torch.no_grad():
        getattr(other, name).mul_(2)
    return module


def to_empty(module: Any, name: str) -> Any:
    state = {key: value * 2 for key, value in module.state_dict().items()}
    module.to("meta").to_empty(device="cpu").load_state_dict(state)
    return module


def share_memory(module: Any, name: str) -> Any:
    return module.share_memory()


def to_double(module: Any, name: str) -> Any:
    return module.double()


def replicate(module: Any, name: str) -> Any:
    replica = module._replicate_for_data_parallel()
    for key, parameter in module._parameters.items():
        setattr(replica, key, None if parameter is None else parameter * 2)
    return replica


CHANGES = [
    assign_parameter,
    write_data,
    weight_drop,
    old_weight_norm,
    old_spectral_norm,
    weight_norm,
    spectral_norm,
    tie,
    to_empty,
    share_memory,
    to_double,
    replicate,
]


@modules
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_weight_is_the_one_used(name: str, change: Callable[[Any, str], Any]) -> None:
    # In double, so that a norm that makes the weight large does not magnify rounding past the tolerance.
    ours, theirs = (module.double().eval() for module in twins(name))
    ours(example(ours))
    weight = "weight_hh_l0" if name in LAYERS else "weight_hh"
    ours, theirs = change(ours, weight), change(theirs, weight)
    x = example(theirs) if change is not replicate else torch.randn((B, I) if name in CELLS else (T, B, I), dtype=torch.float64)
    assert_same_outputs(ours, theirs, x)


@modules
def test_functional_call(name: str) -> None:
    ours, theirs = twins(name)
    weights = {key: value.detach() * 2 for key, value in ours.named_parameters()}
    x = example(ours)
    a, b = (torch.func.functional_call(module, weights, (x,)) for module in (ours, theirs))
    for left, right in zip(flat(a), flat(b), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert_same_outputs(ours, theirs)


def test_dropout_may_change_later() -> None:
    ours, theirs = twins("GRU", num_layers=2)
    ours.dropout = theirs.dropout = 0.5
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(module(example(module))[0])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


# ---- errors of forward


def states(name: str, *shape: int, **options: Any) -> Any:
    zeros = torch.zeros(shape, **options)
    return (zeros, zeros) if name.startswith("LSTM") else zeros


PACKED = [torch.zeros(3, I), torch.zeros(2, I)]
DOUBLE: dict[str, Any] = {"dtype": torch.float64}
META: dict[str, Any] = {"device": "meta"}

# What each case passes to forward, given the class's name.
BAD_LAYER_INPUTS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "no steps": lambda name: (torch.zeros(0, B, I),),
    "no steps, unbatched": lambda name: (torch.zeros(0, I),),
    "no steps, no rows": lambda name: (torch.zeros(0, 0, I),),
    "1-D input": lambda name: (torch.zeros(I),),
    "4-D input": lambda name: (torch.zeros(1, T, B, I),),
    "a list": lambda name: ([1.0],),
    "wide input": lambda name: (torch.zeros(T, B, I + 1),),
    "float64 input": lambda name: (torch.zeros(T, B, I, **DOUBLE),),
    "int64 input": lambda name: (torch.zeros(T, B, I, dtype=torch.int64),),
    "meta input": lambda name: (torch.zeros(T, B, I, **META),),
    "meta input, hx on the CPU": lambda name: (torch.zeros(T, B, I, **META), states(name, 1, B, H)),
    "meta hx": lambda name: (torch.zeros(T, B, I), states(name, 1, B, H, **META)),
    "meta float64 hx": lambda name: (torch.zeros(T, B, I), states(name, 1, B, H, **META, **DOUBLE)),
    "float64 hx": lambda name: (torch.zeros(T, B, I), states(name, 1, B, H, **DOUBLE)),
    "2-D hx": lambda name: (torch.zeros(T, B, I), states(name, B, H)),
    "3-D hx, unbatched input": lambda name: (torch.zeros(T, I), states(name, 1, 1, H)),
    "hx of other rows": lambda name: (torch.zeros(T, B, I), states(name, 1, B + 1, H)),
    "hx of other layers": lambda name: (torch.zeros(T, B, I), states(name, 2, B, H)),
    "wide hx": lambda name: (torch.zeros(T, B, I), states(name, 1, B, H + 1)),
    "wide hx, unbatched": lambda name: (torch.zeros(T, I), states(name, 1, H + 1)),
}
BAD_PACKED: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "float64 input": lambda name: (pack_sequence([x.double() for x in PACKED]),),
    "wide input": lambda name: (pack_sequence([torch.zeros(3, I + 1)]),),
    "float64 hx": lambda name: (pack_sequence(PACKED), states(name, 1, B, H, **DOUBLE)),
    "2-D hx": lambda name: (pack_sequence(PACKED), states(name, B, H)),
    "hx of other rows": lambda name: (pack_sequence(PACKED), states(name, 1, B + 1, H)),
    "hx of other layers": lambda name: (pack_sequence(PACKED), states(name, 2, B, H)),
    "wide hx": lambda name: (pack_sequence(PACKED), states(name, 1, B, H + 1)),
}
BAD_CELL_INPUTS: dict[str, Callable[[str], tuple[Any, ...]]] = {
    "0-D input": lambda name: (torch.zeros(()),),
    "3-D input": lambda name: (torch.zeros(1, B, I),),
    "3-D hx": lambda name: (torch.zeros(B, I), states(name, 1, B, H)),
    "1-D hx": lambda name: (torch.zeros(B, I), states(name, H)),
    "2-D hx, unbatched input": lambda name: (torch.zeros(I), states(name, 1, H)),
    "hx of other rows": lambda name: (torch.zeros(B, I), states(name, B + 1, H)),
    "hx of one row": lambda name: (torch.zeros(B, I), states(name, 1, H)),
    "wide hx": lambda name: (torch.zeros(B, I), states(name, B, H + 1)),
    "wide input": lambda name: (torch.zeros(B, I + 1),),
    "float64 input": lambda name: (torch.zeros(B, I, **DOUBLE),),
    "int64 input": lambda name: (torch.zeros(B, I, dtype=torch.int64),),
    "float64 hx": lambda name: (torch.zeros(B, I), states(name, B, H, **DOUBLE)),
}
BAD_PAIRS: dict[str, Callable[[int], Any]] = {
    "wide c": lambda rank: (torch.zeros((1, B, H)[-rank:]), torch.zeros((1, B, H + 1)[-rank:])),
    "c of other rows": lambda rank: (torch.zeros((1, B, H)[-rank:]), torch.zeros((1, B + 1, H)[-rank:])),
    "three states": lambda rank: (torch.zeros((1, B, H)[-rank:]),) * 3,
}


def same_outcome(name: str, args: tuple[Any, ...]) -> None:
    ours, theirs = twins(name)
    # oneDNN has texts of its own for LSTM; torch's general ones are the contract.
    with torch.backends.mkldnn.flags(enabled=False):
        assert outcome(lambda: ours(*args)) == outcome(lambda: theirs(*args))


@layers
@pytest.mark.parametrize("case", BAD_LAYER_INPUTS)
def test_layer_errors(name: str, case: str) -> None:
    same_outcome(name, BAD_LAYER_INPUTS[case](name))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
@pytest.mark.parametrize("case", BAD_PACKED)
def test_packed_errors(name: str, case: str) -> None:
    same_outcome(name, BAD_PACKED[case](name))


@pytest.mark.parametrize(
    ("case", "error", "text"),
    [
        ("float64 input", ValueError, "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). "),
        ("wide input", RuntimeError, "input.size(-1) must be equal to input_size. Expected 3, got 4"),
        ("2-D hx", RuntimeError, "Expected hidden[0] size (1, 2, 4), got [2, 4]"),
        ("hx of other rows", RuntimeError, "Expected hidden[0] size (1, 2, 4), got [1, 3, 4]"),
        ("wide hx", RuntimeError, "Expected hidden[0] size (1, 2, 4), got [1, 2, 5]"),
    ],
)
def test_packed_lstm_is_checked_as_a_padded_one(case: str, error: type[Exception], text: str) -> None:
    """torch.nn.LSTM checks nothing here: it dies inside a product, or reads past the end of the input."""
    with pytest.raises(error) as caught:
        rnnkernels.LSTM(I, H)(*BAD_PACKED[case]("LSTM"))
    assert str(caught.value).startswith(text)


@cells
@pytest.mark.parametrize("case", BAD_CELL_INPUTS)
def test_cell_errors(name: str, case: str) -> None:
    same_outcome(name, BAD_CELL_INPUTS[case](name))


@cells
@pytest.mark.parametrize("case", ["input", "hx"])
def test_cell_on_two_devices(name: str, case: str) -> None:
    """torch's own text here speaks of an operation inside the cell; ours is that of the layers."""
    device = {"device": "meta"}
    args = (torch.zeros(B, I, **device),) if case == "input" else (torch.zeros(B, I), states(name, B, H, **device))
    with pytest.raises(RuntimeError, match="tensors are not at the same device, found input tensor at "):
        getattr(rnnkernels, name)(I, H)(*args)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("case", BAD_PAIRS)
def test_errors_of_the_pair(name: str, case: str) -> None:
    x = torch.zeros(B, I) if name in CELLS else torch.zeros(T, B, I)
    same_outcome(name, (x, BAD_PAIRS[case](x.dim())))


def test_hx_of_lstm_is_a_pair() -> None:
    for module, x in ((rnnkernels.LSTM(I, H), torch.zeros(T, B, I)), (rnnkernels.LSTMCell(I, H), torch.zeros(B, I))):
        with pytest.raises(TypeError, match=r"argument 'hx' \(position 2\) must be tuple of Tensors, not Tensor"):
            module(x, torch.zeros(2, 1, B, H)[:, 0] if x.dim() == 2 else torch.zeros(2, 1, B, H))
        pair = [torch.zeros((1, B, H)[-x.dim() :])] * 2
        assert len(flat(module(x, pair))) == (2 if x.dim() == 2 else 3)


def test_hx_of_rnn_is_no_pair() -> None:
    same_outcome("RNN", (torch.zeros(T, B, I), (torch.zeros(1, B, H),)))
    same_outcome("GRU", (torch.zeros(T, B, I), (torch.zeros(1, B, H),)))


# ---- the inherited helpers


@layers
def test_helpers(name: str) -> None:
    ours, theirs = twins(name, num_layers=2, bidirectional=True)
    x, permutation = torch.zeros(T, B, I), torch.tensor([1, 0])
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None)
    hx = states(name, 4, B, H)
    ours.check_forward_args(x, hx, None)
    for a, b in zip(flat(ours.permute_hidden(hx, permutation)), flat(theirs.permute_hidden(hx, permutation)), strict=True):
        assert torch.equal(a, b)
    assert ours.permute_hidden(hx, None) is hx
    if name == "LSTM":
        assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None)


# ---- explain


@pytest.mark.parametrize("hx", [False, True], ids=["zeros", "hx"])
@layers
def test_explain_a_layer(name: str, hx: bool) -> None:
    layer = getattr(rnnkernels, name)(I, H, num_layers=2, bidirectional=True)
    explanation = rnnkernels.explain(layer, torch.zeros(T, B, I), states(name, 4, B, H) if hx else None)
    names = ["layer 0 forward", "layer 0 reverse", "layer 1 forward", "layer 1 reverse"]
    assert [plan.name for plan in explanation.plans] == names
    lines = str(explanation).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(start) and plan.engine in line for line, start, plan in zip(lines, names, explanation.plans, strict=True))


def test_explain_packed_and_cells() -> None:
    assert len(rnnkernels.explain(rnnkernels.LSTM(I, H, proj_size=2), pack_sequence(PACKED)).plans) == 1
    for name in CELLS:
        assert len(rnnkernels.explain(getattr(rnnkernels, name)(I, H), torch.zeros(I)).plans) == 1


def test_explain_says_which_engine_and_why() -> None:
    layer = rnnkernels.GRU(I, H, engine="stepwise")
    (plan,) = rnnkernels.explain(layer, torch.zeros(T, B, I)).plans
    assert (plan.engine, plan.why) == ("stepwise", "engine='stepwise' was asked for")
    (plan,) = rnnkernels.explain(rnnkernels.GRU(I, H), torch.zeros(T, B, I)).plans
    assert plan.engine == "cpu"


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(calls: list[Any]) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(ops.cpu, "_run_all", run)


@pytest.mark.usefixtures("no_kernels", "two_threads")
@pytest.mark.parametrize("gains", [True, False])
def test_explain_tells_what_runs_at_the_same_time(gains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops.cpu._C, "gains_apart", lambda *_: gains)
    monkeypatch.setattr(ops.cpu._C, "gains_chained", lambda *_: gains)
    ops.cpu.forget()
    x = torch.zeros(T, B, I)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            plans = rnnkernels.explain(rnnkernels.LSTM(I, H, bidirectional=True), x).plans
            assert ["other direction" in plan.why for plan in plans] == [gains] * 2
            plans = rnnkernels.explain(rnnkernels.LSTM(I, H, num_layers=3), x).plans
            assert ["other layers" in plan.why for plan in plans] == [gains and not training] * 3
            plans = rnnkernels.explain(rnnkernels.LSTM(I, H, num_layers=2), x, lengths=torch.tensor([T, 1])).plans
            assert not any("other layers" in plan.why for plan in plans)
    packed = rnnkernels.explain(rnnkernels.GRU(I, H, bidirectional=True, recompute=True), pack_sequence(PACKED)).plans
    assert not any("other direction" in plan.why for plan in packed)


@pytest.mark.usefixtures("no_kernels")
def test_explain_asks_every_layer_and_draws_nothing() -> None:
    x = torch.zeros(T, B, I)
    names = ["layer 0 context forward", "layer 0 context reverse", "layer 0 hidden forward", "layer 0 hidden reverse"]
    scrn = rnnkernels.SCRN(I, H, 2, bidirectional=True)
    assert [plan.name for plan in rnnkernels.explain(scrn, x, return_states=True).plans] == names
    assert [plan.name for plan in rnnkernels.explain(rnnkernels.SCRNCell(I, H, 2), x[0]).plans] == ["step context", "step hidden"]
    for layer in (
        rnnkernels.ClockworkRNN(I, 8, periods=(1, 2)),
        rnnkernels.LSTM(I, H, zoneout=0.1, recurrent_dropout=0.2, layer_norm="gates"),
        rnnkernels.GRU(I, H, num_layers=2, dropout=0.5, batch_first=True, learn_initial=True),
        rnnkernels.LSTM(I, H, engine="traced"),
        rnnkernels.LSTM(I, H, engine="torch"),
    ):
        now = torch.get_rng_state()
        plans = rnnkernels.explain(layer, x, reset_mask=None).plans
        assert len(plans) == layer.num_layers
        assert torch.equal(torch.get_rng_state(), now)
        assert layer.engine in ("auto", plans[0].engine)


@pytest.mark.usefixtures("no_kernels")
def test_explain_knows_who_asks_for_gradients_and_which_weights() -> None:
    layer = rnnkernels.GRU(I, H, num_layers=2).requires_grad_(False)
    x = torch.zeros(T, B, I)
    frozen, asked = (rnnkernels.explain(layer, x.clone().requires_grad_(needs)).plans for needs in (False, True))
    assert all(a.schedule != b.schedule for a, b in zip(frozen, asked, strict=True))  # the workspace of backward
    with torch.no_grad():
        narrow, wide, lstm = rnnkernels.GRU(I, 64, weight_dtype=torch.int8), rnnkernels.GRU(I, 64), rnnkernels.LSTM(I, 64)
        assert rnnkernels.explain(narrow, x).plans[0].schedule != rnnkernels.explain(wide, x).plans[0].schedule
        before = rnnkernels.explain(lstm, x).plans[0].schedule
        with torch.autocast("cpu", torch.bfloat16):
            assert rnnkernels.explain(lstm, x).plans[0].schedule != before


def test_explain_of_nothing_to_run_of_given_gates_and_under_transforms() -> None:
    x, nothing = torch.zeros(T, B, I), torch.zeros(B, dtype=torch.long)
    assert rnnkernels.explain(rnnkernels.GRU(I, H, engine="stepwise"), x, lengths=nothing).plans == ()
    normed = rnnkernels.LSTM(I, H, num_layers=2, layer_norm="gates").requires_grad_(False)
    frozen = rnnkernels.explain(normed, x).plans[1].schedule
    normed.weight_ih_l0.requires_grad_()
    assert rnnkernels.explain(normed, x).plans[1].schedule != frozen  # backward's, through what the second layer is given
    explained = []
    layer = rnnkernels.GRU(I, H).requires_grad_(False)

    def run(x: Tensor) -> Tensor:
        explained.extend(rnnkernels.explain(layer, x).plans)
        return x

    torch.func.vmap(run)(torch.stack([x, x]))
    assert [plan.engine for plan in explained] == ["cpu"]
    with torch.autograd.forward_ad.dual_level():
        (plan,) = rnnkernels.explain(rnnkernels.PeepholeLSTM(I, H), x).plans
    assert (plan.engine, plan.why) == ("traced", "forward mode, for which this cell has no kernels")


def test_explain_refuses_what_is_not_ours() -> None:
    with pytest.raises(TypeError, match=r"explain takes a layer or cell of rnnkernels, got torch\.nn\.modules\.rnn\.LSTM"):
        rnnkernels.explain(nn.LSTM(I, H), torch.zeros(T, B, I))
    with pytest.raises(TypeError):
        rnnkernels.explain(nn.Linear(I, H), torch.zeros(T, B, I))


def test_explain_raises_what_forward_raises() -> None:
    layer: Any = rnnkernels.GRU(I, H)
    x = torch.zeros(T, B, I + 1)
    assert outcome(lambda: rnnkernels.explain(layer, x)) == outcome(lambda: layer(x))


def test_public_names() -> None:
    package: ModuleType = rnnkernels
    for name in (*LAYERS, *CELLS, "explain", "Explanation"):
        assert getattr(package, name).__doc__


@pytest.mark.parametrize("engine", ["auto", "torch"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16, "mixed"], ids=str)
@pytest.mark.parametrize("input", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_gives_the_dtypes_that_it_gives_of_torch(
    kind: str, weight: torch.dtype, input: torch.dtype, state: Any, training: bool, engine: str
) -> None:
    theirs, ours = (getattr(module, kind)(I, H, dtype=weight).train(training) for module in (nn, rnnkernels))
    ours.load_state_dict(theirs.state_dict())
    ours.engine = engine
    is_cell, is_lstm = kind.endswith("Cell"), kind.startswith("LSTM")
    x = torch.randn(*(() if is_cell else (T,)), B, I, dtype=input)
    h, c = (torch.randn(*(() if is_cell else (1,)), B, H) for _ in range(2))
    if state == "mixed":
        c = c.bfloat16()
    elif state is not None:
        h, c = h.to(state), c.to(state)
    hx = None if state is None else (h, c) if is_lstm else h
    for _ in range(3):  # the later ones may go the short way
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            found, wanted = ours(x, hx), theirs(x, hx)
            assert torch.is_autocast_enabled("cpu")
        for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        if not training:
            continue
        for layer, results in ((ours, found), (theirs, wanted)):
            layer.zero_grad()
            sum(t.float().sum() for t in tree_leaves(results)).backward()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0.05, atol=0.3)


@pytest.mark.parametrize("name", [*LAYERS, "PeepholeLSTM", "GRUResetBefore", "IndRNN", "ClockworkRNN"])
def test_help_shows_what_a_constructor_takes(name: str) -> None:
    kind = getattr(rnnkernels, name)
    parameters = inspect.signature(kind).parameters
    assert {"engine", "recompute", "zoneout", "weight_dtype"} <= set(parameters)
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    by_position = [p.default for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is not p.empty]
    made = [kind(3, 8), kind(3, 8, **defaults), kind(3, 8, *by_position)]
    assert len({repr(layer) for layer in made}) == 1
    if name in LAYERS:
        theirs = getattr(nn, name)(3, 8, *by_position)
        assert [key for key, _ in made[0].named_parameters()] == [key for key, _ in theirs.named_parameters()]
    own = type("Own", (kind,), {"__init__": lambda self, size: kind.__init__(self, size, size)})
    assert list(inspect.signature(own).parameters) == ["size"]
