"""Whether a model takes samples as they are: tried out before anything is collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.inputs import first_output, probe_inputs
from fisherscope.errors import AdapterError, DataError
from fisherscope.instrument.data import Sample


def refuse_wrong_images(task: str, samples: Sequence[Sample], model: nn.Module) -> None:
    """Refuse images on which the model does not run; a task's images have one shape.

    Those of the size that the config names are right. Some models take others, too: these are tried.

    Raises:
        DataError: it does not run; the message names the first row, its shape and what the config says.
    """
    pixels = samples[0].pixels
    config: Any = model.config
    expected = _expected(config)
    if pixels is None or expected is None or tuple(pixels.shape) == expected:
        return
    parameter = next(model.parameters())
    image = pixels.unsqueeze(0).to(parameter.device, parameter.dtype)
    try:
        with torch.no_grad():
            first_output(model, {"pixel_values": image})
    except AdapterError as error:
        raise DataError(
            f"sample {task}_0 (row 0 of task {task!r}): an image of shape {tuple(pixels.shape)}, and "
            f"{type(model).__name__} wants {expected} (channels, height, width): resize it as the model's "
            f"image processor does ({error.__cause__ or error})"
        ) from error


def _expected(config: Any) -> tuple[int, ...] | None:
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    return (channels, *sides) if isinstance(channels, int) and len(sides) == 2 else None


def refuse_misread_padding(tasks: Mapping[str, Sequence[Sample]], model: nn.Module, pad_id: int) -> None:
    """Refuse batches for a head that takes padding for text.

    Decoders read the class off the last token that is not ``config.pad_token_id``. Where the vocabulary has
    no such id, padding is done with another, which such a head does not know.

    Raises:
        DataError: rows differ in length, and a small sample does not give the same once it is padded.
    """
    config: Any = model.config
    wanted = config.pad_token_id
    if wanted is None or wanted == pad_id:
        return
    if len({sample.length for rows in tasks.values() for sample in rows}) == 1:
        return
    try:
        inputs = probe_inputs(model, 1, seed=0)
        with torch.no_grad():
            alone = first_output(model, inputs)
            padded = first_output(model, inputs | _padded(inputs, pad_id))
    except AdapterError:
        return
    if torch.allclose(alone, padded, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        return
    raise DataError(
        f"{type(model).__name__} tells text from padding by config.pad_token_id={wanted!r}, which is no id "
        "of its vocabulary, so rows cannot be padded to one length: call model.resize_token_embeddings, "
        "set model.config.pad_token_id to an id that no text holds, or use batch_size=1"
    )


def _padded(inputs: Mapping[str, Any], pad_id: int) -> dict[str, Tensor]:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pads = torch.full_like(ids[:, :2], pad_id)
    return {
        "input_ids": torch.cat([ids, pads], 1),
        "attention_mask": torch.cat([mask, torch.zeros_like(pads)], 1),
    }
