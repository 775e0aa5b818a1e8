"""Data-parallel training, a process for each device.

    torchrun --nproc-per-node 2 examples/ddp.py

On GPUs where there are as many, else on CPUs. The layer learns to add: of two marked numbers in a sequence it says the sum.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

import rnnkernels


class Adder(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.recurrent = rnnkernels.LSTM(2, hidden, forget_bias=1.0)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.recurrent(x)
        return self.head(output[-1]).squeeze(-1)


def batch(steps: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and marks ``[T, B, 2]``, and the sums of the marked ones ``[B]``."""
    numbers = torch.rand(steps, count, generator=generator)
    marks = torch.zeros(steps, count).scatter_(0, torch.rand(steps, count, generator=generator).argsort(0)[:2], 1.0)
    return torch.stack([numbers, marks], dim=-1), (numbers * marks).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.device_count() >= world
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same weights everywhere, before DDP sees to it
    model = nn.parallel.DistributedDataParallel(Adder(options.hidden).to(device), device_ids=[local] if on_gpu else None)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())  # other data everywhere
    for step in range(1, options.steps + 1):
        x, y = (t.to(device) for t in batch(options.length, options.batch // world, generator))
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(options.steps // 5, 1) == 0:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if dist.get_rank() == 0:
                print(f"step {step}: mean squared error {mean.item() / world:.4f} on {world} processes", flush=True)
    dist.destroy_process_group()
    if not on_gpu:
        # DDP keeps gloo's threads alive for good, and one that still lets go of its last work while the interpreter ends aborts the process
        # (one in four here; torch 2.13).
        os._exit(0)


if __name__ == "__main__":
    main()
