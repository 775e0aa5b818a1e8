"""Which of several teams runs a call, found by trying."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import rnnkernels
from rnnkernels.ops import cpu
from rnnkernels.ops.choice import Choice


class Clock:
    """Time passes by calls alone."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def forward(self, choice: Choice, ns: Sequence[int], tokens: int = 1) -> int:
        return self._took(choice, choice.forward(), False, ns, tokens)

    def backward(self, choice: Choice, ns: Sequence[int]) -> int:
        return self._took(choice, choice.backward(), True, ns, 1)

    def _took(self, choice: Choice, way: int, backward: bool, ns: Sequence[int], tokens: int) -> int:
        self.now += ns[way] * tokens
        if choice.asks:
            choice.took(way, backward, ns[way] * tokens, tokens)
        return way


def settled(choice: Choice, clock: Clock, forward: Sequence[int], backward: Sequence[int] = ()) -> int:
    for _ in range(200):
        clock.forward(choice, forward)
        if backward:
            clock.backward(choice, backward)
        if not choice.asks:
            return choice.best
    raise AssertionError("no end of trying")


@pytest.mark.parametrize("quickest", range(3))
@pytest.mark.parametrize("ns", [100, 10_000, 10_000_000], ids="{} ns".format)
def test_the_quickest_is_taken(quickest: int, ns: int) -> None:
    clock = Clock()
    choice = Choice(3, clock)
    assert settled(choice, clock, [ns * (1 + (way != quickest)) for way in range(3)]) == quickest
    assert choice.tried


def test_the_first_of_a_try_does_not_count() -> None:
    clock = Clock()
    choice, last = Choice(2, clock), -1
    while not choice.tried:
        way = choice.forward()
        choice.took(way, False, (10_000_000, 9_000_000)[way] if way == last else (0, 90_000_000)[way])
        last = way
    assert choice.best == 1


def test_little_is_not_worth_a_change() -> None:
    clock = Clock()
    choice = Choice(2, clock)
    assert settled(choice, clock, [1000, 980]) == 0


def test_calls_of_different_lengths() -> None:
    """What counts is the time of a token: the slower way sees only short calls, the quicker one only long ones."""
    clock = Clock()
    choice = Choice(2, clock)
    while not choice.tried:
        clock.forward(choice, [1000, 800], (1, 7)[choice.forward()])
    assert choice.best == 1


def test_the_machine_changes() -> None:
    clock = Clock()
    choice = Choice(2, clock)
    assert settled(choice, clock, [1000, 2000]) == 0
    settling = clock.now
    while not choice.asks:
        assert clock.forward(choice, [2000, 1000]) == 0
    assert clock.now - settling >= Choice.REST
    assert settled(choice, clock, [2000, 1000]) == 1


def test_the_rest_is_measured_by_calls() -> None:
    """Not by what a program does between them."""
    clock = Clock()
    choice = Choice(2, clock)
    while choice.asks:
        clock.forward(choice, [1000, 2000])
        clock.now += 3600 * 10**9
    settling = clock.now
    while not choice.asks:
        clock.forward(choice, [1000, 2000])
    assert clock.now - settling < 2 * Choice.REST


@pytest.mark.parametrize("ns", [1000, 1_000_000, 100_000_000], ids="{} ns".format)
def test_tries_take_little(ns: int) -> None:
    clock = Clock()
    choice, took = Choice(2, clock), [0, 0]
    for _ in range(200_000 if ns == 1000 else 5000):
        began = clock.now
        took[clock.forward(choice, [ns, 2 * ns])] += clock.now - began
    assert took[1] < 0.04 * took[0]


@pytest.mark.parametrize("layers", [1, 6])
@pytest.mark.parametrize("ns", [1000, 10_000_000], ids="{} ns".format)
def test_backward_counts(layers: int, ns: int) -> None:
    clock = Clock()
    choice = Choice(2, clock)
    for _ in range(100):
        for _ in range(layers):
            clock.forward(choice, [ns, 2 * ns])
        for _ in range(layers):
            clock.backward(choice, [4 * ns, ns])
    assert choice.best == 1


def test_backward_takes_the_way_of_forward() -> None:
    clock = Clock()
    choice = Choice(2, clock)
    for _ in range(300):
        assert clock.forward(choice, [1000, 900]) == clock.backward(choice, [1000, 900])


