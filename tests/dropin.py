"""What a layer must bear to pass for torch.nn's, point by point: each a function of the library, so that it is asked of torch.nn too.

``test_dropin.py`` asks ours. ``python -m tests.dropin --write docs/dropin.md`` asks both and writes the table.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

Check = Callable[[Any], None]


@dataclass(frozen=True)
class Point:
    section: str
    says: str
    check: Check
    slow: bool


POINTS: dict[str, Point] = {}


def point(section: str, says: str, slow: bool = False) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        POINTS[check.__name__] = Point(section, says, check, slow)
        return check

    return add


LAYERS = ("RNN", "GRU", "LSTM")


def data(*shape: int, requires_grad: bool = False) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*(shape or (6, 3, 4)), generator=g).requires_grad_(requires_grad)


def each(m: Any, **options: Any) -> list[Any]:
    torch.manual_seed(0)
    return [getattr(m, name)(4, 5, **options) for name in LAYERS]


def close(a: Any, b: Any) -> None:
    flat, other = (torch.utils._pytree.tree_leaves(t) for t in (a, b))
    for x, y in zip(flat, other, strict=True):
        torch.testing.assert_close(x, y)


class Model(nn.Module):
    """A layer inside something."""

    def __init__(self, m: Any, name: str = "LSTM", **options: Any) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Linear(4, 4), getattr(m, name)(4, 5, **options), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x))[0])  # type: ignore[no-any-return]


# ---- derivatives


@point("Derivatives", "double backward")
def double_backward(m: Any) -> None:
    for layer in each(m):
        x = data(requires_grad=True)
        (slope,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
        slope.pow(2).sum().backward()
        assert layer.weight_hh_l0.grad.abs().sum() > 0


@point("Derivatives", "forward mode: jvp, dual numbers")
def forward_mode(m: Any) -> None:
    for layer in each(m):
        x = data()
        tangent = torch.func.jvp(lambda x, layer=layer: layer(x)[0], (x,), (x,))[1]
        step = 1e-3
        torch.testing.assert_close(tangent, (layer(x * (1 + step))[0] - layer(x * (1 - step))[0]) / (2 * step), atol=2e-3, rtol=2e-3)


@point("Derivatives", "vmap over inputs")
def vmap_over_inputs(m: Any) -> None:
    for layer in each(m):
        x = data(2, 6, 3, 4)
        close(torch.func.vmap(lambda x, layer=layer: layer(x)[0])(x), torch.stack([layer(x[i])[0] for i in range(2)]))


def _called(layer: Any, x: Tensor, parameters: Any, buffers: Any) -> Tensor:
    return torch.func.functional_call(layer, (parameters, buffers), (x,))[0]  # type: ignore[no-any-return]


@point("Derivatives", "vmap over models: stacked weights")
def vmap_over_models(m: Any) -> None:
    for name in LAYERS:
        models = [getattr(m, name)(4, 5) for _ in range(3)]
        parameters, buffers = torch.func.stack_module_state(models)
        x = data()
        run = functools.partial(_called, models[0], x)
        found = torch.func.vmap(run)(parameters, buffers)
        close(found, torch.stack([model(x)[0] for model in models]))


@point("Derivatives", "per-sample gradients: vmap of grad")
def per_sample_gradients(m: Any) -> None:
    for layer in each(m):
        parameters = {key: p.detach() for key, p in layer.named_parameters()}

        def loss(p: Any, x: Tensor, layer: Any = layer) -> Tensor:
            return torch.func.functional_call(layer, p, (x.unsqueeze(1),))[0].pow(2).sum()  # type: ignore[no-any-return]

        found = torch.func.vmap(torch.func.grad(loss), (None, 1))(parameters, data())
        alone = torch.func.grad(loss)(parameters, data()[:, 1])
        for key, grads in found.items():
            close(grads[1], alone[key])


@point("Derivatives", "gradients in eval()")
def gradients_in_eval(m: Any) -> None:
    for layer in each(m):
        layer.eval()(data(requires_grad=True))[0].sum().backward()


@point("Derivatives", "checkpoint, both kinds")
def checkpoint(m: Any) -> None:
    for layer in each(m):
        for reentrant in (False, True):
            x = data(requires_grad=True)
            torch.utils.checkpoint.checkpoint(lambda x, f=layer: f(x)[0].sum(), x, use_reentrant=reentrant).backward()
            close(x.grad, torch.autograd.grad(layer(x)[0].sum(), x)[0])


@point("Derivatives", "saved-tensor hooks: save_on_cpu")
def saved_tensor_hooks(m: Any) -> None:
    for layer in each(m):
        x = data(requires_grad=True)
        with torch.autograd.graph.save_on_cpu():
            y = layer(x)[0]
        close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(layer(x)[0].sum(), x))


@point("Derivatives", "retain_graph, any subset of inputs")
def retain_graph(m: Any) -> None:
    for layer in each(m):
        x = data(requires_grad=True)
        y = layer(x)[0].sum()
        first = torch.autograd.grad(y, x, retain_graph=True)
        layer.weight_hh_l0.requires_grad_(False)
        close(first, torch.autograd.grad(y, x))


# ---- compile and export


def fresh_compile(f: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, **options)


@point("Compile and export", "torch.compile(fullgraph=True), forward and training", slow=True)
def compile_fullgraph(m: Any) -> None:
    model = Model(m)
    compiled = fresh_compile(model)
    x = data(requires_grad=True)
    close(compiled(x), model(x))
    compiled(x).sum().backward()
    close(x.grad, torch.autograd.grad(model(x).sum(), x)[0])


@point("Compile and export", "torch.compile(fullgraph=True) under no_grad, of layers that could be trained")
def compile_no_grad(m: Any) -> None:
    for layer in each(m):
        compiled = fresh_compile(layer, backend="aot_eager")
        with torch.no_grad():
            close(compiled(data()), layer(data()))


@point("Compile and export", "dynamic T and B without a recompile storm")
def compile_dynamic(m: Any) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in each(m):
        counter.frame_count = 0
        compiled = fresh_compile(layer, backend=counter)
        for T in (3, 4, 7, 9, 12):
            for B in (2, 3, 5):
                x = data(T, B, 4)
                close(compiled(x), layer(x))
        assert counter.frame_count <= 3


def exported(m: Any, dynamic: bool = True) -> Any:
    layer = m.LSTM(4, 5, bidirectional=True).eval()
    sizes = ({0: torch.export.Dim("T", max=1000), 1: torch.export.Dim("B", max=1000)},)
    return layer, torch.export.export(layer, (data(),), dynamic_shapes=sizes if dynamic else None)


@point("Compile and export", "torch.export with dynamic T and B; save, load, run")
def export_dynamic(m: Any) -> None:
    layer, program = exported(m)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    again = torch.export.load(buffer).module()
    for shape in ((9, 2, 4), (1, 3, 4), (3, 1, 4)):
        close(again(data(*shape)), layer(data(*shape)))


@point("Compile and export", "AOTInductor package, loaded where the library is imported", slow=True)
def aot_inductor(m: Any) -> None:
    layer, program = exported(m)
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "layer.pt2"))
        close(torch._inductor.aoti_load_package(path)(data(5, 2, 4)), layer(data(5, 2, 4)))


@point("Compile and export", "an exported program under vmap")
def exported_under_vmap(m: Any) -> None:
    layer, program = exported(m, dynamic=False)
    run, x = program.module(), data(2, 6, 3, 4)
    close(torch.func.vmap(lambda x: run(x)[0])(x), torch.stack([layer(x[i])[0] for i in range(2)]))


@point("Compile and export", "torch.jit.trace")
def jit_trace(m: Any) -> None:
    for layer in each(m):
        close(torch.jit.trace(layer.eval(), (data(),))(data(5, 2, 4)), layer(data(5, 2, 4)))


@point("Compile and export", "torch.jit.script")
def jit_script(m: Any) -> None:
    for layer in each(m):
        torch.jit.script(layer)


@point("Compile and export", "torch.fx symbolic tracing of a model, as a leaf")
def fx_trace(m: Any) -> None:
    model = Model(m)
    close(torch.fx.symbolic_trace(model)(data()), model(data()))


@point("Compile and export", "meta tensors and FakeTensor")
def meta_and_fake(m: Any) -> None:
    from torch._subclasses import FakeTensorMode

    layer = m.LSTM(4, 5, device="meta")
    assert layer(torch.empty(6, 3, 4, device="meta"))[0].is_meta
    with FakeTensorMode():
        layer = m.GRU(4, 5)
        layer(torch.empty(6, 3, 4))[0].sum().backward()
        assert layer.weight_hh_l0.grad.shape == (15, 5)


# ---- systems


@point("Systems", "autocast on the CPU, bfloat16 and float16, training")
def autocast(m: Any) -> None:
    for layer in each(m):
        for dtype in (torch.bfloat16, torch.float16):
            layer.zero_grad()
            with torch.autocast("cpu", dtype):
                y = layer(data())[0]
            y.float().sum().backward()
            assert layer.weight_ih_l0.grad.dtype == torch.float32


@point("Systems", "DataParallel replicas")
def data_parallel(m: Any) -> None:
    for layer in each(m):
        replica = layer._replicate_for_data_parallel()
        for key, p in layer.named_parameters():
            setattr(replica, key, p * 1)
        close(replica(data()), layer(data()))


@point("Systems", "deepcopy, pickle, state_dict(strict), load with assign")
def copies(m: Any) -> None:
    for layer in each(m, num_layers=2, bidirectional=True):
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            close(other(data()), layer(data()))
        fresh = type(layer)(4, 5, num_layers=2, bidirectional=True)
        fresh.load_state_dict(layer.state_dict(), assign=True)
        close(fresh(data()), layer(data()))


@point("Systems", "state_dict of torch.nn, both ways")
def state_of_torch(m: Any) -> None:
    for layer, theirs in zip(each(m, num_layers=2), each(nn, num_layers=2), strict=True):
        layer.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(layer.state_dict())
        close(layer(data()), theirs(data()))


@point("Systems", "share_memory and a spawned process", slow=True)
def spawned(m: Any) -> None:
    layer = m.GRU(4, 5).share_memory()
    result = torch.zeros(6, 3, 5).share_memory_()
    mp.spawn(_run_shared, (layer, data(), result), nprocs=1)
    close(result, layer(data())[0])


def _run_shared(rank: int, layer: Any, x: Tensor, result: Tensor) -> None:
    result.copy_(layer(x)[0].detach())


@point("Systems", "DataLoader workers that run the layer", slow=True)
def loader_workers(m: Any) -> None:
    layer = m.GRU(4, 5)
    x = data(4, 6, 3, 4)
    loader = torch.utils.data.DataLoader(x, batch_size=None, num_workers=2, collate_fn=functools.partial(_through, layer))
    close(torch.stack(list(loader)), torch.stack([layer(one)[0].detach() for one in x]))


def _through(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)[0]  # type: ignore[no-any-return]


@point("Systems", "inference_mode, and training after it")
def inference_mode(m: Any) -> None:
    for layer in each(m):
        with torch.inference_mode():
            assert layer(data())[0].is_inference()
        layer(data())[0].sum().backward()


@point("Systems", "deterministic mode")
def deterministic(m: Any) -> None:
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        for layer in each(m):
            runs = [torch.autograd.grad(layer(data())[0].sum(), list(layer.parameters())) for _ in range(3)]
            assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))
    finally:
        torch.use_deterministic_algorithms(was)


@point("Systems", "DDP on two ranks: the losses of one process", slow=True)
def ddp(m: Any) -> None:
    _on_two_ranks(_ddp, m)


@point("Systems", "FSDP2 on two ranks: the losses of one process", slow=True)
def fsdp(m: Any) -> None:
    _on_two_ranks(_fsdp, m)


def _on_two_ranks(work: Any, m: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (work, m.__name__, folder), nprocs=2)


def _rank(rank: int, work: Any, name: str, folder: str) -> None:
    import importlib

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        work(importlib.import_module(name), rank)
    finally:
        dist.destroy_process_group()


def _training(model: Any, batches: list[Tensor]) -> list[Tensor]:
    """Losses over some steps of plain descent."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.5), []
    for x in batches:
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def _shared_losses(wrap: Any, m: Any, rank: int) -> None:
    torch.manual_seed(0)
    model = Model(m, num_layers=2)
    alone = copy.deepcopy(model)
    batches = [torch.randn(6, 4, 4) for _ in range(4)]
    losses = torch.stack(_training(wrap(model), [x[:, 2 * rank : 2 * rank + 2] for x in batches]))
    dist.all_reduce(losses)
    close(losses / 2, torch.stack(_training(alone, batches)))


