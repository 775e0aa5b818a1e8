"""Medians of alternating runs.

Sides take turns, A B A B, so that whatever slows the machine slows them all. A sample repeats a short run until the clock can be trusted.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MIN_SAMPLES, MAX_SAMPLES = 9, 101
# Long enough that a sample shows how a run goes amid others of its kind, and not how it starts.
SAMPLE_SECONDS = 20e-3
WARMUP_SECONDS = 10e-3
# OpenMP's idle threads spin for about 10 ms before they sleep, and would hold the cores of the next side's threads.
SETTLE_SECONDS = 12e-3


@dataclass(frozen=True)
class Spread:
    median: float
    low: float  # quartiles
    high: float

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


def spread(values: list[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


@dataclass(frozen=True)
class Timing:
    """Seconds of one run, sample by sample."""

    samples: list[float]
    repeats: int

    @property
    def seconds(self) -> Spread:
        return spread(self.samples)

    def over(self, other: Timing) -> Spread:
        """How many times longer than `other`, from samples taken side by side."""
        return spread([mine / theirs for mine, theirs in zip(self.samples, other.samples, strict=True)])


def elapsed(run: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def repeats_for(run: Callable[[], object]) -> int:
    """Warms up, and says how many runs make a sample. The first run alone says little: it may load code or start threads."""
    fastest, spent, runs = math.inf, 0.0, 0
    while spent < WARMUP_SECONDS or runs < 2:
        seconds = elapsed(run, 1)
        fastest, spent, runs = min(fastest, seconds), spent + seconds, runs + 1
    return max(1, math.ceil(SAMPLE_SECONDS / fastest))


def measure(sides: Mapping[str, Callable[[], object]], budget: float) -> dict[str, Timing]:
    """At least MIN_SAMPLES of each side, and more while `budget` seconds last."""
    repeats = {name: repeats_for(run) for name, run in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + budget
        rounds = 0
        while rounds < MIN_SAMPLES or (rounds < MAX_SAMPLES and time.perf_counter() < deadline):
            for name, run in sides.items():
                time.sleep(SETTLE_SECONDS)
                if repeats[name] > 1:
                    run()  # wakes this side's threads and fills the caches with its weights; a long run need not be spared that
                samples[name].append(elapsed(run, repeats[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(samples[name], repeats[name]) for name in sides}
