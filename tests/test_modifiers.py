"""Modifiers of layers, against the reference run with the masks that were drawn, or against equations."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnkernels
from rnnkernels import functional, ops, reference
from rnnkernels.modules.layer import LayerBase

LAYERS: dict[str, Any] = {
    "lstm": (rnnkernels.LSTM, {}),
    "lstm_projected": (rnnkernels.LSTM, {"proj_size": 3}),
    "gru": (rnnkernels.GRU, {}),
    "srn_tanh": (rnnkernels.RNN, {}),
    "lstm_peephole": (rnnkernels.PeepholeLSTM, {}),
    "gru_reset_before": (rnnkernels.GRUResetBefore, {}),
}
MODIFIERS = {
    "zoneout": {"zoneout": 0.3},
    "dropout": {"recurrent_dropout": 0.4},
}
T, B, I, H = 6, 4, 3, 5  # noqa: E741


def make(name: str, modifiers: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    layer_class, own = LAYERS[name]
    return layer_class(I, H, dtype=torch.float64, **own, **modifiers, **options)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each call of functional.stack was given."""
    calls: list[Any] = []
    stack = functional.stack

    def spy(*args: Any, given: Any = None, **options: Any) -> Any:
        calls.append(given)
        return stack(*args, given=given, **options)

    monkeypatch.setattr(functional, "stack", spy)
    monkeypatch.setattr(LayerBase, "_again", lambda *_: None)  # which would go around it
    return calls


