"""A character language model, trained with torch.nn and with rnnkernels: the same curve in less time.

    python examples/char_lm.py                    # on the sources of the Python that runs it
    python examples/char_lm.py --text novel.txt   # on any text

An LSTM, then a GRU, learns to continue text. Every training step is taken twice, by turns, with the same seed and the same characters: once
by a model whose recurrent layer is torch.nn's, once by one whose layer is rnnkernels'. Nothing else differs.

Training amplifies rounding: two runs of one library from weights that differ in their last bit part just as far as these two curves do.
"""

import argparse
import json
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import rnnkernels

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LIBRARIES: dict[str, ModuleType] = {"torch.nn": nn, "rnnkernels": rnnkernels}
CELLS = ("LSTM", "GRU")


class CharModel(nn.Module):
    def __init__(self, library: ModuleType, cell: str, vocabulary: int, hidden: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.recurrent = getattr(library, cell)(hidden, hidden)  # the one line in which the two models differ
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        output, _ = self.recurrent(self.embedding(characters))
        return self.head(output)


def read_text(path: Path | None) -> str:
    """The file, or else the standard library of this Python, without its tests."""
    if path is not None:
        return path.read_text(encoding="utf-8", errors="ignore")
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
    files = sorted(file for file in root.rglob("*.py") if not skipped & set(file.relative_to(root).parts))
    return "".join(file.read_text(encoding="ascii", errors="ignore") for file in files)


def batches(data: Tensor, options: argparse.Namespace) -> Iterator[Tensor]:
    """Excerpts of the text, time first, each one character longer than what is fed, in an order the seed alone decides."""
    generator = torch.Generator().manual_seed(options.seed)
    offsets = torch.arange(options.length + 1).unsqueeze(1)
    for _ in range(options.steps):
        yield data[offsets + torch.randint(len(data) - options.length, (options.batch,), generator=generator)]


def train(model: CharModel, data: Tensor, options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Train and give, after each step, its loss (nats a character) and the seconds it took."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    for batch in batches(data, options):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[:-1]).flatten(0, 1), batch[1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item(), time.perf_counter() - start


@torch.no_grad()
def sample(model: CharModel, cell: str, prompt: list[int], count: int, seed: int) -> list[int]:
    """Continue the prompt one character at a time: a cell takes over the layer's weights and carries the state along."""
    hidden = model.recurrent.hidden_size
    step = getattr(rnnkernels, cell + "Cell")(hidden, hidden)
    step.load_state_dict({name.removesuffix("_l0"): value for name, value in model.recurrent.state_dict().items()})
    generator = torch.Generator().manual_seed(seed)
    characters, state = list(prompt), None
    for position in range(len(prompt) + count - 1):
        state = step(model.embedding(torch.tensor([characters[position]])), state)
        if position + 1 == len(characters):
            output = state[0] if isinstance(state, tuple) else state
            odds = torch.softmax(model.head(output[0]) / 0.7, dim=0)
            characters.append(int(torch.multinomial(odds, 1, generator=generator)))
    return characters


def compare(cell: str, data: Tensor, vocabulary: int, options: argparse.Namespace, console: Console) -> tuple[CharModel, dict]:
    """Train both models; give that of rnnkernels, and the numbers of both."""
    runs = {}
    for name, library in LIBRARIES.items():
        torch.manual_seed(options.seed)
        model = CharModel(library, cell, vocabulary, options.hidden)
        runs[name] = train(model, data, options)
    losses: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    columns = (TextColumn(cell), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(cell, total=options.steps, loss="")
        for step in zip(*runs.values(), strict=True):
            for name, (loss, second) in zip(LIBRARIES, step, strict=True):
                losses[name].append(loss)
                seconds[name].append(second)
            progress.update(task, advance=1, loss=" ".join(f"{loss:.4f}" for loss, _ in step))
    total = {name: sum(seconds[name]) for name in LIBRARIES}
    return model, {
        "losses": losses,
        "seconds": seconds,
        "characters_per_second": {name: options.steps * options.batch * options.length / total[name] for name in LIBRARIES},
        "difference": max(abs(a - b) for a, b in zip(*losses.values(), strict=True)),
        "ratio": total["torch.nn"] / total["rnnkernels"],
    }


def show(cell: str, result: dict, console: Console) -> None:
    title = f"{cell}: {result['ratio']:.2f} × as fast, the losses {result['difference']:.1e} apart at most"
    table = Table("", "first loss", "last loss", "seconds", "characters/s", title=title)
    for name, losses in result["losses"].items():
        speed = result["characters_per_second"][name]
        table.add_row(name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{sum(result['seconds'][name]):.1f}", f"{speed:,.0f}")
    console.print(table)
    console.rule(f"written by the {cell}, a character at a time")
    console.print(result["sample"], markup=False, highlight=False)
    console.rule()


def plot(results: dict[str, dict], path: Path) -> None:
    figure, axes = plt.subplots(len(results), 2, figsize=(11, 3.6 * len(results)), sharey="row", squeeze=False, layout="constrained")
    for (cell, result), (by_step, by_time) in zip(results.items(), axes, strict=True):
        for name, style in zip(LIBRARIES, ({"linewidth": 4, "alpha": 0.4}, {"linewidth": 1.2}), strict=True):
            by_step.plot(result["losses"][name], label=name, **style)
            by_time.plot(torch.tensor(result["seconds"][name]).cumsum(0), result["losses"][name], label=name, **style)
        by_step.set(title=f"{cell}: {result['difference']:.1e} apart at most", xlabel="step", ylabel="nats a character")
        by_time.set(title=f"{cell}: {result['ratio']:.2f} × as fast", xlabel="seconds of training")
        by_step.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--text", type=Path, help="file to learn from; without it, the Python standard library")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units")
    parser.add_argument("--batch", type=int, default=32, help="excerpts a step")
    parser.add_argument("--length", type=int, default=100, help="characters an excerpt")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampled text")
    parser.add_argument("--sample", type=int, default=400, help="characters to write with the trained model")
    parser.add_argument("--output", type=Path, default=Path("char_lm"), help="path of the figure and the numbers, without .png and .json")
    options = parser.parse_args()

    text = read_text(options.text)
    if len(text) <= options.length + 1:
        parser.error(f"the text has {len(text)} characters; excerpts of {options.length} need more (see --text and --length)")
    codes, data = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32).unique(return_inverse=True)
    alphabet = [chr(code) for code in codes.tolist()]
    console = Console()
    sizes = f"T {options.length}, B {options.batch}, H {options.hidden}, {torch.get_num_threads()} threads"
    console.print(f"{len(text):,} characters, {len(alphabet)} distinct; {sizes}")

    results = {}
    for cell in CELLS:
        model, result = compare(cell, data, len(alphabet), options, console)
        written = sample(model, cell, data[:24].tolist(), options.sample, options.seed)
        results[cell] = result | {"sample": "".join(alphabet[i] for i in written)}
        show(cell, results[cell], console)

    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure, numbers = options.output.with_suffix(".png"), options.output.with_suffix(".json")
    plot(results, figure)
    setting = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "rnnkernels": rnnkernels.__version__}
    report = {"setting": setting, "versions": versions, "threads": torch.get_num_threads(), "characters": len(text), "cells": results}
    numbers.write_text(json.dumps(report, indent=1), encoding="utf-8")
    console.print(f"wrote {figure} and {numbers}")


if __name__ == "__main__":
    main()
