"""Outputs, final states and every gradient of the layers and cells against torch.nn's, for every combination of options.

In float64 the two agree to rounding. In a lower precision neither is the truth: the error of ours against float64 may be twice that of
torch, plus a few units in the last place.
"""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from conftest import ISAS
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import rnnkernels
from rnnkernels import ops

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "gru": ("GRU", {}),
    "lstm": ("LSTM", {}),
    "lstm_projected": ("LSTM", {"proj_size": 2}),
}
CELL_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNNCell", {}),
    "rnn_relu": ("RNNCell", {"nonlinearity": "relu"}),
    "gru": ("GRUCell", {}),
    "lstm": ("LSTMCell", {}),
}
LENGTHS = {"packed_sorted": [5, 3, 3, 1], "packed_unsorted": [3, 1, 5, 3]}
T, B, I, H = 5, 4, 3, 5  # noqa: E741

kinds = pytest.mark.parametrize("kind", KINDS)
cell_kinds = pytest.mark.parametrize("kind", CELL_KINDS)
depths = pytest.mark.parametrize("num_layers", [1, 2], ids=["1_layer", "2_layers"])
directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one_way", "both_ways"])
low_precision = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])

Input = Tensor | PackedSequence
# Outputs and final states, then gradients of input, states and parameters; None where there is none.
Numbers = list[Tensor | None]


def twins(kind: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    name, more = (CELL_KINDS if options.pop("cell", False) else KINDS)[kind]
    built = []
    for package in (rnnkernels, nn):
        torch.manual_seed(0)
        built.append(getattr(package, name)(*sizes, **more, **options))
    return built[0], built[1]


def flat(result: Any) -> list[Tensor]:
    if result is None:
        return []
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def rebuilt(like: Any, tensors: Iterable[Tensor]) -> Any:
    """``tensors`` in the structure of ``like``."""
    tensors = list(tensors)
    if isinstance(like, PackedSequence):
        return PackedSequence(tensors[0], like.batch_sizes, like.sorted_indices, like.unsorted_indices)
    return tuple(tensors) if isinstance(like, tuple) else tensors[0] if tensors else None


def numbers(module: Any, x: Any, hx: Any, *, seed: int = 1, of: slice = slice(None)) -> Numbers:
    """Run forward, and backward from random cotangents of the outputs in ``of``; x and hx are used as they are, views included."""
    torch.manual_seed(seed)
    outputs = flat(module(x, hx))
    used = [y for y in outputs[of] if y.requires_grad]
    leaves = [leaf for leaf in (*flat(x), *flat(hx), *module.parameters()) if leaf.requires_grad]
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in used]
    gradients = torch.autograd.grad(used, leaves, cotangents, allow_unused=True) if leaves else ()
    return [*outputs, *gradients]


def assert_close(ours: Numbers, theirs: Numbers) -> None:
    for a, b in zip(ours, theirs, strict=True):
        # torch gives None or zeros for what has no part in the result, and which of the two is no promise.
        a, b = (torch.zeros_like(other) if one is None and other is not None else one for one, other in ((a, b), (b, a)))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def inputs(form: str, *, batch_first: bool = False, dtype: torch.dtype = torch.float64, sizes: tuple[int, int, int] = (T, B, I)) -> Any:
    generator = torch.Generator().manual_seed(3)
    steps, batch, width = sizes
    if form in LENGTHS:
        rows = [torch.randn(length, width, generator=generator, dtype=torch.float64).to(dtype) for length in LENGTHS[form]]
        packed = pack_sequence(rows, enforce_sorted=form == "packed_sorted")
        return rebuilt(packed, [packed.data.requires_grad_()])
    shape = (steps, width) if form == "unbatched" else (batch, steps, width) if batch_first else (steps, batch, width)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def initial(module: Any, x: Any, how: str) -> Any:
    """hx: None, contiguous, a strided view, or one state expanded over the batch."""
    if how == "hx_none":
        return None
    lstm = isinstance(module, (nn.LSTM, nn.LSTMCell, rnnkernels.LSTM, rnnkernels.LSTMCell))
    data = flat(x)[0]
    if isinstance(module, nn.RNNCellBase):
        lead = data.shape[:-1]
        widths = [module.hidden_size] * (1 + lstm)
    else:
        count = module.num_layers * (1 + module.bidirectional)
        batch = int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else x.size(0 if module.batch_first else 1)
        lead = (count,) if data.dim() == 2 and not isinstance(x, PackedSequence) else (count, batch)
        widths = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + lstm]
    generator = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(data.dtype).requires_grad_()

    def state(width: int) -> Tensor:
        if how == "hx_strided":
            return random(*lead, 2 * width)[..., ::2]
        return random(width).expand(*lead, width) if how == "hx_expanded" else random(*lead, width)

    made = tuple(state(width) for width in widths)
    return made if lstm else made[0]


