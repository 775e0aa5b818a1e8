"""The promise: on a CPU a row's bits depend on nothing but the row: not on threads, reruns, batch, its place in it, padding, or packing."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnkernels
from rnnkernels.ops.choice import Choice

LAYERS: dict[str, Callable[..., Any]] = {
    "RNN": rnnkernels.RNN,
    "GRU": rnnkernels.GRU,
    "LSTM": rnnkernels.LSTM,
    "LSTM projected": lambda *a, **o: rnnkernels.LSTM(*a, proj_size=7, **o),
    "PeepholeLSTM": rnnkernels.PeepholeLSTM,
    "GRUResetBefore": rnnkernels.GRUResetBefore,
    # Not layer_norm, whose input's part is a product of torch's.
    "cell norm": lambda *a, **o: rnnkernels.LSTM(*a, cell_norm=True, **o),
    "DreamerGRU": rnnkernels.DreamerGRU,
}
T, B, SIZE, H = 9, 13, 6, 40
LONG, LARGE = 41, 33  # steps and rows: several rounds of sums over tokens, which each half of the batch has of its own


@pytest.fixture(params=LAYERS)
def make(request: Any) -> Callable[..., Any]:
    def layer(**options: Any) -> Any:
        torch.manual_seed(0)
        return LAYERS[request.param](SIZE, **{"hidden_size": H, "num_layers": 2, "bidirectional": True, **options})

    return layer


@pytest.fixture
def exact() -> Iterator[None]:
    """Deterministic mode, in which a single step too is the engine's own."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def results(layer: Any, x: Tensor, cotangent: Tensor, weights: bool = True, **inside: Any) -> list[Tensor]:
    """Output, final states, and the gradients of the input and, with ``weights``, of all parameters."""
    x = x.detach().requires_grad_()
    output, final = layer(x, **inside)
    leaves = [x, *layer.parameters()] if weights else [x]
    return [output, *(final if isinstance(final, tuple) else (final,)), *torch.autograd.grad(output, leaves, cotangent)]


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("restore")
def test_threads_and_reruns(make: Any, dtype: torch.dtype) -> None:
    layer, x = make(dtype=dtype), torch.randn(T, B, SIZE, dtype=dtype)
    found = []
    for threads in (1, 2, 3, 5, 1):
        torch.set_num_threads(threads)
        output, _ = layer(x)
        found.append(results(layer, x, torch.ones_like(output)))
    for other in found[1:]:
        same(other, found[0])


