"""Calls that wait for each other, so that an engine runs them at the same time: on a thread each, or in one launch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Waiting(NamedTuple):
    """A call as its engine has it, and what follows it. Until then it keeps alive what it reads and writes."""

    call: Any
    done: Callable[[], None] | None = None
    held: tuple[Any, ...] = ()


class Together(threading.local):
    """Those of one thread of Python's. ``launch`` runs some at once."""

    def __init__(self, launch: Callable[[list[Any]], None]) -> None:
        self.launch = launch
        self.waiting: list[Waiting] | None = None

    def run(self, one: Waiting) -> None:
        """Now, or once all are there."""
        if self.waiting is None:
            self._run([one], self.launch)
        else:
            self.waiting.append(one)

    @contextlib.contextmanager
    def block(self, launch: Callable[[list[Any]], None] | None = None) -> Iterator[None]:
        """The calls inside run when the block ends, by ``launch`` where it is given. Their results are not there before."""
        around, self.waiting = self.waiting, []
        try:
            yield
            waiting = self.waiting
        finally:
            self.waiting = around
        if waiting:  # of calls whose gradients nobody asked for there is none
            self._run(waiting, launch or self.launch)

    @staticmethod
    def _run(waiting: list[Waiting], launch: Callable[[list[Any]], None]) -> None:
        launch([one.call for one in waiting])
        for one in waiting:
            if one.done is not None:
                one.done()