def expected(layer: Any, cell: str, x: Tensor, given: Any) -> Tensor:
    for depth in range(layer.num_layers):
        outputs = []
        for d in range(2 if layer.bidirectional else 1):
            k = depth * (2 if layer.bidirectional else 1) + d
            weights = layer._weights()[k]
            more = {"given": given[k]} if given else {}
            outputs.append(reference.sequence(cell, x, None, *weights, reverse=bool(d), **more)[0])
        x = torch.cat(outputs, -1)
    return x


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("modifier", MODIFIERS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_reference_with_its_masks(name: str, modifier: str, training: bool, drawn: list[Any]) -> None:
    if (name, modifier) == ("lstm_projected", "dropout"):
        with pytest.raises(ValueError, match="recurrent_dropout: expected 0 for a layer with a projection, got 0.4"):
            make(name, MODIFIERS[modifier])
        return
    layer = make(name, MODIFIERS[modifier], num_layers=2, bidirectional=True).train(training)
    x = torch.randn(T, B, I, dtype=torch.float64)
    output, _ = layer(x)
    cell = name if modifier == "dropout" and not training else f"{name}_{modifier}"
    truth = expected(layer, cell, x, drawn[0])
    torch.testing.assert_close(output, truth)
    leaves = list(layer.parameters())
    cotangent = torch.randn_like(output)
    for ours, theirs in zip(torch.autograd.grad(output, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_masks_are_zeros_and_ones_of_the_right_number_drawn_anew_and_by_the_seed(drawn: list[Any]) -> None:
    layer = rnnkernels.LSTM(I, 64, zoneout=(0.2, 0.7), recurrent_dropout=0.25)
    x = torch.randn(50, 16, I)
    torch.manual_seed(1)
    first, _ = layer(x)
    second, _ = layer(x)
    torch.manual_seed(1)
    third, _ = layer(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, third)
    zone_h, zone_c, dropout = drawn[0][0]
    assert zone_h.shape == zone_c.shape == (50, 16, 64)
    assert dropout.shape == (16, 64)
    assert set(zone_h.unique().tolist()) == set(zone_c.unique().tolist()) == {0.0, 1.0}
    assert zone_h.mean().item() == pytest.approx(0.2, abs=0.01)
    assert zone_c.mean().item() == pytest.approx(0.7, abs=0.01)
    torch.testing.assert_close(dropout.unique(), torch.tensor([0, 1 / 0.75]))
    assert (dropout == 0).double().mean().item() == pytest.approx(0.25, abs=0.05)


def test_zoneout_of_one_keeps_the_state_and_of_zero_is_the_plain_layer() -> None:
    layer = rnnkernels.GRU(I, H, zoneout=1.0)
    x, h = torch.randn(T, B, I), torch.randn(1, B, H)
    for module in (layer, copy.deepcopy(layer).eval()):
        assert torch.equal(module(x, h)[0], h.expand(T, B, H))
    plain = rnnkernels.GRU(I, H, zoneout=0.0, recurrent_dropout=0.0)
    assert plain._cell == "gru"


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_in_eval_a_stream_is_the_layer(name: str) -> None:
    layer = make(name, {"zoneout": 0.3, "recurrent_dropout": 0.5}, num_layers=2).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    stream = layer.stream(B)
    assert torch.equal(torch.stack([stream.step(x[t]) for t in range(T)]), layer(x)[0])


def test_rows_keep_their_mask_where_a_batch_is_cut(drawn: list[Any]) -> None:
    x, reset = torch.randn(T, B, I, dtype=torch.float64), torch.zeros(T, B, dtype=torch.bool)
    reset[2, 1] = reset[3, 0] = True
    outputs = []
    for engine in ("cpu", "stepwise"):  # by the kernels themselves, and in segments
        layer = make("lstm", {"recurrent_dropout": 0.5, "zoneout": 0.3}, engine=engine)
        torch.manual_seed(1)
        outputs.append(layer(x, reset_mask=reset, lengths=torch.tensor([6, 5, 0, 3]))[0])
        assert drawn[0][0][-1].shape == (B, H)
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layer = rnnkernels.LSTM(I, H, zoneout=0.3, recurrent_dropout=0.2, dtype=dtype)
    output, _ = layer(torch.randn(T, B, I, dtype=dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_unbatched_packed_and_empty() -> None:
    layer = rnnkernels.LSTM(I, H, zoneout=0.3, recurrent_dropout=0.2)
    assert layer(torch.randn(T, I))[0].shape == (T, H)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (5, 2, 1)])
    assert layer(packed)[0].data.shape == (8, H)
    assert layer(torch.randn(T, 0, I))[0].shape == (T, 0, H)


def test_compiles_and_checkpoints() -> None:
    torch._dynamo.reset()
    layer = rnnkernels.LSTM(I, H, zoneout=0.3, recurrent_dropout=0.2)
    x = torch.randn(T, B, I, requires_grad=True)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0].sum().backward()
    torch.manual_seed(5)
    plain = torch.autograd.grad(layer(x)[0].sum(), x)[0]
    torch.manual_seed(5)
    output = torch.utils.checkpoint.checkpoint(lambda t: layer(t)[0], x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x)[0], plain)


def test_combinations_are_compiled_when_first_asked_for() -> None:
    layer = rnnkernels.IndRNN(I, H, zoneout=0.2, dtype=torch.float64)
    assert layer._cell == "indrnn_relu_zoneout"
    x = torch.randn(T, B, I, dtype=torch.float64)
    states = [torch.zeros(B, H, dtype=torch.float64).requires_grad_()]

    def run(x: Tensor, h: Tensor) -> Any:
        return ops.sequence(layer._cell, x, [h], *layer._weights()[0], given=[torch.full((H,), 0.2, dtype=torch.float64)])

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *states))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"zoneout": 1.5}, r"zoneout: expected a number from 0 to 1, or one for each state \(h, c\), got 1.5"),
        ({"zoneout": (0.1, 0.2, 0.3)}, "zoneout: expected a number from 0 to 1"),
        ({"zoneout": -0.1}, "zoneout"),
        ({"recurrent_dropout": 1.0}, "recurrent_dropout: expected a number from 0 to below 1, got 1.0"),
    ],
    ids=["above one", "too many", "negative", "dropout of one"],
)
def test_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        rnnkernels.LSTM(I, H, **options)