LONG_PRODUCTS: dict[str, Callable[[], Any]] = {  # chains of sums end within them; modules of 96 units end within panels
    "ClockworkRNN": lambda: rnnkernels.ClockworkRNN(SIZE, 768),
    "LSTM": lambda: rnnkernels.LSTM(SIZE, 300),
    "LSTM in bfloat16": lambda: rnnkernels.LSTM(SIZE, 600, dtype=torch.bfloat16),
    "GRU in bfloat16": lambda: rnnkernels.GRU(SIZE + 64, 80, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("kind", LONG_PRODUCTS)
@pytest.mark.usefixtures("restore", "exact")
def test_long_products_of_any_batch(kind: str) -> None:
    """Tiles of any height and panels of any width: results of a row, and its gradients, are those of the row in a batch."""
    layer = LONG_PRODUCTS[kind]()
    dtype = next(layer.parameters()).dtype
    x = torch.randn(3, 70, layer.input_size, dtype=dtype)
    cotangent = torch.randn(3, 70, layer.hidden_size, dtype=dtype)
    whole = results(layer, x, cotangent, weights=False)
    for rows, threads in (((0, 1), 2), ((3, 11), 1), ((5, 22), 1), ((0, 37), 2), ((30, 70), 3)):
        torch.set_num_threads(threads)
        part = slice(*rows)
        output, *final, grad = results(layer, x[:, part], cotangent[:, part], weights=False)
        same([output, grad], [whole[0][:, part], whole[-1][:, part]])
        same(final, [t[:, part] for t in whole[1:-1]])


@pytest.mark.parametrize("inside", ["whole", "lengths", "recompute"])
@pytest.mark.usefixtures("restore")
def test_whichever_team_is_tried(make: Any, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
    torch.set_num_threads(2)
    layer, x = make(bidirectional=False, recompute=inside == "recompute"), torch.randn(T, B, SIZE)
    given = {"lengths": torch.randint(0, T + 1, (B,))} if inside == "lengths" else {}
    cotangent, found, ways = torch.randn_like(layer(x)[0]), list[list[Tensor]](), set[int]()

    def always(way: int) -> Any:
        def take(self: Choice) -> int:
            ways.add(min(way, self.ways - 1))
            return min(way, self.ways - 1)

        return take

    for forward, backward in itertools.product(range(2), repeat=2):
        monkeypatch.setattr(Choice, "forward", always(forward))
        monkeypatch.setattr(Choice, "backward", always(backward))
        found.append(results(layer, x, cotangent, **given))
        with torch.no_grad():
            same([layer(x, **given)[0]], found[0][:1])
    assert ways == {0, 1}
    for other in found[1:]:
        same(other, found[0])


def on_several_threads(layer: Any, x: Tensor, given: dict[str, Tensor], threads: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """A cotangent, and the results that are the same on all of them."""
    cotangent, found = torch.randn_like(layer(x, **given)[0]), list[list[Tensor]]()
    for n in threads:
        torch.set_num_threads(n)
        found.append(results(layer, x, cotangent, **given))
    for other in found[1:]:
        same(other, found[0])
    return cotangent, found[0]


def check_sums(layer: Any, x: Tensor, given: dict[str, Tensor], cotangent: Tensor, found: list[Tensor]) -> None:
    """The gradients of parameters are the sums of those of each row alone."""
    count = len(list(layer.parameters()))
    rows = [
        results(layer, x[:, b : b + 1], cotangent[:, b : b + 1], **{k: v[..., b : b + 1] for k, v in given.items()})[-count:]
        for b in range(x.shape[1])
    ]
    for i, grad in enumerate(found[-count:]):
        torch.testing.assert_close(grad, torch.stack([row[i] for row in rows]).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inside", ["whole", "lengths", "resets"])
@pytest.mark.usefixtures("restore")
def test_sums_of_two_groups_of_rows(make: Any, inside: str, dtype: torch.dtype) -> None:
    """Each half of a large batch has sums over tokens of its own, whoever adds them up."""
    layer, x = make(dtype=dtype, bidirectional=False), torch.randn(LONG, LARGE, SIZE, dtype=dtype)
    given: dict[str, Tensor] = {}
    if inside == "lengths":
        given["lengths"] = torch.cat([torch.tensor([LONG]), torch.randint(0, 14, (LARGE - 1,))])  # one row, and then the others
    if inside == "resets":
        given["reset_mask"] = torch.rand(LONG, LARGE) < 0.2
    cotangent, found = on_several_threads(layer, x, given, (1, 2, 3, 4, 6))
    if dtype == torch.float64:
        check_sums(layer, x, given, cotangent, found)


@pytest.mark.parametrize("inside", ["whole", "lengths"])
@pytest.mark.usefixtures("restore")
def test_sums_of_large_matrices(make: Any, inside: str) -> None:
    """Those of more than a core's cache are added up in rounds of several chunks, here two rounds, some units of a slot at a time."""
    steps, batch = 235, 5
    layer = make(dtype=torch.float64, bidirectional=False, num_layers=1, hidden_size=360)
    x = torch.randn(steps, batch, SIZE, dtype=torch.float64)
    given = {"lengths": torch.tensor([steps, 0, 200, 1, 107])} if inside == "lengths" else {}
    cotangent, found = on_several_threads(layer, x, given, (1, 2, 3, 5))
    check_sums(layer, x, given, cotangent, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_and_place_in_it(make: Any, dtype: torch.dtype) -> None:
    layer, x = make(dtype=dtype), torch.randn(T, B, SIZE, dtype=dtype)
    cotangent = torch.randn_like(layer(x)[0])
    together = results(layer, x, cotangent, weights=False)
    order = torch.randperm(B)
    same([t[:, order] for t in together], results(layer, x[:, order], cotangent[:, order], weights=False))
    for rows in (slice(0, 1), slice(4, 6), slice(B - 1, B)):
        same([t[:, rows] for t in together], results(layer, x[:, rows], cotangent[:, rows], weights=False))


def test_padding_and_packing(make: Any) -> None:
    layer, x = make(), torch.randn(T, B, SIZE)
    lengths = torch.randint(1, T - 1, (B,))
    lengths[0] = T - 2
    cotangent = torch.randn_like(layer(x)[0]) * (torch.arange(T).unsqueeze(1) < lengths).unsqueeze(2)
    padded = results(layer, x, cotangent, weights=False, lengths=lengths)
    shorter = results(layer, x[: T - 2], cotangent[: T - 2], weights=False, lengths=lengths)
    cut = [t[: T - 2] if t.shape[0] == T else t for t in padded]
    same(shorter, cut)
    leaf = x.detach().requires_grad_()
    output, final = layer(pack_padded_sequence(leaf, lengths, enforce_sorted=False))
    spread, _ = pad_packed_sequence(output, total_length=T)
    (grad,) = torch.autograd.grad(spread, leaf, cotangent)
    same([spread, *(final if isinstance(final, tuple) else (final,)), grad], padded)
    for b in range(0, B, 5):
        n = int(lengths[b])
        alone = results(layer, x[:n, b : b + 1], cotangent[:n, b : b + 1], weights=False)
        same([t[:n, b : b + 1] if t.shape[0] == T else t[:, b : b + 1] for t in padded], alone)


@pytest.mark.usefixtures("exact", "restore")
def test_a_single_step_in_deterministic_mode(make: Any) -> None:
    layer, x = make(), torch.randn(1, B, SIZE)
    cotangent = torch.randn_like(layer(x)[0])
    together = results(layer, x, cotangent, weights=False)
    for rows in (slice(0, 1), slice(5, 9)):
        same([t[:, rows] for t in together], results(layer, x[:, rows], cotangent[:, rows], weights=False))
    longer, _ = layer(torch.cat([x, torch.zeros_like(x)]), lengths=torch.ones(B, dtype=torch.int64))
    assert torch.equal(longer[:1], together[0])
    torch.set_num_threads(1)
    same(results(layer, x, cotangent), results(layer, x, cotangent))
    same(results(layer, x, cotangent, weights=False), together)


def test_steps_of_a_stream(make: Any) -> None:
    layer = type(make())(SIZE, H, num_layers=2)
    x = torch.randn(T, B, SIZE)
    stream = layer.stream(B)
    assert torch.equal(torch.stack([stream.step(step) for step in x]), layer(x)[0])
