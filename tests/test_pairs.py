"""Two directions of a layer side by side, on a thread each: the bits of one after the other, for every option that goes with it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import rnnkernels
from rnnkernels import ops
from rnnkernels.ops import steps as steps_engine

pytestmark = pytest.mark.usefixtures("poison", "two_threads")


@contextlib.contextmanager
def apart(monkeypatch: pytest.MonkeyPatch, gains: bool) -> Iterator[list[int]]:
    """Whether they run side by side, and how many did."""
    runs, run_all = [], ops.cpu._run_all

    def counted(calls: list[Any]) -> None:
        runs.append(len(calls))
        run_all(calls)

    with monkeypatch.context() as patch:
        patch.setattr(ops.cpu._C, "gains_apart", lambda *_: gains)
        patch.setattr(ops.cpu, "_run_all", counted)
        yield runs


def results(layer: Any, x: Any, upstream: Tensor | None, **options: Any) -> list[Tensor]:
    layer.zero_grad()
    output, final, *states = layer(x, **options)
    output = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
    finals = final if isinstance(final, tuple) else (final,)
    found = [output, *finals, *(states[0] if states else ())]
    if upstream is None:
        return found
    leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
    grads = torch.autograd.grad(output, leaves, upstream, retain_graph=True)
    again = torch.autograd.grad(output, leaves, upstream)
    assert all(map(torch.equal, grads, again))
    return [t.detach() for t in (*found, *grads)]


LAYERS = {
    "LSTM": lambda: rnnkernels.LSTM(5, 7, bidirectional=True),
    "GRU": lambda: rnnkernels.GRU(5, 7, num_layers=2, bidirectional=True, bias=False, dtype=torch.float64),
    "RNN": lambda: rnnkernels.RNN(5, 7, bidirectional=True, dtype=torch.bfloat16),
    "projected": lambda: rnnkernels.LSTM(5, 7, bidirectional=True, proj_size=3),
    "peephole": lambda: rnnkernels.PeepholeLSTM(5, 7, bidirectional=True),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bits_are_those_of_one_after_the_other(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    dtype = layer.weight_ih_l0.dtype
    lengths, mask = torch.tensor([9, 0, 4]), torch.rand(9, 3) < 0.2
    for options in ({}, {"lengths": lengths, "reset_mask": mask}, {"return_states": True}):
        x = torch.randn(9, 3, 5, dtype=dtype, requires_grad=training)
        upstream = torch.randn(9, 3, 2 * (3 if name == "projected" else 7), dtype=dtype) if training else None
        with contextlib.nullcontext() if training else torch.no_grad():
            with apart(monkeypatch, True) as runs:
                mine = results(layer, x, upstream, **options)
            with apart(monkeypatch, False) as others:
                theirs = results(layer, x, upstream, **options)
        assert set(runs) == {2}
        assert set(others) <= {1}  # a call like the one before goes straight to its kernel
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("gains", [True, False], ids=["side by side", "in turns"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("steps", [1, 9])
@pytest.mark.parametrize("name", LAYERS)
def test_calls_that_repeat_one(name: str, steps: int, training: bool, gains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    dtype, width, rows = layer.weight_ih_l0.dtype, 3 if name == "projected" else 7, layer.num_layers * 2
    stacks, stack = [], ops.pair
    monkeypatch.setattr(ops, "pair", lambda *args: stacks.append(1) or stack(*args))

    def call(layer: Any, given: bool) -> list[Tensor]:
        x = torch.randn(steps, 3, 5, dtype=dtype, requires_grad=training, generator=torch.Generator().manual_seed(1))
        h, c = torch.ones(rows, 3, width, dtype=dtype), torch.ones(rows, 3, 7, dtype=dtype)
        hx = None if not given else (h, c) if "LSTM" in type(layer).__name__ else h
        upstream = torch.ones(steps, 3, 2 * width, dtype=dtype) if training else None
        with apart(monkeypatch, gains), contextlib.nullcontext() if training else torch.no_grad():
            return results(layer, x, upstream, hx=hx)

    for change in (lambda w: None, lambda w: w.data.mul_(0.5), lambda w: setattr(w, "data", w.data.clone())):
        for w in layer.parameters():
            change(w)
        for given in (False, True) * 3:
            assert all(map(torch.equal, call(layer, given), call(copy.deepcopy(layer), given)))
    stacks.clear()
    call(layer, True)
    assert not stacks
    for one in (layer.weight_hh_l0, layer.weight_hh_l0_reverse):  # gradients of one direction's own alone, or of the input alone
        one.requires_grad_(False)
        assert all(map(torch.equal, call(layer, True), call(copy.deepcopy(layer), True)))
    torch.set_num_threads(1)
    assert all(map(torch.equal, call(layer, True), call(copy.deepcopy(layer), True)))


def test_what_cannot_wait_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 2, 5)
    recomputing = rnnkernels.LSTM(5, 7, bidirectional=True, recompute=True)
    zoned = rnnkernels.LSTM(5, 7, bidirectional=True, zoneout=0.1)
    with apart(monkeypatch, True) as runs:
        recomputing(x)[0].sum().backward()
        zoned(x)[0].sum().backward()
        rnnkernels.GRU(5, 7, bidirectional=True)(x, reset_mask=torch.zeros(6, 2, dtype=torch.bool), reset_state=torch.ones(2, 7))
        layer = rnnkernels.GRU(5, 7, bidirectional=True)
        layer.weight_ih_l0_reverse = torch.nn.Parameter(torch.randn(21, 5, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
    assert set(runs) <= {1, 2}
    output, _ = rnnkernels.LSTM(5, 7, bidirectional=True)(x)  # an error leaves nobody waiting
    assert output.isfinite().all()


def test_frozen_directions_second_derivatives_and_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = rnnkernels.GRU(5, 7, bidirectional=True).double()
    x = torch.randn(6, 2, 5, dtype=torch.float64, requires_grad=True)

    def penalty() -> list[Tensor]:
        (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.pow(2).sum(), [x, *layer.parameters()], materialize_grads=True))

    found = []
    for gains in (True, False):
        with apart(monkeypatch, gains), torch.autograd.graph.save_on_cpu():
            layer.requires_grad_(True)
            found.append(penalty())
            for p in (layer.weight_hh_l0_reverse, layer.bias_ih_l0):
                p.requires_grad_(False)
            found[-1] += torch.autograd.grad(layer(x)[0].sum(), [layer.weight_hh_l0, layer.weight_ih_l0_reverse])
            layer.requires_grad_(False)
            found[-1] += torch.autograd.grad(layer(x.detach().requires_grad_())[1].sum(), [x], allow_unused=True, materialize_grads=True)
    assert all(map(torch.equal, *found))


def test_weights_that_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = rnnkernels.LSTM(5, 7, bidirectional=True, weight_dtype=torch.bfloat16), torch.randn(6, 2, 5)
    with torch.no_grad():
        with apart(monkeypatch, True) as runs:
            found = [layer(x)[0], layer(x)[0]]
        layer.flatten_parameters()
        with apart(monkeypatch, False):
            expected = layer(x)[0]
    assert set(runs) == {2}
    assert all(torch.equal(y, expected) for y in found)


@pytest.mark.parametrize("gains", [True, False], ids=["side by side", "in turns"])
def test_narrow_weights_do_not_train(gains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor once calls of these shapes are known, this layer's without gradients and another's with them."""
    plain, narrow = (rnnkernels.LSTM(5, 7, bidirectional=True, weight_dtype=dtype) for dtype in (None, torch.int8))
    x = torch.randn(6, 2, 5)
    with apart(monkeypatch, gains):
        for _ in range(2):
            with torch.no_grad():
                narrow(x)
            plain(x)
            with pytest.raises(RuntimeError, match="weight_dtype"):
                narrow(x)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = rnnkernels.LSTM(2, 3, bidirectional=True).double()
    x, h, c = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2, 2), (2, 2, 3), (2, 2, 3)))
    with apart(monkeypatch, True) as runs:
        assert torch.autograd.gradcheck(lambda x, h, c, *_: (layer(x, (h, c))[0], *layer(x, (h, c))[1]), (x, h, c, *layer.parameters()))
    assert set(runs) == {2}


