"""Derivatives of derivatives, forward mode, torch.func: against the reference, a plain loop that torch differentiates and transforms."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernels import arguments, error, oracle, ours, run
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import rnnkernels
from rnnkernels import ops

PLAIN = ["srn_tanh", "lstm", "gru", "lstm_projected", "lstm_peephole", "gru_reset_before", "indrnn_tanh", "lstm_layer_norm", "gru_dreamer"]
# A clipped gradient is that of no function, so there is nothing to hold its derivative against.
SMOOTH = [cell for cell, spec in ops.CELLS.items() if "grad_clip" not in spec.fixed]
traced = functools.partial(ours, engine="traced")
Function = Callable[..., Tensor]


def case(cell: str, ragged: bool = False, T: int = 4, B: int = 3, size: int = 3, H: int = 5) -> Any:
    return arguments(cell, T, B, size, H, ragged=ragged)


def as_function(sequence: Any, cell: str, tensors: Any, sizes: Any, **options: Any) -> tuple[Any, list[Tensor]]:
    """The sequence as a function of the tensors that are there, with what the cell is given; thresholds are constants."""
    at = [i for i, t in enumerate(tensors) if t is not None]

    def f(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, t in zip(at, values, strict=True):
            full[i] = t
        x, *weights = full[:7]
        results: tuple[Tensor, ...] = tuple(sequence(cell, x, full[7:], *weights, batch_sizes=sizes, **options))
        return results

    return f, [tensors[i] for i in at]


def contracted(f: Callable[..., tuple[Tensor, ...]], upstream: list[Tensor]) -> Callable[..., Tensor]:
    """A number: each result weighed, and bent so that its second derivative is not zero for linear cells."""
    return lambda *values: sum(((y * g).sum() + (y * y).sum() / 2 for y, g in zip(f(*values), upstream, strict=True)), torch.zeros(()))


def directions(values: list[Tensor], number: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(number)
    return tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in values)


def close(found: Any, expected: Any, tolerance: float = 1e-10) -> None:
    assert error(list(found), list(expected)) < tolerance


@pytest.mark.parametrize("cell", ops.CELLS)
def test_the_traced_engine_computes_the_cell(cell: str) -> None:
    for shape, ragged, reverse, bias in itertools.product([(5, 3, 4, 5), (1, 2, 3, 1)], *[(False, True)] * 3):
        tensors, sizes, upstream = arguments(cell, *shape, ragged=ragged, bias=bias)
        found, expected = run(traced, cell, tensors, sizes, upstream, reverse), run(oracle, cell, tensors, sizes, upstream, reverse)
        assert error(found, expected) < (1e-9 if shape[3] == 1 else 1e-12), f"{shape} {ragged=} {reverse=} {bias=}"


@pytest.mark.parametrize("engine", ["cpu", "stepwise"])
@pytest.mark.parametrize("cell", SMOOTH)
def test_double_backward(cell: str, engine: str) -> None:
    mine = functools.partial(ours, engine=engine)
    for ragged, reverse in [(False, False), (True, True)]:
        tensors, sizes, upstream = case(cell, ragged)
        found, expected = (second(s, cell, tensors, sizes, upstream, reverse) for s in (mine, oracle))
        close(found, expected)


def second(sequence: Any, cell: str, tensors: Any, sizes: Any, upstream: Any, reverse: bool, **options: Any) -> list[Tensor]:
    """Gradients of a weighing of the gradients, upstream's among them."""
    f, values = as_function(sequence, cell, tensors, sizes, reverse=reverse, **options)
    leaves = [t.clone().requires_grad_() for t in values]
    weights = [g.clone().requires_grad_() for g in upstream]
    first = torch.autograd.grad(f(*leaves), leaves, weights, create_graph=True, materialize_grads=True)
    total = sum((g * d).sum() for g, d in zip(first, directions(values), strict=True))
    return [*first, *torch.autograd.grad(total, [*leaves, *weights], materialize_grads=True)]


@pytest.mark.parametrize("cell", ["srn_tanh", "lstm", "gru_reset_before"])
def test_gradgradcheck_and_the_third_derivative(cell: str) -> None:
    tensors, sizes, _ = case(cell, T=3, B=2, size=2, H=2)
    f, values = as_function(ours, cell, tensors, sizes)
    leaves = [t.clone().requires_grad_() for t in values]
    assert torch.autograd.gradgradcheck(f, leaves)

    def third(sequence: Any) -> tuple[Tensor, ...]:
        f, _ = as_function(sequence, cell, tensors, sizes)
        total = f(*leaves)[0].pow(2).sum()
        for number in range(2):
            grads = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
            total = sum(((g * d).sum() for g, d in zip(grads, directions(values, number), strict=True)), torch.zeros(()))
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    close(third(ours), third(oracle))


