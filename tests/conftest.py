"""What all tests share."""

import functools
import random
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from rnnkernels import ops

ISAS: list[str] = ops.build_info()["supported"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="which random numbers the tests draw; 0 is what CI draws (default: %(default)s)")


def pytest_configure(config: pytest.Config) -> None:
    """A run draws what the one before it drew: by another --seed, and then hypothesis goes its own way too, others are found."""
    torch.manual_seed(config.getoption("seed"))
    same = config.getoption("seed") == 0
    settings.register_profile("rnnkernels", max_examples=40, deadline=None, derandomize=same, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("rnnkernels")


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """A test draws the same numbers whichever ran before it in its process."""
    seed = zlib.crc32(f"{request.config.getoption('seed')} {request.node.nodeid}".encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture
def restore() -> Iterator[None]:
    """Puts back the instruction set and the thread count that a test changes."""
    isa, threads = ops.build_info()["isa"], torch.get_num_threads()
    yield
    ops.set_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture
def two_threads(restore: None) -> None:
    """What runs at the same time needs two, whatever the machine has."""
    torch.set_num_threads(2)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN, and all memory is fresh, so that what a kernel reads without having written it shows."""
    monkeypatch.setattr(ops.cpu.thread, "KEPT", -1)
    monkeypatch.setattr(ops.cpu.thread, "buffers", [])
    was, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    monkeypatch.setattr(ops.cells, "deterministic", lambda: False)  # or a single step would not be left to torch
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def given_of(cell: str, x: Tensor, states: Any, weights: Any, batch_sizes: Tensor | None = None, first_row: int = 0) -> list[Tensor]:
    """What the cell is given, if anything: some numbers for each row, some for each token, always the same."""
    spec = ops.CELLS[cell]
    if not spec.given:
        return []
    H = weights[0].shape[0] // spec.input_gates if spec.input_gates else weights[1].shape[0] // spec.hidden_gates
    if batch_sizes is None:
        row, token = torch.arange(first_row, first_row + x.shape[1]), torch.arange(x.shape[0]).unsqueeze(1) * 31
    else:
        row, token = torch.arange(states[0].shape[0]), torch.arange(x.shape[0]) * 31
    found = []
    for kind, slot in enumerate(spec.given):
        each_row = row * 17 + kind * 5
        place = each_row if spec.slots[slot][0] == "dropout" else token + (each_row if batch_sizes is None else kind * 5)
        scattered = (place.unsqueeze(-1) + torch.arange(H) * 7).double() * 0.6180339887498949
        found.append((scattered - scattered.floor()).to(x.dtype).to(x.device))
    return found


def giving(sequence: Any) -> Any:
    """`sequence` with what the cell is given."""

    @functools.wraps(sequence)
    def call(cell: str, x: Tensor, states: Any, *weights: Any, first_row: int = 0, **options: Any) -> Any:
        given = given_of(cell, x, states, weights, options.get("batch_sizes"), first_row)
        return sequence(cell, x, states, *weights, **options, **({"given": given} if given else {}))

    return call
