"""The README's table from a report."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from bench.show import speedups, times

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def summary(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    mean = times(statistics.geometric_mean(ratios))
    return mean if len(ratios) == 1 else f"{mean} ({times(min(ratios))} to {times(max(ratios))})"


def markdown(report: dict[str, Any]) -> str:
    """Speed over torch.nn: a row for each cell and pass, a column for each batch size."""
    cases, machine = report["cases"], report["machine"]
    batches = sorted({case["B"] for case in cases})
    lines = [
        "| | " + " | ".join(f"B {B}" for B in batches) + " | all |",
        "|---|" + "---:|" * (len(batches) + 1),
    ]
    for cell, direction in dict.fromkeys((case["cell"], case["pass"]) for case in cases):
        members = [case for case in cases if (case["cell"], case["pass"]) == (cell, direction)]
        by_batch = [summary(speedups((case for case in members if case["B"] == B), "torch")) for B in batches]
        lines.append(f"| {cell} {direction} | " + " | ".join([*by_batch, summary(speedups(members, "torch"))]) + " |")
    ratios = speedups(cases, "torch")
    T, H = (sorted({case[size] for case in cases}) for size in "TH")
    lines += [
        "",
        f"Times the speed of torch.nn {machine['torch']}: geometric mean (worst to best) over T {listed(T)} and H {listed(H)}; "
        f"over all {len(ratios)} cases {summary(ratios)}. "
        f"{machine['cpu']}, {machine['isa']}, {listed(report['threads'])} threads, {report['date'][:10]}, commit {report['commit']}: "
        f"`python -m rnnkernels bench --preset {report['preset']}`.",
    ]
    if wrong := sum(bool(case["wrong"]) for case in cases):
        lines.append(f"**{wrong} of {len(cases)} cases gave wrong results and are left out.**")
    return "\n".join(lines)


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values))


def write(report: dict[str, Any], page: Path) -> None:
    """Replaces what stands between the two markers."""
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{page} needs one {BEGIN} and after it one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{markdown(report)}\n{END}{after}", encoding="utf-8")
