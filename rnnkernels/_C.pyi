from collections.abc import Sequence
from typing import Any

class Problem:
    def __init__(
        self,
        cell: int,
        storage: int,
        steps: int,
        batch: int,
        input: int,
        hidden: int,
        output: int,
        rows: int,
        reverse: bool,
        training: bool,
        complete: bool,
        threads: int,
        products: int,
        lengths: int,
        resets: int,
        units: int,
        module: int,
        weight_type: int,
        keeps_packed: bool,
        chained: bool,
        least: int,
        row_groups: int,
    ) -> None: ...

class Forward:
    def __init__(
        self,
        problem: Problem,
        input: int,
        weight_ih: int,
        bias_ih: int,
        bias_hh: int,
        gates: int,
        gates_row: int,
        weights: Sequence[int],
        vectors: Sequence[int],
        initial: Sequence[int],
        final: Sequence[int],
        output: int,
        history: Sequence[int],
        workspace: int,
        bytes: int,
        given: Sequence[tuple[int, int, int]],
        moments: int,
        resets: Sequence[tuple[int, int, int]],
        packed: int,
        pack: int,
    ) -> None: ...
    def run(
        self,
        input: int,
        initial: Sequence[int],
        gates: int,
        output: int,
        final: Sequence[int],
        history: Sequence[int],
        workspace: int,
        packed: int,
        pack: int,
    ) -> None: ...
    def placed(
        self,
        input: int,
        initial: Sequence[int],
        gates: int,
        output: int,
        final: Sequence[int],
        history: Sequence[int],
        workspace: int,
        packed: int,
        pack: int,
    ) -> Forward: ...

class Backward:
    def __init__(
        self,
        problem: Problem,
        kept: int,
        grad_gates: int,
        weights: Sequence[int],
        vectors: Sequence[int],
        initial: Sequence[int],
        output: int,
        history: Sequence[int],
        grad_states: Sequence[int],
        grad_final: Sequence[int],
        grad_initial: Sequence[int],
        input: int,
        weight_ih: int,
        grad_input: int,
        grad_weight_ih: int,
        grad_weights: Sequence[int],
        grad_bias_ih: int,
        grad_bias_hh: int,
        grad_vectors: Sequence[int],
        workspace: int,
        bytes: int,
        moments: int,
        resets: Sequence[tuple[int, int, int]],
        grad_resets: Sequence[int],
    ) -> None: ...
    def run(
        self,
        kept: int,
        grad_gates: int,
        output: int,
        input: int,
        workspace: int,
        weights: Sequence[int],
        vectors: Sequence[int],
        initial: Sequence[int],
        history: Sequence[int],
        grad_states: Sequence[int],
        grad_final: Sequence[int],
        grad_initial: Sequence[int],
        grad_weights: Sequence[int],
        grads: Sequence[int],
        grad_vectors: Sequence[int],
    ) -> None: ...

class Stream:
    def __init__(self, layers: Sequence[Problem]) -> None: ...
    @property
    def bytes(self) -> int: ...
    def place(self, workspace: int) -> None: ...
    def pack(
        self,
        layer: int,
        weight_ih: int,
        bias_ih: int,
        bias_hh: int,
        weights: Sequence[int],
        vectors: Sequence[int],
        given: Sequence[tuple[int, int, int]],
    ) -> None: ...
    def load(self, states: Sequence[int], rows: Sequence[int]) -> None: ...
    def store(self, states: Sequence[int]) -> None: ...
    def step(self, x: int, y: int) -> None: ...

MAX_SUMS: int

def cells() -> list[dict[str, Any]]: ...
def trace(cell: int) -> dict[str, Any]: ...
def add_cell(isa: str, page: int, tracer: int) -> tuple[int, dict[str, Any]]: ...
def add_page(cell: int, isa: str, page: int) -> None: ...
def add_cuda_cell(cell: int, kernels: int) -> None: ...  # of builds with CUDA, as what follows it at the end
def build() -> dict[str, Any]: ...
def supported_isas() -> list[str]: ...
def isa() -> str: ...
def isa_of_pages() -> str: ...
def set_isa(name: str) -> None: ...
def workspace_bytes(problem: Problem, backward: bool) -> int: ...
def packing(problem: Problem) -> tuple[int, tuple[int, ...]]: ...
def schedule(problem: Problem, backward: bool) -> tuple[int, int, int, float]: ...
def teams(problem: Problem, training: bool) -> list[tuple[int, int, int]]: ...
def gains_apart(problem: Problem, training: bool) -> bool: ...
def gains_chained(problem: Problem, first_input: int, layers: int) -> bool: ...
def tiling(
    problem: Problem, backward: bool, multiprocessors: int, shared_bytes: int, cluster_blocks: int, sequences: int
) -> tuple[str, int, int, int, bool]: ...
def prefer_large_pages(memory: int, bytes: int) -> None: ...
def measure_bandwidth(bytes: int, threads: int) -> float: ...
def measure_product(storage: int, threads: int) -> float: ...
def measure_barrier(threads: int) -> float: ...
def measure_page(cell: int, storage: int, training: bool, backward: bool) -> float: ...
def forward(calls: Sequence[Forward]) -> None: ...
def forward_chain(calls: Sequence[Forward], threads: int) -> None: ...
def backward(calls: Sequence[Backward]) -> None: ...
def forward_step(
    problem: Problem,
    stage: int,
    gates: int,
    gates_row: int,
    kept: int,
    between: int,
    vectors: Sequence[int],
    states: Sequence[int],
    history: Sequence[int],
    given: Sequence[int],
    given_row: Sequence[int],
    rows: int,
    sums: int,
    moments: int,
    partial: int,
    device: int,
    stream: int,
) -> None: ...
def backward_step(
    problem: Problem,
    stage: int,
    kept: int,
    grad_gates: int,
    vectors: Sequence[int],
    previous_rows: int,
    previous: Sequence[int],
    initial: Sequence[int],
    states: Sequence[int],
    grad_states: Sequence[int],
    carried: Sequence[int],
    operand: int,
    rows: int,
    summed_rows: int,
    sums: int,
    moments: int,
    means: int,
    partial: int,
    device: int,
    stream: int,
) -> None: ...

# Only in a build with CUDA.
def cuda_device(device: int) -> tuple[int, int, int]: ...
def cuda_why_not(problem: Problem, backward: bool, device: int) -> str: ...
def cuda_gains_together(problem: Problem, backward: bool, device: int) -> bool: ...
def cuda_workspace_bytes(problem: Problem, backward: bool, device: int, sequences: int) -> int: ...
def cuda_forward_call(
    problem: Problem,
    gates: int,
    gates_row: int,
    weights: Sequence[int],
    vectors: Sequence[int],
    initial: Sequence[int],
    final: Sequence[int],
    output: int,
    history: Sequence[int],
    workspace: int,
) -> Forward: ...
def cuda_backward_call(
    problem: Problem,
    kept: int,
    grad_gates: int,
    weights: Sequence[int],
    vectors: Sequence[int],
    initial: Sequence[int],
    output: int,
    history: Sequence[int],
    grad_states: Sequence[int],
    grad_final: Sequence[int],
    grad_initial: Sequence[int],
    workspace: int,
) -> Backward: ...
def cuda_forward(calls: Sequence[Forward], offsets: int, device: int, stream: int) -> None: ...
def cuda_backward(calls: Sequence[Backward], offsets: int, device: int, stream: int) -> None: ...
