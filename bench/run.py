"""Runs cases: same results first, then time."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench.cases import COMPILED, Case
from bench.peers import OURS, PEERS, PLAIN, Problem, Runner, difference, make_problem
from bench.roofs import Roofs
from bench.timing import measure
from rnnkernels.__main__ import describe, version_of

SCHEMA = 1


def commit() -> str:
    """Of this repository, marked when files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def prepare(case: Case, problem: Problem, peers: Sequence[str]) -> tuple[dict[str, Runner], dict[str, str], dict[str, str]]:
    """The sides that may be timed; why others cannot run; and what was wrong with the rest: they raised, or differ from the first."""
    runners: dict[str, Runner] = {}
    unavailable: dict[str, str] = {}
    wrong: dict[str, str] = {}
    expected = None
    if case.layout == COMPILED:
        torch.compiler.reset()  # or each call would look through what other cases' layers were compiled to
    for name in peers:
        if reason := PEERS[name].why_not(case):
            unavailable[name] = reason
            continue
        try:
            run = PEERS[name].prepare(case, problem)
            results = run()
        except Exception as failure:  # one broken case or peer must not end a run of hours
            wrong[name] = f"{type(failure).__name__}: {failure}"
            continue
        if PEERS[name].yardstick:
            runners[name] = run
            continue
        expected = results if expected is None else expected
        if unequal := difference(results, expected, case.dtype):
            wrong[name] = unequal
        else:
            runners[name] = run
    return runners, unavailable, wrong


def run_case(case: Case, peers: Sequence[str], budget: float, roofs: Roofs) -> dict[str, Any]:
    """One case as the report has it. torch comes first: the others are held against its results."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        runners, unavailable, wrong = prepare(case, make_problem(case), peers)
        # Without us, or with nobody to compare us with, a time says nothing.
        timings = measure(runners, budget) if OURS.name in runners and len(runners) > 1 else {}
    finally:
        torch.set_num_threads(before)
    ours = timings.get(OURS.name)
    dearer = ours.over(timings[PLAIN.name]).times(case.T * case.B / case.tokens) if ours and PLAIN.name in timings else None
    floor = roofs.floor(case)
    return {
        **case.facts(),
        "flops": case.flops,
        "floor": floor and asdict(floor),
        "share": floor.seconds / ours.seconds.median if floor and ours else None,
        "peers": {name: {**asdict(t.seconds), "samples": len(t.samples), "repeats": t.repeats} for name, t in timings.items()},
        "speedup": {name: asdict(t.over(ours)) for name, t in timings.items() if ours and t is not ours and not PEERS[name].yardstick},
        # Our time a token over that of the plain cell on a padded batch.
        "over_plain": dearer and asdict(dearer),
        "unavailable": unavailable,
        "wrong": wrong,
    }


def facts(preset: str) -> dict[str, Any]:
    """What, when, of which commit, on which machine."""
    return {
        "schema": SCHEMA,
        "preset": preset,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": describe() | {"onnxruntime": version_of("onnxruntime")},
    }


def report(preset: str, cases: list[dict[str, Any]], roofs: Roofs, threads: Sequence[int]) -> dict[str, Any]:
    return {**facts(preset), "threads": list(threads), "roofs": roofs.facts(), "cases": cases}
