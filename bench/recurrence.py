"""How near a layer's recurrence stands to its roof: what more steps cost, of a layer whose input is one number wide.

A whole call also packs weights, goes through Python and multiplies by W, which have roofs of their own. Of twice the steps less the steps
nothing of the call is left, and W's one column is next to nothing; in training U's gradient, a product over all steps, remains. The roof
takes its turns with the two: on a machine that others share, what it gave a minute ago says little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import Case, label
from bench.peers import OURS, make_problem
from bench.roofs import Roofs
from bench.timing import measure, spread


def recurrence(case: Case, budget: float, roofs: Roofs) -> dict[str, Any]:
    """What the case's steps cost in a sequence twice as long, as the report has it."""
    case = replace(case, I=1)
    longer = replace(case, T=2 * case.T)
    floor = roofs.floor(case)
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        sides: dict[str, Callable[[], object]] = {str(one.T): OURS.prepare(one, make_problem(one)) for one in (case, longer)}
        if floor is not None:
            sides["roof"], at_best = roofs.yardstick(floor, case)
        once, twice, *yardstick = (timing.samples for timing in measure(sides, budget).values())
    finally:
        torch.set_num_threads(before)
    seconds = [more - less for more, less in zip(twice, once, strict=True)]
    found = {**case.facts(), "seconds": asdict(spread(seconds)), "floor": floor and asdict(floor), "share": None}
    if floor is not None and found["seconds"]["low"] > 0 and all(seconds):  # else the difference is lost in the noise
        now = [floor.seconds * of_roof / at_best for of_roof in yardstick[0]]
        found["share"] = asdict(spread([low / taken for low, taken in zip(now, seconds, strict=True)]))
    return found


def show_recurrence(cases: Iterable[dict[str, Any]], console: Console) -> None:
    table = Table("cell", "pass", "B", "H", "threads", "µs/step (quartiles)", "roof", "share (quartiles)", title="the recurrence alone")
    for case in cases:
        low, median, high = (case["seconds"][name] / case["T"] * 1e6 for name in ("low", "median", "high"))
        share = "{median:.0%} ({low:.0%}–{high:.0%})".format(**case["share"]) if case["share"] else "n/a"
        roof = (case["floor"]["roof"], share) if case["floor"] else ("n/a", "")
        sizes = (str(case[name]) for name in ("B", "H", "threads"))
        table.add_row(label(case), case["pass"], *sizes, f"{median:.3g} ({low:.3g}–{high:.3g})", *roof)
    console.print(table)
