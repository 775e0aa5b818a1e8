"""Cells that a user writes: load_cell, the automatic backward, and everything that the library's own cells get."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ISAS
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkernels
from rnnkernels import ops, reference
from rnnkernels.ops import load
from rnnkernels.verify import DTYPES, FAMILIES, add, checks

EXAMPLES = Path(__file__).parents[1] / "examples"

# The library's LSTM without its backward, one stage; three states; two stages, the second of a value that the first kept.
OWN_LSTM = """
struct OwnLstm {
  static constexpr Slot slots[] = {{"i", X | H}, {"f", X | H}, {"g", X | H}, {"o", X | H}};
  static constexpr const char* states[] = {"h", "c"};
  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V*) {
    s1[1] = fma(sigmoid(a[1]), s[1], sigmoid(a[0]) * tanh(a[2]));
    s1[0] = sigmoid(a[3]) * tanh(s1[1]);
  }
};
RNN_CELL(own_lstm, COLD, OwnLstm)
"""
THREE_STATES = """
struct ThreeStates {
  static constexpr Slot slots[] = {{"z", X | H}, {"a", 0}, {"b", 0}};
  static constexpr const char* states[] = {"h", "fast", "slow"};
  static constexpr PerUnit vectors[] = {{"a", 1, Factor::Itself}, {"b", 2, Factor::Itself}};
  template <int S, class V>
  RNN_FN static void forward(const V* a, const V* w, const V* s, V* s1, V*) {
    s1[1] = fma(w[0], s[1], a[0]);
    s1[2] = fma(w[1], s[2], s1[1]);
    s1[0] = tanh(s1[1] - s1[2] + s[0]);
  }
};
RNN_CELL(three_states, COLD, ThreeStates)
"""
TWO_STAGES = """
struct TwoStages {
  static constexpr Slot slots[] = {{"r", X | H}, {"z", X | H}, {"n", X | H}};
  static constexpr Stage stages[] = {{0, 2}, {2, 1, 3}};
  static constexpr const char* states[] = {"h"};
  static constexpr int kept = 4;
  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V* k) {
    if constexpr (S == 0) {
      k[1] = sigmoid(a[1]);
      k[3] = sigmoid(a[0]) * s[0];
    } else {
      s1[0] = fma(k[1], s[0] - tanh(a[2]), tanh(a[2]));
    }
  }
};
RNN_CELL(own_reset_before, COLD, TwoStages)
"""
REFERENCES = {
    "own_lstm": "def step(x, u, v, h, c):\n    i, f, g, o = (x + u(h)).chunk(4, -1)\n"
    "    c = f.sigmoid() * c + i.sigmoid() * g.tanh()\n    return o.sigmoid() * c.tanh(), c\n",
    "three_states": "def step(x, u, v, h, fast, slow):\n    fast = v[0] * fast + x + u(h)\n    slow = v[1] * slow + fast\n"
    "    return (fast - slow + h).tanh(), fast, slow\n",
    "own_reset_before": "def step(x, u, v, h):\n    x_r, x_z, x_n = x.chunk(3, -1)\n    u_r, u_z = u(h, 0, 2).chunk(2, -1)\n"
    "    r, z = (x_r + u_r).sigmoid(), (x_z + u_z).sigmoid()\n    n = (x_n + u(r * h, 2, 3)).tanh()\n    return (z * h + (1 - z) * n,)\n",
}
PAGES = {"own_lstm": OWN_LSTM, "three_states": THREE_STATES, "own_reset_before": TWO_STAGES}
CELLS = ["leaky", *PAGES]


@pytest.fixture(scope="module", autouse=True)
def known_cells(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All pages compiled anew, and afterwards forgotten by the lists that other tests walk."""
    folder = tmp_path_factory.mktemp("cells")
    before, references, cache = dict(ops.CELLS), dict(reference.CELLS), os.environ.get("RNNKERNELS_CACHE")
    os.environ["RNNKERNELS_CACHE"] = str(folder / "cache")
    add(str(EXAMPLES / "leaky.h"), str(EXAMPLES / "leaky.py"))
    for name, page in PAGES.items():
        (folder / f"{name}.h").write_text(page)
        (folder / f"{name}.py").write_text(REFERENCES[name])
        assert add(str(folder / f"{name}.h"), str(folder / f"{name}.py")) == name
    yield
    for table, kept in ((ops.CELLS, before), (reference.CELLS, references)):
        for name in set(table) - set(kept):
            del table[name]
    for name in [name for name in load._sources if name not in ops.CELLS]:
        del load._sources[name], load._isas[name]
    os.environ.pop("RNNKERNELS_CACHE")
    if cache is not None:
        os.environ["RNNKERNELS_CACHE"] = cache


