"""What an analysis can require of a store, and what to collect where it is absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fisherscope.layout.attention import Part
from fisherscope.store import ContributionStore


@dataclass(frozen=True)
class Quantity:
    """Something that a store may hold.

    Attributes:
        title: what it is, in words.
        present: whether the store holds it.
        advice: what to collect when a store does not.
    """

    title: str
    present: Callable[[ContributionStore], bool]
    advice: Callable[[ContributionStore], str]


def _has_attention_gradients(store: ContributionStore) -> bool:
    stored = set(store.gradient_parameters)
    return any(block.weight.parameter in stored for _, block in store.layout.head_blocks())


def collecting_heads(store: ContributionStore, part: Part = "weight") -> str:
    """How to collect, into another store, gradients of the slices of heads that this one lacks.

    Args:
        store: one whose layout has heads.
        part: of the blocks.
    """
    parts = [block.part(part) for _, block in store.layout.head_blocks()]
    names = {found.parameter for found in parts if found is not None}
    if not names:
        other = "weight" if part == "bias" else "bias"
        return (
            f"the attention of this model has no {part} that is cut into heads, so none can be collected; "
            f"use part={other!r}, if that is there"
        )
    again = (
        'pass extensions=("fisher", fisherscope.SampleGradients(parameters="attention")) to scope.collect, '
        "with a new directory"
    )
    if names.isdisjoint(store.header.parameters):
        return f'wrap the model with parameters="linear", which instruments attention, too, and {again}'
    return again


def without_heads(store: ContributionStore) -> str | None:
    """Why there is nothing to compare head by head, and what there is; None where the layout has heads."""
    if next(iter(store.layout.head_blocks()), None) is not None:
        return None
    return (
        f"this compares slices of attention heads, and the layout of {store.path} has none: none could be "
        "confirmed when the model was wrapped, and collecting again changes nothing. The analyses fisher, "
        "importance, masks and overlap answer by module, and store.gradients(task, parameter) has the "
        "gradients of the parameters in store.gradient_parameters. If the model has attention after "
        "all, say where its heads are with fisherscope.register_adapter, and collect into a new directory"
    )


QUANTITIES: dict[str, Quantity] = {
    "groups": Quantity(
        "group values",
        lambda store: len(store.group_table) > 0,
        lambda _: 'pass extensions=("fisher",) to scope.collect',
    ),
    "fisher": Quantity(
        "F in full shape",
        lambda store: store.header.fisher_shape == "full",
        lambda _: 'pass extensions=(fisherscope.Fisher(shape="full"),) to scope.collect',
    ),
    "gradients": Quantity(
        "sample gradients of attention weights",
        _has_attention_gradients,
        collecting_heads,
    ),
}


def missing(store: ContributionStore, requires: tuple[str, ...]) -> str | None:
    """Which required quantities the store lacks and what to collect, or None."""
    lacking = [QUANTITIES[name] for name in requires if not QUANTITIES[name].present(store)]
    if not lacking:
        return None
    nothing = without_heads(store) if QUANTITIES["gradients"] in lacking else None
    if nothing is not None:
        return nothing
    titles = " and ".join(q.title for q in lacking)
    return f"the store {store.path} holds no {titles}; collect again: " + ", ".join(
        q.advice(store) for q in lacking
    )
