"""Walking through the rows of a task: whatever iterable was given, one row at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fisherscope.errors import DataError
from fisherscope.instrument.data.forms import plain_row, rows_of_frame
from fisherscope.instrument.data.place import Place
from fisherscope.instrument.data.reaching import CheckRow
from fisherscope.instrument.data.unlabelled import SECOND_TEXTS, TEXTS
from fisherscope.instrument.data.whole_numbers import dimensions

ACCEPTED = (
    'accepted are a string, {"text"}, {"prompt", "completion"}, {"messages"}, '
    '{"input_ids", "labels", "attention_mask"} (the last two optional), a list or 1-D tensor of ids, '
    "and batches of those as a DataLoader yields them"
)
_TARGETS = ("label", "labels", "target", "ner_tags", "tags", "summary")
_PER_SAMPLE = (
    *_TARGETS,
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "decoder_attention_mask",
    "decoder_input_ids",
)
_TEXTS = (*TEXTS, *SECOND_TEXTS, "completion")


# generators and other iterators that were read before, by identity: they have no rows left, or not the first
_begun: WeakValueDictionary[int, Any] = WeakValueDictionary()


def walk(task: str, rows: Any, check: CheckRow | None = None) -> Iterator[tuple[Place, Any]]:
    """Yield every row of a task with its place; batches are split into rows.

    Args:
        task: name of the task.
        rows: as the user gives them.
        check: is shown every item before it is split.

    Raises:
        DataError: the rows are no iterable of rows.
    """
    number = 0
    for given in _iterable(task, rows):
        source = getattr(given, "source", None)
        place = Place(task, number, source if isinstance(source, str) else None)
        item = plain_row(given)
        if check is not None:
            check(item, place)
        for row in _split(item, place):
            yield Place(task, number, place.source), row
            number += 1


def _iterable(task: str, rows: Any) -> Iterable[Any]:
    """The rows as an iterable, with a word about the usual mix-ups."""
    if isinstance(rows, str | bytes | Path):
        raise DataError(
            f"task {task!r}: a {type(rows).__name__}, not rows; read a file with "
            "fisherscope.instrument.data.read_jsonl(path), put a single text into a list"
        )
    if isinstance(rows, Mapping):
        if "input_ids" in rows or "pixel_values" in rows:
            return (rows,)
        raise DataError(
            f"task {task!r}: a mapping with the keys {_keys(rows)}, not rows; "
            "give a list of rows, or one split of a DatasetDict"
        )
    frame = rows_of_frame(rows)
    if frame is not None:
        return frame
    try:
        items: Iterable[Any] = iter(rows)
    except TypeError as error:
        raise DataError(f"task {task!r}: a {type(rows).__name__} is no list of rows; {ACCEPTED}") from error
    # what has a length can be walked through again
    if items is rows and not hasattr(rows, "__len__"):
        _refuse_read_before(task, rows)
    return items


def _refuse_read_before(task: str, rows: Any) -> None:
    """An iterator gives its rows once: a second reading would find none, or begin somewhere in the middle."""
    if _begun.get(id(rows)) is rows:
        raise DataError(
            f"task {task!r}: this {type(rows).__name__} was read before, by an estimate, an earlier call or "
            "another task, and gives its rows only once: pass list(rows), or make a new one for every call"
        )
    try:
        _begun[id(rows)] = rows
    except TypeError:  # a map or zip: the empty task says what may have happened
        return


def _split(item: Any, place: Place) -> Iterator[Any]:
    """The rows of one item: itself, or, if it is a batch, one after the other."""
    if isinstance(item, Mapping):
        yield from _split_mapping(item, place)
    elif dimensions(item) == 2 or _is_text_batch(item):
        yield from item
    elif isinstance(item, list | tuple) and any(hasattr(entry, "ndim") and entry.ndim for entry in item):
        if len(item) != 1 or item[0].ndim != 2:
            raise place.error(
                f"a {type(item).__name__} of {len(item)} tensors does not say which is which; "
                'yield dicts of "input_ids", "labels" and "attention_mask" instead'
            )
        yield from item[0]
    else:
        yield item


def _split_mapping(item: Mapping[str, Any], place: Place) -> Iterator[Any]:
    # a column of a dataset that this row does not use is None
    row = {key: value for key, value in item.items() if value is not None} or dict(item)
    if dimensions(row.get("pixel_values")) == 4:
        yield from _split_columns(row, "pixel_values", place)
        return
    if "input_ids" not in row:
        texts = {key: row[key] for key in _TEXTS if key in row}
        if texts and "messages" not in row and all(_is_text_batch(value) for value in texts.values()):
            columns = texts | {key: row[key] for key in _TARGETS if key in row}
            _check_sizes({key: len(value) for key, value in columns.items()}, place)
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))
            return
        yield row
        return
    ids = row["input_ids"]
    if isinstance(ids, list | tuple) and any(getattr(entry, "ndim", 0) for entry in ids):
        raise place.error(
            'a list of tensors as "input_ids" is what default_collate makes of lists, with rows and '
            "positions exchanged; give the DataLoader a collate_fn that pads and stacks to a 2-D tensor"
        )
    if dimensions(ids) != 2:
        yield row
        return
    yield from _split_ids(row, place)


def _split_columns(row: dict[str, Any], first: str, place: Place) -> Iterator[dict[str, Any]]:
    columns = {key: row[key] for key in (first, *_TARGETS) if key in row}
    _check_sizes({key: len(value) for key, value in columns.items()}, place)
    for index in range(len(row[first])):
        yield {key: value[index] for key, value in columns.items()}


def _split_ids(row: dict[str, Any], place: Place) -> Iterator[dict[str, Any]]:
    size = len(row["input_ids"])
    columns = {"input_ids": row["input_ids"]}
    for key in _PER_SAMPLE:
        if key in row:
            value = row[key]
            # position_ids of shape [1, length] hold for every row of the batch
            broadcast = key == "position_ids" and dimensions(value) == 2 and len(value) == 1
            columns[key] = [value[0]] * size if broadcast else value
    _check_sizes({key: len(value) for key, value in columns.items()}, place)
    # what is not one value per position stays whole: the check for packing looks at its name
    rest = {key: value for key, value in row.items() if key not in columns and key != "text"}
    for index in range(size):
        yield {**rest, **{key: value[index] for key, value in columns.items()}}


def _is_text_batch(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, str) for entry in value)


def _check_sizes(sizes: dict[str, int], place: Place) -> None:
    if len(set(sizes.values())) > 1:
        raise place.error(f"the parts of the batch have different numbers of rows: {sizes}")


def _keys(row: Mapping[Any, Any]) -> list[str]:
    return [str(key) for key in row]