def test_a_mask_takes_no_gradient() -> None:
    layer = rnnkernels.GRU(I, H)
    mask = torch.rand(H, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"given\[0\]: expected a mask that requires no gradient"):
        ops.sequence("gru_zoneout", torch.randn(T, B, I), None, *layer._weights()[0], given=[mask])
    with pytest.raises(RuntimeError, match=r"given: expected numbers for 1 slots \(zoneout_0\) for cell 'gru_zoneout', got them for 0"):
        ops.sequence("gru_zoneout", torch.randn(T, B, I), None, *layer._weights()[0])
    with pytest.raises(RuntimeError, match=r"given\[0\]: expected shape \(6, 4, 5\), \(4, 5\) or \(5,\), got \(3, 5\)"):
        ops.sequence("gru_zoneout", torch.randn(T, B, I), None, *layer._weights()[0], given=[torch.rand(3, H)])
    with pytest.raises(RuntimeError, match="given: expected nothing for cell 'gru', got them for 1"):
        ops.sequence("gru", torch.randn(T, B, I), None, *layer._weights()[0], given=[torch.rand(H)])


NORMS = {
    "lstm gates": (rnnkernels.LSTM, {"layer_norm": "gates"}),
    "lstm gate": (rnnkernels.LSTM, {"layer_norm": "gate"}),
    "lstm cell": (rnnkernels.LSTM, {"cell_norm": True}),
    "lstm gates cell": (rnnkernels.LSTM, {"layer_norm": "gates", "cell_norm": True}),
    "gru gates": (rnnkernels.GRU, {"layer_norm": "gates"}),
    "gru gate": (rnnkernels.GRU, {"layer_norm": "gate"}),
    "srn": (rnnkernels.RNN, {"layer_norm": "gates"}),
    "peephole": (rnnkernels.PeepholeLSTM, {"layer_norm": "gates"}),
    "dreamer": (rnnkernels.DreamerGRU, {}),
}


def normalised(v: Tensor, gain: Tensor, shift: Tensor | None, gates: int, by_gate: bool, eps: float = 1e-5) -> Tensor:
    blocks = v.unflatten(-1, (gates, -1)) if by_gate else v
    result = torch.nn.functional.layer_norm(blocks, blocks.shape[-1:], eps=eps).reshape(v.shape) * gain
    return result if shift is None else result + shift


def by_equations(layer: Any, name: str, x: Tensor) -> Tensor:
    """One layer, one direction, step by step, as Ba 2016, or for Dreamer Hafner 2020, has it."""
    p = {key.removesuffix("_l0"): value for key, value in layer.named_parameters()}
    v = list(p["weight_v"].split(H))
    h = c = x.new_zeros(x.size(1), H)
    by_gate, gates = layer.layer_norm == "gate", p["weight_ih"].size(0) // H
    outputs = []
    for x_t in x:
        if name == "dreamer":
            z = x_t @ p["weight_ih"].t() + p["bias_ih"] + h @ p["weight_hh"].t() + p["bias_hh"]
            r, n, u = normalised(z, torch.cat(v[:3]), torch.cat(v[3:]), 3, by_gate=False, eps=1e-3).chunk(3, -1)
            u = (u - 1).sigmoid()
            h = u * (r.sigmoid() * n).tanh() + (1 - u) * h
            outputs.append(h)
            continue
        if layer.layer_norm:
            a = normalised(x_t @ p["weight_ih"].t(), p["norm_ih"], p["bias_ih"], gates, by_gate)
            m = normalised(h @ p["weight_hh"].t(), torch.cat(v[:gates]), None, gates, by_gate)
            own = v[gates:]
        else:
            a, m, own = x_t @ p["weight_ih"].t() + p["bias_ih"], h @ p["weight_hh"].t() + p["bias_hh"], v
        if isinstance(layer, rnnkernels.GRU):
            (x_r, x_z, x_n), (m_r, m_z, m_n) = a.chunk(3, -1), m.chunk(3, -1)
            z = (x_z + m_z).sigmoid()
            h = z * h + (1 - z) * (x_n + (x_r + m_r).sigmoid() * (m_n + own[0])).tanh()
        elif isinstance(layer, rnnkernels.RNN):
            h = (a + m).tanh()
        else:
            i, f, g, o = (a + m).chunk(4, -1)
            if name == "peephole":
                i, f = i + own[0] * c, f + own[1] * c
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            if name == "peephole":
                o = o + own[2] * c
            out = torch.nn.functional.layer_norm(c, (H,), own[0], own[1]) if layer.cell_norm else c
            h = o.sigmoid() * out.tanh()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("engine", ["cpu", "stepwise"])
