"""Layers and steps of cells that torch.nn lacks: torch.nn's grammar around the reference's numbers."""

import copy
import io
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

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
    "DreamerGRU": ("DreamerGRU", "gru_dreamer", {}),
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
    torch._dynamo.reset()  # all layers share one forward, of which dynamo keeps a few compilations
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
    projects = name.endswith("LSTM")
    with pytest.raises(ValueError, match="proj_size has to be smaller" if projects else "proj_size argument is only supported"):
        make(name, SIZE, H, proj_size=H if projects else 2)
    with pytest.raises(ValueError, match="engine must be one of"):
        make(name, SIZE, H, engine="warp")


@pytest.mark.parametrize("kind", ["IndRNN", "IndRNNCell", "ResidualRNN", "ResidualRNNCell"])
def test_an_unknown_nonlinearity_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="Unknown nonlinearity 'swish'"):
        getattr(rnnkernels, kind)(SIZE, H, nonlinearity="swish")


def by_hand(cell: str, layer: Any, x: Tensor, states: list[Tensor], lengths: list[int], mask: Tensor, reset: Any) -> Any:
    """Row by row and segment by segment; reset(i, k, t, b) is what state i of layer-direction k becomes before step t of row b."""
    T, B = x.shape[:2]
    finals = [[[state[k, b] for b in range(B)] for k in range(len(state))] for state in states]
    k = 0
    for depth in range(layer.num_layers):
        outputs = []
        for direction in ("", "_reverse") if layer.bidirectional else ("",):
            columns = []
            for b in range(B):
                steps: list[Tensor] = [x.new_zeros(H)] * T
                current = [state[k, b] for state in states]
                for t in reversed(range(lengths[b])) if direction else range(lengths[b]):
                    boundary = t + 1 if direction else t
                    if boundary < lengths[b] and mask[boundary, b]:
                        current = [reset(i, k, boundary, b) for i in range(len(states))]
                    initial = [state.unsqueeze(0) for state in current]
                    y, *after = reference.sequence(cell, x[t, b].view(1, 1, -1), initial, *weights_of(layer, f"_l{depth}{direction}"))
                    steps[t], current = y.view(-1), [state.view(-1) for state in after]
                columns.append(torch.stack(steps))
                for i, state in enumerate(current):
                    finals[i][k][b] = state
            outputs.append(torch.stack(columns, 1))
            k += 1
        x = torch.cat(outputs, -1)
    return x, [torch.stack([torch.stack(rows) for rows in state]) for state in finals]


ALL = {**LAYERS, "LSTM": ("LSTM", "lstm", {}), "GRU": ("GRU", "gru", {}), "RNN": ("RNN", "srn_tanh", {})}


