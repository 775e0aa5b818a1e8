"""Rows that end early or start anew, and units that pause, inside a padded batch: the CPU's kernels against the float64 reference."""

import functools
import itertools
from typing import Any

import pytest
import torch
from conftest import ISAS
from test_kernels import PLAIN, SHAPES, arguments, error, oracle, ours, run
from torch import Tensor

import rnnkernels
from rnnkernels import ops

CELLS = [*PLAIN, "lstm_zoneout_dropout", "lstm_projected_zoneout", "lstm_cell_norm_gate_norm", "gru_layer_norm", "gru_dreamer"]
SRNS = [cell for cell in PLAIN if cell.startswith("srn_") and len(ops.CELLS[cell].slots) == 1]
KINDS = ("lengths", "resets", "row", "token", "all")


def cut(cell: str, T: int, B: int, H: int, kind: str, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], list[Tensor]]:
    """What is cut, and by what states are replaced."""
    g = torch.Generator().manual_seed(T * 31 + B * 7 + H)
    P = (H + 1) // 2 if ops.CELLS[cell].projected else H
    widths = [P] + [H] * (len(ops.CELLS[cell].states) - 1)
    options: dict[str, Any] = {}
    if kind != "resets":
        options["lengths"] = torch.randint(0, T + 1, (B,), generator=g)
    if kind != "lengths":
        options["reset_mask"] = torch.rand(T, B, generator=g) < 0.3
    shape = {"row": (B,), "token": (T, B), "all": ()}.get(kind)
    states = [] if shape is None else [torch.randn(*shape, width, generator=g, dtype=torch.float64).to(dtype) for width in widths]
    return options, states


def run_cut(
    sequence: Any, cell: str, case: Any, options: dict[str, Any], resets: list[Tensor], reverse: bool, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """As ``run``, with the gradients of what replaces states."""
    tensors, sizes, upstream = case
    count = len(ops.CELLS[cell].states)

    def cutting(cell: str, x: Tensor, states: Any, *weights: Any, **more: Any) -> Any:
        replacing = {"reset_states": states[count:]} if resets else {}
        return sequence(cell, x, states[:count], *weights, **more, **options, **replacing)

    return run(cutting, cell, [*tensors, *resets], sizes, upstream, reverse, dtype)


@pytest.mark.parametrize(
    ("isa", "kind"), [(isa, kind) for isa, kind in itertools.product(ISAS, KINDS) if isa == ISAS[0] or kind in ("lengths", "token")]
)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("restore", "poison")
def test_float64(cell: str, isa: str, kind: str) -> None:
    ops.set_isa(isa)
    shapes = ("step", "row", "odd", "empty", "rounds") if kind == "row" else ("step", "odd")
    for shape, reverse in itertools.product(shapes, (False, True)):
        T, B, _, H = SHAPES[shape]
        case, (options, resets) = arguments(cell, *SHAPES[shape]), cut(cell, T, B, H, kind)
        found = run_cut(ours, cell, case, options, resets, reverse)
        assert error(found, run_cut(oracle, cell, case, options, resets, reverse)) < 1e-12, f"{shape} {reverse=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.endswith("relu")])
@pytest.mark.usefixtures("poison")
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_dtype(cell: str, dtype: torch.dtype) -> None:
    for kind, shape, reverse in itertools.product(("lengths", "row"), ("row", "odd"), (False, True)):
        T, B, _, H = SHAPES[shape]
        case, (options, resets) = arguments(cell, *SHAPES[shape], dtype=dtype), cut(cell, T, B, H, kind, dtype)
        truth = run_cut(oracle, cell, case, options, resets, reverse, torch.float64)
        mine = error(run_cut(ours, cell, case, options, resets, reverse), truth)
        theirs = error(run_cut(oracle, cell, case, options, resets, reverse), truth)
        assert mine <= 2 * theirs + 8 * torch.finfo(dtype).eps, f"{kind} {shape} {reverse=}"


@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.endswith("relu")])
@pytest.mark.usefixtures("poison")
def test_recompute_and_states(cell: str) -> None:
    for kind, reverse in itertools.product(("lengths", "token"), (False, True)):
        T, B, _, H = SHAPES["odd"]
        (tensors, sizes, upstream), (options, resets) = arguments(cell, *SHAPES["odd"]), cut(cell, T, B, H, kind)
        upstream += [torch.randn(T, B, H, dtype=torch.float64) for _ in ops.CELLS[cell].states[1:]]
        options["return_states"] = True
        truth = run_cut(oracle, cell, (tensors, sizes, upstream), options, resets, reverse)
        for recompute in (False, True):
            again = functools.partial(ours, recompute=recompute)
            found = run_cut(again, cell, (tensors, sizes, upstream), options, resets, reverse)
            assert error(found, truth) < 1e-12, f"{kind} {reverse=} {recompute=}"
        with torch.no_grad():
            weights, states = tensors[1:7], tensors[7:]
            inference = ours(cell, tensors[0], states, *weights, reverse=reverse, **options, **({"reset_states": resets} if resets else {}))
        assert error(list(inference), truth[: len(inference)]) < 1e-12


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before", "lstm_projected", "indrnn_tanh", "gru_dreamer"])
@pytest.mark.usefixtures("restore")
def test_bits_depend_neither_on_threads_nor_on_the_batch(cell: str) -> None:
    T, B, size, H = 9, 6, 5, 48
    case, (options, resets) = arguments(cell, T, B, size, H), cut(cell, T, B, H, "row")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run_cut(ours, cell, case, options, resets, False))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    (x, *weights), row = case[0], 4
    states, weights = weights[6:], weights[:6]
    alone = {name: t[row : row + 1] if name == "lengths" else t[:, row : row + 1] for name, t in options.items()}
    with torch.no_grad():
        y, *_ = ours(
            cell,
            x[:, row : row + 1],
            [s[row : row + 1] for s in states],
            *weights,
            **alone,
            reset_states=[r[row : row + 1] for r in resets],
        )
    assert torch.equal(y[:, 0], found[0][0][:, row])


