"""Who can run a case. An entry of PEERS says why it cannot, or prepares a function that runs the case once and returns its results.

All peers get the same weights, input and upstream gradient; `results` are compared before anything is timed, but for a yardstick's, which
computes something else in the same time slots.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.cases import COMPILED, COMPILED_STEPS, DERIVATIVES, DTYPES, IN_TORCH, JVP, PACKED, PADDED, PENALTY, RESETS, STEPS, Case
from rnnkernels import ops, reference

Results = dict[str, Tensor]
Runner = Callable[[], Results]
Layer = Callable[[Tensor], tuple[Tensor, Any]]  # -> output, final states


@dataclass(frozen=True)
class Problem:
    """What a case is run on."""

    input: Tensor
    upstream: Tensor
    weights: dict[str, Tensor]
    given: tuple[Tensor, ...] = ()


class Steps(torch.nn.Module):
    """A cell over a sequence, a call a step."""

    def __init__(self, cell: torch.nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        outputs, state = [], None
        for step in input.unbind():
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


def make_layer(module: ModuleType, case: Case) -> torch.nn.Module:
    name = {"lstm": "LSTM", "gru": "GRU", "srn": "RNN"}[case.cell]
    if case.layout == STEPS:
        return Steps(getattr(module, f"{name}Cell")(case.I, case.H, dtype=DTYPES[case.dtype])).train(case.training)
    layer: torch.nn.Module = getattr(module, name)(case.I, case.H, bidirectional=case.bidirectional, dtype=DTYPES[case.dtype])
    return layer.train(case.training)


def make_problem(case: Case) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if case.cell not in IN_TORCH:
            return make_sequence(case)
        weights = {name: value.detach() for name, value in make_layer(torch.nn, case).named_parameters()}
        dtype = DTYPES[case.dtype]
        return Problem(
            torch.randn(case.T, case.B, case.I).to(dtype),
            torch.randn(case.T, case.B, case.H * (2 if case.bidirectional else 1)).to(dtype),
            weights,
        )


def make_sequence(case: Case) -> Problem:
    """What ``ops.sequence`` and ``reference.sequence`` take."""
    cell, H, dtype = case.page, case.H, DTYPES[case.dtype]
    shapes = {
        "weight_ih": (cell.input_gates * H, case.I),
        "weight_hh": (cell.hidden_gates * H, H),
        "bias_ih": (cell.input_gates * H,),
        "bias_hh": (cell.biased * H,),
        "weight_v": (cell.learned * H,),
    }
    weights = {name: (torch.rand(shape) * 2 - 1).div(H**0.5).to(dtype) for name, shape in shapes.items() if shape[0]}
    if cell.fixed:
        weights["weight_v"][-len(cell.fixed) * H :] = 1  # thresholds
    given = [torch.rand(case.B, H) if cell.slots[i][0] == "dropout" else torch.rand(case.T, case.B, H) for i in cell.given]
    return Problem(
        torch.randn(case.T, case.B, case.I).to(dtype), torch.randn(case.T, case.B, H).to(dtype), weights, tuple(g.to(dtype) for g in given)
    )


class Peer(Protocol):
    name: str
    yardstick: bool  # other numbers than the case's: not compared with anybody's

    def why_not(self, case: Case) -> str | None:
        """Why this peer cannot run the case, or None if it can."""

    def prepare(self, case: Case, problem: Problem) -> Runner: ...


class Layers:
    """A module with torch.nn's layers."""

    yardstick = False

    def __init__(self, name: str, module: str) -> None:
        self.name = name
        self.module = module

    def why_not(self, case: Case) -> str | None:
        return None

    def layer(self, case: Case, problem: Problem) -> torch.nn.Module:
        layer = make_layer(importlib.import_module(self.module), case)
        layer.load_state_dict(problem.weights)
        return layer

    def way(self, layer: torch.nn.Module, case: Case) -> Layer:
        """How the case's batch goes through a layer, padded on both sides."""
        if case.layout == COMPILED:
            compiled: Layer = torch.compile(layer, dynamic=False)
            return compiled
        return layer if case.layout in (PADDED, STEPS) else packed(layer, case)

    def prepare(self, case: Case, problem: Problem) -> Runner:
        layer = self.layer(case, problem)
        run = self.way(layer, case)
        input = problem.input.clone().requires_grad_(case.training or case.direction == PENALTY)

        @torch.no_grad()
        def inference() -> Results:
            output, final = run(input)
            return named(output, final)

        def training() -> Results:
            layer.zero_grad(set_to_none=True)
            input.grad = None
            output, final = run(input)
            if case.direction == PENALTY:
                (slope,) = torch.autograd.grad(output, input, problem.upstream, create_graph=True)
                slope.square().sum().backward()
            else:
                output.backward(problem.upstream)
            gradients = {f"gradient of {name}": p.grad for name, p in (("input", input), *layer.named_parameters())}
            return named(output, final) | {name: g for name, g in gradients.items() if g is not None}

        @torch.no_grad()
        def streaming() -> Results:
            outputs, final = [], None
            for step in input.split(1):
                output, final = layer(step, final)
                outputs.append(output)
            assert final is not None
            return named(torch.cat(outputs), final)

        def jvp() -> Results:
            weights = {name: p.detach() for name, p in layer.named_parameters()}

            def f(input: Tensor, weights: dict[str, Tensor]) -> Results:
                return named(*functional_call(layer, weights, (input,)))

            made, tangents = torch.func.jvp(f, (input, weights), (input.flip(0), weights))
            return {**made, **{f"tangent of {name}": t for name, t in tangents.items()}}

        ways = {"training": training, PENALTY: training, "streaming": streaming, JVP: jvp, "inference": inference}
        return ways[case.direction]