@pytest.mark.parametrize("kind", ["zeros", "learned", "rows", "steps"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "PeepholeLSTM", "IndRNN tanh"])
def test_lengths_and_resets(name: str, kind: str) -> None:
    layer_kind, cell, more = ALL[name]
    T, B, count = 6, 5, len(reference.CELLS[cell].states)
    for both, given in itertools.product((False, True), (False, True)):
        torch.manual_seed(both + 2 * given)
        layer = getattr(rnnkernels, layer_kind)(SIZE, H, num_layers=2, bidirectional=both, dtype=torch.float64, **more)
        K = 2 * (1 + both)
        x = torch.randn(T, B, SIZE, dtype=torch.float64, requires_grad=True)
        states = [torch.randn(K, B, H, dtype=torch.float64, requires_grad=given) * given for _ in range(count)]
        mask = torch.rand(T, B) < 0.3
        lengths = [4, 6, 0, 1, 5]
        shape = {"zeros": (1,), "learned": (K, H), "rows": (K, B, H), "steps": (T, K, B, H)}[kind]
        resets = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(count)]

        def reset(i: int, k: int, t: int, b: int, resets: list[Tensor] = resets) -> Tensor:
            full = {"zeros": None, "learned": (k,), "rows": (k, b), "steps": (t, k, b)}[kind]
            return resets[i].new_zeros(H) if full is None else resets[i][full]

        def bundle(tensors: list[Tensor]) -> Any:
            return tuple(tensors) if count > 1 else tensors[0]

        output, last = layer(
            x,
            bundle(states) if given else None,
            lengths=torch.tensor(lengths),
            reset_mask=mask,
            reset_state=None if kind == "zeros" else bundle(resets),
        )
        truth, finals = by_hand(cell, layer, x, states, lengths, mask, reset)
        for a, b in zip((output, *as_list(last)), (truth, *finals), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        leaves = [x, *layer.parameters(), *(resets if kind != "zeros" else [])]
        ours = torch.autograd.grad(output.square().sum() + sum(s.sin().sum() for s in as_list(last)), leaves)
        theirs = torch.autograd.grad(truth.square().sum() + sum(s.sin().sum() for s in finals), leaves)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_lengths_are_what_packing_gives() -> None:
    ours, theirs = (
        rnnkernels.LSTM(SIZE, H, bidirectional=True, batch_first=True),
        torch.nn.LSTM(SIZE, H, bidirectional=True, batch_first=True),
    )
    theirs.load_state_dict(ours.state_dict())
    x, lengths = torch.randn(3, 6, SIZE), torch.tensor([2, 6, 3], dtype=torch.int32)
    packed, (h, c) = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    output, (our_h, our_c) = ours(x, lengths=lengths)
    torch.testing.assert_close(output, pad_packed_sequence(packed, batch_first=True)[0])
    torch.testing.assert_close((our_h, our_c), (h, c))


def test_a_mask_in_the_layouts_of_the_input() -> None:
    layer = rnnkernels.GRU(SIZE, H)
    first = rnnkernels.GRU(SIZE, H, batch_first=True)
    first.load_state_dict(layer.state_dict())
    x, mask = torch.randn(6, 3, SIZE), torch.rand(6, 3) < 0.4
    output, h = layer(x, reset_mask=mask)
    torch.testing.assert_close(first(x.transpose(0, 1), reset_mask=mask.t())[0], output.transpose(0, 1))
    single, h_of_one = layer(x[:, 1], reset_mask=mask[:, 1])
    torch.testing.assert_close(single, output[:, 1])
    torch.testing.assert_close(h_of_one, h[:, 1])
    nothing = torch.zeros(6, 3, dtype=torch.bool)
    torch.testing.assert_close(layer(x, reset_mask=nothing)[0], layer(x)[0])
    empty, h_empty = layer(x, lengths=torch.zeros(3, dtype=torch.int64))
    assert not empty.any()
    assert not h_empty.any()


def test_contradictory_cuts_are_refused() -> None:
    layer, x = rnnkernels.GRU(SIZE, H), torch.randn(6, 3, SIZE)
    mask, lengths = torch.zeros(6, 3, dtype=torch.bool), torch.tensor([1, 2, 3])
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"reset_mask": mask.t()}, RuntimeError, r"reset_mask: expected torch.bool of shape \(6, 3\), got torch.bool of shape \(3, 6\)"),
        ({"reset_mask": mask.float()}, RuntimeError, "reset_mask: expected torch.bool"),
        ({"lengths": lengths.float()}, RuntimeError, "lengths: expected integers"),
        ({"lengths": lengths[:2]}, RuntimeError, r"lengths: expected integers of shape \(3,\)"),
        ({"lengths": lengths + 4}, ValueError, "lengths: expected 0 to 6, got 5 to 7"),
        ({"lengths": lengths - 2}, ValueError, "lengths: expected 0 to 6, got -1 to 1"),
        ({"reset_state": torch.zeros(1, H)}, ValueError, "reset_state: expected a reset_mask"),
        ({"reset_mask": mask, "reset_state": torch.zeros(2, H)}, RuntimeError, r"reset_state: expected shape \(1, 5\), \(1, 3, 5\)"),
    ]
    for arguments, error, text in cases:
        with pytest.raises(error, match=text):
            layer(x, **arguments)
    with pytest.raises(ValueError, match="got a PackedSequence"):
        layer(pack_sequence([x[:, 0]]), lengths=torch.tensor([3]))


