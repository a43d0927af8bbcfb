"""Rows for next-token prediction, in all the forms that people have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherscope.instrument.data.chat import encode_messages
from fisherscope.instrument.data.ids import encode_ids
from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.rows import ACCEPTED
from fisherscope.instrument.data.text import encode_completion, encode_text, string
from fisherscope.instrument.data.whole_numbers import dimensions


def encode_next_token(row: Any, reading: Reading, place: Place) -> Encoded:
    """Ids and labels of a row of any form; the most explicit form wins where keys of several are there.

    Raises:
        DataError: the row has no form that is known, or is malformed.
    """
    if isinstance(row, Mapping):
        if "input_ids" in row:
            return encode_ids(row, reading.tokenizer, place)
        if "messages" in row:
            tokenizer = reading.needed_tokenizer(place)
            return encode_messages(tokenizer, row["messages"], row.get("tools"), place)
        if "prompt" in row and "completion" in row:
            prompt, completion = string(row, "prompt", place), string(row, "completion", place)
            return encode_completion(reading.needed_tokenizer(place), prompt, completion, place)
        if "text" in row and "prompt" not in row and "completion" not in row:
            return encode_text(reading.needed_tokenizer(place), string(row, "text", place), place)
        raise place.error(f"unknown form, with the keys {[str(key) for key in row]}; {ACCEPTED}")
    if isinstance(row, str):
        return encode_text(reading.needed_tokenizer(place), row, place)
    if dimensions(row) == 1:
        return encode_ids({"input_ids": row}, reading.tokenizer, place)
    raise place.error(f"unknown form, a {type(row).__name__}; {ACCEPTED}")