@contextlib.contextmanager
def as_if_persistent(monkeypatch: pytest.MonkeyPatch, gains: bool) -> Iterator[list[int]]:
    """The stepwise engine in the persistent one's place: its walks wait to be launched. How many were launched at a time."""
    launches: list[int] = []
    walk, walk_back, run = steps_engine._walk, steps_engine._walk_back, steps_engine._together.run
    place = lambda: torch.empty(0), (-1, 0)

    class Module:
        """The compiled module, with what a build for GPUs has beyond it."""

        def __getattr__(self, name: str) -> Any:
            return getattr(ops._C, name)

        def cuda_gains_together(self, *_: Any) -> bool:
            return gains

        def cuda_workspace_bytes(self, task: Any, backward: bool, device: int, sequences: int) -> int:
            return 8

        def cuda_forward(self, calls: list[Any], *_: Any) -> None:
            launches.append(len(calls))
            with torch.autocast("cpu", enabled=False):  # a kernel hears of none
                for call in calls:
                    call()

        cuda_backward = cuda_forward

    def together(s: Any, training: bool, gates: Tensor, *rest: Any) -> list[Tensor]:
        final = [gates.new_full((s.batch, width), torch.nan) for width in s.widths]

        def call() -> None:
            for to, found in zip(final, walk(s, training, gates, *rest), strict=True):
                to.copy_(found)

        run(steps_engine._Launch(None, False, lambda _: call, *place), None)
        return final

    def back_together(*arguments: Any) -> None:
        *of_walk, done = arguments
        run(steps_engine._Launch(None, True, lambda _: lambda: walk_back(*of_walk), *place), done)

    with monkeypatch.context() as patch:
        steps_engine._gains.cache_clear()
        patch.setattr(steps_engine, "_C", Module())
        patch.setattr(steps_engine, "PERSISTENT", ("stepwise",))
        patch.setattr(steps_engine, "_walk_together", together)
        patch.setattr(steps_engine, "_walk_back_together", back_together)
        yield launches
    steps_engine._gains.cache_clear()


