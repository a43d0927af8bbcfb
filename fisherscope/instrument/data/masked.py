"""Rows for masked language models: labelled by the user, or masked here as BERT was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from fisherscope.instrument.data.ids import encode_ids
from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.sample import IGNORED
from fisherscope.instrument.data.unlabelled import encode_unlabelled
from fisherscope.instrument.data.whole_numbers import dimensions

_SHARE = 0.15
_MASKED, _REPLACED = 0.8, 0.1  # of the chosen; the rest stays as it is


def encode_masked(row: Any, reading: Reading, place: Place) -> Encoded:
    """A row with ``labels`` as it is; another has 15 % of its tokens masked.

    Of the chosen tokens 80 % become the mask token, 10 % a random token and 10 % stay (Devlin et al. 2019).
    The choice depends on the row's own ids and the seed, not on the rows around it.

    Raises:
        DataError: the row is malformed, or is to be masked and the tokenizer has no mask token.
    """
    if isinstance(row, Mapping) and "labels" in row and "input_ids" in row:
        return encode_ids(row, reading.tokenizer, place)
    if isinstance(row, str):
        row = {"text": row}
    elif not isinstance(row, Mapping) and dimensions(row) == 1:
        row = {"input_ids": row}
    if not isinstance(row, Mapping):
        raise place.error(f'a {type(row).__name__} is no text and no "input_ids"')
    return _mask(encode_unlabelled(row, reading, place), reading, place)


def _mask(encoded: Encoded, reading: Reading, place: Place) -> Encoded:
    tokenizer = reading.tokenizer
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise place.error(
            'the row has no "labels", and the tokenizer has no mask token to make some with; give '
            '"input_ids" with masks in them and "labels" (-100 elsewhere)'
        )
    ids = list(encoded.input_ids)
    kept = ids if reading.max_length is None else ids[: reading.max_length]
    special = set(tokenizer.all_special_ids)
    places = [index for index, token in enumerate(kept) if token not in special]
    if not places:
        raise place.error("the row has nothing but special tokens, so there is nothing to mask; remove it")
    generator = np.random.default_rng(_seed(kept, reading.seed))
    chosen = sorted(generator.permutation(places)[: max(1, round(_SHARE * len(places)))].tolist())
    labels = [IGNORED] * len(ids)
    for index in chosen:
        labels[index] = ids[index]
        draw = generator.random()
        if draw < _MASKED:
            ids[index] = mask
        elif draw < _MASKED + _REPLACED:
            ids[index] = int(generator.integers(len(tokenizer)))
    return Encoded(ids, labels, encoded.text, encoded.token_types)


def _seed(ids: list[int], seed: int) -> int:
    content = np.array([seed, *ids], dtype="<i8").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")
