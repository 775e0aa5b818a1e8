"""Calls that wait for each other, so that an engine runs them at the same time: on a thread each, or in one launch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Waiting(NamedTuple):
    """A call as its engine has it, what follows it, and what it reads and writes, kept alive until then."""

    call: Any
    done: Callable[[], None] | None
    held: tuple[Any, ...]


class Together(threading.local):
    """Those of one thread of Python's. ``launch`` runs some at once."""

    def __init__(self, launch: Callable[[list[Any]], None]) -> None:
        self.launch = launch
        self.waiting: list[Waiting] | None = None

    def run(self, call: Any, done: Callable[[], None] | None, *held: Any) -> None:
        """Now, or once all are there."""
        if self.waiting is not None:
            self.waiting.append(Waiting(call, done, held))
            return
        self.launch([call])
        if done is not None:
            done()

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
            (launch or self.launch)([one.call for one in waiting])
        for one in waiting:
            if one.done is not None:
                one.done()