@pytest.mark.parametrize("name", LAYERS)
def test_two_directions_are_one_launch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    layer.engine = "stepwise"
    x = torch.randn(9, 3, 5, dtype=layer.weight_ih_l0.dtype, requires_grad=True)
    upstream = torch.randn(9, 3, 2 * (3 if name == "projected" else 7), dtype=x.dtype)
    expected = results(layer, x, upstream)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, [9, 4, 2])
    of_packed = results(layer, packed, None)
    for gains in (True, False):
        with as_if_persistent(monkeypatch, gains) as launches:
            found = results(layer, x, upstream)
            for a, b in zip(results(layer, packed, None), of_packed, strict=True):
                assert torch.equal(a, b)
        assert set(launches) == ({2} if gains else {1})
        assert all(map(torch.equal, found, expected))


def test_what_follows_a_launch_does_not_hear_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = rnnkernels.GRU(5, 7, bidirectional=True, engine="stepwise"), torch.randn(6, 2, 5)  # whose input keeps its dtype on a CPU
    upstream = torch.randn(6, 2, 14)

    def gradients() -> tuple[Tensor, ...]:
        layer.zero_grad()
        with torch.autocast("cpu"):
            output, _ = layer(x)
            return torch.autograd.grad(output, list(layer.parameters()), upstream)

    expected = gradients()
    with as_if_persistent(monkeypatch, True) as launches:
        found = gradients()
    assert launches == [2, 2]
    assert all(map(torch.equal, found, expected))


def test_what_follows_a_launch_of_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight_ih, weight_hh = torch.randn(6, 2, 5, requires_grad=True), torch.randn(21, 5), torch.randn(21, 7, requires_grad=True)
    upstream = torch.randn(6, 2, 7)
    calls = [ops.Call("gru", x, None, weight_ih, weight_hh, *[None] * 4, reverse=back, engine="stepwise") for back in (False, True)]
    expected = torch.autograd.grad(ops.run(calls[0])[0], [x, weight_hh], upstream)
    with as_if_persistent(monkeypatch, True) as launches:
        (output, _), _ = ops.pair(calls)
        found = torch.autograd.grad(output, [x, weight_hh], upstream)
        layer = rnnkernels.LSTM(5, 7, bidirectional=True, engine="stepwise", recompute=True)  # backward reads what its own forward gives
        layer(x)[0].sum().backward()
        layer(x[:, :0])[0].sum().backward()
    assert launches[:2] == [2, 1]
    assert 2 not in launches[2:]
    assert all(map(torch.equal, found, expected))


def test_a_checkpoint_saves_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the other direction's way is not known yet when the first one's is: neither takes the short one."""
    layer, x = rnnkernels.GRU(3, 5, bidirectional=True), torch.randn(3, 4, 3)
    for gains in (False, False, False, True):
        h = torch.randn(2, 1, 5, requires_grad=True)
        with apart(monkeypatch, gains), torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
            y = torch.utils.checkpoint.checkpoint(lambda x, h: layer(x, h)[0], x, h.expand(2, 4, 5), use_reentrant=False)
        y.sum().backward()
        assert h.grad is not None
