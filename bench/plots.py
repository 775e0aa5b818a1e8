"""Plots from a report."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: needs no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator

from bench.cases import label

PLAIN = FormatStrFormatter("%g")


def panels(cases: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((label(case), case["pass"]) for case in cases))


def of(cases: list[dict[str, Any]], panel: tuple[str, str]) -> list[dict[str, Any]]:
    return [case for case in cases if (label(case), case["pass"]) == panel]


def caption(report: dict[str, Any]) -> str:
    machine = report["machine"]
    threads = ", ".join(map(str, report["threads"]))
    return f"{machine['cpu']}, {machine['isa']}, {threads} threads, torch {machine['torch']}, {report['date'][:10]}, {report['commit']}"


def frame(names: list[tuple[str, str]]) -> tuple[Figure, list[Axes]]:
    """A panel for each name."""
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1 + 4 * columns, 1 + 2.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    return figure, list(axes.flat)


def speedup_map(report: dict[str, Any]) -> Figure | None:
    """B × H, a panel for each cell and pass, the geometric mean over all else. White is torch's own speed."""
    cases = [case for case in report["cases"] if "torch" in case["speedup"]]
    if not cases:
        return None
    names = panels(cases)
    figure, axes = frame(names)
    ratios = [case["speedup"]["torch"]["median"] for case in cases]
    largest = max(1.1, *ratios, *(1 / ratio for ratio in ratios))
    norm = LogNorm(1 / largest, largest)
    colours = ScalarMappable(norm, "RdYlGn")
    for axis, name in zip(axes, names, strict=False):
        members = of(cases, name)
        batches, widths = sorted({c["B"] for c in members}), sorted({c["H"] for c in members})
        grid = np.full((len(batches), len(widths)), np.nan)
        for i, B in enumerate(batches):
            for j, H in enumerate(widths):
                if found := [c["speedup"]["torch"]["median"] for c in members if (c["B"], c["H"]) == (B, H)]:
                    grid[i, j] = statistics.geometric_mean(found)
                    axis.text(j, i, f"{grid[i, j]:.2g}", ha="center", va="center", fontsize=9)
        axis.imshow(grid, norm=norm, cmap=colours.cmap, aspect="auto")
        axis.set(title=" ".join(name), xlabel="H", ylabel="B")
        axis.set_xticks(range(len(widths)), widths)
        axis.set_yticks(range(len(batches)), batches)
    figure.colorbar(colours, ax=axes, label="times torch.nn's speed", format=PLAIN, ticks=LogLocator(subs=(1, 2, 5))).ax.minorticks_off()
    figure.suptitle(caption(report), fontsize=8)
    return figure


def step_time(report: dict[str, Any]) -> Figure | None:
    """Microseconds a step against H at the smallest batch and longest sequence, every peer, and the floor under them."""
    cases = [case for case in report["cases"] if case["peers"]]
    if not cases:
        return None
    names = panels(cases)
    figure, axes = frame(names)
    for axis, name in zip(axes, names, strict=False):
        members = of(cases, name)
        T, B = max(c["T"] for c in members), min(c["B"] for c in members)
        # One line a peer: a run over several dtypes or thread counts shows the first of each.
        dtype, threads = members[0]["dtype"], members[0]["threads"]
        members = [c for c in members if (c["T"], c["B"], c["dtype"], c["threads"]) == (T, B, dtype, threads)]
        members.sort(key=lambda c: int(c["H"]))
        for peer in dict.fromkeys(peer for c in members for peer in c["peers"]):
            points = [(c["H"], c["peers"][peer]["median"] / T * 1e6) for c in members if peer in c["peers"]]
            axis.plot(*zip(*points, strict=True), marker="o", label=peer)
        if floors := [(c["H"], c["floor"]["seconds"] / T * 1e6) for c in members if c["floor"]]:
            axis.plot(*zip(*floors, strict=True), "k--", label="roof")
        axis.set(title=f"{' '.join(name)}, {dtype}, T {T}, B {B}", xlabel="H", ylabel="µs a step", xscale="log", yscale="log")
        axis.set_xticks([c["H"] for c in members], [str(c["H"]) for c in members])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(PLAIN)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(caption(report), fontsize=8)
    return figure


def plot(report: dict[str, Any], stem: Path) -> list[Path]:
    """Writes <stem>-speedup.png and <stem>-step.png; a report without a timed case has neither."""
    written = []
    for name, figure in (("speedup", speedup_map(report)), ("step", step_time(report))):
        if figure is not None:
            written.append(stem.with_name(f"{stem.name}-{name}.png"))
            figure.savefig(written[-1], dpi=120)
            plt.close(figure)
    return written
