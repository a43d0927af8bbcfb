"""The formula of interference, and what enters it."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fisherscope.store import ContributionStore


def interference_matrix(
    contributions: Tensor,
    fisher: Tensor,
    gradients: Tensor,
    lam: float,
    aggregate: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Unsigned interference of all pairs: ``M_ij = agg_k C_ik / (F_k + lam) * |g_jk|``.

    One matrix product. Asymmetric and never negative: how much the update of sample j moves the entries
    on which sample i leans. Where F is 0 throughout, M is 0.

    Args:
        contributions: C = h^2 of the first task's samples ``[n_a, k]``.
        fisher: F ``[k]``.
        gradients: g of the second task's samples ``[n_b, k]``, signed or not.
        lam: damping, > 0.
        aggregate: "mean" over the k entries, or "sum".

    Returns:
        ``[n_a, n_b]`` float32.
    """
    if not bool((fisher > 0).any()):
        return torch.zeros(len(contributions), len(gradients))
    # an F of another task may be 0 where C is not: keep the quotient a number, so that 0 gradients give 0
    ratio = (contributions / (fisher + lam)).clamp_(max=torch.finfo(torch.float32).max)
    product = ratio @ gradients.abs().T
    return product.div_(fisher.numel()) if aggregate == "mean" else product


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
