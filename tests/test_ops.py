"""What stands around the kernels: bad input, threads, forks, torch.compile."""

import functools
import os
import threading
from typing import Any

import pytest
import torch
from conftest import ISAS, given_of
from test_kernels import PLAIN, arguments, oracle, ours, run
from torch import Tensor

import rnnkernels
from rnnkernels import ops
from rnnkernels.ops import engines


def good(cell: str = "lstm") -> dict[str, Any]:
    (x, *rest), _, _ = arguments(cell, 4, 3, 5, 6, dtype=torch.float32)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr", "weight_v")
    return {"cell": cell, "input": x, "states": rest[6:], **dict(zip(names, rest[:6], strict=True))}


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "cell": ({"cell": "lstn"}, ValueError, "cell: expected one of srn_tanh.*lstn"),
    "rank": ({"input": torch.zeros(3, 5)}, RuntimeError, "input: expected 3-D .* got 2-D"),
    "integer": ({"input": torch.zeros(4, 3, 5, dtype=torch.int64)}, RuntimeError, "input: expected dtype .* got torch.int64"),
    "complex": ({"input": torch.zeros(4, 3, 5, dtype=torch.complex64)}, RuntimeError, "input: expected dtype"),
    "no steps": ({"input": torch.zeros(0, 3, 5)}, RuntimeError, "Expected sequence length to be larger than 0"),
    "input size": ({"input": torch.zeros(4, 3, 7)}, RuntimeError, r"weight_ih: expected shape \(24, 7\), got \(24, 5\)"),
    "weight_ih rows": (
        {"weight_ih": torch.zeros(23, 5)},
        RuntimeError,
        r"weight_ih: expected shape \(4·hidden_size, input_size\), got \(23, 5\)",
    ),
    "weight_ih rank": ({"weight_ih": torch.zeros(24)}, RuntimeError, "weight_ih: expected shape"),
    "no units": ({"weight_ih": torch.zeros(0, 5)}, RuntimeError, "weight_ih: expected shape"),
    "weight_hh": ({"weight_hh": torch.zeros(24, 5)}, RuntimeError, r"weight_hh: expected shape \(24, 6\), got \(24, 5\)"),
    "weight dtype": (
        {"weight_hh": torch.zeros(24, 6, dtype=torch.float64)},
        RuntimeError,
        "weight_hh: expected dtype torch.float32 .* got torch.float64",
    ),
    "bias": ({"bias_hh": torch.zeros(23)}, RuntimeError, r"bias_hh: expected shape \(24,\), got \(23,\)"),
    "too few states": ({"states": [torch.zeros(3, 6)]}, RuntimeError, r"states: expected 2 \(h, c\) for cell 'lstm', got 1"),
    "state batch": (
        {"states": [torch.zeros(2, 6), torch.zeros(3, 6)]},
        RuntimeError,
        r"states\[0\] \(h\): expected shape \(3, 6\), got \(2, 6\)",
    ),
    "state size": (
        {"states": [torch.zeros(3, 6), torch.zeros(3, 7)]},
        RuntimeError,
        r"states\[1\] \(c\): expected shape \(3, 6\), got \(3, 7\)",
    ),
    "unwanted projection": ({"weight_hr": torch.zeros(3, 6)}, RuntimeError, "weight_hr: expected None for cell 'lstm'"),
    "unwanted vectors": ({"weight_v": torch.zeros(6)}, RuntimeError, "weight_v: expected None for cell 'lstm'"),
    "missing matrix": ({"weight_hh": None}, RuntimeError, "weight_hh: expected a tensor for cell 'lstm'"),
    "wrong vectors": (
        {"cell": "lstm_peephole", "weight_v": torch.zeros(6)},
        RuntimeError,
        r"weight_v: expected shape \(18,\), got \(6,\)",
    ),
    "missing projection": ({"cell": "lstm_projected"}, RuntimeError, "weight_hr: expected a tensor for cell 'lstm_projected'"),
    "wide projection": (
        {"cell": "lstm_projected", "weight_hr": torch.zeros(7, 6)},
        RuntimeError,
        "weight_hr: expected .* at most hidden_size = 6",
    ),
    "increasing": (
        {"batch_sizes": torch.tensor([2, 3]), "input": torch.zeros(5, 5)},
        RuntimeError,
        r"batch_sizes: expected positive and non-increasing",
    ),
    "zero rows": ({"batch_sizes": torch.tensor([3, 0]), "input": torch.zeros(3, 5)}, RuntimeError, "batch_sizes: expected positive"),
    "negative rows": ({"batch_sizes": torch.tensor([6, -3]), "input": torch.zeros(3, 5)}, RuntimeError, "batch_sizes: expected positive"),
    "wrong sum": (
        {"batch_sizes": torch.tensor([3, 3]), "input": torch.zeros(5, 5)},
        RuntimeError,
        "batch_sizes: expected to sum to the 5 tokens of input, got 6",
    ),
    "no sizes": (
        {"batch_sizes": torch.tensor([], dtype=torch.int64), "input": torch.zeros(0, 5)},
        RuntimeError,
        "batch_sizes: expected a non-empty",
    ),
    "float sizes": ({"batch_sizes": torch.tensor([3.0]), "input": torch.zeros(3, 5)}, RuntimeError, "batch_sizes: expected .* int64"),
    "beyond memory": (
        {"input": torch.zeros(1, 1, 1).expand(2**40, 2**20, 5), "states": None},
        RuntimeError,
        "input: .* more than memory can address",
    ),
    "ragged rank": ({"batch_sizes": torch.tensor([3])}, RuntimeError, "input: expected 2-D"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_and_names_what_is_wrong(case: str) -> None:
    change, exception, text = BAD[case]
    with pytest.raises(exception, match=text):
        ops.sequence(**{**good(), **change})


@pytest.mark.parametrize("case", BAD)
def test_what_is_known_of_calls_before_hides_nothing(case: str) -> None:
    change, exception, text = BAD[case]
    for states in ({}, {"states": None}):
        ops.sequence(**{**good(), **states})
    with pytest.raises(exception, match=text):
        ops.sequence(**{**good(), **change})


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_numbers_that_torch_has_yet_to_negate_or_make(training: bool) -> None:
    """Views of conjugates, and zeros without memory; gradients too."""
    layer, kinds = rnnkernels.LSTM(5, 6), {"negative": lambda x: torch.complex(x, -x).conj().imag, "zeros": lambda x: x}
    for kind, lazy in kinds.items():
        x, h, c = (lazy(torch.randn(shape)) for shape in ((4, 3, 5), (1, 3, 6), (1, 3, 6)))
        if kind == "zeros":
            x, h, c = (torch._efficientzerotensor(t.shape) for t in (x, h, c))
        plain = [t.resolve_neg() if kind == "negative" else torch.zeros(t.shape) for t in (x, h, c)]
        assert kind == "zeros" or x.is_neg()
        with torch.set_grad_enabled(training):
            output, (h_n, c_n) = layer(x, (h, c))
            expected, (h_e, c_e) = layer(plain[0], (plain[1], plain[2]))
        assert all(map(torch.equal, (output, h_n, c_n), (expected, h_e, c_e)))
        if training:
            upstream = lazy(torch.randn(4, 3, 6))
            found = torch.autograd.grad(output, list(layer.parameters()), upstream)
            wanted = torch.autograd.grad(expected, list(layer.parameters()), upstream.resolve_neg())
            assert all(map(torch.equal, found, wanted))


def test_states_are_counted_again() -> None:
    """Those that replace others lie beside those at the start."""
    case = {**good(), "reset_mask": torch.zeros(4, 3, dtype=torch.bool), "reverse": True}
    ops.sequence(**case)
    states = case.pop("states")
    for given in ([], states[:1]):
        with pytest.raises(RuntimeError, match=f"states: expected 2 .*got {len(given)}"):
            ops.sequence(**case, states=given, reset_states=states[len(given) :])


@pytest.mark.parametrize(
    "change", [lambda w: w[:-1], lambda w: w.double(), lambda w: w.t().contiguous().t()], ids=["shape", "dtype", "strides"]
)
def test_a_weight_changed_in_place_is_looked_at_again(change: Any) -> None:
    layer, x = rnnkernels.GRU(5, 5), torch.randn(4, 3, 5)
    expected, _ = layer(x)
    layer.weight_hh_l0.data = change(layer.weight_hh_l0.data)
    if layer.weight_hh_l0.shape == (15, 5) and layer.weight_hh_l0.dtype == torch.float32:
        assert torch.equal(layer(x)[0], expected)
    else:
        with pytest.raises(RuntimeError, match="weight_hh: expected"):
            layer(x)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'sse9' is not available here; expected one of .*scalar"):
        ops.set_isa("sse9")


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_forces_an_instruction_set(isa: str, tmp_path: Any) -> None:
    import subprocess
    import sys

    environment = {**os.environ, "RNNKERNELS_ISA": isa}
    program = "from rnnkernels import ops; print(ops.build_info()['isa'])"
    assert (
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.strip() == isa
    )
    refused = subprocess.run(
        [sys.executable, "-c", program], env={**environment, "RNNKERNELS_ISA": "sse9"}, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0
    assert "'sse9' is not available here" in refused.stderr


@pytest.mark.usefixtures("restore")
def test_python_threads_at_once() -> None:
    case = arguments("gru", 20, 3, 16, 130, dtype=torch.float32)
    expected = run(ops.sequence, "gru", *case)
    wrong: list[str] = []

    def work() -> None:
        for _ in range(10):
            for a, b in zip(run(ops.sequence, "gru", *case), expected, strict=True):
                if not torch.allclose(a, b, rtol=1e-4, atol=1e-5):
                    wrong.append("differs")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "threads wait for each other"
    assert not wrong


@pytest.mark.usefixtures("restore")
def test_more_threads_than_cores() -> None:
    case = arguments("lstm", 30, 2, 16, 260, dtype=torch.float32)
    torch.set_num_threads(1)
    expected = run(ops.sequence, "lstm", *case)[:3]
    torch.set_num_threads(4 * (os.cpu_count() or 1))
    for a, b in zip(run(ops.sequence, "lstm", *case)[:3], expected, strict=True):
        assert torch.equal(a, b)


def test_after_fork() -> None:
    (x, w_ih, w_hh, b_ih, b_hh, _, _, h), _, _ = arguments("gru", 20, 1, 300, 300, dtype=torch.float32)
    expected = ops.sequence("gru", x, [h], w_ih, w_hh, b_ih, b_hh)[0]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # torch's own products hang in a forked child unless they keep to one thread, as DataLoader workers do.
        torch.set_num_threads(1)
        found = ops.sequence("gru", x, [h], w_ih, w_hh, b_ih, b_hh)[0]
        os.write(writer, b"y" if torch.allclose(found, expected, rtol=1e-4, atol=1e-5) else b"n")
        os._exit(0)
    import select

    ready, _, _ = select.select([reader], [], [], 60)
    if not ready:
        os.kill(child, 9)
    os.waitpid(child, 0)
    assert ready, "the child hangs"
    assert os.read(reader, 1) == b"y"


class Rows(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Tensor:
        (x, w_ih, w_hh, b_ih, b_hh, _, _, h), _, _ = arguments("gru", 9, 2, 40, 70, dtype=torch.float32)
        return ops.sequence("gru", x + i, [h], w_ih, w_hh, b_ih, b_hh)[0]


def test_inside_dataloader_workers() -> None:
    rows = Rows()
    expected = [rows[i] for i in range(len(rows))]
    for a, b in zip(torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2, timeout=60), expected, strict=True):
        torch.testing.assert_close(a, b)


def call(cell: str, x: Tensor, states: Any, weights: Any, sizes: Tensor | None, given: Any, **options: Any) -> tuple[Any, ...]:
    """The op's arguments, for training."""
    return tuple(ops.Call(cell, x, states, *weights, sizes, given=given, return_states=True, training=True)._replace(**options))


@pytest.mark.parametrize(("engine", "recompute"), [("auto", False), ("stepwise", False), ("auto", True)])
@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", [*PLAIN, "lstm_zoneout_dropout", "lstm_cell_norm_gate_norm", "gru_layer_norm"])
def test_opcheck(cell: str, ragged: bool, engine: str, recompute: bool) -> None:
    (x, *rest), sizes, _ = arguments(cell, 3, 2, 4, 5, ragged=ragged)
    leaves, states = [None if t is None else t.requires_grad_() for t in rest[:6]], rest[6:]
    op, given = torch.ops.rnnkernels.sequence.default, given_of(cell, x, states, leaves, sizes)
    torch.library.opcheck(
        op, call(cell, x.requires_grad_(), [s.requires_grad_() for s in states], leaves, sizes, given, engine=engine, recompute=recompute)
    )


@pytest.mark.parametrize("cell", PLAIN)
def test_opcheck_from_zeros(cell: str) -> None:
    (x, *rest), _, _ = arguments(cell, 3, 2, 4, 5)
    leaves, zeros = [None if t is None else t.requires_grad_() for t in rest[:6]], [torch.zeros_like(t) for t in rest[6:]]
    op = torch.ops.rnnkernels.sequence.default
    torch.library.opcheck(op, call(cell, x.requires_grad_(), [], leaves, None, []))
    for a, b in zip(op(*call(cell, x, None, leaves, None, [])), op(*call(cell, x, zeros, leaves, None, [])), strict=True):
        assert torch.equal(a, b)
    found = torch.autograd.grad(op(*call(cell, x, None, leaves, None, []))[0].sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(op(*call(cell, x, zeros, leaves, None, []))[0].sum(), x))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("cell", [*PLAIN, "lstm_zoneout_dropout", "lstm_cell_norm_gate_norm", "gru_layer_norm"])
def test_compiled_is_eager(cell: str, recompute: bool) -> None:
    case = arguments(cell, 4, 3, 5, 6)
    torch._dynamo.reset()
    sequence = functools.partial(ours, recompute=recompute)
    compiled = torch.compile(sequence, fullgraph=True, backend="aot_eager", dynamic=True)
    for a, b in zip(run(compiled, cell, *case), run(ours, cell, *case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_engine_that_cannot_run_it_is_refused() -> None:
    tensors, _, _ = arguments("gru", 4, 3, 5, 6)
    x, w_ih, w_hh, *_ = tensors
    with pytest.raises(ValueError, match="engine: expected one of auto, .*, got 'warp'"):
        ops.sequence("gru", x, None, w_ih, w_hh, engine="warp")
    for engine in ("persistent", "persistent_3xtf32"):
        with pytest.raises(RuntimeError, match=f"'{engine}' runs on a CUDA device, and input is on the CPU"):
            ops.sequence("gru", x, None, w_ih, w_hh, engine=engine)
    with pytest.raises(RuntimeError, match="torch.nn has no cell srn_sigmoid"):
        ops.sequence("srn_sigmoid", x, None, w_ih[:6], w_hh[:6], engine="torch")


@pytest.mark.skipif(ops.build_info()["cuda"] is None, reason="this build has no CUDA part")
def test_a_device_older_than_the_build_is_told_so() -> None:
    assert engines._too_old(8, 0) == engines._too_old(12, 0) == ""
    assert engines._too_old(7, 5).startswith("it has compute capability 7.5, and this build is for 8.0 and later")


def test_meta_tensors_have_shapes() -> None:
    arguments_ = {
        k: [s.to("meta") for s in v] if k == "states" else v.to("meta") if isinstance(v, Tensor) else v for k, v in good().items()
    }
    output, h, c = ops.sequence(**arguments_)
    assert output.is_meta
    assert (output.shape, h.shape, c.shape) == ((4, 3, 6), (3, 6), (3, 6))


@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "3"}, {"OMP_DYNAMIC": "true"}], ids=["limit", "dynamic"])
def test_a_team_smaller_than_planned(environment: dict[str, str]) -> None:
    import subprocess
    import sys

    program = """
import torch
from rnnkernels import ops
torch.manual_seed(0)
x, u = torch.randn(20, 1, 256).mul(4).round(), torch.randn(768, 256) / 16
results = []
for threads in (1, 4, 8):
    torch.set_num_threads(threads)
    results.append(ops.sequence("gru", x, None, torch.ones(768, 256) / 64, u)[0])
assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
"""
    subprocess.run([sys.executable, "-c", program], env={**os.environ, **environment}, check=True, timeout=120)


def test_batch_sizes_of_any_stride() -> None:
    (x, w_ih, w_hh, b_ih, b_hh, _, _, h), sizes, _ = arguments("gru", 5, 4, 3, 6, ragged=True)
    assert sizes is not None
    strided = torch.full((2 * len(sizes),), 99)
    strided[::2] = sizes
    found = ops.sequence("gru", x, [h], w_ih, w_hh, b_ih, b_hh, batch_sizes=strided[::2])
    expected = ops.sequence("gru", x, [h], w_ih, w_hh, b_ih, b_hh, batch_sizes=sizes)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_default_device_does_not_matter() -> None:
    case = arguments("lstm", 4, 3, 5, 6, ragged=True)
    expected = run(ops.sequence, "lstm", *case)
    ops.cpu.thread.buffers = []
    torch.set_default_device("meta")
    try:
        found = run(ops.sequence, "lstm", *case)
    finally:
        torch.set_default_device(None)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_output_may_be_changed_in_place_without_gradients() -> None:
    output = ops.sequence(**good())[0]
    assert output._base is None
    x, w_ih, w_hh = torch.randn(4, 3, 5, requires_grad=True), torch.randn(6, 5), torch.randn(6, 6)
    ops.sequence("srn_tanh", x, None, w_ih, w_hh)[0].relu_()


@pytest.mark.parametrize("cell", ["lstm", "gru", "srn_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_takes_any_mixture(cell: str, dtype: torch.dtype) -> None:
    (x, w_ih, w_hh, b_ih, b_hh, _, _, *states), _, _ = arguments(cell, 4, 3, 5, 6, dtype=torch.float32)
    with torch.autocast("cpu"):
        output = ops.sequence(cell, x.to(dtype), states, w_ih.requires_grad_(), w_hh, b_ih, b_hh)[0]
    assert output.dtype == (states[0].dtype if cell == "gru" else torch.bfloat16)
    output.float().sum().backward()
    assert w_ih.grad is not None
    assert w_ih.grad.dtype == torch.float32


@pytest.mark.parametrize("engine", ["cpu", "stepwise", "torch"])
def test_autocast_does_not_reach_into_an_engine(engine: str) -> None:
    tensors, _, upstream = arguments("gru", 4, 3, 5, 6, dtype=torch.float32)
    plain = run(functools.partial(ops.sequence, engine=engine), "gru", tensors, None, upstream)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    wanted = [leaf for leaf in leaves if leaf is not None]
    results = ops.sequence("gru", leaves[0], leaves[7:], *leaves[1:7], engine=engine)
    with torch.autocast("cpu"):
        grads = torch.autograd.grad(results, wanted, upstream)
        inside = ops.sequence("gru", leaves[0], leaves[7:], *leaves[1:7], engine=engine)
    if engine != "torch":  # whose products are autocast's to choose
        for a, b in zip((*inside, *grads), plain, strict=True):
            assert torch.equal(a, b)
    assert [g.dtype for g in grads] == [torch.float32] * len(wanted)
    with torch.autocast("cpu"):
        half = ops.sequence("lstm", *_lstm_in_mixed_dtypes(), engine=engine)
    assert half[0].dtype == torch.bfloat16


def _lstm_in_mixed_dtypes() -> list[Any]:
    (x, *rest), _, _ = arguments("lstm", 4, 3, 5, 6, dtype=torch.float32)
    return [x.bfloat16(), rest[6:], *rest[:6]]


def test_the_backward_op_checks_its_arguments() -> None:
    (x, w_ih, w_hh, b_ih, b_hh, _, _, h), _, _ = arguments("gru", 4, 3, 5, 6)
    output, kept = torch.zeros(4, 3, 6, dtype=x.dtype), torch.zeros(12, 24, dtype=x.dtype)
    needs = [True] * 5 + [False, False, True]
    arguments_of_forward = call("gru", x, [h], (w_ih, w_hh, b_ih, b_hh, None, None), None, ())

    def back(output: Tensor, kept: Tensor, needs: list[bool]) -> Any:
        return torch.ops.rnnkernels.sequence_backward(*arguments_of_forward, needs, [output], [None], output, kept, [])

    back(output, kept, needs)
    with pytest.raises(RuntimeError, match=r"output: expected shape \(4, 3, 6\)"):
        back(output[:2], kept, needs)
    with pytest.raises(RuntimeError, match=r"kept: expected shape \(12, 24\)"):
        back(output, kept[:5], needs)
    with pytest.raises(RuntimeError, match="needs"):
        back(output, kept, needs[:3])


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("cell", ops.CELLS)
@pytest.mark.usefixtures("poison")
def test_an_input_of_no_features(cell: str, steps: int) -> None:
    case = arguments(cell, steps, 3, 0, 6)
    for a, b in zip(run(ours, cell, *case), run(oracle, cell, *case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_autocast_does_not_cast_integers() -> None:
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="input: expected dtype .* got torch.int64"):
        ops.sequence(**{**good(), "input": torch.zeros(4, 3, 5, dtype=torch.int64)})
