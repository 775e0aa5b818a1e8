"""A cell of one's own, leaky.h beside this file, as a layer that learns to hold a value for a long time.

python examples/leaky.py
python -m rnnkernels verify --load examples/leaky.h --reference examples/leaky.py
"""

from pathlib import Path

import torch

import rnnkernels


def step(x, u, v, h):
    """The equation once more, for verify: h' = h + σ(rate) (tanh(W x + b + U h) − h)."""
    return (h + v[0].sigmoid() * ((x + u(h)).tanh() - h),)


def main() -> None:
    torch.manual_seed(0)
    leaky = rnnkernels.load_cell(Path(__file__).with_suffix(".h"))
    layer, readout = leaky(2, 32), torch.nn.Linear(32, 1)
    torch.nn.init.constant_(layer.weight_v_l0, -3)  # slow units: σ(-3) is a time constant of twenty steps
    parameters = [*layer.parameters(), *readout.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for iteration in range(501):
        values = torch.rand(60, 64, 1) * 2 - 1
        cue = torch.zeros(60, 64, 1)
        cue[0] = 1  # what is shown with the cue is asked for at the end
        output, _ = layer(torch.cat([values, cue], dim=2))
        loss = torch.nn.functional.mse_loss(readout(output[-1]), values[0])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if iteration % 100 == 0:
            print(f"iteration {iteration}: mean squared error {loss.item():.4f}")
    print(rnnkernels.explain(layer, torch.zeros(60, 64, 2)))


if __name__ == "__main__":
    main()