@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_is_its_equations(name: str, engine: str) -> None:
    torch.manual_seed(2)
    layer_class, options = NORMS[name]
    layer = layer_class(I, H, dtype=torch.float64, engine=engine, **options)
    for key, parameter in layer.named_parameters():
        if key.startswith(("weight_v", "norm")):
            torch.nn.init.normal_(parameter, 1 if key.startswith("norm") else 0.3, 0.3)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    output, _ = layer(x)
    truth = by_equations(layer, name, x)
    torch.testing.assert_close(output, truth)
    leaves, cotangent = [x, *layer.parameters()], torch.randn_like(output)
    for ours, theirs in zip(torch.autograd.grad(output, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(layer.eval()(x)[0], output)


@pytest.mark.parametrize("name", NORMS)
def test_layer_norm_in_the_grammar_of_layers(name: str) -> None:
    torch._dynamo.reset()
    layer_class, options = NORMS[name]
    options = {**options, "dtype": torch.float64}
    layer = layer_class(I, H, num_layers=2, bidirectional=True, batch_first=True, **options)
    gains = {key: value for key, value in layer.named_parameters() if key.startswith("norm")}
    assert all(value.eq(1).all() for value in gains.values())
    x = torch.randn(B, T, I, dtype=torch.float64)
    output, hx = layer(x)
    assert output.shape == (B, T, 2 * H)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x, hx)[0], layer(x, hx)[0])
    lengths = torch.tensor([6, 2, 5, 1])
    ragged, _ = layer(x, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(ragged[row, :length], layer(x[row : row + 1, :length])[0][0])
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0], output)
    stream = layer_class(I, H, num_layers=2, **options)
    running = stream.stream(B)
    steps = torch.stack([running.step(x[:, t]) for t in range(T)])
    torch.testing.assert_close(steps, stream(x.transpose(0, 1))[0])
    assert rnnkernels.explain(layer, x).plans[0].engine == "cpu"


