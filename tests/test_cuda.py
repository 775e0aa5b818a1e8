"""The CUDA engines on a GPU: against the float64 reference, bit for bit on reruns, on streams, in graphs."""

import functools
import itertools
import threading
from typing import Any

import pytest
import torch
from test_kernels import arguments, error, oracle, ours, run

import rnnkernels
from rnnkernels import ops
from rnnkernels.ops.cells import PERSISTENT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

CELLS = [cell for cell in ops.CELLS if not cell.endswith("relu")]  # relu's gradient near zero hangs on the last bit
SHAPES = {
    "one": (1, 1, 1, 1),
    "row": (12, 1, 3, 33),
    "odd": (7, 17, 5, 100),
    "tall": (9, 65, 8, 129),
    "wide": (5, 3, 16, 600),
    "long": (1000, 3, 4, 64),
    "large": (4, 3, 8, 1111),
}


@functools.cache
def witness(cell: str, shape: str, dtype: torch.dtype, ragged: bool, reverse: bool) -> Any:
    """A problem, its float64 truth and the reference's own error in the dtype: the same for every engine."""
    tensors, sizes, upstream = arguments(cell, *SHAPES[shape], ragged=ragged, dtype=dtype)
    truth = run(oracle, cell, tensors, sizes, upstream, reverse, torch.float64)
    return tensors, sizes, upstream, truth, error(run(oracle, cell, tensors, sizes, upstream, reverse), truth)