def scrn_by_hand(layer: Any, x: Tensor, hx: Any, lengths: list[int], mask: Tensor, resets: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row; resets[i][k] is what state i of layer-direction k becomes before a marked step."""
    f = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}[layer.nonlinearity]
    finals: list[list[Tensor]] = [[], []]
    for depth in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(("", "_reverse") if layer.bidirectional else ("",)):
            w_is, w_ih, w_sh, w_hh, bias, alpha = (
                getattr(layer, f"{name}_l{depth}{suffix}")
                for name in ("weight_is", "weight_ih", "weight_sh", "weight_hh", "bias_ih", "alpha")
            )
            k, rows, ends = len(finals[0]), [], []
            for b, length in enumerate(lengths):
                h, s, steps = hx[0][k, b], hx[1][k, b], {}
                for t in reversed(range(length)) if d else range(length):
                    if t + d < length and mask[t + d, b]:
                        h, s = resets[0][k], resets[1][k]
                    s = (1 - alpha) * (w_is @ x[t, b]) + alpha * s
                    h = f(w_sh @ s + w_ih @ x[t, b] + w_hh @ h + (0 if bias is None else bias))
                    steps[t] = torch.cat([h, s])
                rows.append(torch.stack([steps.get(t, x.new_zeros(len(h) + len(s))) for t in range(len(x))]))
                ends.append((h, s))
            outputs.append(torch.stack(rows, 1))
            for i in range(2):
                finals[i].append(torch.stack([end[i] for end in ends]))
        x = torch.cat(outputs, -1)
    return x, torch.stack(finals[0]), torch.stack(finals[1])


@pytest.mark.parametrize("engine", ["auto", "stepwise"])
@pytest.mark.parametrize("learn_alpha", [False, True], ids=["fixed", "learned"])
def test_scrn(learn_alpha: bool, engine: str) -> None:
    S, T, B = 4, 6, 3
    for depth, both, options in ((1, False, {}), (2, True, {"nonlinearity": "tanh", "bias": False})):
        layer = rnnkernels.SCRN(
            SIZE,
            H,
            S,
            num_layers=depth,
            bidirectional=both,
            learn_alpha=learn_alpha,
            alpha=0.8,
            engine=engine,
            dtype=torch.float64,
            **options,
        )
        assert [name.startswith("alpha") for name, _ in layer.named_parameters()].count(True) == learn_alpha * depth * (1 + both)
        K = depth * (1 + both)
        x = torch.randn(T, B, SIZE, dtype=torch.float64, requires_grad=True)
        hx = [torch.randn(K, B, width, dtype=torch.float64, requires_grad=True) for width in (H, S)]
        resets = [torch.randn(K, width, dtype=torch.float64, requires_grad=True) for width in (H, S)]
        mask, lengths = torch.rand(T, B) < 0.3, [4, 6, 0]
        mask[1, 0] = True  # or no state may come from `resets`
        for cut in (False, True):
            more = {"lengths": torch.tensor(lengths), "reset_mask": mask, "reset_state": tuple(resets)} if cut else {}
            output, (h_n, s_n), (h, s) = layer(x, tuple(hx), return_states=True, **more)
            truth = scrn_by_hand(layer, x, hx, lengths if cut else [T] * B, mask if cut else torch.zeros_like(mask), resets)
            for a, b in zip((output, h_n, s_n), truth, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
            assert torch.equal(torch.cat([h[-1], s[-1]], -1), output[..., -H - S :])
            leaves = [x, *hx, *layer.parameters(), *(resets if cut else [])]
            upstream = [torch.randn_like(t) for t in truth]
            for a, b in zip(
                torch.autograd.grad((output, h_n, s_n), leaves, upstream, retain_graph=True),
                torch.autograd.grad(truth, leaves, upstream, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_scrn_in_every_layout() -> None:
    layer = rnnkernels.SCRN(SIZE, H, 4, num_layers=2, bidirectional=True, dtype=torch.float64)
    first = copy.deepcopy(layer)
    first.batch_first = True
    x, h, s = (torch.randn(*shape, dtype=torch.float64) for shape in ((6, 3, SIZE), (4, 3, H), (4, 3, 4)))
    output, _ = layer(x, (h, s))
    torch.testing.assert_close(first(x.transpose(0, 1), (h, s))[0], output.transpose(0, 1))
    torch.testing.assert_close(layer(x[:, 0], (h[:, 0], s[:, 0]))[0], output[:, 0])
    packed, last = layer(pack_sequence([x[:2, 0], x[:, 1], x[:4, 2]], enforce_sorted=False), (h, s))
    padded, ends = layer(x, (h, s), lengths=torch.tensor([2, 6, 4]))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], padded)
    torch.testing.assert_close(last, ends)
    layer.load_state_dict(first.state_dict())
    step = rnnkernels.SCRNCell(SIZE, H, 4, nonlinearity="tanh", dtype=torch.float64)
    single = rnnkernels.SCRN(SIZE, H, 4, nonlinearity="tanh", dtype=torch.float64)
    single.load_state_dict({f"{name}_l0": weight for name, weight in step.state_dict().items()})
    found = step(x[0], (h[0], s[0]))
    torch.testing.assert_close(found, tuple(t[0] for t in single(x[:1], (h[:1], s[:1]))[1]))
    torch.testing.assert_close(step(x[0, 0], (h[0, 0], s[0, 0])), tuple(t[0] for t in found))


def test_scrn_refuses() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"alpha": 1.5}, "alpha: expected 0 to 1, got 1.5"),
        ({"num_layers": 0}, "num_layers must be greater than zero"),
        ({"dropout": 2}, "dropout should be a number in range"),
        ({"nonlinearity": "cosine"}, "Unknown nonlinearity"),
        ({"dropout": True}, "dropout should be a number in range"),
    ]
    for options, text in cases:
        with pytest.raises(ValueError, match=text):
            rnnkernels.SCRN(SIZE, H, 2, **options)
    with pytest.raises(TypeError, match="num_layers should be of type int, got: str"):
        rnnkernels.SCRN(SIZE, H, 2, num_layers="two")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="context_size should be of type int, got: float"):
        rnnkernels.SCRN(SIZE, H, 2.0)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="dropout falls between layers: expected 0 with num_layers=1, got 0.5"):
        rnnkernels.SCRN(SIZE, H, 2, dropout=0.5)
    layer = rnnkernels.SCRN(SIZE, H, 2)
    for wrong in ("gates", 1):
        with pytest.raises(ValueError, match="return_states: expected True or False"):
            layer(torch.zeros(4, 1, SIZE), return_states=wrong)
    with pytest.raises(ValueError, match="got 1D tensor"):
        layer(torch.zeros(SIZE))
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        layer(torch.zeros(4, 1, SIZE + 1))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 1, 2\)"):
        layer(torch.zeros(4, 1, SIZE), (torch.zeros(1, 1, H), torch.zeros(1, 1, 3)))
    with pytest.raises(RuntimeError, match="reset_state: expected shape"):
        layer(torch.zeros(4, 1, SIZE), reset_mask=torch.zeros(4, 1, dtype=torch.bool), reset_state=(torch.zeros(1, H), torch.zeros(1, H)))
    with pytest.raises(ValueError, match="SCRNCell: Expected input to be 1D or 2D"):
        rnnkernels.SCRNCell(SIZE, H, 2)(torch.zeros(1, 1, SIZE))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, 2\), got \[1, 3\]"):
        rnnkernels.SCRNCell(SIZE, H, 2)(torch.zeros(1, SIZE), (torch.zeros(1, H), torch.zeros(1, 3)))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (lambda: rnnkernels.ResidualRNN(3, 4, nonlinearity="relu", recurrent=False), "(3, 4, nonlinearity=relu, recurrent=False)"),
        (lambda: rnnkernels.IndRNN(3, 4, num_layers=2), "(3, 4, num_layers=2, nonlinearity=relu)"),
        (lambda: rnnkernels.IndRNNCell(3, 4, bias=False), "(3, 4, bias=False, nonlinearity=relu)"),
        (lambda: rnnkernels.PeepholeLSTMCell(3, 4, engine="stepwise"), "(3, 4, engine=stepwise)"),
        (lambda: rnnkernels.IndRNNCell(3, 4, engine="stepwise"), "(3, 4, nonlinearity=relu, engine=stepwise)"),
        (
            lambda: rnnkernels.SCRNCell(3, 4, 2, learn_alpha=True),
            "(3, 4, context_size=2, alpha=0.95, learn_alpha=True, nonlinearity=sigmoid)",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr_tells_what_was_chosen(module: Any, text: str) -> None:
    made = module()
    assert repr(made) == type(made).__name__ + text


def test_initial_weights_by_name() -> None:
    plain, same = (rnnkernels.LSTM(SIZE, H, **options) for options in ({}, {"forget_bias": None}) if torch.manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))
    layer = rnnkernels.LSTM(SIZE, H, num_layers=2, bidirectional=True, forget_bias=2.0, recurrent_init="orthogonal")
    for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
        assert (getattr(layer, f"bias_ih{suffix}")[H : 2 * H] == 2).all()
        assert not getattr(layer, f"bias_hh{suffix}")[H : 2 * H].any()
        for block in getattr(layer, f"weight_hh{suffix}").split(H):
            torch.testing.assert_close(block @ block.t(), torch.eye(H), rtol=1e-5, atol=1e-5)
    identity = rnnkernels.RNN(SIZE, H, nonlinearity="relu", recurrent_init="identity")
    identity.reset_parameters()
    assert torch.equal(identity.weight_hh_l0, torch.eye(H))
    assert (rnnkernels.PeepholeLSTM(SIZE, H, forget_bias=1.0).bias_ih_l0[H : 2 * H] == 1).all()
    with pytest.raises(ValueError, match="recurrent_init must be one of"):
        rnnkernels.GRU(SIZE, H, recurrent_init="zeros")
    for make_bad in (lambda: rnnkernels.GRU(SIZE, H, forget_bias=1.0), lambda: rnnkernels.LSTM(SIZE, H, bias=False, forget_bias=1.0)):
        with pytest.raises(ValueError, match="forget_bias: expected None for a layer without"):
            make_bad()


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "PeepholeLSTM"])
def test_every_state_comes_out(name: str, cut: bool) -> None:
    kind, cell, _ = ALL[name]
    layer = getattr(rnnkernels, kind)(SIZE, H, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 6, SIZE, dtype=torch.float64, requires_grad=True)
    options = {"lengths": torch.tensor([4, 6, 0])} if cut else {}
    output, last, states = layer(x, return_states=True, **options)
    torch.testing.assert_close(output, layer(x, **options)[0])
    assert [s.shape for s in states] == [(4, 3, 6, H)] * len(reference.CELLS[cell].states)
    torch.testing.assert_close(torch.cat([states[0][2], states[0][3]], -1), output)
    for state, final in zip(states, as_list(last), strict=True):
        torch.testing.assert_close(state[1, :, 0], final[1])
        if not cut:
            torch.testing.assert_close(state[2, :, -1], final[2])
        (grad,) = torch.autograd.grad(state.square().sum(), x, retain_graph=True)
        assert grad[:2].abs().sum() > 0
    assert layer(x[0], return_states=True)[2][0].shape == (4, 6, H)
    packed = pack_sequence([x[0], x[1, :2]], enforce_sorted=False)
    assert layer(packed, return_states=True)[2][-1].shape == (4, 8, H)
    nothing = layer(x, return_states=True, lengths=torch.zeros(3, dtype=torch.int64))
    assert nothing[2][0].shape == (4, 3, 6, H)


PERIODS = {"nested": (1, 2, 4), "others": (1, 3, 4), "late": (2, 6), "one": (1,)}


def clockwork_by_hand(layer: Any, x: Tensor, hx: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """The equation, module by module."""
    n, k = len(layer.periods), layer.hidden_size // len(layer.periods)
    finals = []
    for depth in range(layer.num_layers):
        outputs = []
        for d, suffix in enumerate(("", "_reverse") if layer.bidirectional else ("",)):
            w, u, b = (getattr(layer, f"{name}_l{depth}{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih"))
            b = b + getattr(layer, f"bias_hh_l{depth}{suffix}")
            h, steps = hx[len(finals)], [x[0]] * len(x)
            for t in reversed(range(len(x))) if d else range(len(x)):
                parts = []
                for i in range(n):
                    rows = slice(i * k, (i + 1) * k)
                    z = x[t] @ w[rows].t() + b[rows] + h[:, i * k :] @ u[rows, i * k :].t()
                    parts.append(z.tanh() if (t + first) % layer.periods[i] == 0 else h[:, rows])
                h = steps[t] = torch.cat(parts, 1)
            outputs.append(torch.stack(steps))
            finals.append(h)
        x = torch.cat(outputs, -1)
    return x, torch.stack(finals)


def test_a_clock_made_in_inference_mode_serves_training() -> None:
    first, second = (rnnkernels.ClockworkRNN(SIZE, 14, periods=(1, 5)) for _ in range(2))
    x = torch.randn(13, 2, SIZE)
    with torch.inference_mode():
        first(x)
    second(x)[0].sum().backward()
    assert second.weight_hh_l0.grad is not None


@pytest.mark.parametrize("engine", ["auto", "stepwise"])
@pytest.mark.parametrize("name", PERIODS)
def test_clockwork(name: str, engine: str) -> None:
    periods, T, B = PERIODS[name], 9, 3
    torch.manual_seed(3)
    for depth, both, first in ((1, False, 0), (2, True, 0), (1, False, 5)):
        layer = rnnkernels.ClockworkRNN(
            SIZE, 12, depth, periods=periods, bidirectional=both, engine=engine, dtype=torch.float64, recurrent_init="orthogonal"
        )
        blocks = torch.arange(12) // (12 // len(periods))
        below = blocks.unsqueeze(1) > blocks
        assert not layer.weight_hh_l0[below].any()
        layer.weight_hh_l0.data[below] = 7.0  # counts for nothing
        x = torch.randn(T, B, SIZE, dtype=torch.float64, requires_grad=True)
        hx = torch.randn(depth * (1 + both), B, 12, dtype=torch.float64, requires_grad=True)
        results, truth = layer(x, hx, first_step=first), clockwork_by_hand(layer, x, hx, first)
        leaves = [x, hx, *layer.parameters()]
        upstream = [torch.randn_like(t) for t in truth]
        found, expected = (torch.autograd.grad(r, leaves, upstream) for r in (results, truth))
        for a, b in zip((*results, *found), (*truth, *expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert not found[3][below].any()


def test_clockwork_in_every_layout() -> None:
    layer = rnnkernels.ClockworkRNN(SIZE, 12, periods=(1, 2, 4), dtype=torch.float64)
    first = copy.deepcopy(layer)
    first.batch_first = True
    x = torch.randn(6, 3, SIZE, dtype=torch.float64)
    output, _ = layer(x)
    torch.testing.assert_close(first(x.transpose(0, 1))[0], output.transpose(0, 1))
    torch.testing.assert_close(layer(x[:, 1])[0], output[:, 1])
    packed, last = layer(pack_sequence([x[:4, 0], x[:, 1], x[:1, 2]], enforce_sorted=False))
    padded, ends = layer(x, lengths=torch.tensor([4, 6, 1]))
    torch.testing.assert_close(pad_packed_sequence(packed)[0], padded)
    torch.testing.assert_close(last, ends)
    halves = layer(x[:3])
    torch.testing.assert_close(layer(x[3:], halves[1], first_step=3)[0], output[3:])
    counter, state = torch.tensor(0), None
    for t in range(len(x)):  # a counter of torch's, changed in place
        step, state = layer(x[t : t + 1], state, first_step=counter)
        torch.testing.assert_close(step[0], output[t])
        counter += 1
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], output)


def test_clockwork_refuses() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"periods": (1, 2, 2)}, "periods: expected rising positive integers"),
        ({"periods": ()}, "periods: expected rising"),
        ({"periods": (1, 2, 4, 8, 16)}, "hidden_size: expected a multiple of the 5 modules"),
        ({"periods": (1, 2), "zoneout": 0.1}, "zoneout: expected none for a ClockworkRNN, whose units take turns, got 0.1"),
        ({"periods": (1, 2), "layer_norm": "gates"}, "layer_norm: expected none for a ClockworkRNN"),
        ({"periods": (1, 2), "grad_clip": 1.0}, "grad_clip: expected none for a ClockworkRNN"),
        ({"nonlinearity": "cosine"}, "Unknown nonlinearity"),
    ]
    for options, text in cases:
        with pytest.raises(ValueError, match=text):
            rnnkernels.ClockworkRNN(SIZE, 12, **options)
    layer = rnnkernels.ClockworkRNN(SIZE, 16)
    with pytest.raises(ValueError, match="first_step: expected 0 or more, got -1"):
        layer(torch.zeros(2, 1, SIZE), first_step=-1)
    with pytest.raises(TypeError, match="first_step: expected an int, got 0.5"):
        layer(torch.zeros(2, 1, SIZE), first_step=0.5)
    layer.zoneout = 0.1
    with pytest.raises(ValueError, match="zoneout: expected none"):
        layer(torch.zeros(2, 1, SIZE))
    with pytest.raises(ValueError, match="first_step"):
        layer.stream(1)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "PeepholeLSTM", "IndRNN"])
def test_learned_initial_states(kind: str) -> None:
    torch.manual_seed(3)
    layer = getattr(rnnkernels, kind)(SIZE, H, num_layers=2, bidirectional=True, learn_initial=True, dtype=torch.float64)
    initial = [p for name, p in layer.named_parameters() if name.startswith("initial_")]
    assert all(not p.any() and p.shape == (4, H) for p in initial)
    for p in initial:
        torch.nn.init.normal_(p)
    x = torch.randn(6, 3, SIZE, dtype=torch.float64)
    hx = [p.detach().unsqueeze(1).repeat(1, 3, 1).requires_grad_() for p in initial]
    output, _ = layer(x)
    truth, _ = layer(x, tuple(hx) if len(hx) > 1 else hx[0])
    assert torch.equal(output, truth)
    found = torch.autograd.grad(output.square().sum(), initial)
    for a, b in zip(found, torch.autograd.grad(truth.square().sum(), hx), strict=True):
        torch.testing.assert_close(a, b.sum(1), rtol=1e-12, atol=1e-12)
    packed, _ = layer(pack_sequence([x[:2, 0], x[:, 1]], enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed)[0][:, 1], output[:, 1])
    single = getattr(rnnkernels, kind)(SIZE, H, learn_initial=True)
    torch.nn.init.normal_(single.initial_h)
    steps = single.stream(3)
    y = torch.stack([steps.step(t) for t in x.float()])
    assert torch.equal(y, single(x.float())[0])
    single.reset_parameters()
    assert not single.initial_h.any()


def gates_by_hand(kind: str, layer: Any, suffix: str, x: Tensor, h: Tensor, c: Tensor | None, new_c: Tensor | None) -> list[Tensor]:
    w, u, b, d = (getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    x = w @ x + b
    if kind == "GRUResetBefore":
        r, z = (x[: 2 * H] + u[: 2 * H] @ h + d[: 2 * H]).sigmoid().split(H)
        return [r, z, (x[2 * H :] + u[2 * H :] @ (r * h) + d[2 * H :]).tanh()]
    y = u @ h + d
    if kind == "GRU":
        r, z = (x + y)[: 2 * H].sigmoid().split(H)
        return [r, z, (x[2 * H :] + r * y[2 * H :]).tanh()]
    *first, g, o = (x + y).split(H)
    if kind == "PeepholeLSTM":
        p = getattr(layer, "weight_v" + suffix).split(H)
        first, o = [first[0] + p[0] * c, first[1] + p[1] * c], o + p[2] * new_c
    return [*(gate.sigmoid() for gate in first), g.tanh(), o.sigmoid()]


@pytest.mark.parametrize("engine", ["auto", "stepwise"])
@pytest.mark.parametrize("kind", ["LSTM", "LSTM projected", "GRU", "PeepholeLSTM", "CoupledLSTM", "NoForgetLSTM", "GRUResetBefore"])
def test_gates_come_out_with_gradients(kind: str, engine: str) -> None:
    torch.manual_seed(3)
    name, T, B = kind.removesuffix(" projected"), 5, 3
    options = {"proj_size": 2} if name != kind else {}
    layer = getattr(rnnkernels, name)(SIZE, H, 2, bidirectional=True, engine=engine, dtype=torch.float64, **options)
    x, mask, lengths = torch.randn(T, B, SIZE, dtype=torch.float64, requires_grad=True), torch.rand(T, B) < 0.3, torch.tensor([5, 0, 3])
    widths = layer._widths
    hx = [torch.randn(4, B, width, dtype=torch.float64, requires_grad=True) for width in widths]
    resets = [torch.randn(T, 4, B, width, dtype=torch.float64, requires_grad=True) for width in widths]
    join = tuple if len(widths) > 1 else (lambda states: states[0])
    for cut in (False, True):
        more = {"lengths": lengths, "reset_mask": mask, "reset_state": join(resets)} if cut else {}
        _, _, found = layer(x, join(hx), return_states="gates", **more)
        states, gates = found[: len(widths)], found[len(widths) :]
        below = torch.cat(list(states[0][:2]), -1)  # what the second layer reads
        for k, suffix in enumerate(("_l0", "_l0_reverse", "_l1", "_l1_reverse")):
            step = -1 if k % 2 == 0 else 1
            for b, t in itertools.product(range(B), range(T)):
                length = int(lengths[b]) if cut else T
                if t >= length:
                    assert not any(gate[k, t, b].any() for gate in gates)
                    continue
                mark = t + k % 2
                if cut and mark < length and mask[mark, b]:
                    before = [r[mark, k, b] for r in resets]
                else:
                    before = [s[k, t + step, b] if 0 <= t + step < length else i[k, b] for s, i in zip(states, hx, strict=True)]
                new_c = states[1][k, t, b] if len(states) > 1 else None
                truth = gates_by_hand(name, layer, suffix, (x if k < 2 else below)[t, b], before[0], before[-1], new_c)
                for a, e in zip(gates, truth, strict=True):
                    torch.testing.assert_close(a[k, t, b], e, rtol=1e-12, atol=1e-12)
    leaves = [x, *hx, *layer.parameters()]
    assert torch.autograd.gradcheck(
        lambda *leaves: layer(leaves[0], join(leaves[1 : 1 + len(hx)]), return_states="gates", lengths=lengths)[2], leaves, fast_mode=True
    )
    none = layer(x, return_states="gates", lengths=torch.zeros(B, dtype=torch.int64))[2]
    assert [t.shape for t in none] == [t.shape for t in found]


def test_gates_that_are_not_given_out() -> None:
    x = torch.zeros(3, 2, SIZE)
    with pytest.raises(
        ValueError, match="return_states: expected True or False for 'srn_tanh', whose gates are not given out, got 'gates'"
    ):
        rnnkernels.RNN(SIZE, H)(x, return_states="gates")
    with pytest.raises(ValueError, match="return_states: expected True or False for 'lstm_zoneout'"):
        rnnkernels.LSTM(SIZE, H, zoneout=0.1)(x, return_states="gates")
    with pytest.raises(ValueError, match="return_states: expected False, True or 'gates', got 'all'"):
        rnnkernels.LSTM(SIZE, H)(x, return_states="all")
    packed = pack_sequence([x[:, 0], x[:2, 1]])
    assert [t.shape for t in rnnkernels.GRU(SIZE, H)(packed, return_states="gates")[2]] == [(1, 5, H)] * 4
