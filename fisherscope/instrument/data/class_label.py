"""Rows with labels of the whole sample: texts, and images."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.reading import Reading
from fisherscope.instrument.data.sample import IGNORED
from fisherscope.instrument.data.unlabelled import encode_unlabelled
from fisherscope.instrument.data.whole_numbers import dimensions, integers


def encode_class_label(row: Any, reading: Reading, place: Place) -> Encoded:
    """``input_ids`` or ``text`` (with ``text_pair``), and a ``label``.

    Raises:
        DataError: there is no label, or no input.
    """
    labels = labels_of(row, reading, place)
    encoded = encode_unlabelled(row, reading, place)
    return Encoded(encoded.input_ids, labels, encoded.text, encoded.token_types)


def encode_image_label(row: Any, reading: Reading, place: Place) -> Encoded:
    """``pixel_values`` ``[channels, height, width]``, or an ``image`` for the processor, and a ``label``.

    Raises:
        DataError: there is no label, or no image.
    """
    labels = labels_of(row, reading, place)
    return Encoded(
        [],
        labels,
        row["text"] if isinstance(row.get("text"), str) else None,
        None,
        _pixels(row, reading, place),
    )


def labels_of(row: Any, reading: Reading, place: Place) -> list[int]:
    """The class of a row, or 0 and 1 for every class where the model has several at once.

    Raises:
        DataError: there is none.
    """
    found = row.get("label", row.get("labels")) if isinstance(row, Mapping) else None
    if found is None:
        raise place.error('classification needs a "label" for every row')
    if getattr(reading.config, "problem_type", None) == "multi_label_classification":
        if dimensions(found) != 1:
            raise place.error("the model's classes are not exclusive: give one 0 or 1 per class")
        values = found.tolist() if hasattr(found, "tolist") else found
        if len(values) != reading.config.num_labels:
            raise place.error(
                f"{len(values)} labels for {reading.config.num_labels} classes that are not exclusive: give "
                "a 0 or 1 for each of them"
            )
        if any(value not in (0, 1, IGNORED) for value in values):
            raise place.error("labels of classes that are not exclusive must be 0 or 1, or -100 for no loss")
        return [int(value) for value in values]
    if dimensions(found) == 1:
        (number,) = numbers if len(numbers := integers(found, "labels", place)) == 1 else (None,)
        if number is None:
            raise place.error(f"{len(numbers)} labels for one sample; give one class per row")
        return [number]
    return [class_number(found, reading, place)]


def class_number(label: Any, reading: Reading, place: Place) -> int:
    """A class by number, or by its name in the model's config.

    Raises:
        DataError: it is neither.
    """
    if isinstance(label, str):
        known: Mapping[str, int] = getattr(reading.config, "label2id", None) or {}
        if label not in known:
            raise place.error(f"the model's config knows no class {label!r}: it has {sorted(known)[:20]}")
        return int(known[label])
    try:
        return operator.index(label)
    except TypeError:
        raise place.error(f"a label must be the number or name of a class, not {label!r}") from None


def _pixels(row: Mapping[str, Any], reading: Reading, place: Place) -> Tensor:
    if "pixel_values" in row:
        values = torch.as_tensor(row["pixel_values"], dtype=torch.float32, device="cpu")
    elif "image" in row:
        if not callable(reading.tokenizer):
            raise place.error(
                '"image" needs an image processor: pass one in place of the tokenizer to '
                'fisherscope.wrap(model, processor), or give "pixel_values"'
            )
        values = reading.tokenizer(images=row["image"], return_tensors="pt")["pixel_values"][0]
    else:
        raise place.error(f'neither "pixel_values" nor "image" among the keys {[str(key) for key in row]}')
    if values.dim() != 3:
        raise place.error(f"pixel_values must be [channels, height, width], not {tuple(values.shape)}")
    return values.detach().cpu().float()