@pytest.mark.parametrize("cell", SMOOTH)
def test_jvp(cell: str) -> None:
    for ragged, reverse in [(False, False), (True, True)]:
        tensors, sizes, _ = case(cell, ragged)
        (f, values), (g, _) = (as_function(s, cell, tensors, sizes, reverse=reverse) for s in (ours, oracle))
        tangents = directions(values)
        for a, b in zip(jvp(f, tuple(values), tangents), jvp(g, tuple(values), tangents), strict=True):
            close(a, b)
        expected = jvp(g, tuple(values), tangents)[1]
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(values, tangents, strict=True)]
            close([forward_ad.unpack_dual(y).tangent for y in f(*duals)], expected)


def test_a_clipped_gradient_has_the_tangents_of_the_function() -> None:
    tensors, sizes, _ = case("lstm_grad_clip")
    f, values = as_function(ours, "lstm_grad_clip", tensors, sizes)
    g, others = as_function(ours, "lstm", [*tensors[:6], None, *tensors[7:]], sizes)
    tangents = directions(values)
    without = [d for t, d in zip(values, tangents, strict=True) if t is not tensors[6]]
    close(jvp(f, tuple(values), tangents)[1], jvp(g, tuple(others), tuple(without))[1])


IN_DIMS = {"inputs": "x", "states": "s", "weights": "w", "both": "xw", "everything": "xws"}


