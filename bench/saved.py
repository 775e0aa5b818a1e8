"""Memory that a layer keeps for its backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.cases import DTYPES, Case
from bench.peers import Layers, make_problem


@dataclass(frozen=True)
class Saved:
    """In units of H numbers a token (a row of one step), storages counted once, without the input and the parameters."""

    alone: float  # without the layer's output, which the caller keeps anyway
    with_output: float


def saved_for_backward(peer: Layers, case: Case) -> Saved:
    """What autograd's saved tensors hold after one forward in training."""
    problem = make_problem(case)
    layer = peer.layer(case, problem)
    run = peer.way(layer, case)
    input = problem.input.clone().requires_grad_()
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)  # keeps it alive too, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = run(input)
    free = {t.untyped_storage().data_ptr() for t in (input, *layer.parameters())}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    sizes = {address: size for address, size in storages.items() if address not in free}
    unit = case.tokens * case.H * DTYPES[case.dtype].itemsize
    result = output.untyped_storage()
    alone = sum(size for address, size in sizes.items() if address != result.data_ptr())
    return Saved(alone / unit, (alone + result.nbytes()) / unit)
