"""Every kernel against the float64 reference.

The rule: the error of a kernel, the largest absolute difference from the reference in float64 over the largest absolute value of the
reference, is at most twice that of torch's own computation in the same dtype, plus a few units in the last place. Torch's own is torch.nn
where it has the cell and the reference loop where it has not.
"""

from __future__ import annotations

import math
import runpy
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnkernels import ops, reference

Run = Callable[..., tuple[Tensor, ...]]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
ULPS = 8
INFERENCE = ", inference"
# Its gradient jumps where a pre-activation is zero. Half types round some of them across, in torch as in a kernel: neither is then wrong.
KINKED = "srn_relu"


@dataclass(frozen=True)
class Family:
    """A shape that could break a kernel in its own way.

    Where the error of one problem is a matter of luck, torch's as well as ours, several are drawn and judged as a whole: problems of a
    single number, which may be ill-conditioned (a saturated tanh), and sums over thousands of steps.
    """

    name: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    ragged: bool = False
    reverse: bool = False
    bias: bool = True
    quick: bool = False
    draws: int = 1


FAMILIES = (
    Family("unit", 1, 1, 1, 1, quick=True, draws=16),
    Family("under a vector", 5, 3, 7, 15, quick=True),
    Family("one vector", 7, 2, 16, 16),
    Family("over a vector", 6, 5, 9, 17, quick=True),
    Family("two vectors and one", 9, 4, 33, 33),
    Family("one step", 1, 6, 9, 17),
    Family("no bias", 6, 5, 9, 17, bias=False),
    Family("reverse", 6, 5, 9, 17, reverse=True),
    Family("ragged", 7, 5, 9, 17, ragged=True, quick=True),
    Family("ragged reverse", 7, 5, 9, 17, ragged=True, reverse=True, quick=True),
    Family("ragged no bias", 7, 5, 9, 17, ragged=True, bias=False),
    Family("long", 1000, 2, 5, 8, draws=4),
    Family("medium H", 6, 2, 32, 256),
    Family("large batch", 4, 65, 9, 17),
)


