"""What all tests share."""

from collections.abc import Iterator

import pytest
import torch

from rnnkernels import ops

ISAS: list[str] = ops.build_info()["supported"]


@pytest.fixture
def restore() -> Iterator[None]:
    """Puts back the instruction set and the thread count that a test changes."""
    isa, threads = ops.build_info()["isa"], torch.get_num_threads()
    yield
    ops.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, and all memory is fresh, so that what a kernel reads without having written it shows."""
    monkeypatch.setattr(ops.cpu.memory, "KEPT", -1)
    monkeypatch.setattr(ops.cpu.memory, "buffer", torch.empty(0, dtype=torch.uint8))
    was, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = fill