def _ddp(m: Any, rank: int) -> None:
    _shared_losses(nn.parallel.DistributedDataParallel, m, rank)


def _fsdp(m: Any, rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))

    def wrap(model: Model) -> Any:
        fully_shard(model.layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    _shared_losses(wrap, m, rank)


# ---- weights that are not what they were


@point("Weights", "weight_norm, old and as parametrization")
def weight_norm(m: Any) -> None:
    for norm in (nn.utils.weight_norm, parametrizations.weight_norm):
        layer = norm(m.LSTM(4, 5), "weight_hh_l0")
        y = layer(data())[0].sum()
        y.backward()
        assert all(p.grad is not None for p in layer.parameters())


@point("Weights", "spectral_norm, old and as parametrization")
def spectral_norm(m: Any) -> None:
    for norm in (nn.utils.spectral_norm, parametrizations.spectral_norm):
        layer = norm(m.LSTM(4, 5), "weight_hh_l0")
        layer(data())[0].sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@point("Weights", "pruning")
def pruning(m: Any) -> None:
    layer = m.LSTM(4, 5)
    before = layer(data())[0]
    prune.l1_unstructured(layer, "weight_hh_l0", amount=0.9)  # type: ignore[no-untyped-call]
    after = layer(data())[0]
    assert not torch.equal(before, after)
    after.sum().backward()
    assert layer.weight_hh_l0_orig.grad is not None


@point("Weights", "weight drop: a tensor in the Parameter's place, with gradients")
def weight_drop(m: Any) -> None:
    layer = m.LSTM(4, 5)
    raw = layer.weight_hh_l0
    del layer._parameters["weight_hh_l0"]
    layer.register_parameter("raw", raw)
    layer.weight_hh_l0 = torch.nn.functional.dropout(raw, 0.5)
    dropped = layer(data())[0]
    dropped.sum().backward()
    assert raw.grad is not None
    layer.weight_hh_l0 = raw * 0
    assert not torch.equal(layer(data())[0], dropped)


@point("Weights", "changed through .data, in place, or by a new Parameter")
def written(m: Any) -> None:
    for layer in each(m):
        first = layer(data())[0]
        layer.weight_hh_l0.data.mul_(2)
        second = layer(data())[0]
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)
        assert not torch.equal(first, second)
        assert not torch.equal(second, layer(data())[0])