@dataclass(frozen=True)
class Problem:
    """The arguments of one call of `sequence`, and what the gradients of its results are."""

    cell: str
    input: Tensor
    states: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    given: dict[str, Tensor]
    cotangents: tuple[Tensor, ...]
    batch_sizes: Tensor | None
    reverse: bool

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All that has a gradient."""
        spec = ops.CELLS[self.cell]
        masks = {name for name, *_, mask in spec.slots if mask}
        learned = {name: w for name, w in self.weights.items() if name != "weight_v" or spec.learned > len(spec.fixed)}
        return {
            **({"input": self.input} if spec.input_gates else {}),
            **{f"initial {name}": state for name, state in zip(spec.states, self.states, strict=True)},
            **learned,
            **{f"given {name}": numbers for name, numbers in self.given.items() if name not in masks},
        }

    def to(self, dtype: torch.dtype) -> Problem:
        return replace(
            self,
            input=self.input.to(dtype),
            states=tuple(s.to(dtype) for s in self.states),
            weights={name: w.to(dtype) for name, w in self.weights.items()},
            given={name: g.to(dtype) for name, g in self.given.items()},
            cotangents=tuple(c.to(dtype) for c in self.cotangents),
        )


@dataclass(frozen=True)
class Check:
    """One quantity of one problem on one instruction set."""

    cell: str
    dtype: str
    isa: str
    family: str
    quantity: str
    error: float
    torch_error: float
    limit: float
    witness: str
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit

    @property
    def severity(self) -> float:
        return self.error / self.limit


def add(page: str, reference_file: str) -> str:
    """Load a cell and, from a Python file, the ``step(x, u, v, *states)`` that it is held against (see reference.Cell); return its name."""
    name = ops.load_page(Path(page))
    spec = ops.CELLS[name]
    step = runpy.run_path(reference_file).get("step")
    if not callable(step):
        raise ValueError(f"reference: expected a function step(x, u, v, *states) in {reference_file}")
    reference.CELLS[name] = reference.Cell(step, spec.states, spec.input_gates, spec.hidden_gates, vectors=spec.learned)
    return name


def batch_sizes_of(T: int, B: int) -> Tensor:
    lengths = [max(1, T - T * b // B) for b in range(B)]
    return torch.tensor([sum(length > t for length in lengths) for t in range(T)])


def make(cell: str, family: Family, dtype: torch.dtype, number: int = 0) -> Problem:
    """Drawn in float64 and rounded to `dtype`: the reference later sees exactly what the kernel saw."""
    spec, H = ops.CELLS[cell], family.H
    P = max(1, H // 2) if spec.projected else H
    draw = torch.Generator().manual_seed(zlib.crc32(f"{cell}/{family.name}/{number}".encode()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=draw, dtype=torch.float64) * 2 - 1) / math.sqrt(H)

    weights = {"weight_ih": uniform(spec.input_gates * H, family.I)} if spec.input_gates else {}
    if spec.hidden_gates:
        weights["weight_hh"] = uniform(spec.hidden_gates * H, P)
    # States that grow multiply roundings from step to step, and one draw of them then says little of another: an attracting U, a small one.
    if spec.hidden_gates and cell.startswith("residual"):
        weights["weight_hh"] -= torch.eye(H, dtype=torch.float64) / 2
    if cell == "lstm_no_forget":
        weights["weight_hh"] /= 4
    if family.bias and spec.input_gates:
        weights["bias_ih"] = uniform(spec.input_gates * H)
    if family.bias and spec.biased:
        weights["bias_hh"] = uniform(spec.biased * H)
    if spec.learned:
        weights["weight_v"] = normal(spec.learned * H) / (8 if spec.moments else 2)  # a norm's gain alone makes chaos
    if spec.fixed:
        weights["weight_v"][-len(spec.fixed) * H :] = thresholds(spec, H, dtype, draw)
    if spec.projected:
        weights["weight_hr"] = uniform(P, H)
    batch_sizes = batch_sizes_of(family.T, family.B) if family.ragged else None
    rows = (family.T, family.B) if batch_sizes is None else (int(batch_sizes.sum()),)
    widths = [P if state == "h" else H for state in spec.states]
    problem = Problem(
        cell=cell,
        input=normal(*rows, family.I),
        states=tuple(normal(family.B, width) for width in widths),
        weights=weights,
        given=given(spec, family, rows, draw),
        cotangents=(normal(*rows, P), *(normal(family.B, width) for width in widths)),
        batch_sizes=batch_sizes,
        reverse=family.reverse,
    )
    return (clear_of_kink(problem) if cell.endswith(KINKED) and dtype.itemsize == 2 else problem).to(dtype)


def thresholds(spec: ops.Cell, H: int, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """Of the clipping: what some values reach and others do not. A gradient jumps where a value is its threshold, and short of float64 some
    are rounded across; there every other unit is clipped to zero and the rest never, which no rounding changes. The clip of a gradient
    itself does not jump.
    """
    found = []
    for name in spec.fixed:
        reached = torch.rand(H, generator=draw, dtype=torch.float64) / 2 + 0.05
        clear = torch.where(torch.arange(H) % 2 == 0, 1024.0, 0.0).double()
        found.append(reached if dtype is torch.float64 or name == "grad_clip" else clear)
    return torch.cat(found)


def given(spec: ops.Cell, family: Family, rows: tuple[int, ...], draw: torch.Generator) -> dict[str, Tensor]:
    """What the caller gives: zoneout for each token, a mask for each row. Numbers between 0 and 1 find more than zeros and ones."""
    found = {}
    for i in spec.given:
        name, *_, mask = spec.slots[i]
        shape = (family.B, family.H) if name == "dropout" else (*rows, family.H)
        found[f"{name} {i}" if name in found else name] = (torch.rand if mask else torch.randn)(shape, generator=draw, dtype=torch.float64)
    return found


def clear_of_kink(problem: Problem) -> Problem:
    """The problem with every unit always on or always off: its sums are of one sign, so that no rounding can turn a pre-activation's."""
    on = torch.arange(len(problem.weights["weight_ih"])) % 2 == 0
    weights = {name: torch.where(on if w.dim() == 1 else on[:, None], w.abs(), -w.abs()) for name, w in problem.weights.items()}
    if "weight_hh" in weights:
        weights["weight_hh"] /= math.sqrt(len(on))  # sums of one sign would grow from step to step
    return replace(problem, input=problem.input.abs(), states=tuple(s.abs() for s in problem.states), weights=weights)


def call(sequence: Run, problem: Problem, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    given = tuple(leaves.get(f"given {name}", numbers) for name, numbers in problem.given.items())
    results = sequence(
        problem.cell,
        leaves.get("input", problem.input),
        [leaves[f"initial {name}"] for name in ops.CELLS[problem.cell].states],
        **{"weight_ih": None, "weight_hh": None, **{name: leaves.get(name, w) for name, w in problem.weights.items()}},
        **({"given": given} if given else {}),
        batch_sizes=problem.batch_sizes,
        reverse=problem.reverse,
    )
    return dict(zip(("output", *(f"final {state}" for state in ops.CELLS[problem.cell].states)), results, strict=True))


def compute(sequence: Run, problem: Problem) -> dict[str, Tensor]:
    """The results of `sequence` and all gradients."""
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in problem.leaves.items()}
    results = call(sequence, problem, leaves)
    gradients = torch.autograd.grad(tuple(results.values()), list(leaves.values()), problem.cotangents)
    return {name: value.detach() for name, value in results.items()} | {
        f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)
    }


def compute_kernel(sequence: Run, problem: Problem) -> dict[str, Tensor]:
    """Without grad mode too, which is another kernel."""
    with torch.no_grad():
        inference = call(sequence, problem, problem.leaves)
    return {name + INFERENCE: value for name, value in inference.items()} | compute(sequence, problem)


