"""Models with our layers as ONNX's own operators, run by onnxruntime."""

from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import rnnkernels

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "RNN": lambda: rnnkernels.RNN(4, 5, 2, nonlinearity="relu", bidirectional=True),
    "RNN identity": lambda: rnnkernels.RNN(4, 5, nonlinearity="identity", bias=False),
    "GRU": lambda: rnnkernels.GRU(4, 5, num_layers=2, batch_first=True),
    "LSTM": lambda: rnnkernels.LSTM(4, 5, bidirectional=True),
    "GRUResetBefore": lambda: rnnkernels.GRUResetBefore(4, 5, bidirectional=True),
    "PeepholeLSTM": lambda: rnnkernels.PeepholeLSTM(4, 5, bidirectional=True),
    "CoupledLSTM": lambda: rnnkernels.CoupledLSTM(4, 5),
}


class Given(nn.Module):
    """A layer with hx and lengths."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor) -> Any:
        return self.layer(x, (h, c), lengths=lengths)


def run(program: Any, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})]


def expect(found: list[Tensor], expected: Any) -> None:
    for a, b in zip(found, torch.utils._pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b.detach())


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_in_onnxruntime(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    program = rnnkernels.onnx.export(layer, (torch.randn(6, 3, 4),), dynamic_shapes=({0: Dim("T"), 1: Dim("B")},), verbose=False)
    for shape in ((6, 3, 4), (1, 2, 4), (9, 1, 4)):
        x = torch.randn(*shape)
        expect(run(program, x), layer(x))


def test_states_and_lengths() -> None:
    torch.manual_seed(0)
    model = Given(rnnkernels.PeepholeLSTM(4, 5, bidirectional=True)).eval()
    inputs = (torch.randn(6, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([2, 6, 4]))
    expect(run(rnnkernels.onnx.export(model, inputs, verbose=False), *inputs), model(*inputs))


def test_by_way_of_torch() -> None:
    model = rnnkernels.convert(nn.Sequential(rnnkernels.GRU(4, 5)), to=nn).eval()
    x = torch.randn(6, 3, 4)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    expect(run(program, x), model(x))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: rnnkernels.LSTM(4, 5, proj_size=2), "no operator for the cell 'lstm_projected'"),
        (lambda: rnnkernels.IndRNN(4, 5), "no operator for the cell 'indrnn_"),
    ],
)
def test_what_onnx_lacks_is_refused(layer: Any, text: str) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        rnnkernels.onnx.export(layer().eval(), (torch.randn(6, 3, 4),), verbose=False)
    causes, error = [], caught.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any(text in cause for cause in causes), causes