def packed(layer: torch.nn.Module, case: Case) -> Layer:
    lengths = case.lengths
    assert lengths is not None

    def run(input: Tensor) -> tuple[Tensor, Any]:
        output, final = layer(pack_padded_sequence(input, lengths, enforce_sorted=False))
        return pad_packed_sequence(output, total_length=case.T)[0], final

    return run


def masked_steps(layer: torch.nn.Module, case: Case) -> Layer:
    """A call a step, the state zeroed between them: the way of agents' code, for a layer that knows no resets."""
    assert case.reset_mask is not None
    kept = (~case.reset_mask).to(DTYPES[case.dtype]).unsqueeze(-1).unbind()

    def run(input: Tensor) -> tuple[Tensor, Any]:
        outputs, state = [], None
        for step, keep in zip(input.split(1), kept, strict=True):
            state = tuple(s * keep for s in state) if isinstance(state, tuple) else None if state is None else state * keep
            output, state = layer(step, state)
            outputs.append(output)
        return torch.cat(outputs), state

    return run


class Torch(Layers):
    """For lengths, the packed path; resets it has none of."""

    def why_not(self, case: Case) -> str | None:
        if case.cell == "lstm" and case.direction == JVP:
            return "torch.nn.LSTM has no forward-mode derivatives on a CPU"
        return None if case.cell in IN_TORCH else f"torch.nn has no cell {case.cell}"

    def way(self, layer: torch.nn.Module, case: Case) -> Layer:
        return masked_steps(layer, case) if case.layout == RESETS else super().way(layer, case)


class LoopedLayer(torch.nn.Module):
    """A layer of torch.nn's, as a loop in Python."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.cell = case.page.name
        for name, p in make_layer(torch.nn, case).named_parameters():
            self.register_parameter(name, p)

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        weights = {name.removesuffix("_l0"): p for name, p in self.named_parameters()}
        output, *finals = reference.sequence(self.cell, input, None, **weights)
        final = tuple(state.unsqueeze(0) for state in finals)
        return output, final if len(final) > 1 else final[0]


class LoopedLayers(Layers):
    def layer(self, case: Case, problem: Problem) -> torch.nn.Module:
        layer = LoopedLayer(case)
        layer.load_state_dict(problem.weights)
        return layer


class Loop:
    """One call a step: what whoever needs the cell writes in Python, here the reference's own loop."""

    yardstick = False

    def __init__(self, name: str, sequence: Callable[..., tuple[Tensor, ...]]) -> None:
        self.name, self.sequence = name, sequence

    def why_not(self, case: Case) -> str | None:
        if case.cell in IN_TORCH and case.direction not in DERIVATIVES:
            return "is for cells that torch.nn lacks, and for derivatives beyond the first"
        return None

    def prepare(self, case: Case, problem: Problem) -> Runner:
        if case.direction in DERIVATIVES:
            return LoopedLayers(self.name, "").prepare(case, problem)
        leaves = {name: weight.clone().requires_grad_(case.training) for name, weight in problem.weights.items()}
        input = problem.input.clone().requires_grad_(case.training and case.page.input_gates > 0)
        options: dict[str, Any] = {"given": problem.given} if problem.given else {}
        if case.clock is not None:
            options |= {"units": case.clock.units, "module": case.clock.module}

        def forward() -> Results:
            weights = {"weight_ih": None, "weight_hh": None, **leaves}
            output, *finals = self.sequence(case.page.name, input, None, **weights, **options)
            return {"output": output, **{f"final {name}": value for name, value in zip(case.page.states, finals, strict=True)}}

        def training() -> Results:
            results = forward()
            wanted = {**({"input": input} if input.requires_grad else {}), **leaves}
            # Thresholds have no gradient, which a kernel says by zeros.
            found = torch.autograd.grad(results["output"], list(wanted.values()), problem.upstream, materialize_grads=True)
            return results | {f"gradient of {name}": grad for name, grad in zip(wanted, found, strict=True)}

        return training if case.training else torch.no_grad()(forward)


