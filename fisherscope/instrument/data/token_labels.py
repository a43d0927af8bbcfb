"""Rows for token classification: a class for every token, or for every word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fisherscope.instrument.data.class_label import class_number
from fisherscope.instrument.data.ids import encode_ids
from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.sample import IGNORED

_LABELS = ("labels", "ner_tags", "tags")


def encode_token_labels(row: Any, reading: Reading, place: Place) -> Encoded:
    """``input_ids`` with one label per position, or ``tokens`` (words) with one label per word.

    A word's label stands at its first token; its other tokens, and special tokens, bear no loss.

    Raises:
        DataError: there are no labels, not one per position or word, or the tokenizer cannot tell words.
    """
    key = next((name for name in _LABELS if isinstance(row, Mapping) and name in row), None)
    if key is None:
        raise place.error('token classification needs "labels": one class per position, -100 for no loss')
    if "input_ids" in row:
        return encode_ids({**row, "labels": row[key]}, reading.tokenizer, place)
    words = row.get("tokens", row.get("words"))
    if not isinstance(words, Sequence) or isinstance(words, str) or not words:
        raise place.error('neither "input_ids" nor "tokens" (a list of words) goes with the labels')
    if not isinstance(row[key], Sequence) or isinstance(row[key], str):
        raise place.error(f"{key!r} must be a list with one class per word, not a {type(row[key]).__name__}")
    if len(words) != len(row[key]):
        raise place.error(f"{len(row[key])} labels for {len(words)} words; give one per word")
    tokenizer = reading.needed_tokenizer(place)
    if not getattr(tokenizer, "is_fast", False):
        raise place.error('only fast tokenizers can tell words apart; give "input_ids" and their "labels"')
    encoding = tokenizer(list(words), is_split_into_words=True)
    numbers = [class_number(label, reading, place) for label in row[key]]
    labels, before = [], None
    for word in encoding.word_ids():
        labels.append(IGNORED if word is None or word == before else numbers[word])
        before = word
    return Encoded([int(token) for token in encoding["input_ids"]], labels, " ".join(map(str, words)))
