"""Rows for encoder-decoder models: a source, and a target that has its own tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.targets import target_ids
from fisherscope.instrument.data.text import check_encodable
from fisherscope.instrument.data.unlabelled import encode_unlabelled

_TARGETS = ("labels", "target", "completion", "summary")


def encode_sequence_pair(row: Any, reading: Reading, place: Place) -> Encoded:
    """``input_ids`` or ``text`` (also ``source`` or ``prompt``), and ``labels`` or ``target``.

    A target is a text or ids, with the end of sequence that the tokenizer adds of itself; padding behind ids
    is no part of it.

    Raises:
        DataError: one of them is missing or malformed.
    """
    key = next((name for name in _TARGETS if isinstance(row, Mapping) and row.get(name) is not None), None)
    if key is None:
        raise place.error('an encoder-decoder model needs "labels" (ids) or a "target" (text) for every row')
    source = encode_unlabelled(row, reading, place)
    target = row[key]
    if isinstance(target, str):
        check_encodable(target, place)
        tokenizer = reading.needed_tokenizer(place)
        labels = [int(token) for token in tokenizer(text_target=target)["input_ids"]]
        text = None if source.text is None else f"{source.text}\n{target}"
    else:
        labels, text = target_ids(row, key, reading, place), source.text
    if not labels:
        raise place.error("the target has no tokens; remove the row")
    return Encoded(source.input_ids, labels, text, source.token_types)
