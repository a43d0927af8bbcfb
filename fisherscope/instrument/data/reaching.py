"""Whether what a row brings reaches the model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from fisherscope.instrument.data.place import Encoded, Place

CheckRow = Callable[[Any, Place], None]

_READ = frozenset(
    {"input_ids", "attention_mask", "position_ids", "token_type_ids", "pixel_values", "labels", "label"}
)
_READ_OF_TARGETS = frozenset({"decoder_attention_mask", "decoder_input_ids"})


def refuse_unread(arguments: Collection[str], *, has_decoder: bool) -> CheckRow:
    """A check that refuses a row with a key that the model would take and fisherscope does not pass on.

    Args:
        arguments: what the model's forward pass may be given.
        has_decoder: whether rows have a target of their own.
    """
    dropped = frozenset(arguments) - _READ - (_READ_OF_TARGETS if has_decoder else frozenset())

    def check(row: Any, place: Place) -> None:
        if not isinstance(row, Mapping):
            return
        for key, value in row.items():
            if value is not None and key in dropped:
                raise place.error(
                    f"{key!r} is an argument of the model's forward, and fisherscope does not pass it on: "
                    "the gradient would be that of another input. Remove the key where it changes nothing, "
                    "or wrap the model in one that makes it from input_ids"
                )

    return check


def without_needless_types(encoded: Encoded, place: Place) -> Encoded:
    """The row without token types, for a model that takes none: types of one kind say nothing.

    Raises:
        DataError: they tell two texts apart.
    """
    if encoded.token_types is None:
        return encoded
    if any(encoded.token_types):
        raise place.error(
            '"token_type_ids" tell two texts apart, and the model\'s forward takes no such argument: remove '
            "them, or use a model that takes them (and the tokenizer that belongs to it)"
        )
    return replace(encoded, token_types=None)
