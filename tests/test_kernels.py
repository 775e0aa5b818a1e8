"""The kernels against the float64 reference: every cell × instruction set × dtype × shape, outputs, final states and all gradients."""

import functools
import itertools
from typing import Any

import pytest
import torch
from conftest import ISAS, giving
from torch import Tensor

import rnnkernels
from rnnkernels import ops, reference, verify

ours, oracle = giving(ops.sequence), giving(reference.sequence)

# A decorated cell is run by the same engine code, so that what takes long is run for the plain ones.
PLAIN = [cell for cell, spec in ops.CELLS.items() if not spec.given and not spec.moments and not spec.fixed]
FEW = ("one", "step", "row", "odd", "rounds", "empty")

# steps, batch, input size, hidden size
SHAPES = {
    "one": (1, 1, 1, 1),
    "step": (1, 5, 4, 17),
    "row": (12, 1, 3, 33),
    "unit": (5, 4, 3, 1),
    "under": (5, 3, 7, 15),
    "vector": (4, 2, 16, 16),
    "over": (6, 5, 9, 17),
    "odd": (7, 13, 5, 33),
    "large": (5, 37, 20, 161),
    "rounds": (30, 19, 6, 9),  # more tokens than backward takes at a time
    "empty": (3, 0, 4, 5),
}


def arguments(
    cell: str,
    T: int,
    B: int,
    size: int,
    H: int,
    *,
    ragged: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    number: int = 0,
) -> Any:
    """-> tensors (input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v, *states), batch_sizes, upstream gradients"""
    g = torch.Generator().manual_seed(T * 7919 + B * 104729 + H * 31 + ragged + 1000003 * number)
    spec = ops.CELLS[cell]
    P = (H + 1) // 2 if spec.projected else H

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

    sizes, tokens = None, (T, B)
    if ragged:
        lengths = torch.randint(1, T + 1, (B,), generator=g).sort(descending=True).values
        lengths[:1] = T
        sizes = (lengths[None, :] > torch.arange(T)[:, None]).sum(1)
        tokens = (int(sizes.sum()),)
    scale = H**-0.5
    tensors = [
        random(*tokens, size),
        random(spec.input_gates * H, size, scale=scale) if spec.input_gates else None,
        random(spec.hidden_gates * H, P, scale=scale) if spec.hidden_gates else None,
        random(spec.input_gates * H) if bias and spec.input_gates else None,
        random(spec.biased * H) if bias and spec.biased else None,
        random(P, H, scale=scale) if spec.projected else None,
        random(spec.learned * H, scale=0.15 if spec.moments else 0.5) if spec.learned else None,  # a norm's gain alone makes chaos
        random(B, P),
        *([random(B, H)] if len(spec.states) > 1 else []),
    ]
    if spec.fixed:
        tensors[6][-len(spec.fixed) * H :] = verify.thresholds(spec, H, dtype, g).to(dtype)
    if cell.startswith("residual") and spec.hidden_gates:
        # Attracting: any other U multiplies roundings from step to step, and one draw of them then says little of another.
        tensors[2] = tensors[2] / 4 - torch.eye(H, dtype=dtype) / 2
    upstream = [random(*tokens, P), random(B, P), *([random(B, H)] if len(spec.states) > 1 else [])]
    return tensors, sizes, upstream


