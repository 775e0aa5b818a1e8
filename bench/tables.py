"""Markdown tables from a report."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.cases import label
from bench.show import compared, grouped, over_plain, speedups, times
from rnnkernels.__main__ import write_between

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
FEW = 8  # sizes that are named one by one


def summary(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    mean = times(statistics.geometric_mean(ratios))
    return mean if len(ratios) == 1 else f"{mean} ({times(min(ratios))} to {times(max(ratios))})"


def markdown(report: dict[str, Any]) -> str:
    """Of the layers that torch.nn has, the speed over it; of anything else, over each peer, and what it costs beside a plain cell."""
    cases = report["cases"]
    in_torch = {"torch", "onnxruntime"}.issuperset(compared(cases)) and not over_plain(cases)
    lines = by_batch(report) if in_torch and len({case["B"] for case in cases}) <= FEW else by_peer(report)
    if wrong := sum(bool(case["wrong"]) for case in cases):
        lines.append(f"**{wrong} of {len(cases)} cases gave wrong results and are left out.**")
    return "\n".join(lines)


def by_peer(report: dict[str, Any]) -> list[str]:
    """A row for each cell and pass, a column for each peer."""
    cases = report["cases"]
    peers = compared(cases)
    plain = ["of plain's time"] if over_plain(cases) else []
    lines = ["| | " + " | ".join([*(f"× {peer}" for peer in peers), *plain]) + " |", "|---|" + "---:|" * (len(peers) + len(plain))]
    for name, members in grouped(cases).items():
        found = [*(speedups(members, peer) for peer in peers), *([over_plain(members)] if plain else [])]
        lines.append(f"| {' '.join(name).strip()} | " + " | ".join(map(summary, found)) + " |")
    explained = "Times the speed of each peer"
    if plain:
        explained += "; the last column is our time a token over that of our own plain cell with as many products by U, on a padded batch"
    explained += f": geometric mean (worst to best{', or least to most dear' * bool(plain)})"
    explained += f" over T {sizes(cases, 'T')}, B {sizes(cases, 'B')} and H {sizes(cases, 'H')}."
    return [*lines, "", f"{explained} {conditions(report)}"]


def by_batch(report: dict[str, Any]) -> list[str]:
    """Speed over torch.nn: a row for each cell and pass, a column for each batch size."""
    cases = report["cases"]
    batches = sorted({case["B"] for case in cases})
    lines = [
        "| | " + " | ".join(f"B {B}" for B in batches) + " | all |",
        "|---|" + "---:|" * (len(batches) + 1),
    ]
    for cell, direction in dict.fromkeys((label(case), case["pass"]) for case in cases):
        members = [case for case in cases if (label(case), case["pass"]) == (cell, direction)]
        columns = [summary(speedups((case for case in members if case["B"] == B), "torch")) for B in batches]
        lines.append(f"| {cell} {direction} | " + " | ".join([*columns, summary(speedups(members, "torch"))]) + " |")
    ratios = speedups(cases, "torch")
    return [
        *lines,
        "",
        f"Times the speed of torch.nn {report['machine']['torch']}: geometric mean (worst to best) over T {sizes(cases, 'T')} and "
        f"H {sizes(cases, 'H')}; over all {len(ratios)} cases {summary(ratios)}. {conditions(report)}",
    ]


def conditions(report: dict[str, Any]) -> str:
    cases, machine = report["cases"], report["machine"]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    options = f"--preset {report['preset']}" + ("" if dtypes == ["float32"] else f" --dtype {' '.join(dtypes)}")
    if "peak_bytes" in cases[0]:
        options += " --saved"
    isa = machine.get("RNNKERNELS_ISA")
    asked = f"RNNKERNELS_ISA={isa} " if isa else ""
    return (
        f"{machine['cpu']}, {machine['isa']}, {sizes(cases, 'threads')} threads, {report['date'][:10]}, commit {report['commit']}: "
        f"`{asked}python -m rnnkernels bench {options}`."
    )


def sizes(cases: list[dict[str, Any]], name: str) -> str:
    return listed(sorted({case[name] for case in cases}))


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) if len(values) <= FEW else f"{values[0]} to {values[-1]}"


def write(reports: Iterable[dict[str, Any]], page: Path) -> None:
    """Puts them between the two markers."""
    write_between(page, BEGIN, END, "\n\n".join(map(markdown, reports)))