class CompiledLoop(Loop):
    """That loop under torch.compile, unrolled, as one graph: where a graph broke, steps would go back to Python without a word."""

    def __init__(self) -> None:
        super().__init__("compiled loop", reference.sequence)

    def why_not(self, case: Case) -> str | None:
        if case.T > COMPILED_STEPS:
            return f"compiling more than {COMPILED_STEPS} steps takes minutes: see the preset 'compiled'"
        return super().why_not(case)

    def prepare(self, case: Case, problem: Problem) -> Runner:
        torch.compiler.reset()  # or the shapes of earlier cases count, and past a limit nothing is compiled any more
        return Loop(self.name, torch.compile(self.sequence, backend="inductor", dynamic=False, fullgraph=True)).prepare(case, problem)


class Ours(Layers):
    """Streaming is the layer's stream; cells that torch.nn lacks run through ops.sequence."""

    def way(self, layer: torch.nn.Module, case: Case) -> Layer:
        if case.layout in (PADDED, PACKED, STEPS, COMPILED):
            return super().way(layer, case)
        return partial(layer, lengths=case.lengths, reset_mask=case.reset_mask)

    def prepare(self, case: Case, problem: Problem) -> Runner:
        if case.cell not in IN_TORCH:
            return Loop(self.name, ops.sequence).prepare(case, problem)
        if case.direction != "streaming":
            return super().prepare(case, problem)
        stream = self.layer(case, problem).stream(case.B)

        def run() -> Results:
            stream.reset()
            outputs = [stream.step(step) for step in problem.input]
            return named(torch.stack(outputs), stream.state)

        return run


class Kept(Ours):
    """Ours with weights that stay packed from call to call, the recurrent ones perhaps narrower, which is other numbers than the case's."""

    def __init__(self, name: str, weight_dtype: torch.dtype) -> None:
        super().__init__(name, "rnnkernels")
        self.weight_dtype = weight_dtype
        self.yardstick = weight_dtype != torch.float32

    def why_not(self, case: Case) -> str | None:
        runs = case.direction in ("inference", "streaming") and case.cell in IN_TORCH and case.layout == PADDED
        if not runs or case.dtype != "float32" or case.B > 8:
            return "is for inference of padded batches up to 8 in float32"
        return None

    def layer(self, case: Case, problem: Problem) -> torch.nn.Module:
        layer = super().layer(case, problem)
        layer.weight_dtype = self.weight_dtype  # type: ignore[assignment]
        return layer


# By how many row blocks U has: the cells that variants are variants of.
BY_PRODUCTS = {ops.CELLS[page].hidden_gates: name for name, page in IN_TORCH.items()}


class Plain:
    """What a variant, a modifier, lengths or resets are dear against: our own plain cell with as many products by U, on a padded batch.

    A cell whose input gates are given, already multiplied by W, stands against a plain cell without an input.
    """

    name = "plain"
    yardstick = True

    def why_not(self, case: Case) -> str | None:
        if case.cell in IN_TORCH:
            return "is for variants, and for what happens inside a sequence" if case.layout in (PADDED, STEPS, COMPILED) else None
        return None if case.page.hidden_gates in BY_PRODUCTS else f"no plain cell has as many products by U: {case.page.hidden_gates}"

    def prepare(self, case: Case, problem: Problem) -> Runner:
        if case.cell in IN_TORCH:
            return OURS.prepare(replace(case, layout=PADDED), problem)
        width = case.I if case.page.input_gates else 0
        plain = replace(case, cell=BY_PRODUCTS[case.page.hidden_gates], I=width, layout=PADDED)
        return Loop(self.name, ops.sequence).prepare(plain, make_sequence(plain))


