"""python -m rnnkernels info | verify | features | bench"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rnnkernels import ops


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def gpu(cuda: dict[str, Any] | None) -> str:
    """In one line, whether layers run on a GPU here, and if not, what is missing."""
    if cuda is None:
        return "no: this build has no CUDA part; install it where nvcc is on PATH (RNNKERNELS_CUDA=1 insists)"
    if not cuda["driver"]:
        return f"no: built for {cuda['architectures']}, but there is no NVIDIA driver here"
    if not cuda["devices"]:
        return f"no: built for {cuda['architectures']}, but the driver shows no device"
    if not torch.cuda.is_available():
        return f"no: this torch ({torch.__version__}) computes on no GPU; install a CUDA build of it, ours serves any"
    return f"yes: {', '.join(f'{name} (compute capability {major}.{minor})' for name, major, minor in cuda['devices'])}"


def describe() -> dict[str, Any]:
    """What is built, what would run, and where."""
    build = ops.build_info()
    return {
        **build,
        "gpu": gpu(build["cuda"]),
        "RNNKERNELS_ISA": os.environ.get("RNNKERNELS_ISA"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "cpu": cpu_model(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version_of("numpy"),
    }


def require(package: str, extra: str) -> None:
    """Ends the program, with a way out, where an optional package is missing."""
    if find_spec(package) is None:
        raise SystemExit(f"this command needs {package}, which is not installed: pip install 'rnnkernels[{extra}]'")


def console(stderr: bool = False) -> Any:
    """A rich console; where nobody looks at a terminal, wide enough for a table in a log."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 170)


def progress_bar() -> Any:
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), *Progress.get_default_columns()[1:], MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console(stderr=True), transient=True)


def write_json(value: object, destination: str) -> None:
    text = json.dumps(value, indent=2)
    if destination == "-":
        print(text)
    else:
        Path(destination).write_text(text + "\n", encoding="utf-8")


def info(arguments: argparse.Namespace) -> int:
    facts = describe()
    if arguments.json:
        write_json(facts, arguments.json)
        return 0
    if facts["cuda"] is None:
        facts["cuda"] = "not built"
    for name, value in facts.items():
        for key, entry in {f"{name} {k}": v for k, v in value.items()}.items() if isinstance(value, dict) else [(name, value)]:
            print(f"{key:20}{', '.join(map(str, entry)) if isinstance(entry, (list, tuple)) else entry if entry is not None else 'none'}")
    return 0


def chosen(given: Sequence[str] | None, known: Sequence[str], what: str) -> list[str]:
    """The known names that were asked for, all if none was."""
    if strangers := set(given or ()) - set(known):
        raise SystemExit(f"unknown {what}: {', '.join(sorted(strangers))}; known: {', '.join(known)}")
    return [name for name in known if not given or name in given]


def verify(arguments: argparse.Namespace) -> int:
    require("rich", "cli")
    from rich.table import Table

    from rnnkernels.verify import DTYPES, FAMILIES, Check, add, checks

    if bool(arguments.load) != bool(arguments.reference):
        raise SystemExit("--load and --reference go together: a page, and the Python file whose step() it is held against")
    if arguments.load:
        arguments.cell = [*(arguments.cell or ()), add(arguments.load, arguments.reference)]
    build = ops.build_info()
    cells = chosen(arguments.cell, list(ops.CELLS), "cell")
    dtypes = chosen(arguments.dtype, list(DTYPES), "dtype")
    isas = chosen(arguments.isa, [isa for isa in build["isas"] if isa in build["supported"]], "instruction set on this machine")
    families = [family for family in FAMILIES if family.quick or not arguments.quick]

    table = Table("cell", "dtype", "isa", "worst in", "error", "torch's", "limit", "witness", "")
    report: list[dict[str, Any]] = []
    with progress_bar() as progress:
        task = progress.add_task("verify", total=len(cells) * len(dtypes) * len(isas) * len(families))
        for cell, dtype in ((cell, dtype) for cell in cells for dtype in dtypes):
            progress.update(task, description=f"{cell} {dtype}")
            done: dict[str, list[Check]] = {isa: [] for isa in isas}
            for batch in checks(cell, dtype, isas, families):
                done[batch[0].isa] += batch
                progress.advance(task)
            for isa, all_checks in done.items():
                worst = max(all_checks, key=lambda check: check.severity)
                failed = sum(not check.ok for check in all_checks)
                report.append({**vars(worst), "checks": len(all_checks), "failed": failed})
                table.add_row(
                    cell,
                    dtype,
                    isa,
                    f"{worst.family}: {worst.message or worst.quantity}",
                    f"{worst.error:.1e}",
                    f"{worst.torch_error:.1e}",
                    f"{worst.limit:.1e}",
                    worst.witness,
                    f"[red]{failed} of {len(all_checks)} failed[/]" if failed else f"[green]{len(all_checks)} ok[/]",
                )
    failures = [row for row in report if row["failed"]]
    out = console(stderr=arguments.json == "-")
    out.print(table)
    out.print(f"{len(report) - len(failures)} of {len(report)} rows hold" + (f", [red]{len(failures)} do not[/]" if failures else ""))
    if arguments.json:
        # JSON has no infinity
        rows = [{key: None if value == math.inf else value for key, value in row.items()} for row in report]
        write_json({"build": describe(), "ok": not failures, "rows": rows}, arguments.json)
    return 1 if failures else 0


def write_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two markers."""
    whole = page.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise SystemExit(f"{page} needs one {begin} and after it one {end}")
    before, rest = whole.split(begin)
    page.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def features(arguments: argparse.Namespace) -> int:
    from rnnkernels.features import BEGIN, END, markdown

    if arguments.write:
        write_between(Path(arguments.write), BEGIN, END, markdown())
    else:
        print(markdown())
    return 0


def bench(arguments: Sequence[str]) -> int:
    """The benchmarks live beside the package in the repository and are not installed with it."""
    for root in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (root / "bench" / "cases.py").is_file():
            sys.path.insert(0, str(root))
            return int(importlib.import_module("bench.__main__").main(arguments))
    raise SystemExit("the benchmarks are not part of the installed package: clone the repository and run this command in its root")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rnnkernels", description="Recurrent kernels: what is built, is it right, is it fast.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("info", help="the build, the machine, the versions")
    command.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to the standard output")

    command = commands.add_parser("verify", help="every cell, dtype, instruction set and shape family against the float64 reference")
    command.add_argument("--cell", nargs="+", help=f"of {', '.join(ops.CELLS)}")
    command.add_argument("--load", metavar="PAGE", help="a cell of your own, see rnnkernels.load_cell; verify it alone, or with --cell")
    command.add_argument("--reference", metavar="FILE", help="its reference: a Python file with step(x, u, v, *states)")
    command.add_argument("--dtype", nargs="+")
    command.add_argument("--isa", nargs="+", help="instruction sets")
    command.add_argument("--quick", action="store_true", help="the five shape families that find most")
    command.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or to the standard output")

    command = commands.add_parser("features", help="what each layer runs and takes, as a markdown table")
    command.add_argument("--write", metavar="PAGE", help="put it between the markers of this page")

    commands.add_parser("bench", add_help=False, help="speed against torch.nn and other peers; see bench --help")

    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "bench":
        return bench(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return {"info": info, "verify": verify, "features": features}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
