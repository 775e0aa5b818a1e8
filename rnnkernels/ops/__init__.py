"""One cell over one sequence: argument checks, memory, autograd and the torch.library ops. The only door to the compiled module.

:func:`sequence` is what layers are made of. A call is looked at whole in ``calls.py``; one like a call that was found to be as it must be
takes a shorter way, in ``short.py``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from torch import Tensor

from .. import _C
from . import cells
from . import cpu as cpu
from . import parts as parts
from . import registered as registered
from .autograd import Sequence
from .calls import chain_gains, pair, run
from .cells import CELLS, Cell, Rows, Sizes, Weights, before_each_step
from .checks import Call, check_lengths, check_reset_mask, forget_seen, is_one_of, widths
from .engines import ENGINES, cuts_natively
from .explained import listening
from .load import heats, is_modified, load_page, modified, source_of
from .packed import Packed, Remembered, weight_type
from .short import again, layer_again
from .transforms import is_transformed

__all__ = [
    "CELLS",
    "ENGINES",
    "Call",
    "Cell",
    "Packed",
    "Remembered",
    "Sequence",
    "Weights",
    "again",
    "before_each_step",
    "before_each_token",
    "build_info",
    "chain_gains",
    "check_lengths",
    "check_reset_mask",
    "cuts_natively",
    "heats",
    "is_modified",
    "is_one_of",
    "is_transformed",
    "layer_again",
    "listening",
    "load_page",
    "modified",
    "pair",
    "run",
    "sequence",
    "set_isa",
    "source_of",
    "weight_type",
    "widths",
]


def build_info() -> dict[str, Any]:
    """How the compiled module was built and what it runs on: version, compiler, isas, isa, supported, cuda."""
    return {**_C.build(), "isa": _C.isa(), "supported": _C.supported_isas()}


def set_isa(name: str | None) -> None:
    """Choose the instruction set (``"amx"``, ``"avx512bf16"``, ``"avx512"``, ``"avx2"``, ``"scalar"``; ``None``: the best there is), not
    while a kernel runs elsewhere.

    Raises ``ValueError`` for one that this processor or build does not have. The variable ``RNNKERNELS_ISA`` does the same at start.
    """
    _C.set_isa(name or "")
    forget_seen()
    cpu.forget()


def before_each_token(cell: Cell, after: Tensor, initial: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """A state before each token of a ragged batch, ``[N, ·]``, from that after each."""
    width = after.shape[1]
    return cells.before_each_token(Sizes(cell, reverse, len(batch_sizes), initial.shape[0], width, width), after, initial, batch_sizes)


def sequence(
    cell: str,
    input: Tensor,
    states: Seq[Tensor] | None,
    weight_ih: Tensor | None,
    weight_hh: Tensor | None,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    weight_v: Tensor | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset_mask: Tensor | None = None,
    reset_states: Seq[Tensor] | None = None,
    units: Tensor | None = None,
    module: int = 0,
    given: Seq[Tensor] = (),
    reverse: bool = False,
    engine: str = "auto",
    recompute: bool = False,
    return_states: bool = False,
    packed: Packed | Remembered | None = None,
) -> tuple[Tensor, ...]:
    """Run ``cell`` over a sequence in one direction.

    Args:
        cell: a name of :data:`CELLS`, for instance ``"lstm"``, ``"gru"``, ``"srn_tanh"``; the equations: :mod:`rnnkernels.reference`.
        input: ``[T, B, I]``, or with ``batch_sizes`` ``[N, I]``, the tokens step by step as in a ``PackedSequence``; float32, float64,
            bfloat16 or float16.
        states: one tensor a state before the first step, ``h [B, P]`` and for LSTM ``c [B, H]``; None: zeros.
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr: as in torch.nn: ``[gates·H, I]``, ``[gates·H, P]``, ``[gates·H]``,
            ``[gates·H]``, ``[P, H]``. weight_hh is None for a cell without a matrix, weight_hr for one without a projection, weight_ih for
            one that the input does not feed, whose input then only says how many steps and rows there are.
        weight_v: ``[vectors·H]``, for cells that multiply a state by a number a unit (peephole LSTM, IndRNN), None for others. The last
            blocks are those that nothing learns, thresholds of clipping, in the order of ``CELLS[cell].fixed``: their gradient is zero.
        batch_sizes: how many rows take part in each step, non-increasing, on the CPU.
        lengths: ``[B]``, int64 on the CPU, from 0 to T in any order: how many steps each row of a padded batch has. Results past them are
            zero; a row's final state is that after its own last step, with which ``reverse`` starts.
        reset_mask: ``[T, B]``, booleans on the CPU: the state that the marked step would take over from the one before it (with
            ``reverse``, that one from the marked one) is replaced, and nothing flows across.
        reset_states: by what, a tensor a state, ``[B, ·]`` for each row, ``[T, B, ·]`` by the token that is marked, or ``[·]`` for all;
            None: zeros. Gradients flow into them.
        units, module: ``[T]``, int64 on the CPU, for simple recurrent networks (Koutník 2014): only the units below ``units[t]`` take part
            in step t, the others keep their state; unit u reads only units from the start of its own block of ``module`` units on.
        given: for cells with slots that the caller feeds (masks, gates made elsewhere), tensors that have them side by side, ``k·H`` wide
            for k slots: ``[T, B, k·H]`` (``[N, k·H]``) for each token, ``[B, k·H]`` for each row, or ``[k·H]`` for all. Gradients flow into
            them, but for masks.
        reverse: run from the last step (a ragged row's own last step) to the first. The output keeps the input's order.
        engine: ``"auto"``; ``"cpu"``; ``"stepwise"``, a product by torch and one run of the cell a step, on any device; ``"persistent"``,
            the whole sequence in one launch on a GPU, where the weights fit; its float32 is exact, or TF32 where
            ``torch.backends.cuda.matmul.allow_tf32`` says so; ``"persistent_3xtf32"``, the same with float32 by three TF32 products on
            tensor cores, nearly as exact; ``"torch"``, torch.nn's own function (cuDNN on a GPU), for the cells it has. "auto" never takes
            it but where a table in ``ops/peer.py`` says that it is faster; ``"traced"``, the cell's operations one by one by torch, slow,
            on any device. Forward-mode and second derivatives of torch.nn's cells are kernels' too, of others the traced engine's.
        recompute: save the states alone for backward, which then makes the rest anew: less memory, more work.
        return_states: return the states beyond the first after each step too.
        packed: where the CPU engine keeps this cell's weights packed from call to call, and how narrow; for eager calls without gradients.

    Returns:
        ``(output, *final_states)``, the output ``[T, B, P]`` or ``[N, P]``; with ``return_states`` also ``c`` and the like after each step,
        ``[T, B, H]`` or ``[N, H]``.

    Raises:
        ValueError: an unknown cell or engine. RuntimeError: a tensor of the wrong rank, size, dtype or device, or an engine that cannot run
            it; the text names it and says why.

    >>> import torch
    >>> x, h = torch.randn(5, 2, 3), torch.zeros(2, 4)
    >>> y, h_n = sequence("gru", x, [h], torch.randn(12, 3), torch.randn(12, 4))
    >>> y.shape, torch.equal(y[-1], h_n)
    (torch.Size([5, 2, 4]), True)
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_v)
    rows = Rows(batch_sizes, lengths, reset_mask, units)
    call = Call(cell, input, states, *weights, *rows, given, reset_states or (), module, reverse, engine, recompute, return_states)
    return run(call, packed)
