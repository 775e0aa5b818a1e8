"""Which of several ways to run a call is the quickest: found by taking each for a few calls, now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from time import perf_counter_ns

__all__ = ["Choice"]


@dataclass
class _Try:
    """Of one way: by forward and backward how many calls told what they took, and the least of a token; nanoseconds of all calls."""

    way: int
    calls: list[int] = field(default_factory=lambda: [0, 0])
    least: list[float] = field(default_factory=lambda: [inf, inf])
    spent: int = 0


class Choice:
    """Among ``ways``, the first of which is the most likely. Calls of one kind share it: a forward call asks :meth:`forward` which way to
    take, the backward call that belongs to it :meth:`backward`, and while the choice ``asks`` both tell :meth:`took` how long that took.

    In a round each way is tried for some calls, the first of them uncounted, since its caches are cold and its threads asleep. Then the
    quickest is taken, and nothing is measured, until the next round: for at least ``REST`` nanoseconds and ``SHARE`` times as long as the
    round's calls took. By then the machine may be another, as where a hypervisor moves cores.

    >>> clock = iter(range(0, 10**9, 1000)).__next__
    >>> choice = Choice(2, clock)
    >>> for _ in range(2 * Choice.CALLS + 1):
    ...     way = choice.forward()
    ...     choice.took(way, False, [300_000, 200_000][way])
    >>> choice.forward(), choice.asks
    (1, False)
    """

    CALLS, MOST_CALLS, ENOUGH = 3, 64, 500_000  # of a try: at least, without a backward call at most; nanoseconds beyond which no more
    REST, SHARE = 100_000_000, 25
    MARGIN = 0.97  # what takes longer than so much of the time of the way that was taken is not worth a change

    def __init__(self, ways: int, clock: Callable[[], int] = perf_counter_ns) -> None:
        self.ways = ways
        self.best = 0  # as far as is known
        self.asks = True
        self.tried = False  # all ways, at least once
        self.trains = False  # backward calls have been seen
        self._clock = clock
        self._turning, self._until = threading.Lock(), 0
        self._tries: list[_Try] = []  # of this round, those that are over
        self._trying = _Try(self.best)
        self._begin()

    def forward(self) -> int:
        """The way that a forward call takes, and backward calls until the next one."""
        if self._is_over():
            self._turn()
        return self._trying.way

    def backward(self) -> int:
        """The way that a backward call takes."""
        if not self.trains:
            self.trains, self._afresh = True, True
            self._turn()
        return self._trying.way

    def took(self, way: int, backward: bool, ns: int, tokens: int = 1) -> None:
        """So many nanoseconds for a call that took this way; calls are compared by the time of a token."""
        trying = self._trying
        if not self.asks or way != trying.way:
            return
        calls = trying.calls[backward]
        trying.calls[backward] += 1
        trying.spent += ns
        if calls:
            trying.least[backward] = min(trying.least[backward], ns / max(tokens, 1))

    def _is_over(self) -> bool:
        """A try, or the rest after a round."""
        if not self.asks:
            return self._clock() >= self._until
        forward, backward = self._trying.calls
        calls = backward if self.trains else forward
        return forward >= self.MOST_CALLS or calls >= 4 * self.CALLS or (calls >= self.CALLS and self._trying.spent > self.ENOUGH)

    def _turn(self) -> None:
        """To the next way, or to the quickest. One of several threads at a time; the others go on as before."""
        if not self._turning.acquire(blocking=False):
            return
        try:
            over = self._is_over()  # still: another thread may have been here just before
            if self._afresh or (over and not self.asks):
                self._begin()
            elif over and self._left:
                self._tries.append(self._trying)
                self._trying = _Try(self._left.pop(0))
            elif over:
                self._end([*self._tries, self._trying])
        finally:
            self._turning.release()

    def _begin(self) -> None:
        self.asks, self._afresh = True, False
        self._left = [way for way in range(self.ways) if way != self.best]
        self._tries, self._trying = [], _Try(self.best)

    def _end(self, tries: list[_Try]) -> None:
        passes = [i for i in range(2) if all(one.least[i] < inf for one in tries)]
        took = {one.way: sum(one.least[i] for i in passes) for one in tries}
        quickest = min(took, key=took.__getitem__)
        if took[quickest] < self.MARGIN * took[self.best]:
            self.best = quickest
        self._until = self._clock() + max(self.REST, self.SHARE * sum(one.spent for one in tries))
        self._trying = _Try(self.best)
        self.asks, self.tried = False, True
