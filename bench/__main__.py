"""python -m bench [run | plots | tables | goals]"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench.cases import DTYPES, IN_TORCH, PRESETS, RECURRENCE, Case, select
from bench.memory import peak_of_step, saved_for_backward
from bench.peers import OURS, PEERS, TORCH
from bench.roofs import Roofs
from bench.run import facts, report, run_case
from rnnkernels.__main__ import console, progress_bar, require, write_between, write_json

RESULTS = Path(__file__).parent / "results"


def load(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def run(arguments: argparse.Namespace) -> int:
    cases = select(arguments.preset, arguments.dtype, arguments.threads, arguments.filter)
    if not cases:
        raise SystemExit(f"no case of preset {arguments.preset} matches {arguments.filter!r}")
    if arguments.list:
        print("\n".join(case.id for case in cases))
        return 0
    require("rich", "bench")
    if arguments.saved:
        return saved([case for case in cases if case.training and case.cell in IN_TORCH], arguments.json)
    from bench.recurrence import recurrence, show_recurrence
    from bench.show import show, show_roofs

    roofs, found = Roofs(), []
    peers = list(dict.fromkeys([TORCH.name, *arguments.peers, OURS.name]))
    with progress_bar() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.id)
            if arguments.preset == RECURRENCE:
                found.append(recurrence(case, arguments.budget, roofs))
            else:
                found.append(run_case(case, peers, arguments.budget, roofs))
            progress.advance(task)
    whole = report(arguments.preset, found, roofs, arguments.threads)
    destination = arguments.json or str(RESULTS / f"{arguments.preset}-{date.today().isoformat()}.json")
    if destination != "-":
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
    out = console(stderr=destination == "-")
    if arguments.preset == RECURRENCE:
        show_recurrence(found, out)
        show_roofs(whole["roofs"], out)
    else:
        show(whole, out)
    write_json(whole, destination)
    if destination != "-":
        out.print(f"written: {os.path.relpath(destination)}")
    return 1 if any(case.get("wrong") for case in found) else 0


def saved(cases: Sequence[Case], destination: str | None) -> int:
    """The report on memory."""
    from rich.table import Table

    table = Table("case", "peer", "saved, H a token", "with the output", "peak, MB", "of torch's", title="memory of a training step")
    found = []
    for case in cases:
        peaks = {"torch": peak_of_step("torch", case), "rnnkernels": peak_of_step("rnnkernels", case)}
        peaks["recompute"] = peak_of_step("rnnkernels", case, recompute=True)
        kept = {peer.name: saved_for_backward(peer, case) for peer in (TORCH, OURS)}
        for name, peak in peaks.items():
            numbers = (f"{kept[name].alone:.2f}", f"{kept[name].with_output:.2f}") if name in kept else ("", "")
            table.add_row(case.id, name, *numbers, f"{peak / 1e6:.1f}", f"{peak / peaks['torch']:.2f}")
        found.append({**case.facts(), "peak_bytes": peaks, "saved": {name: asdict(numbers) for name, numbers in kept.items()}})
    console().print(table)
    if destination:
        write_json(facts("memory") | {"cases": found}, destination)
    return 0


def plots(arguments: argparse.Namespace) -> int:
    require("matplotlib", "bench")
    from bench.plots import plot

    source = Path(arguments.source)
    for path in plot(load(arguments.source), Path(arguments.out or source.parent) / source.stem):
        print(path)
    return 0


def tables(arguments: argparse.Namespace) -> int:
    require("rich", "bench")
    from bench.tables import markdown, write

    reports = list(map(load, arguments.source))
    if arguments.write:
        write(reports, Path(arguments.write))
    else:
        print("\n\n".join(map(markdown, reports)))
    return 0


def goals(arguments: argparse.Namespace) -> int:
    from bench.goals import BEGIN, END, markdown

    text = markdown(list(map(load, arguments.source)))
    if arguments.write:
        write_between(Path(arguments.write), BEGIN, END, text)
    else:
        print(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv.insert(0, "run")
    parser = argparse.ArgumentParser(prog="python -m bench", description="Speed against torch.nn and other peers; `run` is the default.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("run", help="run cases, print them and write a report")
    command.add_argument("--preset", choices=PRESETS, default="quick")
    command.add_argument("--filter", default="", metavar="REGEX", help="only the cases whose id matches (see --list)")
    command.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    command.add_argument("--threads", nargs="+", type=int, default=[torch.get_num_threads()])
    command.add_argument("--budget", type=float, default=1.0, help="seconds a case (default 1); nine samples are taken in any case")
    command.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="beside torch and rnnkernels")
    command.add_argument("--json", metavar="FILE", help="the report, - for standard output (default: bench/results/<preset>-<date>.json)")
    command.add_argument("--saved", action="store_true", help="instead of time, the memory that training cases take")
    command.add_argument("--list", action="store_true", help="the ids of the cases, and no more")

    command = commands.add_parser("plots", help="PNG files from a report")
    command.add_argument("--from", dest="source", required=True, metavar="JSON")
    command.add_argument("--out", metavar="FOLDER", help="default: the report's own")

    command = commands.add_parser("tables", help="markdown tables from reports")
    command.add_argument("--from", dest="source", nargs="+", required=True, metavar="JSON")
    command.add_argument("--write", metavar="PAGE", help="put them between the markers of this page")

    command = commands.add_parser("goals", help="a markdown table of what the CPU engine is to reach, from reports")
    command.add_argument("--from", dest="source", nargs="+", required=True, metavar="JSON")
    command.add_argument("--write", metavar="PAGE", help="put it between the markers of this page")

    arguments = parser.parse_args(argv)
    return {"run": run, "plots": plots, "tables": tables, "goals": goals}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