def layer_of(name: str) -> type:
    return rnnkernels.load_cell(EXAMPLES / "leaky.h" if name == "leaky" else PAGES[name])


def leaves(name: str, dtype: torch.dtype = torch.float64, T: int = 4, B: int = 3, I: int = 2, H: int = 5) -> list[torch.Tensor]:  # noqa: E741
    torch.manual_seed(0)
    spec = ops.CELLS[name]
    shapes = [(T, B, I), (spec.input_gates * H, I), (spec.hidden_gates * H, H), (spec.input_gates * H,), (spec.hidden_gates * H,)]
    shapes += [(spec.learned * H,)] * bool(spec.learned) + [(B, H)] * len(spec.states)
    return [(torch.randn(shape, dtype=torch.float64) / 2).to(dtype).requires_grad_() for shape in shapes]


def run(
    name: str, x: torch.Tensor, ih: torch.Tensor, hh: torch.Tensor, *rest: torch.Tensor, engine: str = "cpu"
) -> tuple[torch.Tensor, ...]:
    (b_ih, b_hh, *rest), spec = rest, ops.CELLS[name]
    v = rest.pop(0) if spec.learned else None
    return ops.sequence(name, x, rest, ih, hh, b_ih, b_hh, None, v, engine=engine)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CELLS)
def test_error_rule(name: str, dtype: str, poison: None) -> None:
    for found in checks(name, dtype, ISAS, [family for family in FAMILIES if family.quick]):
        for check in found:
            assert check.ok, check


@pytest.mark.parametrize("engine", ["cpu", "stepwise"])
@pytest.mark.parametrize("name", CELLS)
def test_gradcheck(name: str, engine: str) -> None:
    assert torch.autograd.gradcheck(lambda *tensors: run(name, *tensors, engine=engine), leaves(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_page_of_ones_own_gives_the_bits_of_the_same_page_in_the_library(dtype: torch.dtype) -> None:
    ours, theirs = (run(name, *leaves("own_lstm", dtype, T=9, H=33)) for name in ("own_lstm", "lstm"))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("name", CELLS)
def test_layer_in_the_grammar_of_torch_nn(name: str) -> None:
    layer_class = layer_of(name)
    layer = layer_class(3, 5, num_layers=2, bidirectional=True, batch_first=True)
    x, states = torch.randn(4, 6, 3), len(ops.CELLS[name].states)
    output, hx = layer(x)
    assert output.shape == (4, 6, 10)
    assert all(state.shape == (4, 4, 5) for state in (hx if states > 1 else (hx,)))
    again, _ = layer(x, hx)
    assert not torch.equal(again, output)
    lengths = torch.tensor([6, 2, 5, 1])
    ragged, ends = layer(x, lengths=lengths)
    packed, theirs = layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0], ragged)
    torch.testing.assert_close(theirs, ends)
    histories = layer(x, return_states=True)[2]
    assert [h.shape for h in histories] == [(4, 4, 6, 5)] * states
    assert rnnkernels.explain(layer, x).plans[0].engine == "cpu"


@pytest.mark.parametrize("name", CELLS)
def test_steps_make_the_sequence(name: str) -> None:
    layer_class = layer_of(name)
    layer, cell = layer_class(3, 5), layer_class.Cell(3, 5)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x, hx = torch.randn(6, 2, 3), None
    for t in range(6):
        hx = cell(x[t], hx)
    torch.testing.assert_close(hx[0] if isinstance(hx, tuple) else hx, layer(x)[0][-1])


@pytest.mark.parametrize("name", CELLS)
def test_deepcopy_and_pickle(name: str) -> None:
    layer = layer_of(name)(3, 5)
    x = torch.randn(6, 2, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), pickle.loads(pickle.dumps(layer_of(name).Cell(3, 5)))):
        assert type(other) in (type(layer), type(layer).Cell)
        if type(other) is type(layer):
            assert torch.equal(other(x)[0], layer(x)[0])


def test_a_pickle_opens_in_another_process(tmp_path: Path) -> None:
    layer = layer_of("leaky")(3, 5)
    x = torch.randn(6, 2, 3)
    torch.save((layer, x, layer(x)[0]), tmp_path / "layer.pt")
    program = "import sys, torch\nlayer, x, y = torch.load(sys.argv[1], weights_only=False)\nassert torch.equal(layer(x)[0], y)"
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "layer.pt"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compiles_fullgraph() -> None:
    torch._dynamo.reset()
    layer = layer_of("leaky")(3, 5)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(6, 2, 3)
    compiled(x)[0].sum().backward()
    compiled_grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    layer(x)[0].sum().backward()
    for ours, theirs in zip(compiled_grads, layer.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)


