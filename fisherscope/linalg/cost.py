"""Which of two exact routes is cheaper; ``benchmarks/norms.py`` measures whether it chooses well."""

from __future__ import annotations

# Reading, squaring and reducing one entry of a materialised gradient costs about as much as this many
# multiply-adds of a matrix product.
_PASS_COST = 12.0


def gram_is_cheaper(positions: int, shape: tuple[int, ...], axis: int) -> bool:
    """Whether norms come cheaper from a Gram matrix over positions than from the gradients themselves.

    Per sample, with T positions and a parameter [R, C] reduced to R values, the Gram route forms the T x T
    Gram of the other side (T^2 C) and multiplies it with this one (T^2 R); materialising costs T R C and a
    few passes over R C entries.
    """
    rows, columns = shape
    gram = positions * positions * (rows + columns) + 2 * _PASS_COST * positions * shape[axis]
    return gram < positions * rows * columns + _PASS_COST * rows * columns


def pair_gram_is_cheaper(
    n: int, m: int, positions: int, other_positions: int, shape: tuple[int, ...]
) -> bool:
    """Whether all inner products of two sets of samples come cheaper over positions than materialised."""
    rows, columns = shape
    pairs = n * m * positions * other_positions * (rows + columns + _PASS_COST)
    dense = (n * positions + m * other_positions + n * m) * rows * columns
    return pairs < dense
