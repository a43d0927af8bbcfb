"""A task's rows to samples: tokenised, truncated, checked, and told apart."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fisherscope.errors import DataError
from fisherscope.instrument.data.chat import encode_messages
from fisherscope.instrument.data.ids import encode_ids
from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.rows import ACCEPTED, walk
from fisherscope.instrument.data.sample import IGNORED, Sample
from fisherscope.instrument.data.text import encode_completion, encode_text
from fisherscope.instrument.data.whole_numbers import dimensions


def prepare_task(
    name: str,
    rows: Any,
    tokenizer: Any = None,
    *,
    max_length: int | None = None,
    max_samples: int | None = None,
    vocab_size: int | None = None,
    max_positions: int | None = None,
) -> list[Sample]:
    """Turn the rows of a task into samples.

    Args:
        name: name of the task, for messages.
        rows: an iterable of strings, of dicts with ``text``, ``prompt`` and ``completion``, ``messages`` or
            ``input_ids`` (with ``labels`` and ``attention_mask``), of lists or 1-D tensors of ids; a
            ``datasets.Dataset``; or a DataLoader that yields batches of these.
        tokenizer: a transformers tokenizer; needed for rows of text.
        max_length: longer samples are cut at the right, and the number of cut tokens is kept.
        max_samples: only the first so many rows are read.
        vocab_size: number of token ids the model has; ids beyond it are refused.
        max_positions: the longest sequence the model takes; longer samples are refused.

    Returns:
        One sample per row, in row order, with keys that differ within the task.

    Raises:
        DataError: the task is empty, or a row cannot be used; the message names the row and what to do.
        ValueError: ``max_length`` or ``max_samples`` is too small.
    """
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (position 0 bears no loss), it is {max_length}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, it is {max_samples}")
    limits = _Limits(max_length, vocab_size, max_positions)
    walked = [
        (place, _sample(row, tokenizer, place, limits))
        for place, row in itertools.islice(walk(name, rows), max_samples)
    ]
    if not walked:
        raise DataError(f"task {name!r} is empty; give it at least one row, or leave it out")
    _check_loss(name, walked)
    return _told_apart([sample for _, sample in walked])


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a sample has to fit into; None where there is no limit."""

    length: int | None
    vocabulary: int | None
    positions: int | None


def _sample(row: Any, tokenizer: Any, place: Place, limits: _Limits) -> Sample:
    """One row, encoded, checked and truncated."""
    encoded = _encode(row, tokenizer, place)
    ids, labels, text = encoded.input_ids, encoded.labels, encoded.text
    if not ids:
        raise place.error("the row has no tokens; remove it")
    _check_vocabulary("input_ids", ids, limits.vocabulary, place)
    _check_vocabulary("labels", [label for label in labels if label != IGNORED], limits.vocabulary, place)
    if text is None and tokenizer is not None:
        text = str(tokenizer.decode(ids))
    kept = len(ids) if limits.length is None else min(len(ids), limits.length)
    if limits.positions is not None and kept > limits.positions:
        raise place.error(
            f"{kept} tokens, and the model takes {limits.positions}; "
            f"pass max_length={limits.positions} to cut longer samples, or shorten the row"
        )
    sample = Sample(tuple(ids[:kept]), tuple(labels[:kept]), text, len(ids) - kept)
    if sample.truncated and not sample.tokens:
        _refuse_cut_loss(labels, kept, place)
    return sample


def _refuse_cut_loss(labels: list[int], kept: int, place: Place) -> None:
    bearing = [index for index, label in enumerate(labels) if index and label != IGNORED]
    if bearing:
        raise place.error(
            f"max_length={kept} cuts off every token that bears loss: the sample has {len(labels)} tokens "
            f"and loss on positions {bearing[0]} to {bearing[-1]}; raise max_length above {bearing[0]}, "
            "or shorten or remove the row"
        )


def _encode(row: Any, tokenizer: Any, place: Place) -> Encoded:
    """Ids and labels of a row of any form; the most explicit form wins where keys of several are there."""
    if isinstance(row, Mapping):
        if "input_ids" in row:
            return encode_ids(row, tokenizer, place)
        if "messages" in row:
            checked = _needed(tokenizer, place)
            return encode_messages(checked, row["messages"], row.get("tools"), place)
        if "prompt" in row and "completion" in row:
            prompt, completion = _string(row, "prompt", place), _string(row, "completion", place)
            return encode_completion(_needed(tokenizer, place), prompt, completion, place)
        if "text" in row and "prompt" not in row and "completion" not in row:
            return encode_text(_needed(tokenizer, place), _string(row, "text", place), place)
        raise place.error(f"unknown form, with the keys {[str(key) for key in row]}; {ACCEPTED}")
    if isinstance(row, str):
        return encode_text(_needed(tokenizer, place), row, place)
    if dimensions(row) == 1:
        return encode_ids({"input_ids": row}, tokenizer, place)
    raise place.error(f"unknown form, a {type(row).__name__}; {ACCEPTED}")


def _needed(tokenizer: Any, place: Place) -> Any:
    if tokenizer is None:
        raise place.error(
            'text needs a tokenizer: pass one to fisherscope.wrap(model, tokenizer), or give "input_ids"'
        )
    return tokenizer


def _string(row: Mapping[str, Any], key: str, place: Place) -> str:
    value = row[key]
    if not isinstance(value, str):
        hint = '; for lists of messages use {"messages"}' if isinstance(value, list | tuple) else ""
        raise place.error(f"{key!r} must be a string, it is a {type(value).__name__}{hint}")
    return value


def _check_vocabulary(what: str, values: list[int], size: int | None, place: Place) -> None:
    if not values:
        return
    low, high = min(values), max(values)
    allowed = ", or -100 for no loss" if what == "labels" else ""
    if low < 0:
        raise place.error(f"{what} hold {low}; token ids are 0 or more{allowed}")
    if size is not None and high >= size:
        raise place.error(
            f"{what} hold {high}, but the model's vocabulary has {size} entries (0 to {size - 1}){allowed}; "
            "use the tokenizer that belongs to the model"
        )


def _check_loss(name: str, walked: list[tuple[Place, Sample]]) -> None:
    silent = [place for place, sample in walked if not sample.tokens]
    if not silent:
        return
    advice = "labels other than -100 are needed after position 0, which bears no loss"
    if len(silent) == len(walked):
        raise DataError(
            f"task {name!r} has no loss-bearing token in any of its {len(walked)} samples; {advice}"
        )
    raise silent[0].error(
        f"no token bears loss (the same in {len(silent)} of {len(walked)} samples); {advice}; "
        "fix or remove these rows"
    )


def _told_apart(samples: list[Sample]) -> list[Sample]:
    """Number the repetitions of a sample, so that keys are unique within the task."""
    seen: Counter[str] = Counter()
    result = []
    for sample in samples:
        content = sample.key
        repeated = seen[content]
        result.append(replace(sample, occurrence=repeated) if repeated else sample)
        seen[content] += 1
    return result
