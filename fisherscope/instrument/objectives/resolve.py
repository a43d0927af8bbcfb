"""From the ``objective`` argument to an objective."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from fisherscope.errors import UsageError
from fisherscope.instrument.data.class_label import encode_class_label, encode_image_label
from fisherscope.instrument.data.masked import encode_masked
from fisherscope.instrument.data.sequence_pair import encode_sequence_pair
from fisherscope.instrument.data.token_labels import encode_token_labels
from fisherscope.instrument.objectives.at_positions import at_positions
from fisherscope.instrument.objectives.base import Objective, Predict
from fisherscope.instrument.objectives.causal_lm import causal_lm
from fisherscope.instrument.objectives.classification import image_classification, sequence_classification
from fisherscope.instrument.objectives.content import parts_of
from fisherscope.instrument.objectives.seq2seq import seq2seq

CAUSAL_LM = Objective("causal_lm", causal_lm)

_NAMED = {
    objective.name: objective
    for objective in (
        CAUSAL_LM,
        Objective("seq2seq", seq2seq, encode_sequence_pair, "decoder"),
        Objective("masked_lm", at_positions, encode_masked, "position", is_drawn=True),
        Objective("sequence_classification", sequence_classification, encode_class_label, "whole", "classes"),
        Objective("token_classification", at_positions, encode_token_labels, "position", "classes"),
        Objective("image_classification", image_classification, encode_image_label, "whole", "classes"),
    )
}
# where transformers lists which class is for which task; a class in two lists takes the first
_LISTS = {
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image_classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def resolve_objective(choice: str | Objective | Predict, model: nn.Module) -> Objective:
    """The objective of a run.

    Args:
        choice: "auto" (what the model's head is for), a name, or a function ``loss(model, batch)`` that
            returns the sum of each sample's losses, ``[n]``, or :class:`Predictions`.
        model: the model.

    Returns:
        The objective. That of a function of the user's own reads rows as the model's own objective does. Of
        what torch.compile made, the function that was compiled is taken: tracing cannot see through what
        watches the layers.

    Raises:
        ValueError: no objective of that name, or the model has no head that "auto" knows.
    """
    choice = _uncompiled(choice)
    if isinstance(choice, Objective):
        return choice if choice.is_named else replace(choice, parts=parts_of(choice.predict))
    if isinstance(choice, type):
        message = f"objective={choice.__name__} is a class: pass an object of it, or a function"
        raise UsageError(message)
    if callable(choice):
        own = _of_model(model)
        base = CAUSAL_LM if own is None else own
        return replace(base, name=_name(choice), predict=choice, parts=parts_of(choice))
    if choice == "auto":
        found = _of_model(model)
        if found is None:
            raise UsageError(
                f"{type(model).__name__} has no head that says what it predicts: load it with one (such as "
                f"AutoModelForCausalLM), or name the objective, one of {sorted(_NAMED)}, or pass a function "
                "loss(model, batch) -> [n]"
            )
        return found
    if not isinstance(choice, str) or choice not in _NAMED:
        raise UsageError(
            f"no objective {choice!r}: use 'auto', one of {sorted(_NAMED)}, "
            "or a function loss(model, batch) -> [n]"
        )
    return _NAMED[choice]


def _of_model(model: nn.Module) -> Objective | None:
    from transformers.models.auto import modeling_auto

    for name, listed in _LISTS.items():
        if any(cls.__name__ in _class_names(getattr(modeling_auto, listed)) for cls in type(model).__mro__):
            return _NAMED[name]
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
        return _NAMED["seq2seq" if encoder_decoder else "causal_lm"]
    return None


def _uncompiled(choice: Any) -> Any:
    for name in ("_torchdynamo_orig_callable", "_orig_mod"):
        choice = getattr(choice, name, choice)
    return choice


def _name(function: Any) -> str:
    inner = function.func if isinstance(function, partial) else function
    return f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def _class_names(listed: dict[str, str | tuple[str, ...]]) -> set[str]:
    names: set[str] = set()
    for value in listed.values():
        names.update((value,) if isinstance(value, str) else value)
    return names
