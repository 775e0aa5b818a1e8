"""convert and accelerate, on real module trees."""

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkernels
from rnnkernels import accelerate, convert

MAKERS: dict[str, Any] = {
    "RNN": lambda m: m.RNN(3, 4, 2, "relu", bidirectional=True),
    "GRU": lambda m: m.GRU(3, 4, batch_first=True, dropout=0.1, num_layers=2),
    "LSTM": lambda m: m.LSTM(3, 4, bias=False, dtype=torch.float64),
    "LSTM projected": lambda m: m.LSTM(3, 4, proj_size=2, bidirectional=True),
    "RNNCell": lambda m: m.RNNCell(3, 4, nonlinearity="relu"),
    "GRUCell": lambda m: m.GRUCell(3, 4, bias=False),
    "LSTMCell": lambda m: m.LSTMCell(3, 4),
}


class Tagger(nn.Module):
    """Modules nested, in lists and dictionaries, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.layers = nn.ModuleList([nn.LSTM(6, 6), nn.Sequential(nn.GRU(6, 6))])
        self.named = nn.ModuleDict({"cell": nn.GRUCell(6, 6)})
        self.shared = self.layers[0]

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x, _ = self.layers[0](x)
        x, _ = self.layers[1](x)
        x, _ = self.shared(x)
        return self.named["cell"](x[-1])  # type: ignore[no-any-return]


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    found = module(x)
    flat, _ = torch.utils._pytree.tree_flatten(found)
    return flat


@pytest.mark.parametrize("name", MAKERS)
def test_there_and_back(name: str) -> None:
    torch.manual_seed(0)
    theirs = MAKERS[name](nn).eval()
    state = {key: value.clone() for key, value in theirs.state_dict().items()}
    x = torch.randn(5, 2, 3) if "Cell" not in name else torch.randn(2, 3)
    x = x.to(next(theirs.parameters()).dtype)
    expected, kind = outputs(theirs, x), type(theirs)
    ours = convert(theirs)
    assert type(ours) is getattr(rnnkernels, kind.__name__)
    assert repr(ours) == repr(theirs)
    for a, b in zip(outputs(ours, x), expected, strict=True):
        torch.testing.assert_close(a, b)
    again = convert(ours, to=nn)
    assert type(again) is kind
    assert again.state_dict().keys() == state.keys()
    for a, b in zip(outputs(again, x), expected, strict=True):
        assert torch.equal(a, b)
    assert all(p is q for p, q in zip(theirs.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    copy.deepcopy(ours), copy.deepcopy(again)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    assert torch.equal(outputs(torch.load(buffer, weights_only=False), x)[0], outputs(ours, x)[0])


def test_a_tree_is_converted_in_place_and_trains_as_before() -> None:
    torch.manual_seed(0)
    model, twin = Tagger(), None
    twin = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin))
    parameters = dict(model.named_parameters())
    assert convert(model) is model
    assert type(model.layers[0]) is rnnkernels.LSTM
    assert type(model.layers[1][0]) is rnnkernels.GRU
    assert type(model.named["cell"]) is rnnkernels.GRUCell
    assert model.shared is model.layers[0]
    assert all(p is parameters[key] for key, p in model.named_parameters())
    x = torch.randn(7, 3, 5)
    for _ in range(3):
        losses = []
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            loss = m(x).pow(2).mean()
            loss.backward()
            o.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)
    assert convert(model) is model, "nothing is left to convert"
    assert type(convert(model, to=nn).shared) is nn.LSTM


def test_random_numbers_are_not_drawn() -> None:
    torch.manual_seed(0)
    model = Tagger()
    before = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_handles_mode_and_attributes_stay() -> None:
    layer, calls = nn.GRU(3, 4), []
    handle = layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    layer.register_full_backward_hook(lambda module, a, b: calls.append("backward"))
    layer.register_load_state_dict_pre_hook(lambda module, *args: calls.append(("load", type(module))))
    layer.register_state_dict_post_hook(lambda module, *args: calls.append(("save", type(module))))
    layer.note = "mine"
    layer.weight_ih_l0.requires_grad_(False)
    layer.eval()
    ours: Any = convert(nn.Sequential(layer))[0]
    del layer
    gc.collect()
    output, _ = ours(torch.randn(2, 1, 3, requires_grad=True))
    output.sum().backward()
    ours.load_state_dict(ours.state_dict())
    assert calls == [rnnkernels.GRU, "backward", ("save", rnnkernels.GRU), ("load", rnnkernels.GRU)]
    handle.remove()
    calls.clear()
    ours(torch.randn(2, 1, 3))
    assert not calls
    assert ours.note == "mine"
    assert not ours.training
    assert not ours.weight_ih_l0.requires_grad


@pytest.mark.parametrize("how", ["weight_norm", "old weight_norm", "spectral_norm", "old spectral_norm", "prune", "tied"])
def test_weights_that_are_made_anew_stay_so(how: str) -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4)
    if how == "weight_norm":
        parametrizations.weight_norm(layer, "weight_hh_l0")
    elif how == "old weight_norm":
        nn.utils.weight_norm(layer, "weight_hh_l0")
    elif how == "spectral_norm":
        parametrizations.spectral_norm(layer, "weight_hh_l0")
    elif how == "old spectral_norm":
        nn.utils.spectral_norm(layer, "weight_hh_l0")
    elif how == "prune":
        prune.l1_unstructured(layer, "weight_hh_l0", amount=0.5)  # type: ignore[no-untyped-call]
    else:
        layer.weight_hh_l0 = layer.weight_hh_l0
    layer.eval()
    x = torch.randn(5, 2, 3)
    expected, names = outputs(layer, x)[0], [name for name, _ in layer.named_parameters()]
    ours = convert(layer)
    assert isinstance(ours, rnnkernels.LSTM)
    assert [name for name, _ in ours.named_parameters()] == names
    torch.testing.assert_close(outputs(ours, x)[0], expected)
    outputs(ours, x)[0].sum().backward()
    assert all(p.grad is not None for p in ours.parameters())
    if parametrize.is_parametrized(ours):
        copy.deepcopy(ours)
    torch.testing.assert_close(outputs(convert(ours, to=nn), x)[0], expected)
    if how == "weight_norm":
        parametrize.remove_parametrizations(ours, "weight_hh_l0")
        assert type(ours) is rnnkernels.LSTM


class Bidirectional(nn.LSTM):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x.flip(0))


def test_what_cannot_be_converted_is_refused_and_nothing_changes() -> None:
    model = nn.ModuleDict({"a": nn.GRU(3, 4), "b": Bidirectional(3, 4)})
    with pytest.raises(TypeError, match=r"b: .*Bidirectional left alone: it is a subclass of torch.nn.LSTM"):
        convert(model)
    assert type(model["a"]) is nn.GRU
    convert(model, strict=False)
    assert (type(model["a"]), type(model["b"])) == (rnnkernels.GRU, Bidirectional)
    patched = nn.GRU(3, 4)
    patched.forward = lambda *args: None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError, match="its forward was replaced"):
        convert(patched)
    with pytest.raises(TypeError, match="its parameters are torch.complex64"):
        convert(nn.GRU(3, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="to: expected rnnkernels or torch.nn"):
        convert(model, to=torch)
    with pytest.raises(ValueError, match="to: expected rnnkernels or torch.nn, got 'torch.nn'"):
        convert(model, to="torch.nn")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="it is none of torch.nn's layers"):
        convert(nn.RNNBase("GRU", 3, 4))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: rnnkernels.LSTM(3, 4, zoneout=0.1), "torch.nn has no zoneout"),
        (lambda: rnnkernels.GRU(3, 4, layer_norm="gates"), "torch.nn has no layer_norm"),
        (lambda: rnnkernels.RNN(3, 4, nonlinearity="sigmoid"), "torch.nn has no nonlinearity 'sigmoid'"),
        (lambda: rnnkernels.RNNCell(3, 4, nonlinearity="identity"), "torch.nn has no nonlinearity 'identity'"),
        (lambda: rnnkernels.GRU(3, 4, learn_initial=True), "torch.nn has no learn_initial"),
        (lambda: rnnkernels.PeepholeLSTM(3, 4), "PeepholeLSTM left alone: torch.nn has no such layer"),
        (lambda: rnnkernels.SCRN(3, 4, 2), "0: rnnkernels.*SCRN left alone: torch.nn has no such layer"),
        (lambda: rnnkernels.SCRNCell(3, 4, 2), "SCRNCell left alone: torch.nn has no such layer"),
    ],
)
def test_what_torch_lacks_is_refused_on_the_way_back(layer: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        convert(nn.Sequential(layer()), to=nn)


def test_meta_and_later_material() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.LSTM(3, 4))
    ours: Any = convert(model).to_empty(device="cpu")
    ours[0].reset_parameters()
    assert ours(torch.zeros(2, 1, 3))[0].shape == (2, 1, 4)


def test_accelerate_reports() -> None:
    model = nn.ModuleDict({"a": Tagger(), "b": Bidirectional(3, 4), "unused": nn.GRU(2, 2)})
    report = accelerate(model)
    assert report.model is model
    text = str(report)
    assert "a.layers.0: torch.nn.LSTM -> rnnkernels.LSTM, on 100 steps of 16 rows\n    layer 0 forward: cpu engine" in text
    assert "a.shared: torch.nn.LSTM -> rnnkernels.LSTM" in text
    assert "b: test_conversion.Bidirectional left alone: it is a subclass of torch.nn.LSTM" in text
    seen = accelerate(nn.Sequential(nn.GRU(3, 4)), torch.zeros(6, 2, 3))
    assert str(seen).startswith("0: torch.nn.GRU -> rnnkernels.GRU, on torch.float32 (6, 2, 3)\n    layer 0 forward: cpu engine")
    alone = accelerate(nn.LSTM(3, 4))
    assert type(alone.model) is rnnkernels.LSTM
    assert str(alone).startswith("(the model): torch.nn.LSTM -> rnnkernels.LSTM")
    assert str(accelerate(nn.Linear(2, 2))) == "no recurrent module of torch.nn in it"


def test_accelerate_changes_nothing_where_the_model_fails() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.GRU(3, 4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        accelerate(model, torch.zeros(5, 2, 9))
    assert type(model[1]) is nn.GRU
    assert not model[1]._forward_pre_hooks
    accelerate(nn.Sequential(nn.Dropout(), model), torch.zeros(5, 2, 2))
    assert type(model[1]) is rnnkernels.GRU
    assert torch.equal(torch.get_rng_state(), before)