def stacked(values: list[Tensor], names: str, kinds: str, samples: int, dim: int) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Samples of those values whose kind is asked for, side by side in a dimension of each."""
    found, dims = [], []
    for number, (t, name) in enumerate(zip(values, names, strict=True)):
        if name in kinds:
            at = min(dim, t.dim())
            found.append(torch.stack([t, *(t + d for d in [directions([t], 10 * number + i)[0] for i in range(samples - 1)])], at))
            dims.append(at)
        else:
            found.append(t)
            dims.append(None)
    return tuple(found), tuple(dims)


def kinds_of(tensors: Any) -> str:
    return "".join(kind for kind, t in zip("x" + 6 * "w" + "s" * (len(tensors) - 7), tensors, strict=True) if t is not None)


@pytest.mark.parametrize("kinds", IN_DIMS.values(), ids=IN_DIMS)
@pytest.mark.parametrize("cell", PLAIN)
def test_vmap(cell: str, kinds: str) -> None:
    for ragged, reverse, dim in [(False, False, 0), (True, True, 1)]:
        tensors, sizes, upstream = case(cell, ragged)
        if "x" in kinds and (cell.endswith("norm") or ops.CELLS[cell].given):
            return  # the test's own given numbers depend on the batch
        (f, values), (g, _) = (as_function(s, cell, tensors, sizes, reverse=reverse) for s in (ours, oracle))
        args, dims = stacked(values, kinds_of(tensors), kinds, 3, dim)
        close(vmap(f, dims)(*args), vmap(g, dims)(*args))
        every = tuple(range(len(values)))
        mine, theirs = (vmap(grad(contracted(h, upstream), every), dims)(*args) for h in (f, g))
        close(mine, theirs)


@pytest.mark.parametrize("cell", PLAIN)
def test_gradients_through_vmap(cell: str) -> None:
    tensors, sizes, upstream = case(cell)
    for kinds in ("s", "w"):

        def loss(sequence: Any, kinds: str = kinds) -> Any:
            f, values = as_function(sequence, cell, tensors, sizes)
            args, dims = stacked(values, kinds_of(tensors), kinds, 2, 0)
            return grad(lambda *a: vmap(contracted(f, upstream), dims)(*a).pow(2).sum(), tuple(range(len(args))))(*args)

        close(loss(ours), loss(oracle))


@pytest.mark.parametrize("cell", ["srn_tanh", "lstm", "gru"])
def test_compositions(cell: str) -> None:
    tensors, sizes, upstream = case(cell, T=3, B=2, size=2, H=3)
    (f, values), (g, _) = (as_function(s, cell, tensors, sizes) for s in (ours, oracle))
    mine, theirs = contracted(f, upstream), contracted(g, upstream)
    args, dims = stacked(values, kinds_of(tensors), "s", 2, 0)
    many = stacked(values, kinds_of(tensors), "x", 3, 1)[0][0]
    turned = tuple(t if d is None else torch.stack([t, -t], 1) for t, d in zip(args, dims, strict=True))

    def per_sample_norm(h: Function) -> Function:
        return lambda w, x: vmap(lambda x: grad(lambda w: h(x, w, *values[2:]))(w).pow(2).sum(), 1)(x).sum()

    for transform in (
        lambda h: jacrev(f if h is mine else g, 1)(*values)[0],
        lambda h: jacfwd(f if h is mine else g, 1)(*values)[0],
        lambda h: hessian(h, 1)(*values),
        lambda h: jacrev(jacrev(h, 1), 1)(*values),
        lambda h: grad(lambda w: grad(h, 1)(values[0], w, *values[2:]).pow(2).sum())(values[1]),
        lambda h: vmap(vmap(h, dims), tuple(None if d is None else 1 for d in dims))(*turned),
        lambda h: grad(per_sample_norm(h))(values[1], many),
        lambda h: vmap(lambda d: jvp(h, tuple(values), (values[0], d, *values[2:]))[1])(torch.stack(directions([values[1]] * 2))),
        lambda h: vjp(h, *values)[1](torch.tensor(2.0, dtype=torch.float64))[1],
        lambda h: torch.autograd.functional.hessian(lambda w: h(values[0], w, *values[2:]), values[1]),
        lambda h: torch.autograd.functional.jacobian(
            lambda w: (f if h is mine else g)(values[0], w, *values[2:])[0], values[1], vectorize=True
        ),
    ):
        close([transform(mine)], [transform(theirs)])


def test_batched_gradients_of_an_eager_graph() -> None:
    tensors, sizes, upstream = case("lstm")
    cotangents = [torch.stack([g, g.flip(0), -2 * g]) for g in upstream]
    found = []
    for sequence in (ours, oracle):
        f, values = as_function(sequence, "lstm", tensors, sizes)
        leaves = [t.clone().requires_grad_() for t in values]
        found.append(torch.autograd.grad(f(*leaves), leaves, cotangents, is_grads_batched=True))
    close(*found)


# What happens inside a sequence, under transforms: lengths and resets may be batched as well.


def cut(sequence: Any, cell: str, tensors: Any) -> tuple[Any, tuple[Tensor, ...]]:
    x, *rest = tensors
    lengths = torch.tensor([4, 0, 2])
    mask = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)

    def f(x: Tensor, w: Tensor, resets: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        options = {"lengths": lengths, "reset_mask": mask, "reset_states": [resets] * len(ops.CELLS[cell].states)}
        results = sequence(cell, x, rest[6:], rest[0], w, *rest[2:6], reverse=True, return_states=True, **options)
        total: Tensor = sum((y * y).sum() for y in results)
        return total

    return f, (x, rest[1], torch.randn(5, dtype=x.dtype, generator=torch.Generator().manual_seed(1)), lengths, mask)


@pytest.mark.parametrize("cell", ["srn_tanh", "lstm", "gru", "gru_reset_before"])
def test_lengths_and_resets(cell: str) -> None:
    tensors, _, _ = case(cell)
    for engine in ("cpu", "traced"):
        found = []
        for sequence in (functools.partial(ours, engine=engine), oracle):
            f, values = cut(sequence, cell, tensors)
            x, w, resets, lengths, mask = values
            pairs = ((x, -x), (resets, 2 * resets), (lengths, 4 - lengths), (mask, ~mask))
            xs, *others = (torch.stack(pair) for pair in pairs)
            batches = (xs, w, *others)
            by_loop = [grad(f, (0, 1, 2))(*(t[i] if t is not w else w for t in batches)) for i in range(2)] if sequence is oracle else None
            first = grad(f, (0, 1, 2))(*values)
            doubled = grad(lambda x, w=w, f=f, r=resets, n=lengths, m=mask: grad(f, 1)(x, w, r, n, m).pow(2).sum())(x)
            if by_loop is None:
                samples = vmap(grad(f, (0, 1, 2)), (0, None, 0, 0, 0))(*batches)
            else:
                samples = tuple(torch.stack(column) for column in zip(*by_loop, strict=True))
            tangent = jvp(lambda x, w, r, f=f, n=lengths, m=mask: f(x, w, r, n, m), values[:3], tuple(map(torch.sin, values[:3])))
            found.append([*first, doubled, *samples, *tangent])
        close(*found)


def test_no_rows_start_anew_in_the_traced_engine() -> None:
    weights = torch.randn(4, 3), torch.randn(4, 4)
    output, h = ops.sequence(
        "srn_tanh", torch.zeros(5, 0, 3), None, *weights, reset_mask=torch.zeros(5, 0, dtype=torch.bool), engine="traced"
    )
    assert (output.shape, h.shape) == ((5, 0, 4), (0, 4))


def test_the_traced_engine_is_what_runs_where_it_is_asked_for() -> None:
    layer, x = rnnkernels.LSTM(3, 4, engine="traced"), torch.randn(5, 2, 3)
    assert rnnkernels.explain(layer, x).plans[0].engine == "traced"
    stream = layer.stream(2)
    # torch's products of one step and of all need not agree to the last bit.
    torch.testing.assert_close(torch.stack([stream.step(step) for step in x]), layer(x)[0])


def test_batched_lengths_are_checked_too() -> None:
    tensors, _, _ = case("gru")
    f, (x, w, resets, lengths, mask) = cut(ours, "gru", tensors)
    with pytest.raises(ValueError, match="lengths: expected 0 to 4, got 0 to 5"):
        vmap(f, (None, None, None, 0, None))(x, w, resets, torch.stack([lengths, lengths + 1]), mask)


# Layers.

LAYERS: dict[str, Callable[[], Any]] = {
    "RNN": lambda: rnnkernels.RNN(3, 4, num_layers=2, nonlinearity="relu"),
    "GRU": lambda: rnnkernels.GRU(3, 4, bidirectional=True, batch_first=True),
    "LSTM": lambda: rnnkernels.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
    "PeepholeLSTM": lambda: rnnkernels.PeepholeLSTM(3, 4),
    "norm": lambda: rnnkernels.GRU(3, 4, layer_norm="gates"),
    "clips": lambda: rnnkernels.LSTM(3, 4, cell_clip=0.3, learn_initial=True),
    "ClockworkRNN": lambda: rnnkernels.ClockworkRNN(3, 4, periods=[1, 2]),
    "SCRN": lambda: rnnkernels.SCRN(3, 4, context_size=2),
    "cell": lambda: rnnkernels.LSTMCell(3, 4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_under_torch_func(name: str) -> None:
    torch.manual_seed(0)
    layers = [LAYERS[name]().double() for _ in range(3)]
    x = torch.randn(5, 2, 3, dtype=torch.float64) if name != "cell" else torch.randn(2, 3, dtype=torch.float64)

    def loss(parameters: Any, x: Tensor) -> Tensor:
        output = functional_call(layers[0], parameters, (x,))[0]
        return (output * output).sum() + output.sum()

    parameters = dict(layers[0].named_parameters())
    plain = {key: p.detach() for key, p in parameters.items()}
    # Gradients, those of an ensemble, and of each sample, against plain loops.
    expected = dict(zip(parameters, torch.autograd.grad(loss(parameters, x), list(parameters.values())), strict=True))
    found = grad(loss)(plain, x)
    close(found.values(), expected.values())
    stack, _ = stack_module_state(layers)
    stack = {key: p.detach() for key, p in stack.items()}
    ensemble = vmap(grad(loss), (0, None))(stack, x)
    alone = [grad(loss)({key: p[i] for key, p in stack.items()}, x) for i in range(3)]
    close(ensemble.values(), [torch.stack([a[key] for a in alone]) for key in ensemble])
    many = torch.stack([x, -x, x / 2])
    samples = vmap(grad(loss), (None, 0))(plain, many)
    alone = [grad(loss)(plain, many[i]) for i in range(3)]
    close(samples.values(), [torch.stack([a[key] for a in alone]) for key in samples])
    # Tangents, against a difference; a Hessian's product both ways.
    d = {key: torch.randn_like(p) for key, p in plain.items()}
    step = 1e-6
    up, down = ({key: p + sign * step * d[key] for key, p in plain.items()} for sign in (1, -1))
    slope = jvp(lambda p: loss(p, x), (plain,), (d,))[1]
    assert slope.item() == pytest.approx(((loss(up, x) - loss(down, x)) / (2 * step)).item(), rel=1e-6)
    by_jvp = jvp(lambda p: grad(loss)(p, x), (plain,), (d,))[1]
    first = torch.autograd.grad(loss(parameters, x), list(parameters.values()), create_graph=True)
    total = sum((g * d[key]).sum() for g, key in zip(first, parameters, strict=True))
    close(by_jvp.values(), torch.autograd.grad(total, list(parameters.values()), materialize_grads=True))


def test_bias_changed_in_place_before_a_second_derivative_is_noticed() -> None:
    layer = rnnkernels.GRU(2, 3)
    output, _ = layer(torch.zeros(4, 1, 2, requires_grad=True))
    with torch.no_grad():
        layer.bias_ih_l0.add_(1)
    torch.autograd.grad(output.sum(), layer.weight_ih_l0, retain_graph=True)
    with pytest.raises(RuntimeError, match="bias_ih: it was changed in place"):
        torch.autograd.grad(output.sum(), layer.weight_ih_l0, create_graph=True)


@pytest.mark.parametrize("make", [rnnkernels.GRU, rnnkernels.LSTM])
def test_double_backward_under_hooks_of_saved_tensors(make: Any) -> None:
    layer = make(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)

    def penalty() -> Tensor:
        (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        return slope.pow(2).sum()

    expected = torch.autograd.grad(penalty(), x)
    with torch.autograd.graph.save_on_cpu():
        close(torch.autograd.grad(penalty(), x), expected)
    checkpointed = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0].sum(), x, use_reentrant=False)
    close(torch.autograd.grad(checkpointed, x), torch.autograd.grad(layer(x)[0].sum(), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivatives_in_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    layer, x = rnnkernels.LSTM(3, 4, dtype=dtype), torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    slope.pow(2).sum().backward()
    for p in layer.parameters():
        assert p.grad is not None
        assert p.grad.dtype == dtype
        assert p.grad.isfinite().all()


@pytest.mark.parametrize("cell", ["srn_tanh", "srn_relu", "lstm", "gru"])
def test_tangents_and_second_derivatives_are_the_kernels_own(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> Any:
        raise AssertionError("torch followed the page")

    monkeypatch.setattr(ops.traced, "run", refused)
    monkeypatch.setattr(ops.peer, "run", refused)
    tensors, sizes, upstream = case(cell)
    f, values = as_function(ours, cell, tensors, sizes)
    jvp(f, tuple(values), directions(values))
    jvp(lambda *v: grad(contracted(f, upstream), 1)(*v), tuple(values), directions(values))
    second(ours, cell, tensors, sizes, upstream, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["srn_tanh", "lstm", "gru"])
def test_tangents_of_half_types_are_rounded_once(cell: str, dtype: torch.dtype) -> None:
    tensors, sizes, _ = case(cell)
    tangents = directions([t for t in tensors if t is not None])
    results = []
    for kind in (dtype, torch.float32):
        f, values = as_function(ours, cell, [t if t is None else t.to(dtype).to(kind) for t in tensors], sizes)
        results.append([t.to(dtype) for t in jvp(f, tuple(values), tuple(d.to(dtype).to(kind) for d in tangents))[1]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("cell", ["lstm", "gru", "srn_tanh", "lstm_projected", "gru_reset_before"])
def test_what_is_recomputed_is_differentiated_twice_and_in_batches(cell: str) -> None:
    tensors, sizes, _ = case(cell)
    found = []
    for recompute in (False, True):
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
        x, *weights = leaves[:7]
        y, *_ = ops.sequence(cell, x, leaves[7:], *weights, batch_sizes=sizes, recompute=recompute)
        there = [t for t in leaves if t is not None]
        torch.manual_seed(0)
        batched = torch.autograd.grad(y, there, torch.randn(3, *y.shape, dtype=y.dtype), is_grads_batched=True, retain_graph=True)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([*batched, *torch.autograd.grad(slope.square().sum(), there, materialize_grads=True)])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", ["gates", "gate"])
def test_a_gradient_of_a_tangent_through_a_layer_norm(how: str) -> None:
    torch.manual_seed(0)
    layer = rnnkernels.LSTM(3, 4, layer_norm=how, dtype=torch.float64)
    x, along = torch.randn(2, 3, 2, 3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return layer(x)[0].square().sum()

    torch.testing.assert_close(grad(lambda x: jvp(f, (x,), (along,))[1])(x), jvp(grad(f), (x,), (along,))[1])