def test_all_modifiers_at_once() -> None:
    layer = rnnkernels.LSTM(I, H, layer_norm="gates", cell_norm=True, zoneout=(0.1, 0.2), recurrent_dropout=0.3, dtype=torch.float64)
    names = ("i", "f", "g", "o")
    x, weights = torch.randn(T, B, I, dtype=torch.float64), layer._weights()[0]
    spec = ops.CELLS[layer._cell]
    given = [
        torch.rand(B if spec.slots[slot][0] == "dropout" else T, *([] if spec.slots[slot][0] == "dropout" else [B]), H).double()
        for slot in spec.given
    ]
    assert tuple(spec.slots[slot][0] for slot in spec.given[:4]) == names
    leaves = [given[0].requires_grad_(), weights[1], weights[5]]

    def run(gate: Tensor, u: Tensor, v: Tensor) -> Any:
        return ops.sequence(layer._cell, x, None, None, u, None, None, None, v, given=[gate, *given[1:]])

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("make_layer", "text"),
    [
        (lambda: rnnkernels.LSTM(I, H, layer_norm="rows"), r"layer_norm: expected None, 'gates' \(all at once\) or 'gate'"),
        (lambda: rnnkernels.IndRNN(I, H, layer_norm="gates"), "layer_norm: expected None for a layer with no recurrent matrix"),
    ],
    ids=["unknown", "no matrix"],
)
def test_a_norm_is_refused(make_layer: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_layer()


def test_corners_that_a_reader_found() -> None:
    x = torch.randn(T, B, I)
    assert rnnkernels.LSTM(I, H, layer_norm="gates", forget_bias=1.0).bias_ih_l0[H : 2 * H].eq(1).all()
    assert rnnkernels.LSTM(I, H, bias=False, recurrent_init="orthogonal")(x)[0].shape == (T, B, H)
    assert rnnkernels.LSTM(I, H, layer_norm="gate")(x[:, :0])[0].shape == (T, 0, H)
    assert rnnkernels.GRU(I, H, bias=False, layer_norm="gates").weight_v_l0[-H:].eq(0).all()
    with torch.autocast("cpu", torch.bfloat16):
        layer = rnnkernels.GRU(I, H, recurrent_dropout=0.2)
        assert layer(x)[0].dtype == layer.eval()(x)[0].dtype == torch.float32
        stream = rnnkernels.LSTM(I, H, layer_norm="gates").stream(B)
        assert stream.step(x[0]).dtype == torch.float32
    assert rnnkernels.LSTM(I, H, 1, True, False, 0.0, False, 2, proj_clip=1)(x)[0].shape == (T, B, 2)


def test_a_norm_recomputes_stepwise_and_twice() -> None:
    layer = rnnkernels.LSTM(I, H, layer_norm="gates", engine="stepwise", recompute=True)
    output, _ = layer(torch.randn(T, B, I))
    first = torch.autograd.grad(output.sum(), list(layer.parameters()), retain_graph=True)
    second = torch.autograd.grad(output.sum(), list(layer.parameters()))
    assert all(map(torch.equal, first, second))


BOUNDED: dict[str, Any] = {
    "lstm cell": (rnnkernels.LSTM, {"cell_clip": 0.2}),
    "lstm gradient": (rnnkernels.LSTM, {"grad_clip": 0.3}),
    "lstm projection": (rnnkernels.LSTM, {"proj_size": 3, "proj_clip": 0.1}),
    "lstm candidate": (rnnkernels.LSTM, {"candidate_dropout": 0.4}),
    "lstm norm projection": (rnnkernels.LSTM, {"layer_norm": "gates", "proj_size": 3}),
    "lstm all": (
        rnnkernels.LSTM,
        {"candidate_dropout": 0.4, "layer_norm": "gate", "cell_norm": True, "proj_size": 3, "proj_clip": 0.1, "grad_clip": 0.2},
    ),
    "peephole projection": (rnnkernels.PeepholeLSTM, {"proj_size": 3}),
    "peephole all": (
        rnnkernels.PeepholeLSTM,
        {"candidate_dropout": 0.4, "cell_clip": 0.2, "proj_size": 3, "proj_clip": 0.1, "grad_clip": 0.2},
    ),
    "coupled": (rnnkernels.CoupledLSTM, {"cell_clip": 0.2, "proj_size": 3}),
    "no forget": (rnnkernels.NoForgetLSTM, {"candidate_dropout": 0.4, "cell_clip": 0.2, "proj_size": 3}),
    "gru candidate": (rnnkernels.GRU, {"candidate_dropout": 0.4}),
    "gru before": (rnnkernels.GRUResetBefore, {"candidate_dropout": 0.4, "grad_clip": 0.2}),
    "dreamer": (rnnkernels.DreamerGRU, {"candidate_dropout": 0.4, "grad_clip": 0.2}),
    "rnn gradient": (rnnkernels.RNN, {"grad_clip": 0.2}),
}


def make_bounded(name: str, **options: Any) -> Any:
    torch.manual_seed(4)
    layer_class, own = BOUNDED[name]
    return layer_class(I, H, dtype=torch.float64, **own, **options)


def within(t: Tensor, v: float | None) -> Tensor:
    return t if v is None else t.clamp(-v, v)


def bounded_by_equations(layer: Any, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """One layer, one direction, step by step; see cells.md's equations and their modifiers."""
    p = {key.removesuffix("_l0"): value for key, value in layer.named_parameters()}
    P, v = layer.proj_size or H, list(p["weight_v"].split(H)) if "weight_v" in p else []
    gates = p["weight_ih"].size(0) // H
    w, u, b, d = (p.get(key) for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    h, c, outputs = x.new_zeros(x.size(1), P), x.new_zeros(x.size(1), H), []
    for t, x_t in enumerate(x):
        m = 1 if mask is None else mask[t]
        if layer.layer_norm:
            by_gate = layer.layer_norm == "gate"
            a = normalised(x_t @ w.t(), p["norm_ih"], b, gates, by_gate)
            a = a + normalised(h @ u.t(), torch.cat(v[:gates]), None, gates, by_gate)
        else:
            a = x_t @ w.t() + b + (0 if name.startswith("gru") else h @ u.t() + d)
        if name == "rnn gradient":
            h = a.tanh()
        elif name == "dreamer":
            r, n, z = normalised(a, torch.cat(v[:3]), torch.cat(v[3:]), 3, by_gate=False, eps=1e-3).chunk(3, -1)
            z = (z - 1).sigmoid()
            h = z * m * (r.sigmoid() * n).tanh() + (1 - z) * h
        elif name.startswith("gru"):
            (x_r, x_z, x_n), (u_r, u_z, u_n), (d_r, d_z, d_n) = a.chunk(3, -1), u.chunk(3), d.chunk(3)
            r, z = (x_r + h @ u_r.t() + d_r).sigmoid(), (x_z + h @ u_z.t() + d_z).sigmoid()
            reset = (r * h) @ u_n.t() + d_n if name == "gru before" else r * (h @ u_n.t() + d_n)
            h = z * h + (1 - z) * m * (x_n + reset).tanh()
        else:
            i, *f, g, o = a.chunk(gates, -1)
            if name.startswith("peephole"):
                i, f = i + v[0] * c, [f[0] + v[1] * c]
            i, g = i.sigmoid(), m * g.tanh()
            keeps = f[0].sigmoid() if f else 1 - i if name == "coupled" else 1
            c = within(keeps * c + i * g, layer.cell_clip)
            o = o + v[2] * c if name.startswith("peephole") else o
            h = o.sigmoid() * (torch.nn.functional.layer_norm(c, (H,), v[-2], v[-1]) if layer.cell_norm else c).tanh()
            if layer.proj_size:
                h = within(h @ p["weight_hr"].t(), layer.proj_clip)
        if layer.grad_clip is not None and h.requires_grad:
            h.register_hook(lambda grad: within(grad, layer.grad_clip))
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"engine": "stepwise"}], ids=["cpu", "recompute", "stepwise"])
@pytest.mark.parametrize("name", BOUNDED)
def test_what_bounds_and_drops_is_its_equations(name: str, options: dict[str, Any], drawn: list[Any]) -> None:
    layer = make_bounded(name, **options)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        output, _ = layer.train(training)(x)
        mask = drawn[-1][0][-1] if training and layer.candidate_dropout else None
        assert training or drawn[-1] is None
        truth = bounded_by_equations(layer, name, x, mask)
        torch.testing.assert_close(output, truth)
        leaves, cotangent = [x, *layer.parameters()], torch.randn_like(output)
        for ours, theirs in zip(torch.autograd.grad(output, leaves, cotangent), torch.autograd.grad(truth, leaves, cotangent), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["lstm cell", "lstm gradient", "lstm projection"])