@kinds
@depths
@directions
@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("form", ["padded", "unbatched", *LENGTHS])
@pytest.mark.parametrize("how", ["hx_none", "hx_given", "hx_strided", "hx_expanded"])
def test_layers(kind: str, num_layers: int, bidirectional: bool, batch_first: bool, bias: bool, form: str, how: str) -> None:
    ours, theirs = twins(
        kind, I, H, num_layers=num_layers, bidirectional=bidirectional, batch_first=batch_first, bias=bias, dtype=torch.float64
    )
    x = inputs(form, batch_first=batch_first)
    hx = initial(theirs, x, how)
    assert_close(numbers(ours, x, hx), numbers(theirs, x, hx))


@kinds
@pytest.mark.parametrize("form", ["padded", *LENGTHS])
def test_what_comes_back(kind: str, form: str) -> None:
    ours, theirs = twins(kind, I, H, num_layers=2, bidirectional=True, batch_first=True, dtype=torch.float64)
    x = inputs(form, batch_first=True)
    (a, _), (b, _) = ours(x), theirs(x)
    assert type(a) is type(b)
    if isinstance(a, PackedSequence):
        for left, right in zip(a[1:], b[1:], strict=True):
            assert left is right is None or torch.equal(left, right)
    final = flat(ours(x)[1])
    with torch.no_grad():
        for state in final:
            state.zero_()
    # Final states are memory of their own: writing to them leaves the output as it was.
    torch.testing.assert_close(flat(a), flat(b))


