"""Detection in a running signal: trained on whole recordings, then run as sound arrives, frame by frame, with the same numbers.

    python examples/streaming_audio.py

Recordings are noise in which a rising tone sounds now and then (made here, at 8 kHz); features are the spectrum of frames of 16 ms; a GRU
of two layers tells for each frame whether the tone is sounding. In use, ``stream.step`` takes a frame in a few microseconds.
"""

import argparse
import math
import time

import torch
from torch import Tensor, nn

import rnnkernels

RATE, FRAME = 8000, 128


def recording(frames: int, count: int) -> tuple[Tensor, Tensor]:
    """Samples ``[B, frames · FRAME]`` and, for each frame, whether the tone sounds, ``[frames, B]``."""
    time_axis = torch.arange(frames * FRAME) / RATE
    signal, sounds = torch.randn(count, frames * FRAME) * 0.5, torch.zeros(frames, count)
    for row in range(count):
        for _ in range(frames // 60):
            first = int(torch.randint(frames - 20, ()))
            span = slice(first * FRAME, (first + 20) * FRAME)
            t = time_axis[: 20 * FRAME]
            signal[row, span] += 0.35 * torch.sin(2 * math.pi * (500 * t + 1500 * t * t))
            sounds[first : first + 20, row] = 1
    return signal, sounds


def features(samples: Tensor) -> Tensor:
    """The logarithm of the spectrum of each frame: ``[…, FRAME / 2 + 1]`` of ``[…, FRAME]``."""
    return torch.log1p(torch.fft.rfft(samples * torch.hann_window(FRAME)).abs())


class Detector(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.recurrent = rnnkernels.GRU(FRAME // 2 + 1, hidden, num_layers=2)
        self.head = nn.Linear(hidden, 1)

    def forward(self, frames: Tensor) -> Tensor:
        output, _ = self.recurrent(frames)
        return self.head(output).squeeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = Detector(options.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, options.steps + 1):
        signal, sounds = recording(120, 16)
        scores = model(features(signal.unflatten(1, (-1, FRAME))).transpose(0, 1))
        loss = nn.functional.binary_cross_entropy_with_logits(scores, sounds)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(options.steps // 5, 1) == 0:
            right = ((scores > 0) == (sounds > 0)).float().mean()
            print(f"step {step}: loss {loss.item():.3f}, {right.item():.1%} of the frames right")

    with torch.no_grad():
        signal, _ = recording(600, 1)
        frames = signal[0].unflatten(0, (-1, FRAME))
        whole = model.recurrent(features(frames).unsqueeze(1))[0].squeeze(1)
        stream, outputs, taken = model.recurrent.stream(), [], 0.0
        for frame in frames:
            x = features(frame)
            start = time.perf_counter()
            outputs.append(stream.step(x))
            taken += time.perf_counter() - start
    same = torch.equal(torch.stack(outputs), whole)
    print(
        f"streamed: {'the same bits' if same else 'other bits'} as the whole recording, {taken / len(frames) * 1e6:.0f} µs a frame of 16 ms"
    )


if __name__ == "__main__":
    main()
