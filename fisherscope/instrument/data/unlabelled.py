"""The input of a row whose labels stand apart from it: ids, a text, or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherscope.instrument.data.ids import encode_ids
from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.text import check_encodable, string

TEXTS = ("text", "sentence", "sentence1", "source", "prompt")
SECOND_TEXTS = ("text_pair", "sentence2")


def encode_unlabelled(row: Mapping[str, Any], reading: Reading, place: Place) -> Encoded:
    """Ids of ``input_ids``, or of ``text`` (with ``text_pair``), without labels.

    Raises:
        DataError: there is neither, or it is malformed.
    """
    if "input_ids" in row:
        bare = {key: value for key, value in row.items() if key not in {"labels", "label"}}
        return encode_ids(bare, reading.tokenizer, place)
    key = next((name for name in TEXTS if name in row), None)
    if key is None:
        raise place.error(f'neither "input_ids" nor "text" among the keys {[str(name) for name in row]}')
    tokenizer = reading.needed_tokenizer(place)
    text = string(row, key, place)
    if not text:
        raise place.error("the text is empty; remove the row or give it text")
    second = next((string(row, name, place) for name in SECOND_TEXTS if name in row), None)
    for part in (text, second or ""):
        check_encodable(part, place)
    encoding = tokenizer(text) if second is None else tokenizer(text, second)
    types = encoding.get("token_type_ids") if second is not None else None
    return Encoded(
        [int(token) for token in encoding["input_ids"]],
        [],
        text if second is None else f"{text}\n{second}",
        None if types is None else [int(kind) for kind in types],
    )
