"""The engines: what they are called, who runs them, and which of them runs what."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch

from .. import _C
from . import cpu, peer, steps
from .cells import PERSISTENT, Rows, Sizes, problem
from .load import compile_for, load_kernels

ENGINES = ("auto", "cpu", "stepwise", *PERSISTENT, "torch", "traced")
# Those that are kernels; "torch" and "traced" are torch's operations, which differentiate themselves.
RUNS: dict[str, Any] = {"cpu": cpu, "stepwise": steps, **dict.fromkeys(PERSISTENT, steps)}


def cuts_natively(engine: str, device: torch.device) -> bool:
    """Whether lengths, reset_mask and units may go to :func:`sequence`; elsewhere ``functional`` cuts the batch into segments."""
    return engine == "traced" or (engine in ("auto", "cpu") and device.type == "cpu")


def choose(engine: str, s: Sizes, dtype: torch.dtype, input_size: int, device: torch.device) -> tuple[str, str]:
    """Which engine runs it, and why. Raise if that which was asked for cannot."""
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    asked = f"engine={engine!r} was asked for"
    if engine == "torch":
        peer.check(s.cell)
        if s.cut:
            raise RuntimeError("engine: 'torch' takes no lengths, reset_mask or units")
        return engine, asked
    if s.cut and not cuts_natively(engine, device):
        raise RuntimeError(
            f"engine: lengths, reset_mask and units are for the engine 'cpu' on CPU tensors and for 'traced', got {engine!r} on {device}"
        )
    if engine == "traced":
        return engine, asked
    if device.type == "cpu":
        if engine in PERSISTENT:
            raise RuntimeError(f"engine: {engine!r} runs on a CUDA device, and input is on the CPU")
        compile_for("scalar" if engine == "stepwise" else _C.isa_of_pages(), s.cell.name)
        return ("cpu", "the CPU's engine") if engine == "auto" else (engine, asked)
    if device.type != "cuda" or not hasattr(_C, "cuda_why_not"):
        what = "has no CUDA part" if device.type == "cuda" else "computes on CPU and CUDA devices"
        raise RuntimeError(f"input: no engine for device {device}: this build {what}")
    if engine == "cpu":
        raise RuntimeError(f"engine: 'cpu' cannot run on input's device {device}")
    if too_old := _too_old(*torch.cuda.get_device_capability(device)):
        raise RuntimeError(f"input: no engine for device {device}: {too_old}")
    load_kernels(s.cell.name)
    if engine == "stepwise":
        return engine, asked
    chosen = "persistent" if engine == "auto" else engine
    task = problem(s._replace(engine=chosen), dtype, input_size, Rows(), True)
    why_not = next(filter(None, (_C.cuda_why_not(task, backward, index_of(device)) for backward in (False, True))), "")
    if engine in PERSISTENT and why_not:
        raise RuntimeError(f"engine: {engine!r} cannot run this: {why_not}")
    return ("stepwise", why_not) if why_not else (chosen, "the weights fit on the chip" if engine == "auto" else asked)


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _too_old(major: int, minor: int) -> str:
    """Why a device of this compute capability cannot run the CUDA part of this build; empty: it can."""
    built = _C.build()["cuda"]["architectures"]
    oldest = min(int(number) for number in re.findall(r"\d+", built))
    if major * 10 + minor >= oldest:
        return ""
    return f"it has compute capability {major}.{minor}, and this build is for {oldest // 10}.{oldest % 10} and later ({built})"
