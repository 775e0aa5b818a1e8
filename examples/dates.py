"""Encoder and decoder: dates as people write them into ISO 8601.

    python examples/dates.py

The encoder reads a text of any length (``lengths``), the decoder starts from its final state: in training with the right characters as
input, the whole answer in one call, afterwards from its own answers, a step of a stream at a time.
"""

import argparse
import datetime
import random

import torch
from torch import Tensor, nn

import rnnkernels

FORMS = ("%d %B %Y", "%B %d, %Y", "%A, %d %b %Y", "%d/%m/%Y", "%b %d %Y", "the %d of %B, %Y")
START = ord("^")  # what the decoder reads before the first character


def codes(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Characters ``[T, B]``, padded, and lengths ``[B]``."""
    rows = [torch.tensor(list(text.encode("ascii"))) for text in texts]
    return nn.utils.rnn.pad_sequence(rows), torch.tensor([len(row) for row in rows])


def pairs(count: int, draw: random.Random) -> tuple[list[str], list[str]]:
    days = [datetime.date.fromordinal(draw.randrange(693596, 767011)) for _ in range(count)]  # of the years 1900 to 2100
    return [day.strftime(draw.choice(FORMS)) for day in days], [day.isoformat() for day in days]


class Translator(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, hidden)
        self.encoder = rnnkernels.GRU(hidden, hidden)
        self.decoder = rnnkernels.GRU(hidden, hidden)
        self.head = nn.Linear(hidden, 128)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores of each character of the target, ``[T, B, 128]``, from those before it."""
        _, state = self.encoder(self.embedding(source), lengths=lengths)
        before = torch.cat([torch.full_like(target[:1], START), target[:-1]])
        output, _ = self.decoder(self.embedding(before), state)
        return self.head(output)

    @torch.no_grad()
    def translate(self, texts: list[str]) -> list[str]:
        source, lengths = codes(texts)
        _, state = self.encoder(self.embedding(source), lengths=lengths)
        stream, last, found = self.decoder.stream(len(texts), state), torch.full((len(texts),), START), []
        for _ in range(len("2000-01-01")):
            last = self.head(stream.step(self.embedding(last))).argmax(-1)
            found.append(last)
        return [bytes(row).decode("ascii") for row in torch.stack(found, 1).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    draw = random.Random(options.seed)
    model = Translator(options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1, options.steps + 1):
        texts, answers = pairs(options.batch, draw)
        source, lengths = codes(texts)
        target, _ = codes(answers)
        loss = nn.functional.cross_entropy(model(source, lengths, target).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(options.steps // 5, 1) == 0:
            texts, answers = pairs(200, draw)
            found = model.translate(texts)
            right = sum(a == b for a, b in zip(found, answers, strict=True)) / len(answers)
            print(f"step {step}: loss {loss.item():.3f}, {right:.0%} of other dates right: {texts[0]} -> {found[0]}")


if __name__ == "__main__":
    main()
