"""Memory that a layer keeps for its backward, and the most that a training step takes."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from bench.cases import DTYPES, Case
from bench.peers import OURS, TORCH, Layers, make_problem


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


def peak_of_step(name: str, case: Case, recompute: bool = False) -> int:
    """Bytes by which the resident memory of a fresh process grows at most during one forward and backward, gradients and all."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_peak, name, case, recompute).result()


def _peak(name: str, case: Case, recompute: bool) -> int:
    torch.set_num_threads(case.threads)
    peer: Layers = {TORCH.name: TORCH, OURS.name: OURS}[name]

    def step(case: Case, count: bool) -> int:
        problem = make_problem(case)
        layer = peer.layer(case, problem)
        if recompute:
            layer.recompute = True  # type: ignore[assignment]
        input = problem.input.requires_grad_()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is what is resident now
        before = _resident("VmRSS")
        output, _ = peer.way(layer, case)(input)
        output.backward(problem.upstream)
        return _resident("VmHWM") - before if count else 0

    step(replace(case, T=2), count=False)  # libraries and threads come with the first call
    return step(case, count=True)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