def run(
    sequence: Any, cell: str, tensors: Any, sizes: Tensor | None, upstream: Any, reverse: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs, final states and the gradient of every argument."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in tensors]
    x, weights, states = leaves[0], leaves[1:7], leaves[7:]
    results = sequence(cell, x, states, *weights, batch_sizes=sizes, reverse=reverse)
    wanted = [leaf for leaf in leaves if leaf is not None]
    cotangents = [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]
    grads = torch.autograd.grad(results, wanted, cotangents, materialize_grads=True)
    return [*(r.detach() for r in results), *grads]


def error(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest error of any result, relative to that result's largest value."""
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        if y.numel():
            worst = max(worst, ((x.double() - y.double()).abs().max() / y.abs().max().clamp_min(1e-30)).nan_to_num(torch.inf).item())
    return worst


@functools.lru_cache(maxsize=512)
def witness(
    cell: str, shape: tuple[int, ...], ragged: bool, reverse: bool, dtype: torch.dtype, bias: bool, number: int = 0
) -> tuple[Any, list[Tensor], float]:
    """Arguments, what the reference makes of them in float64, and its error in the dtype: a loop in Python, most of the time here."""
    case = arguments(cell, *shape, ragged=ragged, dtype=dtype, bias=bias, number=number)
    if cell == "srn_identity" and shape[0] >= 1000:
        case[0][2] *= 0.5  # a linear recurrence grows without bound unless its matrix shrinks
    truth = run(oracle, cell, *case, reverse, torch.float64)
    return case, truth, 0.0 if dtype is torch.float64 else error(run(oracle, cell, *case, reverse), truth)


def errors(sequence: Any, cell: str, shape: Any, ragged: bool, reverse: bool, dtype: torch.dtype, bias: bool = True) -> tuple[float, float]:
    """Of the sequence and of the reference in the same dtype. Over many steps one draw of roundings says little of another: their mean."""
    mine = theirs = 0.0
    draws = 4 if shape[0] > 100 else 1
    for number in range(draws):
        case, truth, of_reference = witness(cell, shape, ragged, reverse, dtype, bias, number)
        mine += error(run(sequence, cell, *case, reverse), truth) / draws
        theirs += of_reference / draws
    return mine, theirs


def runner(by: str) -> Any:
    """The CPU's engine with an instruction set, or another engine."""
    if by in ISAS:
        ops.set_isa(by)
        return ours
    return functools.partial(ours, engine=by)


def tolerance(cell: str, shape: str) -> float:
    """A norm over one unit has 0 for its gradient, and what is computed is the rounding of a difference, times 1 / √ε at each step."""
    return 1e-9 if ops.CELLS[cell].moments and SHAPES[shape][3] == 1 else 1e-12


def computed(cell: str, by: str, shape: str) -> bool:
    if by == "stepwise":
        return cell in PLAIN or (shape in FEW and shape != "rounds")
    return cell in PLAIN or shape == "odd" or (by == ISAS[0] and shape in FEW)


@pytest.mark.parametrize(
    ("cell", "shape", "by"),
    [which for which in itertools.product(ops.CELLS, SHAPES, [*ISAS, "stepwise"]) if computed(which[0], which[2], which[1])],
)
@pytest.mark.usefixtures("restore", "poison")
def test_float64(cell: str, by: str, shape: str) -> None:
    sequence = runner(by)
    for ragged, reverse, bias in itertools.product((False, True), (False, True), (False, True)):
        if ragged and shape == "empty":
            continue
        case, expected, _ = witness(cell, SHAPES[shape], ragged, reverse, torch.float64, bias)
        assert error(run(sequence, cell, *case, reverse), expected) < tolerance(cell, shape), f"{ragged=} {reverse=} {bias=}"


@pytest.mark.parametrize("engine", ["cpu", "stepwise"])
@pytest.mark.parametrize(
    ("cell", "dtype"),
    [
        (c, d)
        for c, d in itertools.product(ops.CELLS, (torch.float64, torch.float32, torch.bfloat16, torch.float16))
        if not c.endswith("relu") and (c in PLAIN or d is torch.float64)
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_recompute(cell: str, dtype: torch.dtype, engine: str) -> None:
    sequence = functools.partial(ours, engine=engine, recompute=True)
    for shape, ragged, reverse, bias in itertools.product(("row", "odd", "step", "empty"), *[(False, True)] * 3):
        if ragged and shape == "empty":
            continue
        mine, theirs = errors(sequence, cell, SHAPES[shape], ragged, reverse, dtype, bias)
        # In float64 the reference, its own witness, is rounded as the kernel is.
        ulps = 8 * SHAPES[shape][0] ** 0.5 if dtype is torch.float64 else 8
        assert mine <= 2 * theirs + ulps * torch.finfo(dtype).eps, f"{shape} {ragged=} {reverse=} {bias=}"


@pytest.mark.parametrize("cell", [c for c in ops.CELLS if len(ops.CELLS[c].stages) == 1])
@pytest.mark.usefixtures("poison")
def test_a_step_of_large_matrices_and_few_rows_takes_torchs_products(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, product = list[str](), ops.cpu.complete_step

    def watched(*args: Any) -> None:
        taken.append(cell)
        product(*args)

    monkeypatch.setattr(ops.cpu, "complete_step", watched)
    for least, expected in (((0, 0), 4), (ops.cells._COMPLETE, 0)):  # all steps are such, and by what was measured these are none
        monkeypatch.setattr(ops.cells, "_COMPLETE", least)
        taken.clear()
        for recompute, bias in itertools.product((False, True), (False, True)):
            case, truth, _ = witness(cell, SHAPES["step"], False, False, torch.float64, bias)
            assert error(run(functools.partial(ours, recompute=recompute), cell, *case), truth) < 1e-12, f"{recompute=} {bias=}"
        assert len(taken) >= expected
        assert bool(taken) == bool(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [4, 9, 60])
@pytest.mark.parametrize("cell", [c for c in ops.CELLS if len(ops.CELLS[c].stages) == 1])
@pytest.mark.usefixtures("poison")
def test_recompute_in_stretches(cell: str, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one step, of a few with a shorter one at the end, and none but the whole."""
    monkeypatch.setattr(ops.parts, "TOKENS", tokens)
    sequence = functools.partial(ours, recompute=True)
    for reverse, bias in itertools.product((False, True), (False, True)):
        mine, theirs = errors(sequence, cell, (7, 4, 3, 17), False, reverse, dtype, bias)
        assert mine <= 2 * theirs + (64 if dtype is torch.float64 else 8) * torch.finfo(dtype).eps, f"{reverse=} {bias=}"
    tensors, sizes, upstream = arguments(cell, 7, 4, 3, 17)
    if len(ops.CELLS[cell].states) > 1 and dtype is torch.float64:
        upstream.append(torch.randn(7, 4, 17, dtype=torch.float64))
        found = run(functools.partial(sequence, return_states=True), cell, tensors, sizes, upstream, True)
        assert error(found, run(functools.partial(oracle, return_states=True), cell, tensors, sizes, upstream, True)) < 1e-12


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize(
    ("cell", "engine"),
    [
        (c, e)
        for c, e in itertools.product(ops.CELLS, ["cpu", "stepwise", "compiled"])
        if len(ops.CELLS[c].states) > 1 and (e != "compiled" or c in ("lstm", "lstm_peephole_projected"))
    ],
)
@pytest.mark.usefixtures("poison")
def test_states_come_out_with_gradients(cell: str, recompute: bool, engine: str) -> None:
    options = {"recompute": recompute, "engine": "auto" if engine == "compiled" else engine, "return_states": True}
    sequence = functools.partial(ours, **options)
    if engine == "compiled":
        torch._dynamo.reset()
        sequence = torch.compile(sequence, fullgraph=True, backend="aot_eager", dynamic=True)
    expected = functools.partial(oracle, return_states=True)
    for ragged, reverse, steps in itertools.product((False, True), (False, True), (7,) if engine == "compiled" else (1, 7)):
        tensors, sizes, upstream = arguments(cell, steps, 5, 4, 17, ragged=ragged)
        upstream.append(torch.randn(*tensors[0].shape[:-1], 17, dtype=torch.float64))
        found, truth = run(sequence, cell, tensors, sizes, upstream, reverse), run(expected, cell, tensors, sizes, upstream, reverse)
        assert error(found, truth) < 1e-12, f"{ragged=} {reverse=} {steps=}"
        with torch.no_grad():
            inference = sequence(cell, tensors[0], tensors[7:], *tensors[1:7], batch_sizes=sizes, reverse=reverse)
        assert error(list(inference), truth[: len(inference)]) < 1e-12


def test_recompute_saves_states_only() -> None:
    saved: list[Tensor] = []
    T, B, H = 5, 3, 7
    layer = rnnkernels.LSTM(4, H, recompute=True)
    x = torch.randn(T, B, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {t.data_ptr() for t in (x, *layer.parameters())}
    assert sum(t.numel() for t in saved if t.data_ptr() not in own) == 2 * T * B * H


def test_torch_as_an_engine_compiles_with_a_break() -> None:
    layer = rnnkernels.LSTM(4, 6, engine="torch", bidirectional=True)
    x = torch.randn(5, 3, 4)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="aot_eager")(x)[0], layer(x)[0])


@pytest.mark.parametrize("cell", [c for c in ops.CELLS if c in ops.peer.CELLS])
def test_torch_as_an_engine(cell: str) -> None:
    for shape, ragged, reverse, bias in itertools.product(("row", "odd"), *[(False, True)] * 3):
        case = arguments(cell, *SHAPES[shape], ragged=ragged, bias=bias)
        found = run(functools.partial(ours, engine="torch"), cell, *case, reverse)
        assert error(found, run(oracle, cell, *case, reverse)) < 1e-12, f"{shape} {ragged=} {reverse=} {bias=}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("cell", "by"),
    [
        (c, by)
        for c, by in itertools.product(ops.CELLS, [*ISAS, "stepwise"])
        if not c.endswith("relu") and (c in PLAIN or by in (ISAS[0], "stepwise"))
    ],
)
@pytest.mark.usefixtures("restore", "poison")
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_dtype(cell: str, by: str, dtype: torch.dtype) -> None:
    # relu's gradient is left out: a pre-activation near zero decides it by its rounding. test_relu_forward holds what can be held.
    sequence = runner(by)
    shapes = ("row", "odd") if by == "stepwise" else ("row", "under", "odd", "large", "rounds")
    for shape, ragged, reverse in itertools.product(shapes, (False, True), (False, True)):
        mine, theirs = errors(sequence, cell, SHAPES[shape], ragged, reverse, dtype)
        assert mine <= 2 * theirs + 8 * torch.finfo(dtype).eps, f"{shape} {ragged=} {reverse=}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore", "poison")
def test_relu_forward(isa: str) -> None:
    ops.set_isa(isa)
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16, torch.float16), ("row", "odd", "large")):
        (x, *weights), _, _ = arguments("srn_relu", *SHAPES[shape], dtype=dtype)
        w = weights[:6]
        truth = oracle("srn_relu", x.double(), [weights[6].double()], *(None if t is None else t.double() for t in w))
        mine = error(list(ours("srn_relu", x, weights[6:], *w)), list(truth))
        theirs = error(list(oracle("srn_relu", x, weights[6:], *w)), list(truth))
        assert mine <= 2 * theirs + 8 * torch.finfo(dtype).eps


# One of each kind: verify has them all.
LONG = ["lstm", "gru_reset_before", "residual_tanh", "lstm_cell_norm_layer_norm"]


@pytest.mark.parametrize("cell", LONG)
def test_error_over_a_thousand_steps(cell: str) -> None:
    mine, theirs = errors(ours, cell, (1000, 2, 8, 40), False, False, torch.float32)
    assert mine <= 2 * theirs + 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize(
    ("cell", "isa"), [(c, i) for c, i in itertools.product(ops.CELLS, ISAS) if not c.endswith("relu") and (c in PLAIN or i == ISAS[0])]
)
@pytest.mark.usefixtures("restore")
def test_gradcheck_on_the_double_kernels(cell: str, isa: str, ragged: bool, reverse: bool) -> None:
    ops.set_isa(isa)
    tensors, sizes, _ = arguments(cell, 3, 2, 3, 5, ragged=ragged)
    if ops.CELLS[cell].fixed:
        tensors[6][-len(ops.CELLS[cell].fixed) * 5 :] = 1e3  # thresholds have no gradient and what they clip another than its own
    x, *rest = [None if t is None else t.requires_grad_() for t in tensors]

    def function(x: Tensor, *rest: Tensor) -> Any:
        return ours(cell, x, rest[6:], *rest[:6], batch_sizes=sizes, reverse=reverse)

    # Number by number; for the other ways through the same cell in one direction, at random.
    assert torch.autograd.gradcheck(function, (x, *rest), atol=1e-8, fast_mode=ragged != reverse)


def exact(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """The same with an input product that has one value in any order of summation, since for one step it is torch's."""
    x, w_ih, *rest = tensors
    assert x is not None
    return [x.mul(4).round().div(4), None if w_ih is None else w_ih.mul(8).round().div(8), *rest]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.usefixtures("restore", "poison")
def test_same_bits_for_any_thread_count_and_on_every_rerun(cell: str, dtype: torch.dtype) -> None:
    spec = ops.CELLS[cell]
    for (T, B, H), ragged in itertools.product(((6, 1, 130), (6, 3, 70), (5, 33, 65)), (False, True)):
        tensors, sizes, upstream = arguments(cell, T, B, 8, H, ragged=ragged, bias=False, dtype=dtype)
        tensors = exact(tensors)
        results = []
        for threads in (1, 1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(ours, cell, tensors, sizes, upstream))
        states = len(spec.states)
        for other in results[2:]:
            # Outputs, final states, and the initial states' gradients, which come out of the loop last.
            for a, b in zip(results[0][: 1 + states] + results[0][-states:], other[: 1 + states] + other[-states:], strict=True):
                assert torch.equal(a, b)
        for a, b in zip(results[0], results[1], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("cell", ops.CELLS)
def test_a_row_does_not_depend_on_its_batch(cell: str) -> None:
    x, *rest = exact(arguments(cell, 7, 29, 6, 48, bias=False)[0])
    weights, states = rest[:6], rest[6:]
    together = ours(cell, x, states, *weights)[0]
    for b in (0, 13, 28):
        alone = ours(cell, x[:, b : b + 1], [s[b : b + 1] for s in states], *weights, first_row=b)[0]
        assert torch.equal(alone[:, 0], together[:, b])


def misaligned(t: Tensor) -> Tensor:
    room = torch.empty(t.numel() + 1, dtype=t.dtype)
    return room[1:].view(t.shape).copy_(t)


def strided(t: Tensor) -> Tensor:
    room = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), torch.nan, dtype=t.dtype)
    return room[..., 1::2].copy_(t)


@pytest.mark.parametrize(
    "layout", [misaligned, strided, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)], ids=["misaligned", "strided", "transposed"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ops.CELLS)
def test_any_memory_layout(cell: str, dtype: torch.dtype, layout: Any) -> None:
    tensors, sizes, upstream = arguments(cell, 4, 3, 5, 18, dtype=dtype)

    def relaid(cell: str, x: Tensor, states: Any, *weights: Any, **options: Any) -> Any:
        return ours(cell, layout(x), [layout(s) for s in states], *(None if w is None else layout(w) for w in weights), **options)

    plain = run(ours, cell, tensors, sizes, upstream)
    for a, b in zip(run(relaid, cell, tensors, sizes, upstream), plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cell", ops.CELLS)
def test_any_subset_of_gradients(cell: str) -> None:
    tensors, _, upstream = arguments(cell, 4, 3, 5, 18)
    every = run(oracle, cell, tensors, None, upstream)
    wanted = [i for i, t in enumerate(tensors) if t is not None]
    full = dict(zip(wanted, every[len(upstream) :], strict=True))
    for subset in ([0], [0, *wanted[2:3]], *([i] for i in wanted)):
        leaves = [t.clone().requires_grad_(i in subset) if t is not None else None for i, t in enumerate(tensors)]
        x, *weights = leaves[:7]
        results = ours(cell, x, leaves[7:], *weights)
        grads = torch.autograd.grad(results, [leaves[i] for i in subset], upstream)
        for i, grad in zip(subset, grads, strict=True):
            torch.testing.assert_close(grad, full[i], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("which", [0, 1], ids=["output-only", "final-only"])
@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.usefixtures("poison")
def test_upstream_gradients_may_be_missing(cell: str, which: int) -> None:
    tensors, _, upstream = arguments(cell, 4, 3, 5, 18)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    wanted = [t for t in leaves if t is not None]
    x, *weights = leaves[:7]
    found = torch.autograd.grad(ours(cell, x, leaves[7:], *weights)[which], wanted, upstream[which], materialize_grads=True)
    expected = torch.autograd.grad(oracle(cell, x, leaves[7:], *weights)[which], wanted, upstream[which], materialize_grads=True)
    assert error(list(found), list(expected)) < 1e-12


@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.usefixtures("poison")
def test_backward_twice_gives_the_same(cell: str) -> None:
    tensors, _, upstream = arguments(cell, 4, 3, 5, 18)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    wanted = [t for t in leaves if t is not None]
    x, *weights = leaves[:7]
    results = ours(cell, x, leaves[7:], *weights)
    first = torch.autograd.grad(results, wanted, upstream, retain_graph=True)
    second = torch.autograd.grad(results, wanted, upstream)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(results, wanted, upstream)


@pytest.mark.parametrize("cell", ops.CELLS)
def test_what_a_hook_holds_stays_as_it_was(cell: str) -> None:
    tensors, _, upstream = arguments(cell, 4, 3, 5, 18)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    held: list[tuple[Tensor, Tensor]] = []

    def pack(t: Tensor) -> Tensor:
        held.append((t, t.detach().clone()))
        return t

    x, *weights = leaves[:7]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = ours(cell, x, leaves[7:], *weights)
    torch.autograd.grad(results, x, upstream)
    assert held
    for now, before in held:
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("cell", "numbers"), [("lstm", 5), ("gru", 4), ("srn_tanh", 1)])
def test_saved_for_backward(cell: str, numbers: int) -> None:
    T, B, H = 50, 4, 64
    tensors, _, _ = arguments(cell, T, B, H, H, dtype=torch.float32)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x, *weights = leaves[:7]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = ours(cell, x, leaves[7:], *weights)
    for known in (*(t for t in leaves if t is not None), results[0]):
        saved.pop(known.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) <= 1.04 * numbers * 4 * T * B * H