def test_the_same_source_gives_the_same_class() -> None:
    assert layer_of("own_lstm") is layer_of("own_lstm")


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        ("nowhere.h", FileNotFoundError, "source: expected a file or the text of a page, got 'nowhere.h'"),
        ("struct A {};\n", ValueError, "expected one line RNN_CELL(name, HOT or COLD, page) in page, got 0"),
        (OWN_LSTM.replace("RNN_CELL(own_lstm", "RNN_CELL(Own"), ValueError, "lower case, got 'Own'"),
        (OWN_LSTM.replace("RNN_CELL(own_lstm", "RNN_CELL(lstm"), ValueError, "'lstm' is one of the library's own cells"),
        (OWN_LSTM + "\n", ValueError, "a cell 'own_lstm' is loaded already, from another source"),
        (OWN_LSTM.replace("own_lstm", "broken").replace("sigmoid(a[3])", "sigmund(a[3])"), RuntimeError, "sigmund"),
        (OWN_LSTM.replace("own_lstm", "late").replace('{"i", X | H}', '{"i", H}'), RuntimeError, "slots that the input feeds come first"),
    ],
    ids=["no file", "no line", "upper case", "taken by the library", "taken by another", "does not compile", "breaks the contract"],
)
def test_what_is_wrong_is_said(source: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=".*") as raised:
        rnnkernels.load_cell(source)
    assert text in str(raised.value)


def test_a_subclass_stays_itself() -> None:
    class Mine(layer_of("leaky")):
        pass

    assert type(copy.deepcopy(Mine(3, 5))) is Mine


@pytest.mark.parametrize(
    "line", ["RNN_CELL(styled, HOT, OwnLstm);  // mine", "RNN_CELL(styled,\n         HOT, OwnLstm)"], ids=["comment", "lines"]
)
def test_modifiers_of_a_page_however_its_line_is_written(line: str) -> None:
    name = "styled" + str(len(line))
    layer = rnnkernels.load_cell(OWN_LSTM.replace("RNN_CELL(own_lstm, COLD, OwnLstm)", line.replace("styled", name)))(3, 5, zoneout=0.1)
    assert layer(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)
    assert layer._cell == f"{name}_zoneout"


def test_states_of_any_name_zone_out() -> None:
    layer = layer_of("three_states")(3, 5, zoneout=(0.0, 1.0, 0.0)).eval()
    x, hx = torch.randn(4, 2, 3), tuple(torch.randn(1, 2, 5) for _ in range(3))
    _, (_, fast, slow) = layer(x, hx)
    assert torch.equal(fast, hx[1])
    assert not torch.equal(slow, hx[2])


def test_a_hidden_slot_without_a_bias() -> None:
    page = """
struct Unbiased {
  static constexpr Slot slots[] = {{"f", X | H}, {"n", X}, {"m", H}};
  static constexpr const char* states[] = {"h"};
  template <int S, class V>
  RNN_FN static void forward(const V* a, const V*, const V* s, V* s1, V*) {
    s1[0] = fma(sigmoid(a[0]), tanh(a[1] + a[2]) - s[0], s[0]);
  }
};
RNN_CELL(unbiased, COLD, Unbiased)
"""
    rnnkernels.load_cell(page)
    shapes = [(4, 3, 2), (10, 2), (10, 5), (10,), (5,), (3, 5)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for engine, T in (("cpu", 4), ("stepwise", 4), ("cpu", 1)):
        cut = [tensors[0][:T].detach().requires_grad_(), *tensors[1:]]
        assert torch.autograd.gradcheck(lambda x, w, u, b, d, h, e=engine: ops.sequence("unbiased", x, [h], w, u, b, d, engine=e), cut)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no compiler 'no-such-compiler' here: put one on PATH or set CXX"):
        rnnkernels.load_cell(OWN_LSTM.replace("own_lstm", "lonely"))


def test_wrong_states() -> None:
    layer = layer_of("three_states")(3, 5)
    x = torch.randn(6, 2, 3)
    with pytest.raises(TypeError, match=r"hx: expected a tuple of tensors \(h, fast, slow\), got a tensor"):
        layer(x, torch.zeros(1, 2, 5))
    with pytest.raises(RuntimeError, match="hx: expected 3 tensors"):
        layer(x, (torch.zeros(1, 2, 5),) * 2)
    with pytest.raises(RuntimeError, match="Expected hidden size"):
        layer(x, (torch.zeros(1, 2, 4),) * 3)


@pytest.mark.slow
def test_kernels_for_a_gpu_are_compiled() -> None:
    """As far as a machine without a GPU can show: nvcc takes the page, and the library has the kernels' table."""
    if not hasattr(ops._C, "add_cuda_cell"):
        pytest.skip("this build has no CUDA part")
    if not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").is_file() or os.environ.get("CUDACXX")):
        pytest.skip("no nvcc here")
    load.load_kernels("leaky")
