"""The layers of a stack at the same time, each a few steps behind the one below: the bits of one after the other."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ISAS
from torch import Tensor

import rnnkernels
from rnnkernels import ops

pytestmark = pytest.mark.usefixtures("poison", "two_threads")


@pytest.fixture
def chains(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each chain had, where every stack that may be one is one."""
    found, chain = list[int](), ops.cpu._C.forward_chain

    def counted(calls: list[Any], threads: int) -> None:
        found.append(len(calls))
        chain(calls, threads)

    monkeypatch.setattr(ops.cpu, "gains_chained", functools.cache(lambda *_: True))
    monkeypatch.setattr(ops.cpu._C, "forward_chain", counted)
    return found


def run(layer: Any, x: Any, *args: Any, **options: Any) -> list[Tensor]:
    with torch.no_grad():
        output, final, *states = layer(x, *args, **options)
    output = output.data if isinstance(output, torch.nn.utils.rnn.PackedSequence) else output
    return [output, *(final if isinstance(final, tuple) else (final,)), *(states[0] if states else ())]


def in_turn(monkeypatch: pytest.MonkeyPatch, layer: Any, x: Any, *args: Any, **options: Any) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(ops.cpu, "gains_chained", lambda *_: False)
        return run(layer, x, *args, **options)


LAYERS = {
    "LSTM": lambda **options: rnnkernels.LSTM(5, 7, **options),
    "GRU": lambda **options: rnnkernels.GRU(5, 37, bias=False, dtype=torch.float64, **options),
    "RNN": lambda **options: rnnkernels.RNN(5, 7, batch_first=True, dtype=torch.bfloat16, **options),
    "projected": lambda **options: rnnkernels.LSTM(5, 7, proj_size=3, **options),
    "reset before": lambda **options: rnnkernels.GRUResetBefore(5, 7, **options),
    "bfloat16 weights": lambda **options: rnnkernels.GRU(5, 7, weight_dtype=torch.bfloat16, **options),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layers", [2, 3, 5])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bits_are_the_same(kind: str, layers: int, isa: str, chains: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    ops.set_isa(isa)
    layer = LAYERS[kind](num_layers=layers)
    dtype = next(layer.parameters()).dtype
    for T, B in ((2, 1), (17, 1), (100, 3), (9, 17), (5, 0)):
        x = torch.randn(B, T, 5, dtype=dtype) if layer.batch_first else torch.randn(T, B, 5, dtype=dtype)
        expected = in_turn(monkeypatch, layer, x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, run(layer, x), expected)), (T, B, threads)
    assert chains == [layers] * 15


def test_states_go_in_and_out(chains: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = rnnkernels.LSTM(5, 7, num_layers=3), torch.randn(40, 2, 5)
    hx = (torch.randn(3, 2, 7), torch.randn(3, 2, 7).transpose(0, 1).contiguous().transpose(0, 1))
    assert all(map(torch.equal, run(layer, x, hx), in_turn(monkeypatch, layer, x, hx)))
    unbatched = [t[:, 0] for t in hx]
    assert all(map(torch.equal, run(layer, x[:, 0], unbatched), in_turn(monkeypatch, layer, x[:, 0], unbatched)))
    assert chains == [3, 3]


def test_what_needs_more_than_kernels_is_no_chain(chains: list[int]) -> None:
    x, lengths = torch.randn(20, 2, 5), torch.tensor([20, 3])
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    layer = rnnkernels.LSTM(5, 7, num_layers=2, dropout=0.5)
    run(layer, x)  # dropout
    layer.eval()
    layer(x)  # gradients
    run(layer, packed)
    run(layer, x, lengths=lengths)
    run(layer, x, return_states="gates")
    run(rnnkernels.LSTM(5, 7, num_layers=2, bidirectional=True), x)
    run(rnnkernels.LSTM(5, 7, num_layers=2, zoneout=0.1), x)
    run(rnnkernels.LSTM(5, 7, num_layers=2, layer_norm="gates"), x)
    run(rnnkernels.LSTM(5, 7, num_layers=2, engine="stepwise"), x)
    run(torch.compile(layer, backend="eager", fullgraph=True), x)
    with torch.autocast("cpu", torch.bfloat16):
        run(layer, x)
    torch.func.vmap(lambda x: layer(x)[0])(torch.randn(3, 20, 2, 5))
    assert not chains
    run(layer, x)
    layer.requires_grad_(False)
    layer(x)
    assert chains == [2, 2]


def test_a_loaded_cell_is_compiled_for_the_instruction_set_first(chains: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the model asks for the page
    leaky = rnnkernels.load_cell(Path(__file__).parents[1] / "examples" / "leaky.h")
    layer, x = leaky(3, 8, num_layers=2), torch.randn(40, 1, 3)
    expected = run(layer, x)
    ops.set_isa("scalar")
    torch.testing.assert_close(run(layer, x), expected)


def test_a_bad_layer_raises_and_leaves_nothing_behind(chains: list[int]) -> None:
    layer, x = rnnkernels.GRU(5, 7, num_layers=3), torch.randn(20, 2, 5)
    good = layer.weight_hh_l2.data
    expected = run(layer, x)
    layer.weight_hh_l2.data = good[:-1]
    with pytest.raises(RuntimeError, match=r"weight_hh: expected shape \(21, 7\), got \(20, 7\)"):
        run(layer, x)
    layer.weight_hh_l2.data = good
    assert all(map(torch.equal, run(layer, x), expected))
    assert chains == [3, 3]
