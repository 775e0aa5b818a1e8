"""µs a step of the CUDA engines beside torch.nn (cuDNN), alternating, timed by events. Run by bench/gpu.sh; writes JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

import rnnkernels
from bench.cases import DTYPES

PEER = "torch.nn"
LAYERS = {"lstm": (torch.nn.LSTM, rnnkernels.LSTM), "gru": (torch.nn.GRU, rnnkernels.GRU), "srn": (torch.nn.RNN, rnnkernels.RNN)}


def seconds(run: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def sides(cell: str, dtype: torch.dtype, batch: int, hidden: int, steps: int, training: bool, both: bool) -> dict[str, Callable[[], None]]:
    """What is timed: torch.nn's layer and ours by each engine, ``both`` for bidirectional ones."""
    theirs, ours = LAYERS[cell]
    peer = theirs(hidden, hidden, bidirectional=both).to("cuda", dtype)
    inputs = [torch.randn(steps, batch, hidden, device="cuda", dtype=dtype, requires_grad=training) for _ in range(3)]
    upstream = torch.randn(steps, batch, hidden * (2 if both else 1), device="cuda", dtype=dtype)
    turn = itertools.cycle(inputs)  # one buffer over and over would measure the cache

    def made(layer: torch.nn.Module) -> Callable[[], None]:
        def inference() -> None:
            with torch.no_grad():
                layer(next(turn))

        def train() -> None:
            x = next(turn)
            layer(x)[0].backward(upstream)
            layer.zero_grad()
            x.grad = None

        return train if training else inference

    found = {PEER: made(peer)}
    for engine in ("persistent", "stepwise", *(("persistent_3xtf32",) if dtype is torch.float32 else ()), "torch"):
        layer = ours(hidden, hidden, bidirectional=both, engine=engine).to("cuda", dtype)
        layer.load_state_dict(peer.state_dict())
        try:
            a, b = layer(inputs[0])[0].float(), peer(inputs[0])[0].float()
        except RuntimeError as refusal:
            print(f"{cell} {dtype} H {hidden} B {batch} {engine}: {refusal}")
            continue
        worst = (a - b).abs().max().item()
        if not worst < 0.05:
            print(f"{cell} {dtype} H {hidden} B {batch} {engine}: WRONG by {worst}")
            continue
        found[engine] = made(layer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--cells", nargs="+", default=["lstm", "gru"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument("--bidirectional", action="store_true", help="both directions, beside a bidirectional layer of torch.nn's")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # else the peer's float32 would be TF32
    cases = []
    grid = itertools.product(arguments.cells, arguments.dtypes, arguments.hidden, arguments.batch, (False, True))
    for cell, dtype, hidden, batch, training in grid:
        runs = sides(cell, DTYPES[dtype], batch, hidden, arguments.steps, training, arguments.bidirectional)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                times[name].append(seconds(run) / arguments.steps * 1e6)
        medians = {name: statistics.median(values) for name, values in times.items()}
        name = f"{cell} {dtype} H {hidden} B {batch} {'training' if training else 'inference'}"
        ratios = "  ".join(f"{engine} {medians[PEER] / value:.2f}x" for engine, value in medians.items() if engine != PEER)
        print(f"{name:45} {PEER} {medians[PEER]:8.2f} us a step  {ratios}", flush=True)
        sizes = {"cell": cell, "dtype": dtype, "H": hidden, "B": batch, "T": arguments.steps, "training": training}
        cases.append({**sizes, "bidirectional": arguments.bidirectional, "us_a_step": times})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    report = {
        "date": datetime.now(timezone.utc).isoformat(),
        "commit": commit,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