@point("Weights", "tied between layers")
def tied(m: Any) -> None:
    a, b = m.GRU(5, 5), m.GRU(5, 5)
    b.weight_hh_l0 = a.weight_hh_l0
    b(a(data(6, 3, 5))[0])[0].sum().backward()
    assert len({id(p) for p in (*a.parameters(), *b.parameters())}) == 7


@point("Weights", "SWA and EMA copies")
def averaged(m: Any) -> None:
    model = Model(m)
    for function in (None, torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)):
        average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=function)
        before = average(data())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        average.update_parameters(model)
        average.update_parameters(model)
        assert not torch.equal(average(data()), before)


# ---- sequences


@point("Sequences", "hx strided, expanded, with gradients")
def any_hx(m: Any) -> None:
    for name in ("RNN", "GRU"):
        layer = getattr(m, name)(4, 5)
        h = data(1, 1, 5).requires_grad_()
        layer(data(), h.expand(1, 3, 5))[0].sum().backward()
        assert h.grad is not None
        close(layer(data(), data(3, 1, 10)[..., ::2].transpose(0, 1)), layer(data(), data(3, 1, 10)[..., ::2].transpose(0, 1).contiguous()))


@point("Sequences", "PackedSequence, unsorted, in and out")
def packed(m: Any) -> None:
    for layer in each(m, bidirectional=True):
        sequence = pack_padded_sequence(data(), torch.tensor([2, 6, 3]), enforce_sorted=False)
        output, _ = layer(sequence)
        assert torch.equal(output.batch_sizes, sequence.batch_sizes)
        assert torch.equal(output.unsorted_indices, sequence.unsorted_indices)