def test_thresholds_are_reached_and_matter(name: str) -> None:
    layer, plain = make_bounded(name), make_bounded(name)
    for key in ("cell_clip", "grad_clip", "proj_clip"):
        setattr(plain, key, None)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I, dtype=torch.float64)
    ours, theirs = layer(x, return_states=True), plain(x, return_states=True)
    first, second = (torch.autograd.grad(output.sum(), module.weight_hh_l0)[0] for module, (output, *_) in ((layer, ours), (plain, theirs)))
    assert not torch.equal(first, second)
    if name == "lstm cell":
        c = ours[2][1]
        assert c.abs().max() == 0.2
        assert 0 < (c.abs() == 0.2).double().mean() < 1
        assert theirs[2][1].abs().max() > 0.2
    if name == "lstm projection":
        assert ours[0].abs().max() == 0.1
    if name == "lstm gradient":
        assert torch.equal(ours[0], theirs[0])  # forward is not touched


@pytest.mark.parametrize("name", ["lstm cell", "lstm projection", "lstm norm projection", "peephole all", "coupled"])
def test_what_bounds_in_the_grammar_of_layers(name: str) -> None:
    torch._dynamo.reset()
    layer = make_bounded(name, num_layers=2, bidirectional=True, batch_first=True).eval()
    P = layer.proj_size or H
    x = torch.randn(B, T, I, dtype=torch.float64)
    output, hx = layer(x)
    assert output.shape == (B, T, 2 * P)
    assert hx[0].shape == (4, B, P)
    other = copy.deepcopy(layer)
    other.reset_parameters()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x, hx)[0], layer(x, hx)[0])
    lengths = torch.tensor([6, 2, 5, 1])
    ragged, _ = layer(x, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(ragged[row, :length], layer(x[row : row + 1, :length])[0][0])
    compiled, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, output)
    leaves = list(layer.parameters())
    for ours, theirs in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(output.sum(), leaves), strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float())[0].dtype == torch.bfloat16
    assert rnnkernels.explain(layer, x.float()).plans[0].engine == "cpu"
    unbiased = make_bounded(name, bias=False)
    assert unbiased(x[0])[0].shape == (T, P)


