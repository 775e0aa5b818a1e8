"""Gradients of a layer's weights from those of its gates: products over all tokens, by torch.

Each takes tokens ``[N, ·]`` and gives the weight's gradient, or, of so many ``samples`` that lie side by side within each row (token n of
sample i at n · samples + i), that of each sample, ``[samples, …]``.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from .cells import Sizes, before_each_token

__all__ = ["bias_grads", "grad_hh", "grad_hr", "grad_ih", "grad_vectors"]


def product(a: Tensor, b: Tensor, samples: int | None) -> Tensor:
    """aᵀ b over tokens."""
    if samples is None:
        return torch.mm(a.t(), b)
    return torch.bmm(_each(a, samples).permute(1, 2, 0), _each(b, samples).transpose(0, 1))


def _each(t: Tensor, samples: int) -> Tensor:
    return torch.unflatten(t, 0, (-1, samples))


def _sum(t: Tensor, samples: int | None) -> Tensor:
    return t.sum(0) if samples is None else _each(t, samples).sum(0)


def grad_ih(s: Sizes, gates: Tensor, tokens: Tensor, samples: int | None = None) -> Tensor:
    return product(gates[:, : s.cell.input_gates * s.hidden], tokens, samples)


def grad_hh(s: Sizes, gates: Tensor, kept: Tensor, before: Tensor, samples: int | None = None) -> Tensor:
    """Each stage's slots times what its matrix multiplied; ``before``: state 0 before each token."""
    H, products = s.hidden, []
    for (begin, end), (first, count, operand, _) in zip(s.cell.stage_rows, s.cell.stages, strict=True):
        fed = [i for i in range(first, first + count) if s.cell.slots[i][2]]
        read = before if operand < 0 else kept[:, operand * H : (operand + 1) * H]
        products += [product(gates[:, i * H : (i + 1) * H], read, samples) for i in fed[: end - begin]]
    return torch.cat(products, -2)


def grad_hr(s: Sizes, gates: Tensor, kept: Tensor, samples: int | None = None) -> Tensor:
    H, at = s.hidden, s.cell.projection * s.hidden
    operand = next(operand for *_, operand, projects in s.cell.stages if projects) * H
    return product(gates[:, at : at + s.output], kept[:, operand : operand + H], samples)


def bias_grads(s: Sizes, gates: Tensor, samples: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Of bias_ih and, where the cell has one, bias_hh."""
    total, H = _sum(gates, samples), s.hidden
    of_u = [total[..., first * H : end * H] for _, first, end in s.cell.bias_runs]
    return total[..., : s.cell.input_gates * H].clone(), torch.cat(of_u, -1) if of_u else None


def grad_vectors(
    s: Sizes, gates: Tensor, kept: Tensor, states: Seq[Tensor], after: Seq[Tensor], rows: Tensor | None, samples: int | None = None
) -> Tensor:
    """Of weight_v: sums over all tokens of a slot's gradient times what the vector multiplied; zero for what nothing learns."""
    H, number = s.hidden, torch.promote_types(gates.dtype, torch.float32)
    sums = []
    for _, slot, learned, factor, i in s.cell.vectors:
        if not learned:
            continue
        grad = gates[:, slot * H : (slot + 1) * H].to(number)
        if factor == "fixed":
            grad = torch.zeros_like(grad)
        elif factor == "old":
            grad = grad * before_each_token(s, after[i], states[i] if states else None, rows).to(number)
        elif factor == "new":
            grad = grad * after[i].to(number)
        elif factor == "kept":
            grad = grad * kept[:, i * H : (i + 1) * H].to(number)
        sums.append(_sum(grad, samples))
    return torch.cat(sums, -1).to(gates.dtype)