@point("Sequences", "a batch of no rows")
def no_rows(m: Any) -> None:
    for layer in each(m):
        x = data(6, 0, 4).requires_grad_()
        layer(x)[0].sum().backward()


@point("Sequences", "the same bits for every batch, thread count and rerun")
def invariant(m: Any) -> None:
    threads = torch.get_num_threads()
    try:
        for layer in each(m):
            x = data(9, 17, 4)
            with torch.no_grad():
                whole = layer(x)[0]
                assert torch.equal(whole[:, 3:4], layer(x[:, 3:4])[0])
                torch.set_num_threads(1)
                assert torch.equal(whole, layer(x)[0])
                torch.set_num_threads(threads)
                lengths = torch.tensor([9] * 16 + [5])
                output = layer(pack_padded_sequence(x, lengths))[0]
                assert torch.equal(output.data[: int(output.batch_sizes[0])], whole[0])
    finally:
        torch.set_num_threads(threads)


# ---- the table

BEGIN, END = "<!-- dropin:begin -->", "<!-- dropin:end -->"


def outcome(check: Check, m: Any) -> str:
    """Empty, or how it fails."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(m)
        except Exception as error:  # whatever another library raises is its answer
            kind = type(error).__name__
            found = re.search(r"(\w+(?:Error|Exception)): ", str(error)) if kind == "ProcessRaisedException" else None
            return found[1] if found else kind
    return ""


def table() -> str:
    import rnnkernels

    lines = [f"On torch {torch.__version__.split('+')[0]}, CPU.", "", "| | rnnkernels | torch.nn |", "|---|---|---|"]
    section = ""
    for one in POINTS.values():
        if one.section != section:
            section = one.section
            lines.append(f"| **{section}** | | |")
        ours, theirs = (outcome(one.check, m) for m in (rnnkernels, nn))
        lines.append(f"| {one.says} | {f'no: {ours}' if ours else 'yes'} | {f'no: {theirs}' if theirs else 'yes'} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page whose table to replace")
    args = parser.parse_args()
    found = table()
    if args.write:
        before, rest = args.write.read_text(encoding="utf-8").split(BEGIN)
        args.write.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
