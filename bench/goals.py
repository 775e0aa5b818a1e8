"""What the CPU engine is to reach, and how often it does: a table from reports of the presets that know.

A goal that a case misses is either beyond the case's roof (the better peer's time over the floor is less than was asked) or not.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.tables import conditions

BEGIN, END = "<!-- goals:begin -->", "<!-- goals:end -->"

Facts = dict[str, Any]  # of a case, as a report has it


@dataclass(frozen=True)
class Goal:
    """Asked of every case of a preset with such a cell and pass, and B and H within these bounds."""

    preset: str
    cells: tuple[str, ...]
    passes: tuple[str, ...]
    B: tuple[int, int]
    H: tuple[int, int]
    asked: float
    figure: str = "speed"
    layouts: tuple[str, ...] = ("padded",)

    def takes(self, case: Facts) -> bool:
        return (
            case["cell"] in self.cells
            and case["pass"] in self.passes
            and self.B[0] <= case["B"] <= self.B[1]
            and self.H[0] <= case["H"] <= self.H[1]
            and case.get("layout", "padded") in self.layouts
        )

    def __str__(self) -> str:
        cells = "all" if self.cells == ALL else " and ".join(map(str.upper, self.cells))
        direction = self.passes[0] if len(self.passes) == 1 else ""
        layouts = [f"by {layout}" for layout in self.layouts if layout != "padded"]
        name = " ".join(filter(None, ("bidirectional" if self.preset == "bidirectional" else "", cells, direction, *layouts)))
        return ", ".join(filter(None, (name, between("B", *self.B), between("H", *self.H))))


PEERS = ("torch", "onnxruntime")
LARGEST = 10**9
ALL = ("lstm", "gru", "srn")
BOTH = ("inference", "training")
ONE, EIGHT, MANY = (1, 1), (8, 8), (32, LARGEST)
SMALL, LARGE, ANY = (1, 256), (512, 512), (1, LARGEST)


def grid(cell: str, direction: str, *asked: tuple[tuple[int, int], tuple[int, int], float]) -> list[Goal]:
    return [Goal("grid", (cell,), (direction,), B, H, least) for B, H, least in asked]


GOALS = (
    *grid("lstm", "inference", (ONE, SMALL, 1.6), (ONE, LARGE, 1.3), ((8, LARGEST), ANY, 1.1)),
    *grid("lstm", "training", (ONE, SMALL, 2.5), (ONE, LARGE, 2.0), (EIGHT, ANY, 1.1), (MANY, ANY, 1.2)),
    *grid("gru", "inference", (ONE, SMALL, 1.7), (EIGHT, SMALL, 1.7), ((1, 8), LARGE, 1.4), (MANY, ANY, 1.4)),
    *grid("gru", "training", (ONE, SMALL, 20.0), (MANY, ANY, 2.5)),
    *grid("srn", "inference", (ANY, ANY, 2.0)),
    *grid("srn", "training", (ONE, SMALL, 12.0), (MANY, ANY, 2.3)),
    Goal("grid", ALL, BOTH, ANY, ANY, 1.0),
    Goal("recurrence", ALL, BOTH, ONE, (256, LARGEST), 0.85, "share"),
    Goal("recurrence", ALL, BOTH, MANY, (128, LARGEST), 0.85, "share"),
    Goal("recurrence", ALL, BOTH, EIGHT, (128, LARGEST), 0.7, "share"),
    Goal("recurrence", ALL, BOTH, ONE, (128, 255), 0.7, "share"),
    Goal("bidirectional", ("lstm",), BOTH, ONE, SMALL, 3.0),
    Goal("inside", ALL, BOTH, ANY, ANY, 10.0, layouts=("lengths",)),
    Goal("inside", ALL, BOTH, ANY, ANY, 1.15, "cost", ("lengths",)),
    Goal("memory", ("lstm", "gru"), ("training",), ANY, ANY, 0.6, "memory"),
    Goal("memory", ("lstm", "gru"), ("training",), ANY, ANY, 0.35, "recomputing"),
)


def better_peer(case: Facts) -> float | None:
    """Our speed over that of the quicker peer."""
    return min((case["speedup"][peer]["median"] for peer in PEERS if peer in case["speedup"]), default=None)


def at_the_roof(case: Facts) -> float | None:
    """The same of whoever stood at the roof."""
    theirs = [case["peers"][peer]["median"] for peer in PEERS if peer in case["speedup"]]
    return min(theirs) / case["floor"]["seconds"] if theirs and case.get("floor") else None


def over_plain(case: Facts) -> float | None:
    cost = case["over_plain"]
    return cost and cost["median"]


def of_torchs_memory(peer: str) -> Callable[[Facts], float | None]:
    return lambda case: case["peak_bytes"][peer] / case["peak_bytes"]["torch"] if "peak_bytes" in case else None


@dataclass(frozen=True)
class Figure:
    unit: str
    of: Callable[[Facts], float | None]
    at_most: bool = False

    def reached(self, value: float, asked: float) -> bool:
        return value <= asked if self.at_most else value >= asked


FIGURES = {
    "speed": Figure("times the better peer's speed", better_peer),
    "share": Figure("of the recurrence's roof", lambda case: case["share"] and case["share"]["median"]),
    "cost": Figure("of a padded batch's time a token", over_plain, at_most=True),
    "memory": Figure("of torch's peak memory", of_torchs_memory("rnnkernels"), at_most=True),
    "recomputing": Figure("of torch's peak memory, recomputing", of_torchs_memory("recompute"), at_most=True),
}


def between(name: str, least: int, most: int) -> str:
    if least == most:
        return f"{name} {least}"
    if most == LARGEST:
        return "" if least == 1 else f"{name} from {least}"
    return f"{name} to {most}" if least == 1 else f"{name} {least} to {most}"


def row(goal: Goal, cases: Iterable[Facts]) -> str | None:
    figure = FIGURES[goal.figure]
    known = [(case, value) for case in cases if goal.takes(case) and (value := figure.of(case)) is not None]
    if not known:
        return None
    values = [value for _, value in known]
    reached = sum(figure.reached(value, goal.asked) for value in values)
    allowed = "–"
    if goal.figure == "speed":
        bounds = [bound for case, _ in known if (bound := at_the_roof(case)) is not None]
        allowed = f"{sum(bound >= goal.asked for bound in bounds)}" if bounds else "–"
    spread = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    asked = f"{'at most ' if figure.at_most else ''}{goal.asked:g}"
    return f"| {goal} | {asked} | {figure.unit} | {len(known)} | {reached} | {allowed} | {spread} |"


def markdown(reports: Sequence[dict[str, Any]]) -> str:
    """A row for each goal that the reports say something of."""
    lines = ["| cases | asked | | of | reached | the roof allows | median (least to most) |", "|---|---:|---|---:|---:|---:|---:|"]
    for report in reports:
        rows = [row(goal, report["cases"]) for goal in GOALS if goal.preset == report["preset"]]
        lines += filter(None, rows)
    return "\n".join([*lines, "", *(conditions(report) + "  " for report in reports)])
