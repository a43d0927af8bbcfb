"""Targets of a decoder as ids: what a collator has put around them is no part of the sample."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

from fisherscope.instrument.data.place import Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.sample import IGNORED
from fisherscope.instrument.data.whole_numbers import integers


def target_ids(row: Mapping[str, Any], key: str, reading: Reading, place: Place) -> list[int]:
    """The ids of a target, without padding, so that the same row is the same sample from any loader.

    Padding are -100 and pad ids (the tokenizer's and the config's) at the end, and what a
    ``decoder_attention_mask`` leaves out. Where pad and end of sequence are one id, the first of a run at the
    end is text. -100 and pad ids before other ids stay: the decoder is given a position for each of them.

    Raises:
        DataError: nothing is left, mask and target differ, or ``decoder_input_ids`` are not the target, one
            step later.
    """
    ids = integers(row[key], key, place)
    inputs = row.get("decoder_input_ids")
    if inputs is not None:
        _check_inputs(ids, integers(inputs, "decoder_input_ids", place), reading, place)
    if row.get("decoder_attention_mask") is not None:
        # the mask is that of the decoder's input, which lies one step later: its length is the target's
        mask = integers(row["decoder_attention_mask"], "decoder_attention_mask", place)
        ids = _attended(ids, mask, place)
    pads, ends = set(token_ids(reading, "pad_token_id")), set(token_ids(reading, "eos_token_id"))
    return _bare(ids, {IGNORED, *pads}, pads & ends)


def token_ids(reading: Reading, name: str) -> Iterator[int]:
    """Ids under that name in the model's config and of its tokenizer: none, one or several."""
    for source in (reading.config, reading.tokenizer):
        value: Any = getattr(source, name, None)
        for item in value if isinstance(value, list | tuple) else [value]:
            try:
                yield operator.index(item)
            except TypeError:  # none
                continue


def _bare(ids: list[int], padding: set[int], shared: set[int]) -> list[int]:
    stop = len(ids)
    while stop and ids[stop - 1] in padding:
        stop -= 1
    # one end of sequence that looks like padding is text
    if stop and stop < len(ids) and ids[stop] in shared:
        stop += 1
    return ids[:stop]


def _attended(ids: list[int], mask: list[int], place: Place) -> list[int]:
    if len(mask) != len(ids):
        raise place.error(f"{len(mask)} entries of decoder_attention_mask for {len(ids)} labels")
    if set(mask) - {0, 1}:
        raise place.error("decoder_attention_mask must hold 0 and 1: one target per row")
    kept = [index for index, entry in enumerate(mask) if entry]
    if not kept:
        raise place.error("decoder_attention_mask is 0 everywhere: the target is nothing but padding")
    start, stop = kept[0], kept[-1] + 1
    if len(kept) != stop - start:
        raise place.error("decoder_attention_mask has holes: give one target per row, padded at an end")
    return ids[start:stop]


def _check_inputs(ids: list[int], inputs: list[int], reading: Reading, place: Place) -> None:
    """A collator makes the decoder's input from the labels; any other would not be passed on."""
    start = getattr(reading.config, "decoder_start_token_id", None)
    # without one the model begins targets in a way of its own, such as with the token of a language
    first = 0 if start is not None else 1
    expected = [start, *ids[:-1]]
    same = len(inputs) == len(ids) and all(
        want in (got, IGNORED) for want, got in zip(expected[first:], inputs[first:], strict=True)
    )
    if not same:
        raise place.error(
            '"decoder_input_ids" are not the labels behind config.decoder_start_token_id, and fisherscope '
            "makes the decoder's input from the labels: leave them out"
        )