@kinds
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (1, 4, 3, 5), (5, 1, 3, 5), (5, 4, 3, 1), (4, 0, 3, 5), (3, 9, 17, 33), (2, 17, 1, 16)], ids=str
)
def test_sizes(kind: str, sizes: tuple[int, int, int, int]) -> None:
    steps, batch, width, hidden = sizes
    if kind == "lstm_projected" and hidden == 1:
        hidden = 3
    ours, theirs = twins(kind, width, hidden, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = inputs("padded", sizes=(steps, batch, width))
    hx = initial(theirs, x, "hx_given")
    assert_close(numbers(ours, x, hx), numbers(theirs, x, hx))


@kinds
@directions
@pytest.mark.parametrize("form", ["padded", *LENGTHS])
@pytest.mark.parametrize("dropout", [0.5, 1.0])
def test_dropout_draws_what_torch_draws(kind: str, bidirectional: bool, form: str, dropout: float) -> None:
    ours, theirs = twins(kind, I, H, num_layers=3, bidirectional=bidirectional, dropout=dropout, batch_first=True, dtype=torch.float64)
    x = inputs(form, batch_first=True)
    trained = numbers(ours, x, None)
    assert_close(trained, numbers(theirs, x, None))
    evaluated = numbers(ours.eval(), x, None)
    assert_close(evaluated, numbers(theirs.eval(), x, None))
    assert not torch.equal(trained[0], evaluated[0])


@kinds
@pytest.mark.parametrize("form", ["padded", "packed_unsorted"])
@pytest.mark.parametrize(
    "wanted", ["nothing", "input", "states", "weight_ih", "weight_hh", "bias", "weight_hr", "reverse", "input and bias"]
)
def test_subsets_of_requires_grad(kind: str, form: str, wanted: str) -> None:
    ours, theirs = twins(kind, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = inputs(form)
    hx = initial(theirs, x, "hx_given")
    for module in (ours, theirs):
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(any(part in name for part in wanted.split(" and ")))
    flat(x)[0].requires_grad_("input" in wanted)
    for state in flat(hx):
        state.requires_grad_("states" in wanted)
    assert_close(numbers(ours, x, hx), numbers(theirs, x, hx))
    assert [y.requires_grad for y in flat(ours(x, hx))] == [y.requires_grad for y in flat(theirs(x, hx))]


@kinds
@directions
@pytest.mark.parametrize("form", ["padded", "packed_unsorted"])
@pytest.mark.parametrize("of", [slice(0, 1), slice(1, 2), slice(-1, None)], ids=["output", "h_n", "last"])
def test_gradients_from_some_outputs(kind: str, bidirectional: bool, form: str, of: slice) -> None:
    ours, theirs = twins(kind, I, H, bidirectional=bidirectional, dtype=torch.float64)
    x = inputs(form)
    hx = initial(theirs, x, "hx_given")
    assert_close(numbers(ours, x, hx, of=of), numbers(theirs, x, hx, of=of))


@kinds
def test_backward_in_eval_and_twice(kind: str) -> None:
    module, _ = twins(kind, I, H, dtype=torch.float64)
    x = inputs("padded")
    output, _ = module.eval()(x)
    first, second = (torch.autograd.grad(output.sum(), list(module.parameters()), retain_graph=True) for _ in range(2))
    assert_close(list(first), list(second))


@kinds
def test_no_grad_and_inference_mode(kind: str) -> None:
    ours, theirs = twins(kind, I, H, dtype=torch.float64)
    x = inputs("padded")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_close(flat(ours(x)), flat(theirs(x)))
            assert not any(y.requires_grad for y in flat(ours(x)))


@kinds
def test_input_may_be_strided(kind: str) -> None:
    ours, theirs = twins(kind, I, H, dtype=torch.float64)
    x = torch.randn(2 * T, I, B, dtype=torch.float64).mT[::2].requires_grad_()
    assert_close(numbers(ours, x, None), numbers(theirs, x, None))


@cell_kinds
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("lead", [(), (1,), (0,), (9,)], ids=["unbatched", "1_row", "no_rows", "9_rows"])
@pytest.mark.parametrize("how", ["hx_none", "hx_given", "hx_strided", "hx_expanded"])
def test_cells(kind: str, bias: bool, lead: tuple[int, ...], how: str) -> None:
    ours, theirs = twins(kind, I, H, cell=True, bias=bias, dtype=torch.float64)
    x = torch.randn(*lead, I, dtype=torch.float64, requires_grad=True)
    hx = initial(theirs, x, how)
    assert_close(numbers(ours, x, hx), numbers(theirs, x, hx))


@cell_kinds
def test_cells_step_by_step(kind: str) -> None:
    ours, theirs = twins(kind, I, H, cell=True, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        x, hx, outputs = inputs("padded"), None, []
        for step in x:
            hx = module(step, hx)
            outputs.append(hx[0] if isinstance(hx, tuple) else hx)
        results.append([*outputs, *torch.autograd.grad(torch.stack(outputs).square().sum(), (x, *module.parameters()))])
    assert_close(*results)


# ---- lower precision


def assert_as_accurate(ours: Numbers, theirs: Numbers, truth: Numbers, dtype: torch.dtype) -> None:
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype == dtype
        mine, torchs = ((y.double() - exact).abs().max().item() for y in (a, b))
        few = 4 * torch.finfo(dtype).eps * max(exact.abs().max().item(), 2**-6)
        assert mine <= 2 * torchs + few


def in_three_precisions(ours: Any, theirs: Any, x: Any, hx: Any, dtype: torch.dtype) -> list[Numbers]:
    """-> ours, theirs and the truth, of which ours is near enough."""
    exact = copy.deepcopy(theirs).double()
    doubled = [rebuilt(like, [tensor.detach().double().requires_grad_() for tensor in flat(like)]) for like in (x, hx)]
    # relu has no derivative at 0, and rounding may fall on either side of it: only its forward can be held to a bound.
    count = len(flat(theirs(x, hx))) if "relu" in getattr(theirs, "nonlinearity", "") else None
    results = [numbers(ours, x, hx), numbers(theirs, x, hx), numbers(exact, *doubled)]
    results = [result[:count] for result in results]
    assert_as_accurate(*results, dtype)
    return results


@kinds
@depths
@directions
@low_precision
@pytest.mark.parametrize("form", ["padded", "packed_unsorted"])
@pytest.mark.parametrize("hidden", [5, 32, 100], ids=lambda hidden: f"H{hidden}")
def test_error_of_layers(kind: str, num_layers: int, bidirectional: bool, dtype: torch.dtype, form: str, hidden: int) -> None:
    ours, theirs = twins(kind, I, hidden, num_layers=num_layers, bidirectional=bidirectional, dtype=dtype)
    x = inputs(form, dtype=dtype)
    in_three_precisions(ours, theirs, x, initial(theirs, x, "hx_given"), dtype)


@kinds
@low_precision
def test_error_does_not_grow_over_time(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(kind, 8, 16, dtype=dtype)
    x = inputs("padded", dtype=dtype, sizes=(200, 3, 8))
    in_three_precisions(ours, theirs, x, None, dtype)


@pytest.mark.parametrize("kind", ["rnn_tanh", "gru", "lstm"])
@low_precision
@pytest.mark.parametrize("sizes", [(3, 1, 512, 512), (3, 4, 1024, 1024), (4, 33, 256, 640)], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore")
def test_error_of_long_products(kind: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], isa: str) -> None:
    """By root mean squares, and one unit in the last place: where a chain of sums is longer than torch's, all numbers err a little more."""
    ops.set_isa(isa)
    *of_input, hidden = sizes
    ours, theirs = twins(kind, of_input[-1], hidden, dtype=dtype)
    x = inputs("padded", dtype=dtype, sizes=tuple(of_input))
    results = in_three_precisions(ours, theirs, x, initial(theirs, x, "hx_given"), dtype)
    for a, b, exact in zip(*results, strict=True):
        mine, torchs = ((y.double() - exact).square().mean().sqrt().item() for y in (a, b))
        assert mine <= 2 * torchs + torch.finfo(dtype).eps * exact.square().mean().sqrt().item()


@cell_kinds
@low_precision
def test_error_of_cells(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = twins(kind, 7, 33, cell=True, dtype=dtype)
    x = torch.randn(9, 7, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_()
    in_three_precisions(ours, theirs, x, initial(theirs, x, "hx_given"), dtype)
