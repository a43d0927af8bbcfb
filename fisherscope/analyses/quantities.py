"""What an analysis can require of a store, and what to collect where it is absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fisherscope.store import ContributionStore


@dataclass(frozen=True)
class Quantity:
    """Something that a store may hold.

    Attributes:
        title: what it is, in words.
        present: whether the store holds it.
        advice: what to collect when it does not.
    """

    title: str
    present: Callable[[ContributionStore], bool]
    advice: str


def _has_attention_gradients(store: ContributionStore) -> bool:
    stored = set(store.gradient_parameters)
    return any(block.weight.parameter in stored for _, block in store.layout.head_blocks())


QUANTITIES: dict[str, Quantity] = {
    "groups": Quantity(
        "group values",
        lambda store: len(store.group_table) > 0,
        'pass extensions=("fisher",) to scope.collect',
    ),
    "fisher": Quantity(
        "F in full shape",
        lambda store: store.header.fisher_shape == "full",
        'pass extensions=(Fisher(shape="full"),) to scope.collect',
    ),
    "gradients": Quantity(
        "sample gradients of attention weights",
        _has_attention_gradients,
        'pass extensions=("fisher", "sample_gradients") to scope.collect',
    ),
}


def missing(store: ContributionStore, requires: tuple[str, ...]) -> str | None:
    """Which required quantities the store lacks and what to collect, or None."""
    lacking = [QUANTITIES[name] for name in requires if not QUANTITIES[name].present(store)]
    if not lacking:
        return None
    titles = " and ".join(q.title for q in lacking)
    return f"the store {store.path} holds no {titles}; collect again: " + ", ".join(q.advice for q in lacking)