@pytest.mark.parametrize("engine", ["cpu", "stepwise"])
@pytest.mark.parametrize("name", ["lstm cell", "lstm norm projection", "peephole all", "gru before"])
def test_a_stream_has_the_thresholds_and_notices_new_weights(name: str, engine: str) -> None:
    layer = make_bounded(name, num_layers=2, engine=engine).eval()
    x = torch.randn(T, B, I, dtype=torch.float64)
    stream = layer.stream(B)
    for _ in range(2):
        torch.testing.assert_close(torch.stack([stream.step(x[t]) for t in range(T)]), layer(x)[0])
        stream.reset()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bounds_of_other_dtypes(dtype: torch.dtype) -> None:
    layer = rnnkernels.PeepholeLSTM(I, H, dtype=dtype, **BOUNDED["peephole all"][1])
    output, (_, c) = layer(torch.randn(T, B, I, dtype=dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert c.abs().max() <= torch.tensor(0.2, dtype=dtype)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_threshold_is_no_parameter_and_can_be_changed() -> None:
    layer = rnnkernels.LSTM(I, H, cell_clip=0.1, grad_clip=0.5)
    assert [name for name, _ in layer.named_parameters()] == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    assert "cell_clip=0.1, grad_clip=0.5" in repr(layer)
    x = torch.randn(T, B, I)
    layer.cell_clip = layer.grad_clip = None
    plain = rnnkernels.LSTM(I, H)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x)[0], plain(x)[0])
    weight_v = torch.full((H,), 0.1, requires_grad=True)
    output, *_ = ops.sequence("lstm_cell_clip", x, None, *plain._weights()[0], weight_v=weight_v)
    assert torch.autograd.grad(output.sum(), weight_v)[0].eq(0).all()


@pytest.mark.parametrize(
    ("make_layer", "text"),
    [
        (lambda: rnnkernels.LSTM(I, H, cell_clip=0), "cell_clip: expected a number above 0, or None, got 0"),
        (lambda: rnnkernels.LSTM(I, H, grad_clip=-1.0), "grad_clip: expected a number above 0, or None, got -1.0"),
        (lambda: rnnkernels.LSTM(I, H, grad_clip=float("nan")), "grad_clip: expected a number above 0, or None, got nan"),
        (lambda: rnnkernels.GRU(I, H, cell_clip=1.0), "cell_clip: expected None for a layer without an LSTM's cell state, got 1.0"),
        (lambda: rnnkernels.LSTM(I, H, cell_norm=True, cell_clip=1.0), "cell_clip: expected None for a layer with cell_norm, got 1.0"),
        (lambda: rnnkernels.LSTM(I, H, proj_clip=1.0), "proj_clip: expected None for a layer without proj_size, got 1.0"),
        (lambda: rnnkernels.RNN(I, H, candidate_dropout=0.1), "candidate_dropout: expected 0 for a layer that is no LSTM or GRU, got 0.1"),
        (lambda: rnnkernels.LSTM(I, H, candidate_dropout=1.0), "candidate_dropout: expected a number from 0 to below 1, got 1.0"),
        (lambda: rnnkernels.GRU(I, H, 1, True, False, 0.0, False, 2), "proj_size argument is only supported for LSTM, not RNN or GRU"),
        (lambda: rnnkernels.IndRNN(I, H, proj_size=2), "proj_size argument is only supported for LSTM, not IndRNN"),
        (lambda: rnnkernels.CoupledLSTM(I, H, proj_size=H), "proj_size has to be smaller than hidden_size"),
    ],
    ids=["zero", "negative", "nan", "no cell", "cell norm", "no projection", "no candidate", "all dropped", "gru", "indrnn", "too wide"],
)
def test_a_bound_is_refused(make_layer: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_layer()
