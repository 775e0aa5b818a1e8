"""Results on the terminal."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.cases import label

COLUMNS = ("cell", "pass", "dtype", "T", "B", "I", "H", "threads")


def speedups(cases: Iterable[dict[str, Any]], peer: str) -> list[float]:
    return [case["speedup"][peer]["median"] for case in cases if peer in case["speedup"]]


def over_plain(cases: Iterable[dict[str, Any]]) -> list[float]:
    """Our time a token over that of the plain cell on a padded batch."""
    return [case["over_plain"]["median"] for case in cases if case.get("over_plain")]


def compared(cases: Iterable[dict[str, Any]]) -> list[str]:
    """The peers that we were compared with, torch first."""
    return sorted({peer for case in cases for peer in case["speedup"]}, key=lambda peer: (peer != "torch", peer))


def grouped(cases: Iterable[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By cell and pass; after those of a report with several passes, all cells of each pass, and all cases."""
    groups, passes = defaultdict(list), defaultdict(list)
    for case in cases:
        groups[label(case), case["pass"]].append(case)
        passes["all", case["pass"]].append(case)
    every = {("all", ""): [case for members in passes.values() for case in members]}
    return {**groups, **(passes if len(passes) > 1 else {}), **every}


def times(value: float) -> str:
    return f"{value:.2f}×" if value < 9.95 else f"{value:.1f}×"


def row(case: dict[str, Any], peers: Sequence[str]) -> list[str]:
    cells = [label(case), *(str(case[column]) for column in COLUMNS[1:])]
    ours = case["peers"].get("rnnkernels")
    if ours:
        seconds = ours["median"]
        cells += [f"{seconds * 1e3:.3g}", f"{seconds / case['T'] * 1e6:.3g}", f"{case['flops'] / seconds / 1e9:.3g}"]
    else:
        cells += ["", "", ""]
    if case["wrong"]:
        reasons = "; ".join(f"{peer}: {reason}" for peer, reason in case["wrong"].items())
        cells.append(f"[red]{escape(reasons)}[/]")
    else:
        cells.append(f"{case['floor']['roof']}, {case['share']:.0%}" if case["floor"] and ours else "n/a")
    for peer in peers:
        ratio = case["speedup"].get(peer)
        cells.append(quartiles(ratio))
    return [*cells, quartiles(case.get("over_plain"))]


def quartiles(ratio: dict[str, float] | None) -> str:
    return f"{times(ratio['median'])} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else ""


def show(report: dict[str, Any], console: Console) -> None:
    """Every case, geometric means, the worst, and what could not be compared."""
    cases = report["cases"]
    peers = compared(cases)
    table = Table(*COLUMNS, "ms", "µs/step", "GFLOP/s", "roof, share", *(f"× {peer} (quartiles)" for peer in peers), "of plain's time")
    for case in cases:
        table.add_row(*row(case, peers))
    console.print(table)

    means = Table("cell", "pass", *(f"× {peer}" for peer in peers), "of plain's time a token", title="geometric means")
    for name, members in grouped(cases).items():
        found = [*(speedups(members, peer) for peer in peers), over_plain(members)]
        means.add_row(*name, *(f"{times(statistics.geometric_mean(f))} of {len(f)}" if f else "" for f in found))
    console.print(means)
    beside_torch = [case for case in cases if "torch" in case["speedup"]]
    for case in sorted(beside_torch, key=lambda case: case["speedup"]["torch"]["median"])[:5]:
        console.print(f"worst against torch: {times(case['speedup']['torch']['median'])} {case['id']}")
    show_roofs(report["roofs"], console)
    for reason in sorted({f"{peer}: {reason}" for case in cases for peer, reason in case["unavailable"].items()}):
        console.print(f"not compared: {escape(reason)}")
    if wrong := sum(bool(case["wrong"]) for case in cases):
        console.print(f"[red]{wrong} of {len(cases)} cases are wrong[/]")


def show_roofs(roofs: dict[str, Any], console: Console) -> None:
    for found in roofs["matrix_product"]:
        console.print(f"roof: {found['gflops']:.0f} GFLOP/s in {found['dtype']} products on {found['threads']} threads ({found['by']})")
    for found in roofs["bandwidth"]:
        rate = "n/a (not measured by this build)" if found["gb_per_second"] is None else f"{found['gb_per_second']:.0f} GB/s"
        console.print(f"roof: {rate} reading {found['bytes_per_thread'] / 1024:.0f} KiB a thread, {found['threads']} threads")
    for found in roofs["barrier"]:
        rate = "n/a (not measured by this build)" if found["us"] is None else f"{found['us']:.2f} µs"
        console.print(f"roof: {rate} a barrier of {found['threads']} threads")
    for found in roofs.get("page", ()):  # older reports have none
        console.print(f"roof: {found['ns']:.2f} ns a unit of a token in {found['cell']}'s page, {found['pass']}, {found['dtype']}")
