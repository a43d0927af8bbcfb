"""The forms of interference that weigh each entry by itself, and the product of all pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fisherscope.errors import UsageError
from fisherscope.store import ContributionStore

Operand = Callable[[Tensor, Tensor, Tensor], Tensor]

# Operands are made for so many bytes at a time: they stay in a core's cache until the product has read them.
_TILE_BYTES = 2 << 20
_FEWEST_COLUMNS = 256


@dataclass(frozen=True)
class Form:
    """A form ``M_ij = agg_k left(i)_k right(j)_k``, with w = 1 / sqrt(F + lam).

    Attributes:
        left, right: make the operands of gradients ``[n, k]`` and w ``[k]``, into a buffer ``[n, k]``.
        left_power, right_power: the power of the factor which makes h_i of g_i that belongs to each.
        signed: scores below 0 mean conflict, above 0 synergy; else none is below 0.
        degree: with what power of all gradients together a score grows.
    """

    left: Operand
    right: Operand
    left_power: int
    right_power: int
    signed: bool = False
    degree: int = 0


def _square(gradients: Tensor, white: Tensor, out: Tensor) -> Tensor:
    torch.mul(gradients, white, out=out).square_()
    # an F of another task may be 0 where C is not: keep the quotient a number, so that 0 gradients give 0
    return out.clamp_(max=torch.finfo(out.dtype).max)


def _absolute(gradients: Tensor, white: Tensor, out: Tensor) -> Tensor:
    del white
    return torch.abs(gradients, out=out)


def _whitened(gradients: Tensor, white: Tensor, out: Tensor) -> Tensor:
    return torch.mul(gradients, white, out=out)


def _absolute_whitened(gradients: Tensor, white: Tensor, out: Tensor) -> Tensor:
    return torch.mul(gradients, white, out=out).abs_()


FORMS: dict[str, Form] = {
    "unsigned": Form(_square, _absolute, 2, 0, degree=1),
    "natural": Form(_square, _absolute_whitened, 2, 0),
    "signed": Form(_whitened, _whitened, 1, 1, signed=True),
    "symmetric": Form(_absolute_whitened, _absolute_whitened, 1, 1),
}


@dataclass(frozen=True)
class Product:
    """All pairs of one slice.

    Attributes:
        scores: sums over the entries ``[n_a, n_b]``.
        left, right: sums of each operand's rows, ``[n_a]`` and ``[n_b]``; zeros for signed forms.
    """

    scores: Tensor
    left: Tensor
    right: Tensor


def product(form: Form, first: Tensor, second: Tensor, white: Tensor) -> Product:
    """One matrix product over all pairs; the operands are made piece by piece, and never as a whole.

    Args:
        form: one of :data:`FORMS`.
        first: gradients ``[n_a, k]``, left as they are.
        second: gradients ``[n_b, k]``, left as they are.
        white: w = 1 / sqrt(F + lam), ``[k]``.
    """
    n_a, n_b, size = len(first), len(second), first.shape[1]
    scores = first.new_zeros(n_a, n_b)
    sums = first.new_zeros(n_a), second.new_zeros(n_b)
    width = max(_FEWEST_COLUMNS, _TILE_BYTES // (first.element_size() * (n_a + n_b)))
    buffers = first.new_empty(n_a * min(width, size)), second.new_empty(n_b * min(width, size))
    for start in range(0, size, width):
        columns = slice(start, min(start + width, size))
        span = columns.stop - start
        left = form.left(first[:, columns], white[columns], buffers[0][: n_a * span].view(n_a, span))
        right = form.right(second[:, columns], white[columns], buffers[1][: n_b * span].view(n_b, span))
        scores.addmm_(left, right.T)
        if not form.signed:
            sums[0].add_(left.sum(1))
            sums[1].add_(right.sum(1))
    return Product(scores, *sums)


def whitening(fisher: Tensor, lam: float) -> Tensor:
    """Whitening ``1 / sqrt(F + lam)``, in the shape of F; 0 where F is 0 throughout, so that scores are."""
    return (fisher + lam).rsqrt() if bool((fisher > 0).any()) else torch.zeros_like(fisher)


def interference_matrix(
    first: Tensor,
    second: Tensor,
    fisher: Tensor,
    lam: float,
    *,
    form: Literal["unsigned", "natural", "signed", "symmetric"] = "unsigned",
    aggregate: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Interference of all pairs of samples on one slice, as one matrix product.

    With C = h^2: unsigned ``agg_k C_ik / (F_k + lam) |g_jk|``, natural the same over ``sqrt(F_k + lam)``,
    signed ``agg_k h_ik h_jk / (F_k + lam)``, symmetric the same of absolute values. Where F is 0 throughout,
    M is 0. The form "full" is :func:`fisherscope.linalg.woodbury.between`.

    Args:
        first: normalised h of the first task's samples ``[n_a, k]``.
        second: g of the second task's samples ``[n_b, k]``; for signed and symmetric their h.
        fisher: F ``[k]``.
        lam: damping, > 0.
        form: which.
        aggregate: "mean" over the k entries, or "sum".

    Returns:
        ``[n_a, n_b]``, in the type of ``first``.

    Raises:
        ValueError: no such form.
    """
    if form not in FORMS:
        raise UsageError(f"no form {form!r} of single entries: choose from {', '.join(FORMS)}")
    white = whitening(fisher, lam)
    found = product(FORMS[form], first, second.to(first.dtype), white.to(first.dtype)).scores
    return found.div_(fisher.numel()) if aggregate == "mean" else found


def gradient_scale(
    store: ContributionStore, task: str, rule: Literal["none", "per_token_mean", "per_token_sum"]
) -> Tensor | None:
    """Factors ``[n]`` on the second task's gradients: 1 / attended length, or 1 / loss-bearing tokens.

    Returns:
        float32, or None for ``rule="none"``.
    """
    if rule == "none":
        return None
    counts = store.samples(task)["length" if rule == "per_token_mean" else "tokens"].to_numpy(np.float64)
    return torch.from_numpy(1 / counts).float()
