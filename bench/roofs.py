"""What the machine could do at best, measured in the same run, and the floor under a case that follows.

The recurrent part of a case takes no less than its flops at the highest rate of a product (torch's large ones, or a tile of the engine's in
registers and L1) and its cell's page, as the engine has it, in L1; than reading U once a step at the bandwidth of the cache that holds each
thread's slice of it; and, on several threads, than one barrier a step; one thread needs no barrier, so the floor is the lower of the two
ways. The products outside the loop add their flops at the same rate.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from bench.cases import DERIVATIVES, DTYPES, Case
from bench.timing import elapsed, repeats_for
from rnnkernels import ops

# m, k, n of x W' for some T·B, I and gates·H: a roof is the best of them.
PRODUCTS = ((1024, 256, 1024), (3200, 512, 2048), (6400, 128, 512))
# The best of so many: what disturbs a measurement only ever lowers a roof.
TRIES = 5


@dataclass(frozen=True)
class Floor:
    """Seconds, which roof takes most of them, and on how many threads the recurrence is."""

    seconds: float
    roof: str
    threads: int = 1


@dataclass(frozen=True)
class Rate:
    """Flops a second, and by what: a run of which took so many seconds then."""

    flops: float
    by: str
    run: Callable[[], object]
    seconds: float


def kernel_measure(name: str) -> Any:
    """A measurement inside the compiled module, or None where this build has it not."""
    return getattr(importlib.import_module("rnnkernels._C"), name, None)


@dataclass
class Roofs:
    """Measured on demand, once for each size."""

    rates: dict[tuple[str, int], Rate] = field(default_factory=dict)
    bandwidths: dict[tuple[int, int], float | None] = field(default_factory=dict)
    barriers: dict[int, float | None] = field(default_factory=dict)
    pages: dict[tuple[str, str, str], float] = field(default_factory=dict)  # by cell, pass and dtype
    elapsed: dict[tuple[str, tuple[int, ...]], float] = field(default_factory=dict)  # seconds of the measurements that are kept

    def flop_rate(self, dtype: str, threads: int) -> float:
        return self.rate(dtype, threads).flops

    def rate(self, dtype: str, threads: int) -> Rate:
        """The highest. torch's own is not the machine's everywhere: MKL may go without AVX-512 on other makers' processors."""
        if (dtype, threads) not in self.rates:
            rates = [product_rate(*sizes, DTYPES[dtype], threads) for sizes in PRODUCTS]
            arguments = (ops.cells.STORAGE[DTYPES[dtype]], threads)
            tile = self.best("measure_product", *arguments)
            if tile is not None:
                run, seconds = partial(kernel_measure("measure_product"), *arguments), self.elapsed["measure_product", arguments]
                rates.append(Rate(tile * 1e9, "a tile in registers", run, seconds))
            self.rates[dtype, threads] = max(rates, key=lambda rate: rate.flops)
        return self.rates[dtype, threads]

    def best(self, name: str, *arguments: int) -> float | None:
        """What the compiled module measures, at its shortest; None where this build has it not."""
        measure = kernel_measure(name)
        if measure is None:
            return None
        found: list[tuple[float, float]] = []
        for _ in range(TRIES):
            start = time.perf_counter()
            value = measure(*arguments)
            found.append((time.perf_counter() - start, value))
        self.elapsed[name, arguments], value = min(found)
        return value

    def bandwidth(self, total: int, threads: int) -> float | None:
        """Bytes a second, all threads together, each reading its share of `total` bytes again and again."""
        share = -(-total // threads)
        if (share, threads) not in self.bandwidths:
            rate = self.best("measure_bandwidth", share, threads)
            self.bandwidths[share, threads] = None if rate is None else rate * 1e9
        return self.bandwidths[share, threads]

    def barrier(self, threads: int) -> float | None:
        """Seconds of one barrier."""
        if threads == 1:
            return 0.0
        if threads not in self.barriers:
            microseconds = self.best("measure_barrier", threads)
            self.barriers[threads] = None if microseconds is None else microseconds * 1e-6
        return self.barriers[threads]

    def page(self, case: Case) -> float:
        """Seconds of one thread for a unit of a token, forward and, in training, backward; 0 where this build does not measure them."""
        key = (case.page.name, case.direction, case.dtype)
        if key not in self.pages:
            arguments = (case.page.index, ops.cells.STORAGE[DTYPES[case.dtype]], case.training)
            passes = (self.best("measure_page", *arguments, backward) for backward in ((False, True) if case.training else (False,)))
            self.pages[key] = sum(ns or 0.0 for ns in passes) * 1e-9
        return self.pages[key]

    def recurrent(self, case: Case, threads: int) -> Floor | None:
        bandwidth, barrier = self.bandwidth(case.weight_bytes, threads), self.barrier(threads)
        if bandwidth is None or barrier is None:
            return None
        page = self.page(case) * case.tokens * case.H * case.units_share / threads
        return max(
            Floor(case.recurrent_flops / self.flop_rate(case.dtype, threads) + page, "flops", threads),
            Floor(case.weight_bytes * case.sweeps / bandwidth, "cache", threads),
            Floor(barrier * case.sweeps, "barrier", threads),
            key=lambda floor: floor.seconds,
        )

    def floor(self, case: Case) -> Floor | None:
        """None where the compiled module measures no bandwidth or barrier, and where the least that has to be done is not known, or whether
        two sequences wait for each other.
        """
        if case.direction in DERIVATIVES or case.bidirectional:
            return None
        ways = [self.recurrent(case, threads) for threads in {1, case.threads}]
        known = [way for way in ways if way is not None]
        if len(known) < len(ways):
            return None
        loop = min(known, key=lambda floor: floor.seconds)
        outside = case.outside_flops / self.flop_rate(case.dtype, case.threads)
        if loop.seconds >= outside:
            return Floor(loop.seconds + outside, loop.roof, loop.threads)
        return Floor(loop.seconds + outside, "outside flops", case.threads)

    def yardstick(self, floor: Floor, case: Case) -> tuple[Callable[[], object], float]:
        """What is timed beside a case to see how high its roof is at the moment, and the seconds it took when the roof was measured."""
        if floor.roof in ("flops", "outside flops"):
            rate = self.rate(case.dtype, floor.threads)
            return rate.run, rate.seconds
        share = -(-case.weight_bytes // floor.threads)
        name, arguments = (
            ("measure_barrier", (floor.threads,)) if floor.roof == "barrier" else ("measure_bandwidth", (share, floor.threads))
        )
        return partial(kernel_measure(name), *arguments), self.elapsed[name, arguments]

    def facts(self) -> dict[str, Any]:
        """For the report; None where the compiled module does not measure."""
        return {
            "matrix_product": [
                {"dtype": dtype, "threads": threads, "gflops": rate.flops / 1e9, "by": rate.by}
                for (dtype, threads), rate in sorted(self.rates.items(), key=lambda item: item[0])
            ],
            "bandwidth": [
                {"bytes_per_thread": size, "threads": n, "gb_per_second": rate and rate / 1e9}
                for (size, n), rate in sorted(self.bandwidths.items(), key=lambda item: item[0])
            ],
            "barrier": [{"threads": n, "us": seconds and seconds * 1e6} for n, seconds in sorted(self.barriers.items())],
            "page": [
                {"cell": cell, "pass": direction, "dtype": dtype, "ns": seconds * 1e9}
                for (cell, direction, dtype), seconds in sorted(self.pages.items())
            ],
        }


def product_rate(m: int, k: int, n: int, dtype: torch.dtype, threads: int) -> Rate:
    """Of torch's product."""
    a, b, out = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n, dtype=dtype)

    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.mm(a, b, out=out)
        torch.set_num_threads(before)

    repeats = repeats_for(run)
    seconds = min(elapsed(run, repeats) for _ in range(TRIES))
    return Rate(2 * m * k * n / seconds, f"torch.mm of {m} × {k} by {k} × {n}", run, seconds)