def named(output: Tensor, final: Tensor | tuple[Tensor, ...]) -> Results:
    finals = final if isinstance(final, tuple) else (final,)
    return {"output": output, **{f"final {name}": value for name, value in zip("hc", finals, strict=False)}}


# The blocks of ONNX (i o f c; z r h) among those of torch (i f g o; r z n).
ONNX_BLOCKS = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "srn": (0,)}


class OnnxRuntime:
    """The LSTM, GRU and RNN operators of onnxruntime, from a model of one node."""

    name = "onnxruntime"
    yardstick = False

    def why_not(self, case: Case) -> str | None:
        missing = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
        if missing:
            return f"not installed: {', '.join(missing)}"
        if case.cell not in IN_TORCH:
            return "its recurrent operators are LSTM, GRU and RNN"
        if case.layout != PADDED or case.bidirectional:
            return "its model is of a padded batch in one direction"
        if case.training or case.direction in DERIVATIVES:
            return "runs inference only"
        if case.direction == "streaming":
            return "its model is of a whole sequence"
        if case.dtype != "float32":
            return "its recurrent operators are float32 only"
        return None

    def model(self, case: Case, problem: Problem) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        def blocks(name: str) -> Tensor:
            parts = problem.weights[name].chunk(case.page.hidden_gates)
            return torch.cat([parts[i] for i in ONNX_BLOCKS[case.cell]])

        constants = {
            "W": blocks("weight_ih_l0"),
            "R": blocks("weight_hh_l0"),
            "B": torch.cat([blocks("bias_ih_l0"), blocks("bias_hh_l0")]),
        }
        operator = {"lstm": "LSTM", "gru": "GRU", "srn": "RNN"}[case.cell]
        results = ["Y", "Y_h", "Y_c"][: 3 if case.cell == "lstm" else 2]
        options = {"linear_before_reset": 1} if case.cell == "gru" else {}
        node = helper.make_node(operator, ["X", *constants], results, hidden_size=case.H, **options)
        graph = helper.make_graph(
            [node],
            case.cell,
            [helper.make_tensor_value_info("X", TensorProto.FLOAT, [case.T, case.B, case.I])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
            [numpy_helper.from_array(value.unsqueeze(0).numpy(), name) for name, value in constants.items()],
        )
        # An operator set and an IR that every onnxruntime of the last years reads.
        model: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8).SerializeToString()
        return model

    def prepare(self, case: Case, problem: Problem) -> Runner:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = case.threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or idle threads hold the cores of the next side
        session = onnxruntime.InferenceSession(self.model(case, problem), options, providers=["CPUExecutionProvider"])
        feed = {"X": problem.input.numpy()}

        def inference() -> Results:
            output, *finals = (torch.from_numpy(value) for value in session.run(None, feed))
            return named(output.squeeze(1), tuple(finals))

        return inference


OURS = Ours("rnnkernels", "rnnkernels")
TORCH = Torch("torch", "torch.nn")
LOOP = Loop("loop", reference.sequence)
PLAIN = Plain()
KEPT = [Kept("kept", torch.float32), Kept("bfloat16 weights", torch.bfloat16), Kept("int8 weights", torch.int8)]
# The first that can run a case says what its results are.
PEERS: dict[str, Peer] = {peer.name: peer for peer in (TORCH, LOOP, CompiledLoop(), OnnxRuntime(), PLAIN, *KEPT, OURS)}

# Largest difference over largest value: two computations in one dtype, each with rounding of its own. `verify` holds the strict rule.
TOLERANCE = {"float32": 1e-4, "float64": 1e-10, "bfloat16": 0.1, "float16": 0.02}


def difference(ours: Results, theirs: Results, dtype: str) -> str | None:
    """Where two peers disagree, or None."""
    if ours.keys() != theirs.keys():
        return f"gives {', '.join(ours)} where {', '.join(theirs)} was expected"
    for name, value in theirs.items():
        if ours[name].shape != value.shape:
            return f"{name} has shape {tuple(ours[name].shape)} where {tuple(value.shape)} was expected"
        error = ((ours[name] - value).double().abs().max() / value.double().abs().max().clamp_min(1e-30)).item()
        if not error <= TOLERANCE[dtype]:
            return f"{name} differs by {error:.1e}"
    return None
