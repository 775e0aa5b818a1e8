"""Each point of ``dropin.py``, and that the table in docs has them all."""

from pathlib import Path
from typing import Any

import pytest
from dropin import BEGIN, END, POINTS, outcome

import rnnkernels

PAGE = Path(__file__).resolve().parent.parent / "docs" / "dropin.md"
# What torch.nn does and we do not, each with its reason.
LACKING = {"jit_script": "the language of torch.jit.script, which torch has deprecated, knows no Python beyond its own"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * one.slow) for name, one in POINTS.items()])
def test_point(name: str) -> None:
    check: Any = POINTS[name].check
    if name in LACKING:
        assert outcome(check, rnnkernels), "it is not lacking any more"
    else:
        check(rnnkernels)


def test_the_table_has_every_point() -> None:
    rows = [line.split("|")[1:4] for line in PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].splitlines() if "|" in line]
    found = {says.strip(): ours.strip() for says, ours, _ in rows if ours.strip() in ("yes", "no") or ours.strip().startswith("no:")}
    assert list(found) == [one.says for one in POINTS.values()], "python -m tests.dropin --write docs/dropin.md"
    assert [one.says for name, one in POINTS.items() if name in LACKING] == [says for says, ours in found.items() if ours != "yes"]
