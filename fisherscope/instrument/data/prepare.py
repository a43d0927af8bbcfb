"""A task's rows to samples: tokenised, truncated, checked, and told apart."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from fisherscope.errors import DataError, UsageError
from fisherscope.instrument.data.next_token import encode_next_token
from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reaching import CheckRow, without_needless_types
from fisherscope.instrument.data.reading import Encoder, Reading
from fisherscope.instrument.data.rows import walk
from fisherscope.instrument.data.sample import IGNORED, Labelling, Sample
from fisherscope.instrument.data.text import check_encodable


def prepare_task(
    name: str,
    rows: Any,
    tokenizer: Any = None,
    *,
    encode: Encoder = encode_next_token,
    labelling: Labelling = "next",
    config: Any = None,
    seed: int = 0,
    max_length: int | None = None,
    max_samples: int | None = None,
    vocab_size: int | None = None,
    classes: int | None = None,
    max_positions: int | None = None,
    token_types: bool = True,
    check: CheckRow | None = None,
) -> list[Sample]:
    """Turn the rows of a task into samples.

    Args:
        name: name of the task, for messages.
        rows: an iterable of strings, of dicts with ``text``, ``prompt`` and ``completion``, ``messages`` or
            ``input_ids`` (with ``labels`` and ``attention_mask``), of lists or 1-D tensors of ids; a
            ``datasets.Dataset``; or a DataLoader that yields batches of these.
        tokenizer: a transformers tokenizer; needed for rows of text.
        encode: how a row is read; by default for next-token prediction.
        labelling: what the labels that it makes stand beside.
        config: of the model: names of classes, size of patches.
        seed: of what is drawn at random, such as masks.
        max_length: longer samples are cut at the right, and the number of cut tokens is kept.
        max_samples: only the first so many rows are read.
        vocab_size: number of token ids the model has; ids beyond it are refused.
        classes: number of classes that labels may name; by default labels are token ids.
        max_positions: the longest sequence the model takes; longer samples are refused.
        token_types: whether the model takes token types; where not, those that tell texts apart are refused.
        check: is shown every row, or batch of rows, before it is read.

    Returns:
        One sample per row, in row order, with keys that differ within the task.

    Raises:
        DataError: the task is empty, or a row cannot be used; the message names the row and what to do.
        ValueError: ``max_length`` or ``max_samples`` is too small.
    """
    if max_length is not None and max_length < 2:
        raise UsageError(f"max_length must be at least 2 (position 0 bears no loss), it is {max_length}")
    if max_samples is not None and max_samples < 1:
        raise UsageError(f"max_samples must be at least 1, it is {max_samples}")
    limits = _Limits(max_length, vocab_size, max_positions, *_label_range(vocab_size, classes))
    reading = Reading(tokenizer, config, max_length, seed)
    walked = []
    most = None if max_samples is None else min(max_samples, sys.maxsize)
    for place, row in itertools.islice(walk(name, rows, check), most):
        encoded = encode(row, reading, place)
        if not token_types:
            encoded = without_needless_types(encoded, place)
        walked.append((place, _sample(encoded, labelling, reading, place, limits)))
    if not walked:
        used_up = (
            "; an iterator gives its rows only once, so pass a list" if isinstance(rows, Iterator) else ""
        )
        raise DataError(f"task {name!r} is empty; give it at least one row, or leave it out{used_up}")
    _check_loss(name, walked)
    _check_images(walked)
    return _told_apart([sample for _, sample in walked])


@dataclass(frozen=True, slots=True)
class _Limits:
    """What a sample has to fit into; None where there is no limit."""

    length: int | None
    vocabulary: int | None
    positions: int | None
    labels: int | None
    kind: Literal["vocabulary", "list of classes"]


def _label_range(
    vocabulary: int | None, classes: int | None
) -> tuple[int | None, Literal["vocabulary", "list of classes"]]:
    return (vocabulary, "vocabulary") if classes is None else (classes, "list of classes")


def _sample(
    encoded: Encoded, labelling: Labelling, reading: Reading, place: Place, limits: _Limits
) -> Sample:
    """One row, checked and truncated."""
    ids, labels, text = encoded.input_ids, encoded.labels, encoded.text
    if not ids and encoded.pixels is None:
        raise place.error("the row has no tokens; remove it")
    _check_range("input_ids", ids, limits.vocabulary, "vocabulary", place)
    if text is not None:
        check_encodable(text, place)
    bearing = [label for label in labels if label != IGNORED]
    # the labels of classes that are not exclusive are 0 or 1, and as many as there are classes
    _check_range("labels", bearing, limits.labels, limits.kind, place)
    if text is None and ids and hasattr(reading.tokenizer, "decode"):
        text = str(reading.tokenizer.decode(ids))
    kept = len(ids) if limits.length is None else min(len(ids), limits.length)
    target = len(labels[: limits.length]) if labelling == "decoder" else 0
    if limits.positions is not None and max(kept, target) > limits.positions:
        raise place.error(
            f"{max(kept, target)} tokens, and the model takes {limits.positions}; "
            f"pass max_length={limits.positions} to cut longer samples, or shorten the row"
        )
    sample = Sample(
        tuple(ids[:kept]),
        tuple(labels if labelling == "whole" else labels[: limits.length]),
        text,
        len(ids) - kept + (len(labels) - target if labelling == "decoder" else 0),
        labelling=labelling,
        token_types=None if encoded.token_types is None else tuple(encoded.token_types[:kept]),
        pixels=encoded.pixels,
        patches=_patches(encoded, reading.config),
    )
    if sample.truncated and not sample.tokens:
        _refuse_cut_loss(labels, kept, place)
    return sample


def _patches(encoded: Encoded, config: Any) -> int:
    """Positions that an image takes: its patches and a class token; 1 where the model has no patches."""
    if encoded.pixels is None:
        return 0
    size = getattr(config, "patch_size", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2:
        return 1
    height, width = encoded.pixels.shape[1:]
    return (height // int(sides[0])) * (width // int(sides[1])) + 1


def _check_images(walked: list[tuple[Place, Sample]]) -> None:
    first = walked[0][1].pixels
    for place, sample in walked:
        if sample.pixels is not None and first is not None and sample.pixels.shape != first.shape:
            raise place.error(
                f"an image of shape {tuple(sample.pixels.shape)} in a task whose first image has "
                f"{tuple(first.shape)}: resize them alike, as the model's image processor does"
            )


def _refuse_cut_loss(labels: list[int], kept: int, place: Place) -> None:
    bearing = [index for index, label in enumerate(labels) if index and label != IGNORED]
    if bearing:
        raise place.error(
            f"max_length={kept} cuts off every token that bears loss: the sample has {len(labels)} tokens "
            f"and loss on positions {bearing[0]} to {bearing[-1]}; raise max_length above {bearing[0]}, "
            "or shorten or remove the row"
        )


def _check_range(what: str, values: list[int], size: int | None, kind: str, place: Place) -> None:
    if not values:
        return
    low, high = min(values), max(values)
    allowed = ", or -100 for no loss" if what == "labels" else ""
    if low < 0:
        raise place.error(
            f"{what} hold {low}; {'token ids' if kind == 'vocabulary' else 'classes'} are 0 or more{allowed}"
        )
    if size is not None and high >= size:
        raise place.error(
            f"{what} hold {high}, but the model's {kind} has {size} entries (0 to {size - 1}){allowed}; "
            + ("use the tokenizer that belongs to the model" if kind == "vocabulary" else "correct the row")
        )


def _check_loss(name: str, walked: list[tuple[Place, Sample]]) -> None:
    silent = [place for place, sample in walked if not sample.tokens]
    if not silent:
        return
    advice = "labels other than -100 are needed"
    if walked[0][1].labelling == "next":
        advice += " after position 0, which bears no loss"
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
