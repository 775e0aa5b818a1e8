"""Weights that stay packed between calls, and narrower ones: against the same layer with weights that were rounded beforehand."""

import copy
import itertools
import pickle
import threading
from typing import Any

import pytest
import torch
from conftest import ISAS
from torch import Tensor, nn

import rnnkernels
from rnnkernels import ops

T, B, I, H = 7, 3, 5, 37  # noqa: E741
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "GRU": ("GRU", {"bias": False}),
    "LSTM": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "LSTM projected": ("LSTM", {"proj_size": 11}),
    "reset before": ("GRUResetBefore", {}),
    "layer norm": ("LSTM", {"layer_norm": "gates"}),
}
UNASKED = {"clockwork": ("ClockworkRNN", {"periods": [1, 2, 4]})}  # these take no weight_dtype
layers = pytest.mark.parametrize("kind", LAYERS)
NARROW = [torch.bfloat16, torch.int8]
narrow = pytest.mark.parametrize("weight_dtype", NARROW, ids=str)


def layer_of(kind: str, *sizes: int, **options: Any) -> Any:
    name, own = (LAYERS | UNASKED)[kind]
    torch.manual_seed(0)
    return getattr(rnnkernels, name)(*(sizes or (I, H)), **own, **options).eval()


def rounded(layer: Any, weight_dtype: torch.dtype) -> Any:
    """The layer with what narrower weights come to."""
    found = copy.deepcopy(layer)
    found.weight_dtype = None
    for name, weight in found.named_parameters():
        if name.startswith(("weight_hh", "weight_hr")) and weight_dtype != weight.dtype:
            factor = weight.detach().float().abs().amax(1, keepdim=True) / 127
            steps = weight / factor
            whole = (steps.abs() + 0.5).floor() * steps.sign() * factor  # halves away from zero, as the kernels have them
            weight.data = weight.data.bfloat16().to(weight.dtype) if weight_dtype == torch.bfloat16 else whole.to(weight.dtype).detach()
    return found


