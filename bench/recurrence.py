"""How near a layer's recurrence stands to its roof: what more steps cost, of a layer whose input is one number wide.

A whole call also packs weights, goes through Python and multiplies by W, which have roofs of their own. Of twice the steps less the steps
nothing of the call is left, and W's one column is next to nothing; in training U's gradient, a product over all steps, remains.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        sides = {str(one.T): OURS.prepare(one, make_problem(one)) for one in (case, longer)}
        once, twice = measure(sides, budget).values()
    finally:
        torch.set_num_threads(before)
    seconds = spread([more - less for more, less in zip(twice.samples, once.samples, strict=True)])
    floor = roofs.floor(case)
    return {
        **case.facts(),
        "seconds": asdict(seconds),
        "floor": floor and asdict(floor),
        "share": floor and floor.seconds / seconds.median,
    }


def show_recurrence(cases: Iterable[dict[str, Any]], console: Console) -> None:
    table = Table("cell", "pass", "B", "H", "threads", "µs/step (quartiles)", "roof", "share", title="the recurrence alone")
    for case in cases:
        low, median, high = (case["seconds"][name] / case["T"] * 1e6 for name in ("low", "median", "high"))
        roof = (case["floor"]["roof"], f"{case['share']:.0%}") if case["floor"] else ("n/a", "")
        sizes = (str(case[name]) for name in ("B", "H", "threads"))
        table.add_row(label(case), case["pass"], *sizes, f"{median:.3g} ({low:.3g}–{high:.3g})", *roof)
    console.print(table)