def stacked(found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([quantities[name] for quantities in found]) for name in found[0]}


def nn_layer(cell: str, weights: dict[str, Tensor]) -> torch.nn.RNNBase | None:
    """The layer of torch.nn that computes this cell, on the meta device: its weights come with the call."""
    if cell not in ("srn_tanh", "srn_relu", "gru", "lstm", "lstm_projected"):
        return None
    gates_times_hidden, input_size = weights["weight_ih"].shape
    hidden_size = gates_times_hidden // ops.CELLS[cell].input_gates
    projection = weights["weight_hh"].shape[1] if ops.CELLS[cell].projected else 0
    bias = "bias_ih" in weights
    with torch.device("meta"):
        if cell in ("srn_tanh", "srn_relu"):
            return torch.nn.RNN(input_size, hidden_size, nonlinearity=cell.removeprefix("srn_"), bias=bias)
        if cell == "gru":
            return torch.nn.GRU(input_size, hidden_size, bias=bias)
        if cell == "lstm" or (cell == "lstm_projected" and projection < hidden_size):
            return torch.nn.LSTM(input_size, hidden_size, bias=bias, proj_size=projection)
    return None


def mirror(batch_sizes: Tensor) -> Tensor:
    """The permutation of ragged rows that turns every sequence round; it is its own inverse."""
    starts = batch_sizes.cumsum(0) - batch_sizes
    turn = torch.empty(int(batch_sizes.sum()), dtype=torch.int64)
    for b in range(int(batch_sizes[0])):
        rows = starts[batch_sizes > b] + b
        turn[rows] = rows.flip(0)
    return turn


def nn_sequence(
    cell: str,
    input: Tensor,
    states: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
    **weights: Tensor,
) -> tuple[Tensor, ...]:
    """`sequence` by torch.nn. It runs no layer backwards alone, so reverse turns the input and the output round."""
    layer = nn_layer(cell, weights)
    assert layer is not None
    turn = torch.arange(len(input))
    if reverse:
        turn = turn.flip(0) if batch_sizes is None else mirror(batch_sizes)
    hx = tuple(state.unsqueeze(0) for state in states)
    data = input[turn] if batch_sizes is None else PackedSequence(input[turn], batch_sizes)
    parameters = {f"{name}_l0": weight for name, weight in weights.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        output, final = torch.func.functional_call(layer, parameters, (data, hx if len(hx) > 1 else hx[0]))
    final = final if len(hx) > 1 else (final,)
    return (output[turn] if batch_sizes is None else output.data[turn], *(state.squeeze(0) for state in final))


def error_of(value: Tensor, truth: Tensor, dtype: torch.dtype) -> float:
    """Normalised error; infinite where shape or dtype is wrong or a NaN stands."""
    if value.shape != truth.shape or value.dtype != dtype:
        return math.inf
    error = ((value.double() - truth).abs().max() / truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)).item()
    return error if math.isfinite(error) else math.inf


@contextmanager
def one_thread() -> Iterator[None]:
    """For the loop of small tensors in Python, which a second thread makes many times slower. The kernels run on as many as are set."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def checks(cell: str, dtype: str, isas: Sequence[str], families: Sequence[Family]) -> Iterator[list[Check]]:
    """The checks of a family on one instruction set at a time; the witnesses, which know no instruction set, are computed once."""
    number = DTYPES[dtype]
    for family in families:
        if ops.CELLS[cell].moments and family.H == 1:
            continue  # the norm of a single unit is 0 whatever that is, and its gradient the rounding of a difference, times 1 / √ε
        problems = [make(cell, family, number, draw) for draw in range(family.draws)]
        in_torch_nn = nn_layer(cell, problems[0].weights) is not None
        with one_thread():
            truth = stacked([compute(reference.sequence, problem.to(torch.float64)) for problem in problems])
            witness = stacked([compute(nn_sequence if in_torch_nn else reference.sequence, problem) for problem in problems])
        allowed = {name: error_of(witness[name], value, number) for name, value in truth.items()}
        # In float64 the reference is rounded as the kernel is, more with T, and where torch.nn lacks the cell it is its own witness.
        slack = ULPS * torch.finfo(number).eps * (math.sqrt(family.T) if number is torch.float64 else 1)
        for isa in isas:
            common = Check(cell, dtype, isa, family.name, "all", math.inf, 0.0, 1.0, "torch.nn" if in_torch_nn else "reference")
            ops.set_isa(isa)
            try:
                ours = stacked([compute_kernel(ops.sequence, problem) for problem in problems])
            except Exception as failure:  # a kernel that raises has failed, and the others are still of interest
                yield [replace(common, message=f"{type(failure).__name__}: {failure}")]
                continue
            finally:
                ops.set_isa(None)
            found = []
            for quantity, value in ours.items():
                name = quantity.removesuffix(INFERENCE)
                error, limit = error_of(value, truth[name], number), 2 * allowed[name] + slack
                found.append(replace(common, quantity=quantity, error=error, torch_error=allowed[name], limit=limit))
            yield found