def run(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        output, final = layer(x, *args, **kwargs)
    return [output, *(final if isinstance(final, tuple) else (final,))]


@layers
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore", "poison")
def test_the_bits_are_those_of_rounded_weights(kind: str, weight_dtype: torch.dtype, isa: str) -> None:
    """Packed, found, and cut for other batches; one product longer than a chain of sums."""
    ops.set_isa(isa)
    for hidden, batches in ((H, (1, 3, 17)), (300, (3,))):
        kept = layer_of(kind, I, hidden, weight_dtype=weight_dtype)
        plain = rounded(kept, weight_dtype)
        for batch, steps in itertools.product(batches, (T, 2, T)):
            x = torch.randn(steps, batch, I)
            for a, b in zip(run(kept, x), run(plain, x), strict=True):
                assert torch.equal(a, b)


@layers
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore", "poison")
def test_int8_is_that_of_rounded_weights(kind: str, isa: str) -> None:
    ops.set_isa(isa)
    for hidden in (H, 300):
        kept = layer_of(kind, I, hidden, weight_dtype=torch.int8)
        plain, x = rounded(kept, torch.int8), torch.randn(T, B, I)
        for _ in range(2):
            torch.testing.assert_close(run(kept, x), run(plain, x), rtol=1e-5, atol=1e-5)


@narrow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(weight_dtype: torch.dtype, dtype: torch.dtype) -> None:
    kept = layer_of("GRU", dtype=dtype, weight_dtype=weight_dtype)
    x = torch.randn(T, B, I).to(dtype)
    torch.testing.assert_close(run(kept, x), run(rounded(kept, weight_dtype), x), rtol=2e-2, atol=2e-2)


def test_the_error_that_the_docstring_states() -> None:
    """Of each weight; what becomes of it over a sequence is the cell's."""
    plain = layer_of("LSTM", 64, 128)
    for weight_dtype, bound in ((torch.bfloat16, 2.0**-8), (torch.int8, 1 / 254)):
        for name, weight in rounded(plain, weight_dtype).named_parameters():
            own = plain.get_parameter(name)
            of = own.abs() if weight_dtype == torch.bfloat16 else own.abs().amax(-1, keepdim=True)
            assert bool(((weight - own).abs() <= bound * of * (1 + 1e-5)).all()), name
        x = torch.randn(50, 4, 64)
        narrower, exact = run(layer_of("LSTM", 64, 128, weight_dtype=weight_dtype), x), run(plain, x)
        assert max(float((a - b).abs().max()) for a, b in zip(narrower, exact, strict=True)) < 0.02


@pytest.mark.parametrize("weight_dtype", [torch.float32, *NARROW], ids=str)
def test_changes_are_noticed(weight_dtype: torch.dtype) -> None:
    kept, x = layer_of("LSTM", weight_dtype=weight_dtype), torch.randn(T, B, I)

    def check() -> None:
        fresh = layer_of("LSTM", weight_dtype=weight_dtype)
        fresh.load_state_dict(kept.state_dict())
        for a, b in zip(run(kept, x), run(fresh, x), strict=True):
            assert torch.equal(a, b)

    check()
    with torch.no_grad():
        kept.weight_hh_l0.mul_(0.5)
    check()
    kept.load_state_dict({k: v + 0.01 for k, v in kept.state_dict().items()})
    check()
    kept.weight_hh_l1 = nn.Parameter(torch.randn(4 * H, H))
    check()
    kept.weight_ih_l0.data = torch.randn(4 * H, I)
    check()
    for _ in range(3):  # each where the one before the last lay, were that free
        kept.weight_ih_l0.data = torch.randn(4 * H, I)
        kept.weight_ih_l0.data = torch.randn(4 * H, I)
        check()
    kept.weight_hh_l0.data.mul_(2)  # which torch does not count
    kept.flatten_parameters()
    check()
    del kept.weight_hh_l0  # computed anew at each call, perhaps where the last one lay
    for scale in (0.1, 0.2, 0.3):
        kept.weight_hh_l0 = torch.randn(4 * H, H) * scale
        first = run(kept, x)
        kept.flatten_parameters()
        for a, b in zip(first, run(kept, x), strict=True):
            assert torch.equal(a, b)


@narrow
def test_copies_pack_for_themselves(weight_dtype: torch.dtype) -> None:
    kept, x = layer_of("GRU", weight_dtype=weight_dtype), torch.randn(T, B, I)
    expected = run(kept, x)
    for other in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert other.weight_dtype == weight_dtype
        for a, b in zip(run(other, x), expected, strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            other.weight_hh_l0.zero_()
        for a, b in zip(run(kept, x), expected, strict=True):
            assert torch.equal(a, b)


@narrow
@pytest.mark.parametrize("lengths", [[7, 0, 3], None], ids=["lengths", "packed"])
def test_ragged_batches(weight_dtype: torch.dtype, lengths: list[int] | None) -> None:
    kept, x = layer_of("GRU", weight_dtype=weight_dtype), torch.randn(T, B, I)
    plain = rounded(kept, weight_dtype)
    if lengths is not None:
        options = {"lengths": torch.tensor(lengths), "reset_mask": torch.rand(T, B) < 0.3}
        torch.testing.assert_close(run(kept, x, **options), run(plain, x, **options), rtol=1e-5, atol=1e-5)
        return
    packed = nn.utils.rnn.pack_padded_sequence(x, [7, 5, 2])
    a, b = (run(layer, packed) for layer in (kept, plain))
    torch.testing.assert_close([a[0].data, a[1]], [b[0].data, b[1]], rtol=1e-5, atol=1e-5)


@narrow
def test_streams_have_the_bits_of_the_layer(weight_dtype: torch.dtype) -> None:
    kept, x = layer_of("LSTM projected", weight_dtype=weight_dtype), torch.randn(T, B, I)
    stream = kept.stream(batch_size=B)
    assert torch.equal(torch.stack([stream.step(x[t]) for t in range(T)]), run(kept, x)[0])


@narrow
def test_one_step_and_nothing(weight_dtype: torch.dtype) -> None:
    kept = layer_of("RNN", weight_dtype=weight_dtype)
    plain = rounded(kept, weight_dtype)
    for shape in ((1, 1, I), (1, 4, I), (3, 0, I), (5, I)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(kept, x), run(plain, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@narrow
def test_what_is_not_finite_stays_so(weight_dtype: torch.dtype, bad: float) -> None:
    kept = layer_of("RNN", weight_dtype=weight_dtype)
    with torch.no_grad():
        kept.weight_hh_l0[3, 1] = bad
    states = torch.ones(1, 1, H)
    output, _ = run(kept, torch.zeros(1, 1, I), states)
    expected = 1.0 if weight_dtype == torch.bfloat16 and bad == float("inf") else float("nan")
    torch.testing.assert_close(output[0, 0, 3], torch.tensor(expected), equal_nan=True)
    assert bool(output[0, 0, [0, 1, 2, 4]].isfinite().all())


@pytest.mark.parametrize("size", [1e-39, 1e-37, 3.402e38], ids=str)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore")
def test_int8_of_the_smallest_and_largest(size: float, isa: str) -> None:
    ops.set_isa(isa)
    kept = rnnkernels.RNN(1, 3, nonlinearity="identity", bias=False, weight_dtype=torch.int8)
    with torch.no_grad():
        kept.weight_hh_l0.copy_(torch.eye(3) * size)
    start = torch.full((1, 1, 3), 1e30 if size < 1 else 1e-3)
    output, _ = run(kept, torch.zeros(1, 1, 1), start)
    torch.testing.assert_close(output, start * size, rtol=1e-2, atol=0)


def test_another_thread_that_replaces_the_weights() -> None:
    """Between a call's first look at what is packed and its own packing, at every point where Python could switch."""
    kept, x = layer_of("GRU", weight_dtype=torch.float32), torch.randn(T, B, I)
    first, second = kept.weight_hh_l0, nn.Parameter(torch.randn(3 * H, H))
    own = kept._kept()[0]

    class Switching(type(own)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_kept" and kept.weight_hh_l0 is first:
                kept.weight_hh_l0 = second
                run(kept, x)

    own.__class__ = Switching
    run(kept, x)
    expected = rnnkernels.GRU(I, H, bias=False)
    expected.load_state_dict(kept.state_dict())
    assert kept.weight_hh_l0 is second
    for a, b in zip(run(kept, x), run(expected, x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", LAYERS | UNASKED)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore", "poison")
def test_what_is_kept_unasked_follows_every_number(kind: str, isa: str) -> None:
    """However it is changed: torch does not count what goes by way of ``.data``."""
    ops.set_isa(isa)
    layer, x = layer_of(kind, *((I, 36) if kind in UNASKED else ())), torch.randn(T, B, I)
    before = run(layer, x)
    for name, weight in layer.named_parameters():
        for place in (0, weight.numel() // 2 + weight.shape[-1] // 2 - 1, -1):  # of a clockwork's matrix none that nobody reads
            weight.data.view(-1)[place] += 0.5
            after = run(layer, x)
            for a, b in zip(after, run(copy.deepcopy(layer), x), strict=True):
                assert torch.equal(a, b)
            assert not all(map(torch.equal, before, after)), f"{name}[{place}]"
            before = after


def test_what_is_kept_unasked_is_found_and_bounded() -> None:
    layer = layer_of("GRU")
    for batch in (1, 17, 3, 1):
        run(layer, torch.randn(T, batch, I))
    (own,) = layer._kept()
    assert 1 <= len(own._found) <= 2
    kept = {shape: memory.data_ptr() for shape, memory in own._found.items()}
    run(layer, torch.randn(T, 1, I))
    assert {shape: memory.data_ptr() for shape, memory in own._found.items()} == kept
    large = rnnkernels.LSTM(8, 2048).eval()
    run(large, torch.randn(2, 1, 8))
    assert not large._kept()[0]._found, "more than 64 MB"
    fresh = layer_of("GRU")
    fresh(torch.randn(T, B, I))[0].sum().backward()  # training packs for itself
    assert not fresh._kept()[0]._found


def test_what_is_kept_unasked_follows_the_sizes() -> None:
    """Of weights that somebody puts in the place of others."""
    layer = rnnkernels.GRU(I, H).eval()
    first, wide = layer.weight_ih_l0, nn.Parameter(torch.randn(3 * H, 5000))
    for _ in range(2):
        for weight in (first, wide):
            layer.weight_ih_l0, layer.input_size = weight, weight.shape[1]
            x = torch.randn(T, B, weight.shape[1])
            assert all(map(torch.equal, run(layer, x), run(copy.deepcopy(layer), x)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.usefixtures("restore")
def test_what_is_kept_unasked_follows_the_dtype(isa: str) -> None:
    ops.set_isa(isa)
    layer = layer_of("LSTM")
    singles = layer.state_dict()
    for dtype in (torch.float32, torch.float64, torch.float16, torch.float32, torch.float64):
        layer.load_state_dict({name: weight.to(dtype) for name, weight in singles.items()}, assign=True)
        x = torch.randn(T, B, I).to(dtype)
        assert all(map(torch.equal, run(layer, x), run(copy.deepcopy(layer), x)))


@pytest.mark.usefixtures("restore")
def test_what_is_kept_unasked_follows_the_instruction_set() -> None:
    layer, x = layer_of("GRU"), torch.randn(T, B, I)
    for isa in (*ISAS, *ISAS):
        ops.set_isa(isa)
        assert all(map(torch.equal, run(layer, x), run(copy.deepcopy(layer), x)))


def test_threads_that_share_a_layer() -> None:
    layer, wrong = layer_of("LSTM"), list[int]()
    inputs = [torch.randn(T, batch, I) for batch in (1, 1, 3, 17)]
    expected = [run(copy.deepcopy(layer), x) for x in inputs]

    def work(x: Tensor, of: list[Tensor]) -> None:
        wrong.extend(len(x) for _ in range(50) if not all(map(torch.equal, run(layer, x), of)))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_refusals() -> None:
    x = torch.randn(T, B, I)
    kept = layer_of("LSTM", weight_dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"weight_dtype: torch.bfloat16 is for inference, .*use torch.no_grad\(\)"):
        kept(x)
    kept.requires_grad_(False)
    kept(x)
    with pytest.raises(
        ValueError, match=r"weight_dtype: expected torch.float32 as the layer's, torch.bfloat16 or torch.int8, got torch.float16"
    ):
        layer_of("LSTM", weight_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weight_dtype: expected torch.float64, got torch.int8"):
        layer_of("LSTM", dtype=torch.float64, weight_dtype=torch.int8)
    for engine, lengths in itertools.product(("stepwise", "torch", "traced"), (None, torch.tensor([7, 2, 3]))):
        with pytest.raises(RuntimeError, match=f"weight_dtype: expected None but for the CPU engine, .*{engine}"):
            run(layer_of("LSTM", weight_dtype=torch.int8, engine=engine), x, lengths=lengths)
    with pytest.raises(RuntimeError, match="weight_dtype: expected None under a transform"):
        torch.func.vmap(lambda x: run(kept, x)[0])(x.unsqueeze(0))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="weight_dtype: expected None where autocast makes"):
        run(layer_of("LSTM", weight_dtype=torch.float32), x)
    with pytest.raises(RuntimeError, match=r"weight_dtype: torch.int8 is for inference"):
        rnnkernels.explain(layer_of("GRU", weight_dtype=torch.int8), x)
    with torch.no_grad():
        plans = rnnkernels.explain(layer_of("GRU", weight_dtype=torch.int8), x[:1]).plans
    assert "by torch" not in str(plans[0])
    with pytest.raises(RuntimeError, match="weight_dtype: expected None but for the CPU engine, .*stepwise"):
        layer_of("GRU", weight_dtype=torch.int8, engine="stepwise").stream(1)
    clockwork = rnnkernels.ClockworkRNN(I, 8, periods=(1, 2), weight_dtype=torch.int8)
    with pytest.raises(ValueError, match="weight_dtype: expected None for a layer whose units take turns"):
        run(clockwork, x)