LAYERS: dict[str, Any] = {
    "LSTM": lambda: rnnkernels.LSTM(5, 6),
    "LSTM normed": lambda: rnnkernels.LSTM(5, 6, layer_norm="gates"),
    "LSTM normed inside": lambda: rnnkernels.LSTM(5, 6, layer_norm="gate", cell_norm=True),
    "GRU normed": lambda: rnnkernels.GRU(5, 6, layer_norm="gates"),
    "GRU normed, both directions": lambda: rnnkernels.GRU(5, 6, layer_norm="gate", bidirectional=True),
    "RNN normed": lambda: rnnkernels.RNN(5, 6, layer_norm="gates"),
    "reset before": lambda: rnnkernels.GRUResetBefore(5, 6),
    "Dreamer": lambda: rnnkernels.DreamerGRU(5, 6),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.usefixtures("two_threads", "poison")
def test_gradients_are_the_same_where_the_graph_is_kept(kind: str) -> None:
    torch.manual_seed(0)
    layer, x, lengths = LAYERS[kind](), torch.randn(7, 5, 5, requires_grad=True), torch.tensor([7, 2, 0, 4, 1])
    leaves = [x, *layer.parameters()]
    output = layer(x, lengths=lengths)[0].square().sum()
    kept, again = (torch.autograd.grad(output, leaves, retain_graph=keep) for keep in (True, False))
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


@pytest.mark.parametrize("cell", ["lstm", "gru", "lstm_projected", "gru_reset_before", "lstm_peephole"])
def test_gradcheck(cell: str) -> None:
    T, B, size, H = 4, 3, 2, 3
    (x, *rest), _, _ = arguments(cell, T, B, size, H)
    options, resets = cut(cell, T, B, H, "token")
    leaves = [None if t is None else t.requires_grad_() for t in (x, *rest, *resets)]
    count = len(rest)

    def function(x: Tensor, *others: Tensor) -> Any:
        weights, states, replacing = others[:6], others[6:count], others[count:]
        return ours(cell, x, states, *weights, reset_states=replacing, **options)

    assert torch.autograd.gradcheck(function, leaves, atol=1e-8)


@pytest.mark.parametrize("cell", ["lstm", "srn_relu", "gru_layer_norm"])
def test_compiled_is_eager(cell: str) -> None:
    T, B, size, H = 5, 3, 4, 6
    case = arguments(cell, T, B, size, H)
    for kind, reverse in itertools.product(("lengths", "token"), (False, True)):
        options, resets = cut(cell, T, B, H, kind)
        torch._dynamo.reset()
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
        found = run_cut(compiled, cell, case, options, resets, reverse)
        for a, b in zip(found, run_cut(ours, cell, case, options, resets, reverse), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    T, B, size, H = 4, 3, 2, 5
    for cell, kind in (("lstm", "token"), ("gru_layer_norm", "row"), ("srn_tanh", "lengths")):
        (x, *rest), _, _ = arguments(cell, T, B, size, H)
        options, resets = cut(cell, T, B, H, kind)
        given = [torch.randn(T, B, len(ops.CELLS[cell].given) * H, dtype=x.dtype)] if ops.CELLS[cell].given else []
        call = ops.Call(cell, x.requires_grad_(), rest[6:], *rest[:6], given=given, reset_states=resets, training=True, **options)
        torch.library.opcheck(torch.ops.rnnkernels.sequence.default, tuple(call))


# ---- units that pause


def clock(T: int, H: int, module: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Half the units every step, a quarter every second, and so on, to the end of a block."""
    counts = [next(k for k in range(1, 40) if t % 2**k or 2**k > H) for t in range(T)]
    return {"units": torch.tensor([min(H, n * module) for n in counts]), "module": module}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cell", SRNS)
@pytest.mark.usefixtures("restore", "poison")
def test_units_that_pause(cell: str, isa: str) -> None:
    ops.set_isa(isa)
    shapes = [(1, 3, 4, 9), (8, 1, 4, 96), (9, 5, 3, 33), (110, 3, 6, 20), (7, 2, 5, 130), (3, 0, 4, 5)]
    for (T, B, size, H), module, reverse, kind in itertools.product(shapes, (1, 3, 16, 64), (False, True), ("none", "row")):
        case, (options, resets) = arguments(cell, T, B, size, H), cut(cell, T, B, H, kind) if kind != "none" else ({}, [])
        if "identity" in cell or "relu" in cell:
            case[0][2] *= 0.5
        options |= clock(T, H, module)
        found = run_cut(ours, cell, case, options, resets, reverse)
        assert error(found, run_cut(oracle, cell, case, options, resets, reverse)) < 1e-12, f"{T=} {B=} {H=} {module=} {reverse=} {kind}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poison", "restore")
def test_units_that_pause_in_other_dtypes_and_threads(dtype: torch.dtype) -> None:
    for H, module in ((130, 16), (40, 5)):
        T, B = 16, 4
        case, options = arguments("srn_tanh", T, B, 7, H, dtype=dtype), clock(T, H, module)
        truth = run_cut(oracle, "srn_tanh", case, options, [], False, torch.float64)
        theirs = error(run_cut(oracle, "srn_tanh", case, options, [], False), truth)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run_cut(ours, "srn_tanh", case, options, [], False))
        assert error(found[0], truth) <= 2 * theirs + 8 * torch.finfo(dtype).eps
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "lengths' range": ("gru", {"lengths": torch.tensor([1, 2, 5])}, ValueError, "lengths: expected 0 to 4, got 1 to 5"),
    "lengths' dtype": ("gru", {"lengths": torch.tensor([1, 2, 3], dtype=torch.int32)}, RuntimeError, "lengths: expected torch.int64"),
    "lengths' shape": ("gru", {"lengths": torch.tensor([1, 2])}, RuntimeError, r"lengths: expected integers of shape \(3,\)"),
    "mask's shape": ("gru", {"reset_mask": torch.zeros(3, 4, dtype=torch.bool)}, RuntimeError, "reset_mask: expected torch.bool"),
    "states' shape": (
        "gru",
        {"reset_mask": torch.zeros(4, 3, dtype=torch.bool), "reset_states": [torch.zeros(4, 5, dtype=torch.float64)]},
        RuntimeError,
        r"reset_states\[0\]: expected shape \(5,\), \(3, 5\) or \(4, 3, 5\)",
    ),
    "count of states": (
        "lstm",
        {"reset_mask": torch.zeros(4, 3, dtype=torch.bool), "reset_states": [torch.zeros(5, dtype=torch.float64)]},
        RuntimeError,
        "reset_states: expected 2",
    ),
    "batch_sizes": ("gru", {"batch_sizes": torch.tensor([2]), "lengths": torch.tensor([1, 1])}, RuntimeError, "batch_sizes: expected None"),
    "engine": ("gru", {"lengths": torch.tensor([1, 2, 3]), "engine": "stepwise"}, RuntimeError, "are for the engine 'cpu'"),
    "torch": ("gru", {"lengths": torch.tensor([1, 2, 3]), "engine": "torch"}, RuntimeError, "'torch' takes no lengths"),
    "units of a gru": ("gru", {"units": torch.ones(4, dtype=torch.int64), "module": 1}, RuntimeError, "units: expected a cell of one slot"),
    "no module": ("srn_tanh", {"units": torch.ones(4, dtype=torch.int64)}, RuntimeError, "a module of at least 1"),
    "too many units": ("srn_tanh", {"units": torch.full((4,), 9), "module": 1}, ValueError, "units: expected 0 to 5, got 9 to 9"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused(name: str) -> None:
    cell, options, kind, text = BAD[name]
    (x, *rest), _, _ = arguments(cell, 4, 3, 2, 5)
    if "batch_sizes" in options:
        x, rest = x[0, :2], [*rest[:6], *(state[:2] for state in rest[6:])]
    if "reset_states" in options:
        options = {**options, "reset_mask": torch.ones(4, 3, dtype=torch.bool)}
    with pytest.raises(kind, match=text):
        ops.sequence(cell, x, rest[6:], *rest[:6], **options)


def test_a_layer_compiles_whole() -> None:
    layer = rnnkernels.LSTM(3, 5, 2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(6, 4, 3, dtype=torch.float64), torch.tensor([6, 0, 3, 5])
    mask, state = torch.rand(6, 4) < 0.3, (torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    found = compiled(x, lengths=lengths, reset_mask=mask, reset_state=state)
    torch.testing.assert_close(found, layer(x, lengths=lengths, reset_mask=mask, reset_state=state), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("engine", ["auto", "stepwise", "traced"])
@pytest.mark.parametrize("returned", [False, True, "gates"], ids="return_states={}".format)
def test_no_row_has_a_step(engine: str, returned: bool | str) -> None:
    layer = rnnkernels.LSTM(3, 4, num_layers=2, engine=engine)
    x, hx = torch.randn(5, 2, 3, requires_grad=True), tuple(torch.randn(2, 2, 4, requires_grad=True) for _ in range(2))
    output, final, *states = layer(x, hx, lengths=[0, 0], return_states=returned)
    assert not output.any()
    for before, after in zip(hx, final, strict=True):
        assert torch.equal(after, before)
        assert after is not before
    assert all(not state.any() for state in sum(states, ()))
    sum(t.sum() for t in (output, *final, *sum(states, ()))).backward()
    assert all(torch.equal(h.grad, torch.ones_like(h)) for h in hx)
    assert all(p.grad is not None and not p.grad.any() for p in (x, *layer.parameters()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64], ids=str)
def test_lengths_of_any_integers(dtype: torch.dtype) -> None:
    layer, x = rnnkernels.GRU(3, 4), torch.randn(5, 3, 3)
    truth = layer(x, lengths=torch.tensor([5, 0, 2]))
    for lengths in (torch.tensor([5, 0, 2]).to(dtype), [5, 0, 2], (5, 0, 2)):
        for a, b in zip(layer(x, lengths=lengths), truth, strict=True):
            assert torch.equal(a, b)


def test_what_is_no_tensor_is_refused() -> None:
    layer, x, mask = rnnkernels.LSTM(3, 4), torch.randn(5, 3, 3), torch.zeros(5, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="lengths: expected a Tensor, got int"):
        layer(x, lengths=3)
    with pytest.raises(TypeError, match="reset_mask: expected a Tensor, got list"):
        layer(x, reset_mask=mask.tolist())
    with pytest.raises(TypeError, match="reset_state: expected two tensors, as hx, got a Tensor"):
        layer(x, reset_mask=mask, reset_state=torch.zeros(1, 4))
    stream = layer.stream(3)
    with pytest.raises(TypeError, match="state: expected two tensors, as hx, got a Tensor"):
        stream.state = torch.zeros(1, 3, 4)
    with pytest.raises(TypeError, match="rows: expected a Tensor, got list"):
        stream.reset([0])
    with pytest.raises(TypeError, match="x: expected a Tensor, got NoneType"):
        stream.step(None)
