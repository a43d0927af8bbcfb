"""Rows of token ids: padding off, labels checked, packed rows refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.whole_numbers import dimensions, integers

_UNPACK = (
    "several samples in one row cannot have gradients of their own; give one sample per row "
    '(packing=False, or a collator that pads) with its own "attention_mask"'
)


def encode_ids(row: Mapping[str, Any], tokenizer: Any, place: Place) -> Encoded:
    """Ids and labels of a row of ``input_ids``, ``labels`` (default: the ids) and ``attention_mask``.

    Padding, where ``attention_mask`` is 0, is cut off on either side.

    Raises:
        DataError: lengths differ, the mask has holes, or the row is packed.
    """
    _refuse_packing_keys(row, place)
    ids = integers(row["input_ids"], "input_ids", place)
    labels = integers(row["labels"], "labels", place) if "labels" in row else list(ids)
    if len(labels) != len(ids):
        raise place.error(
            f"{len(labels)} labels for {len(ids)} input_ids; give one label per position, not shifted, "
            "-100 where there is no loss"
        )
    if "attention_mask" in row:
        start, stop = _attended(row["attention_mask"], len(ids), place)
    else:
        start, stop = 0, len(ids)
        _refuse_unmasked_padding(ids, tokenizer, place)
    if "position_ids" in row:
        _check_positions(row["position_ids"], start, stop, len(ids), place)
    types = integers(row["token_type_ids"], "token_type_ids", place) if "token_type_ids" in row else None
    if types is not None and len(types) != len(ids):
        raise place.error(f"{len(types)} token_type_ids for {len(ids)} input_ids")
    text = row.get("text")
    return Encoded(
        ids[start:stop],
        labels[start:stop],
        text if isinstance(text, str) else None,
        None if types is None else types[start:stop],
    )


def _refuse_packing_keys(row: Mapping[str, Any], place: Place) -> None:
    for key in row:
        if key == "seq_idx" or key.startswith(("cu_seqlens", "cu_seq_lens")):
            raise place.error(f"{key!r} says that the row is packed: {_UNPACK}")
    lengths = row.get("seq_lengths")
    if lengths is not None and dimensions(lengths) == 1 and len(lengths) > 1:
        raise place.error(f'"seq_lengths" says that the row packs {len(lengths)} samples: {_UNPACK}')


def _attended(mask: Any, length: int, place: Place) -> tuple[int, int]:
    """First attended position and the end of the attended positions."""
    if dimensions(mask) not in (None, 1):
        raise place.error(
            f"an attention_mask with {dimensions(mask)} axes per sample marks a packed or specially masked "
            f"row: {_UNPACK}"
        )
    values = integers(mask, "attention_mask", place, truth=True)
    if len(values) != length:
        raise place.error(f"{len(values)} entries of attention_mask for {length} input_ids")
    if odd := set(values) - {0, 1}:
        raise place.error(f"attention_mask holds {min(odd)}, which numbers packed samples: {_UNPACK}")
    if 1 not in values:
        raise place.error("attention_mask is 0 everywhere: the row is nothing but padding; remove it")
    start = values.index(1)
    stop = length - values[::-1].index(1)
    if 0 in values[start:stop]:
        hole = start + values[start:stop].index(0)
        raise place.error(
            f"attention_mask is 0 at position {hole}, between attended positions: padding may stand at the "
            f"ends only, and {_UNPACK}"
        )
    return start, stop


def _refuse_unmasked_padding(ids: list[int], tokenizer: Any, place: Place) -> None:
    pad, eos = getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)
    if pad is None or not ids:
        return
    # where padding is done with the end-of-sequence token, one of them may be text, two are padding
    ends = [ids[:1], ids[-1:]] if pad != eos else [ids[:2], ids[-2:]]
    if any(set(end) == {pad} and (pad != eos or len(end) == 2) for end in ends):
        raise place.error(
            f'the ids begin or end with the pad token ({pad}) and there is no "attention_mask" to tell '
            "padding from text; pass the attention_mask, or remove the padding"
        )


def _check_positions(positions: Any, start: int, stop: int, length: int, place: Place) -> None:
    values = integers(positions, "position_ids", place)
    if len(values) != length:
        raise place.error(f"{len(values)} position_ids for {length} input_ids")
    attended = values[start:stop]
    for index in range(1, len(attended)):
        if attended[index] != attended[index - 1] + 1:
            raise place.error(
                f"position_ids go from {attended[index - 1]} to {attended[index]} at position "
                f"{start + index}, so the row is packed: {_UNPACK}"
            )
    if attended and attended[0] not in (0, start):
        raise place.error(
            f"position_ids begin at {attended[0]}: samples are run alone, from position 0; "
            "give the whole sequence, or drop position_ids"
        )
