"""The CUDA engines on a GPU: against the float64 reference, bit for bit on reruns, on streams, in graphs."""

import functools
import itertools
import threading

import pytest
import torch
from test_kernels import arguments, error, run

import rnnkernels
from rnnkernels import ops, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

CELLS = [cell for cell in ops.CELLS if cell != "srn_relu"]  # relu's gradient near zero hangs on the last bit
SHAPES = {
    "one": (1, 1, 1, 1),
    "row": (12, 1, 3, 33),
    "odd": (7, 17, 5, 100),
    "tall": (9, 65, 8, 129),
    "wide": (5, 3, 16, 600),
    "long": (1000, 3, 4, 64),
    "large": (4, 3, 8, 1111),
}


def to_cuda(tensors: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


@pytest.mark.parametrize("engine", ["stepwise", "persistent"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_error_is_at_most_twice_that_of_the_reference_in_the_same_dtype(cell: str, shape: str, dtype: torch.dtype, engine: str) -> None:
    if engine == "persistent" and dtype is torch.float64:
        pytest.skip("float64 runs stepwise")
    sequence = functools.partial(ops.sequence, engine=engine)
    for ragged, reverse in itertools.product((False, True), (False, True)):
        tensors, sizes, upstream = arguments(cell, *SHAPES[shape], ragged=ragged, dtype=dtype)
        truth = run(reference.sequence, cell, tensors, sizes, upstream, reverse, torch.float64)
        try:
            found = run(sequence, cell, to_cuda(tensors), sizes, to_cuda(upstream), reverse)
        except RuntimeError as refusal:
            if engine == "persistent" and "cannot run this" in str(refusal):
                pytest.skip(str(refusal))
            raise
        theirs = error(run(reference.sequence, cell, tensors, sizes, upstream, reverse), truth)
        ours = error([t.cpu() for t in found], truth)
        assert ours <= 2 * theirs + 8 * torch.finfo(dtype).eps, f"{ragged=} {reverse=}"


@pytest.mark.parametrize("engine", ["stepwise", "persistent"])
@pytest.mark.parametrize("cell", CELLS)
def test_reruns_streams_and_threads_give_the_same_bits(cell: str, engine: str) -> None:
    tensors, sizes, upstream = arguments(cell, 20, 9, 6, 65, dtype=torch.float32)
    tensors, upstream = to_cuda(tensors), to_cuda(upstream)
    sequence = functools.partial(ops.sequence, engine=engine)
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


@pytest.mark.parametrize("engine", ["stepwise", "persistent"])
def test_a_graph_replays(engine: str) -> None:
    layer = rnnkernels.LSTM(8, 32, engine=engine).cuda()
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


def test_bad_places_are_refused() -> None:
    layer = rnnkernels.GRU(3, 4).cuda()
    with pytest.raises(RuntimeError, match="not at the same device"):
        layer(torch.zeros(2, 1, 3))
    with pytest.raises(RuntimeError, match="'cpu' cannot run on input's device"):
        rnnkernels.GRU(3, 4, engine="cpu").cuda()(torch.zeros(2, 1, 3, device="cuda"))
    with pytest.raises(RuntimeError, match="do not fit into the shared memory"):
        rnnkernels.LSTM(8, 8192, engine="persistent").cuda()(torch.zeros(2, 1, 8, device="cuda"))