def to_cuda(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in memory that was freed and may be handed out again."""
    torch.cuda.empty_cache()
    blocks = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(4)]
    del blocks


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [*(("stepwise", dtype) for dtype in DTYPES), *(("persistent", dtype) for dtype in DTYPES[1:]), ("persistent_3xtf32", torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_dtype(cell: str, shape: str, dtype: torch.dtype, engine: str) -> None:
    sequence = functools.partial(ours, engine=engine)
    for ragged, reverse in itertools.product((False, True), (False, True)):
        tensors, sizes, upstream, truth, theirs = witness(cell, shape, dtype, ragged, reverse)
        try:
            found = run(sequence, cell, to_cuda(tensors), sizes, to_cuda(upstream), reverse)
        except RuntimeError as refusal:
            if engine in PERSISTENT and "cannot run this" in str(refusal):
                pytest.skip(str(refusal))
            raise
        mine = error([t.cpu() for t in found], truth)
        assert mine <= 2 * theirs + 8 * torch.finfo(dtype).eps, f"{ragged=} {reverse=}"


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("engine", ["stepwise", "persistent"])
@pytest.mark.parametrize("cell", CELLS)
def test_recompute(cell: str, engine: str, dtype: torch.dtype) -> None:
    sequence = functools.partial(ours, engine=engine, recompute=True)
    for ragged, reverse in itertools.product((False, True), (False, True)):
        tensors, sizes, upstream = arguments(cell, *SHAPES["odd"], ragged=ragged, dtype=dtype)
        truth = run(oracle, cell, tensors, sizes, upstream, reverse, torch.float64)
        found = run(sequence, cell, to_cuda(tensors), sizes, to_cuda(upstream), reverse)
        theirs = error(run(oracle, cell, tensors, sizes, upstream, reverse), truth)
        assert error([t.cpu() for t in found], truth) <= 2 * theirs + 8 * torch.finfo(dtype).eps, f"{ragged=} {reverse=}"


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "IndRNN"])
def test_cuts_and_states_are_the_cpus(kind: str) -> None:
    layer = getattr(rnnkernels, kind)(5, 33, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, mask = torch.randn(9, 4, 5, dtype=torch.float64), torch.rand(9, 4) < 0.2
    options = {"lengths": torch.tensor([9, 0, 4, 7]), "reset_mask": mask}
    expected, _, states = layer(x, return_states=True, **options)
    cuda = layer.to("cuda")
    found, _, on_gpu = cuda(x.cuda(), return_states=True, **{name: t.cuda() for name, t in options.items()})
    for a, b in zip((found, *on_gpu), (expected, *states), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("make", [lambda: rnnkernels.ClockworkRNN(5, 32), lambda: rnnkernels.SCRN(5, 33, 7, bidirectional=True)])
def test_networks_of_several_sequences_are_the_cpus(make: Any) -> None:
    layer, x = make().double(), torch.randn(9, 4, 5, dtype=torch.float64)
    expected = layer(x)
    found = layer.to("cuda")(x.cuda())
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("size", [(33, 3), (64, 17), (512, 16)], ids=lambda size: f"H{size[0]}-B{size[1]}")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_two_directions_in_one_launch(kind: str, size: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, batch = size
    layer = getattr(rnnkernels, kind)(5, hidden, bidirectional=True, engine="persistent").to("cuda", dtype)
    truth = getattr(rnnkernels, kind)(5, hidden, bidirectional=True).double()
    truth.load_state_dict({name: value.double().cpu() for name, value in layer.state_dict().items()})
    states = 2 if kind == "LSTM" else 1
    x, *h = (torch.randn(*shape).to(dtype) for shape in [(50, batch, 5), *[(2, batch, hidden)] * states])
    launches, launch = [], ops.steps._launch

    def counted(waiting: list[Any]) -> None:
        launches.append(len(waiting))
        launch(waiting)

    def results(layer: Any, like: torch.Tensor, ragged: bool) -> list[torch.Tensor]:
        leaves = [t.to(like).requires_grad_() for t in (x, *h)]
        hx = tuple(leaves[1:]) if states > 1 else leaves[1]
        lengths = torch.arange(50, 50 - batch, -1)
        given = torch.nn.utils.rnn.pack_padded_sequence(leaves[0], lengths) if ragged else leaves[0]
        output, final = layer(given, hx)
        output, finals = output.data if ragged else output, final if states > 1 else (final,)
        loss = output.double().square().sum() + sum(f.double().sum() for f in finals)
        return [output, *finals, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])]

    monkeypatch.setattr(ops.steps, "_launch", counted)
    for ragged in (False, True):
        expected = results(truth, torch.zeros((), dtype=torch.float64), ragged)
        ways = []
        for together in (True, False):
            with monkeypatch.context() as patch:
                if not together:
                    patch.setattr(ops.steps, "_gains", lambda *_: False)
                launches.clear()
                found, again = (results(layer, layer.weight_ih_l0, ragged) for _ in range(2))
            assert set(launches) == ({2} if together else {1})
            assert all(map(torch.equal, found, again))
            ways.append(error([t.cpu() for t in found], expected))
        # Each way has its own cut, and with it its own order of sums.
        assert ways[0] <= 1.5 * ways[1] + 8 * torch.finfo(dtype).eps


def test_tf32_only_when_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, sizes, upstream = arguments("lstm", *SHAPES["wide"], dtype=torch.float32)
    truth = run(oracle, "lstm", tensors, sizes, upstream, False, torch.float64)
    sequence = functools.partial(ours, engine="persistent")
    errors = []
    for allowed in (False, True):
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
        errors.append(error([t.cpu() for t in run(sequence, "lstm", to_cuda(tensors), sizes, to_cuda(upstream))], truth))
    assert errors[0] < 1e-5 < errors[1] < 1e-2


def test_offsets_beyond_32_bits() -> None:
    layer = rnnkernels.LSTM(8, 1024, engine="persistent").to("cuda", torch.bfloat16)
    x = torch.randn(8200, 64, 8, device="cuda", dtype=torch.bfloat16)
    whole, (h, _) = layer(x)
    assert 4 * whole.numel() > 2**31
    first, state = layer(x[:4100])
    second, (h_of_halves, _) = layer(x[4100:], state)
    assert torch.equal(torch.cat([first, second])[-1], whole[-1])
    assert torch.equal(h, h_of_halves)


@pytest.mark.parametrize("engine", ["stepwise", "persistent"])
@pytest.mark.parametrize("cell", CELLS)
def test_reruns_streams_and_threads_give_the_same_bits(cell: str, engine: str) -> None:
    tensors, sizes, upstream = arguments(cell, 20, 9, 6, 65, dtype=torch.float32)
    tensors, upstream = to_cuda(tensors), to_cuda(upstream)
    sequence = functools.partial(ours, engine=engine)
    first = run(sequence, cell, tensors, sizes, upstream)
    results = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found = run(sequence, cell, tensors, sizes, upstream)
            torch.cuda.current_stream().synchronize()
            results.append(found)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


@pytest.mark.parametrize("hidden", [32, 512], ids=["small", "large"])
@pytest.mark.parametrize("engine", ["stepwise", "persistent"])
def test_a_graph_replays(engine: str, hidden: int) -> None:
    layer = rnnkernels.LSTM(8, hidden, engine=engine).cuda()
    x = torch.randn(10, 4, 8, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x)[0])


def test_auto_leaves_to_cudnn_what_the_table_says() -> None:
    layer = rnnkernels.LSTM(64, 256).to("cuda", torch.float16)
    x = torch.randn(5, 16, 64, device="cuda", dtype=torch.float16)
    (plan,) = rnnkernels.explain(layer, x).plans
    assert (plan.engine, "guess" in plan.why) == ("torch", True)
    theirs = torch.nn.LSTM(64, 256).to("cuda", torch.float16)
    theirs.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x)[0], theirs(x)[0], rtol=1e-2, atol=1e-3)


def test_bad_places_are_refused() -> None:
    layer = rnnkernels.GRU(3, 4).cuda()
    with pytest.raises(RuntimeError, match="not at the same device"):
        layer(torch.zeros(2, 1, 3))
    with pytest.raises(RuntimeError, match="'cpu' cannot run on input's device"):
        rnnkernels.GRU(3, 4, engine="cpu").cuda()(torch.zeros(2, 1, 3, device="cuda"))
    with pytest.raises(RuntimeError, match="do not fit into the registers"):
        rnnkernels.LSTM(8, 8192, engine="persistent").cuda()(torch.zeros(2, 1, 8, device="cuda"))
