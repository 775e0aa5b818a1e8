"""Sequence labelling: which characters of a line of Python are code, comment or string, by a bidirectional LSTM.

    python examples/tagging.py

The lines are those of the standard library of the Python that runs it, the labels are its own tokenizer's. Lines are as long as they are:
``lengths`` says so, and nothing is sorted or packed.
"""

import argparse
import io
import sysconfig
import tokenize
from pathlib import Path

import torch
from torch import Tensor, nn

import rnnkernels

LABELS = ("code", "comment", "string")


def labelled(path: Path, longest: int) -> list[tuple[str, list[int]]]:
    """The file's lines with a label for each character."""
    text = path.read_text(encoding="utf-8", errors="ignore")
    lines = text.splitlines(keepends=True)
    labels = [[0] * len(line) for line in lines]
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            label = {tokenize.COMMENT: 1, tokenize.STRING: 2}.get(token.type, 0)
            for row in range(token.start[0], token.end[0] + 1) if label else ():
                first = token.start[1] if row == token.start[0] else 0
                last = token.end[1] if row == token.end[0] else len(lines[row - 1])
                labels[row - 1][first:last] = [label] * (last - first)
    except (tokenize.TokenError, SyntaxError):
        return []
    return [(line, found) for line, found in zip(lines, labels, strict=True) if 8 <= len(line) <= longest and any(found)]


def batch(lines: list[tuple[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Characters and labels ``[B, T]``, padded, and lengths ``[B]``."""
    characters = nn.utils.rnn.pad_sequence([torch.tensor([min(ord(c), 127) for c in line]) for line, _ in lines], batch_first=True)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(found) for _, found in lines], batch_first=True, padding_value=-100)
    return characters, labels, torch.tensor([len(line) for line, _ in lines])


class Tagger(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, hidden)
        self.recurrent = rnnkernels.LSTM(hidden, hidden, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, len(LABELS))

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        output, _ = self.recurrent(self.embedding(characters), lengths=lengths)
        return self.head(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="lines a step")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--files", type=int, default=60, help="files of the standard library to read")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    root = Path(sysconfig.get_path("stdlib"))
    lines = [line for path in sorted(root.glob("*.py"))[: options.files] for line in labelled(path, 120)]
    order = torch.randperm(len(lines)).tolist()
    held = min(500, len(lines) // 2)
    held_out, training = [lines[i] for i in order[:held]], [lines[i] for i in order[held:]]
    model = Tagger(options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        picked = torch.randint(len(training), (options.batch,)).tolist()
        characters, labels, lengths = batch([training[i] for i in picked])
        loss = nn.functional.cross_entropy(model(characters, lengths).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(options.steps // 5, 1) == 0:
            with torch.no_grad():
                characters, labels, lengths = batch(held_out)
                right = (model(characters, lengths).argmax(-1) == labels)[labels >= 0].float().mean()
            print(f"step {step}: loss {loss.item():.3f}, {right.item():.1%} of the characters of {len(held_out)} other lines right")


if __name__ == "__main__":
    main()