def test_the_first_backward_call_begins_anew_with_the_best() -> None:
    clock = Clock()
    choice = Choice(2, clock)
    while choice.forward() == 0:
        choice.took(0, False, 1_000_000)
    assert choice.backward() == choice.best == 0


def test_who_comes_late_begins_no_round() -> None:
    """Two threads see that the last try is over; the first of them has ended it."""
    clock = Clock()
    choice = Choice(2, clock)
    settled(choice, clock, [1000, 900])
    choice._turn()
    assert not choice.asks


def test_no_more_backward() -> None:
    clock = Clock()
    choice = Choice(2, clock)
    assert settled(choice, clock, [1000, 900], [1000, 2000]) == 0
    for _ in range(200_000):
        clock.forward(choice, [1000, 900])
    assert choice.best == 1


def test_from_several_threads() -> None:
    choice = Choice(3)
    choice.REST = 1000  # type: ignore[misc]
    choice.SHARE = 0  # type: ignore[misc]

    def calls(_: int) -> set[int]:
        ways = set()
        for _ in range(5000):
            ways.add(way := choice.forward())
            if choice.asks:
                choice.took(way, False, 1000)
        return ways

    with ThreadPoolExecutor(4) as pool:
        assert set.union(*pool.map(calls, range(4))) == {0, 1, 2}


# ---- Of teams


@pytest.fixture(autouse=True)
def two_threads() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    cpu.forget()  # how long calls took in other tests
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("threads", [1, 2])
def test_explain_tells_what_was_found(monkeypatch: pytest.MonkeyPatch, threads: int, training: bool) -> None:
    layer, x = rnnkernels.LSTM(64, 64).requires_grad_(training), torch.randn(9, 1, 64)
    (plan,) = rnnkernels.explain(layer, x).plans
    assert "first of 2 ways to be tried" in plan.why
    took = Choice.took
    ways = {plan.threads: 0, 3 - plan.threads: 1}

    def told(self: Choice, way: int, backward: bool, ns: int, tokens: int = 1) -> None:
        took(self, way, backward, 1_000_000 * (1 + (way != ways[threads])), tokens)

    monkeypatch.setattr(Choice, "took", told)
    for _ in range(40):
        output, _ = layer(x)
        if training:
            output.sum().backward()
    (plan,) = rnnkernels.explain(layer, x).plans
    assert plan.threads == threads
    assert "the quickest of 2 ways when last tried" in plan.why


def test_explain_of_a_recomputed_sequence_tells_of_its_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Choice, "REST", 10**12)
    layer, x = rnnkernels.LSTM(64, 64, recompute=True), torch.randn(128, 16, 64)
    for _ in range(30):
        layer(x)[0].sum().backward()
    (plan,) = rnnkernels.explain(layer, x).plans
    assert "ways when last tried" in plan.why


def test_one_thread_has_no_choice() -> None:
    torch.set_num_threads(1)
    layer, x = rnnkernels.LSTM(64, 64), torch.randn(9, 1, 64)
    assert "ways" not in rnnkernels.explain(layer, x).plans[0].why


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_every_way_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, kind: str, training: bool) -> None:
    torch.set_num_threads(4)
    layer = getattr(rnnkernels, kind)(70, 70).requires_grad_(training)
    x, found = torch.randn(12, 24, 70, requires_grad=training), list[list[torch.Tensor]]()
    ways = set[tuple[int, int]]()  # how many threads, how many groups of rows
    for way in range(8):
        monkeypatch.setattr(Choice, "forward", lambda self, way=way: way % self.ways)
        monkeypatch.setattr(Choice, "backward", lambda self, way=way: way % self.ways)
        output, _ = layer(x)
        found.append([output, *torch.autograd.grad(output.square().sum(), (x, *layer.parameters()))] if training else [output])
        monkeypatch.setattr(Choice, "best", property(lambda self, way=way: way % self.ways, lambda self, best: None), raising=False)
        (plan,) = rnnkernels.explain(layer, x).plans
        ways.add((plan.threads, int(plan.schedule.split()[0])))
    assert len({threads for threads, _ in ways}) > 1 or len({rows for _, rows in ways}) > 1
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            assert torch.equal(a, b)
