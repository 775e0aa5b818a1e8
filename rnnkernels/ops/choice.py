"""Which of several ways to run a call is the quickest: found by taking each for a few calls, now and then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from math import inf
from time import perf_counter_ns

__all__ = ["Choice"]


class Choice:
    """Among ``ways``, the first of which is the most likely. Calls of one kind share it: a forward call asks :meth:`forward` which way to
    take, the backward call that belongs to it :meth:`backward`, and while the choice ``asks`` both tell :meth:`took` how long that took.

    In a round each way is tried for some calls, the first of them uncounted, since its caches are cold and its threads asleep. Then the
    quickest is taken, and nothing is measured, until the next round: for at least ``REST`` nanoseconds and ``SHARE`` times as long as the
    round took. By then the machine may be another, as where a hypervisor moves cores.

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
        self.ways, self.way = ways, 0
        self.trains = False  # backward calls have been seen
        self.tried = False  # all ways, at least once
        self._clock = clock
        self._turning, self._until = threading.Lock(), 0
        self._begin()

    def forward(self) -> int:
        """The way that a forward call takes, and backward calls until the next one."""
        if self._tried() if self.asks else self._clock() >= self._until:
            self._turn()
        return self.way

    def backward(self) -> int:
        """The way that a backward call takes."""
        if not self.trains:
            self.trains, self._new = True, True
            self._turn()
        return self.way

    def took(self, way: int, backward: bool, ns: int, tokens: int = 1) -> None:
        """So many nanoseconds for a call that took this way; calls are compared by the time of a token."""
        if not self.asks or way != self.way:
            return
        calls = self._calls[backward]
        self._calls[backward] += 1
        self._spent += ns
        if calls:
            self._least[backward] = min(self._least[backward], ns / max(tokens, 1))

    @property
    def best(self) -> int:
        """As far as is known."""
        return self._best if self.asks else self.way

    def _tried(self) -> bool:
        forward, backward = self._calls
        calls = backward if self.trains else forward
        return forward >= self.MOST_CALLS or calls >= 4 * self.CALLS or (calls >= self.CALLS and self._spent > self.ENOUGH)

    def _turn(self) -> None:
        """To the next way, or to the quickest. One of several threads at a time; the others go on as before."""
        if not self._turning.acquire(blocking=False):
            return
        try:
            if self._new or not self.asks:
                self._begin()
            elif self._tried():
                self._known[self.way] = self._least
                if self._left:
                    self._try(self._left.pop(0))
                else:
                    self._end()
        finally:
            self._turning.release()

    def _begin(self) -> None:
        self.asks, self._new, self._best, self._began = True, False, self.way, self._clock()
        self._left = [way for way in range(self.ways) if way != self.way]
        self._known: dict[int, list[float]] = {}
        self._try(self.way)

    def _try(self, way: int) -> None:
        self.way, self._calls, self._least, self._spent = way, [0, 0], [inf, inf], 0

    def _end(self) -> None:
        passes = [i for i in range(2) if all(least[i] < inf for least in self._known.values())]
        took = {way: sum(least[i] for i in passes) for way, least in self._known.items()}
        quickest = min(took, key=took.__getitem__)
        self.way = quickest if took[quickest] < self.MARGIN * took[self._best] else self._best
        now = self._clock()
        self._until = now + max(self.REST, self.SHARE * (now - self._began))
        self.asks, self.tried = False, True
