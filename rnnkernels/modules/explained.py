"""``explain``: what would run a layer or cell."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .. import ops


@dataclass(frozen=True)
class Plan:
    """What would run one layer in one direction, and why.

    ``name``: "layer 0 forward", "layer 0 reverse" and so on, of a cell "step". ``engine``: as :func:`rnnkernels.ops.sequence` names them.
    ``isa``: the instruction set of a CPU's kernels ("amx", "avx512bf16", "avx512", "avx2", "scalar"), "cuda", or "torch" where torch's own
    operations compute. ``threads``: how many share it on a CPU. ``schedule``: how they do. ``why``: what led to it.

    >>> import torch, rnnkernels
    >>> (plan,) = rnnkernels.explain(rnnkernels.GRUCell(3, 5), torch.zeros(2, 3)).plans
    >>> plan.name, plan.engine
    ('step', 'cpu')
    """

    name: str
    engine: str
    isa: str
    threads: int
    schedule: str
    why: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.engine} engine, {self.isa}, {self.threads} thread{'s' * (self.threads != 1)}, {self.schedule}: {self.why}"
        )


@dataclass(frozen=True)
class Explanation:
    """What would run a module on an input: a plan per layer × direction, in the order of the weights. ``str`` gives a line for each."""

    plans: tuple[Plan, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.plans))


def explain(module: nn.Module, input: Tensor | PackedSequence, hx: Any = None, **options: Any) -> Explanation:
    """Tell what would compute ``module(input, hx, **options)``, without its kernels; where gradients are asked for, of the backward pass.

    The module's forward goes its way (no hooks, no numbers drawn from torch's generators) up to each sequence, which is noted and not run.

    Args:
        module: a layer or cell of this package.
        input, hx, options: what its forward would take; shapes, dtypes and errors as there.

    Raises:
        TypeError: ``module`` is not a layer or cell of this package.

    >>> import torch, rnnkernels
    >>> explanation = rnnkernels.explain(rnnkernels.GRU(3, 5, bidirectional=True), torch.zeros(7, 2, 3))
    >>> [plan.name for plan in explanation.plans]
    ['layer 0 forward', 'layer 0 reverse']
    """
    module = getattr(module, "_orig_mod", module)  # of one under torch.compile, which would run kernels
    names = getattr(module, "_sequences", None)
    if names is None:
        raise TypeError(f"explain takes a layer or cell of rnnkernels, got {type(module).__module__}.{type(module).__qualname__}")
    data = input.data if isinstance(input, PackedSequence) else input
    with torch.random.fork_rng([data.device] if data.is_cuda else []), ops.listening() as heard:
        module.forward(input, hx, **options)
    # Where no row has a step there is nothing to run.
    return Explanation(tuple(Plan(name, *facts) for name, facts in zip(names(), heard, strict=True)) if heard else ())
