"""How the tokens of a run read, for reports that have no tokenizer."""

from __future__ import annotations

import logging
from typing import Any

from fisherscope.instrument.planning import RunPlan
from fisherscope.store.token_texts import can_be_kept

_REPLACEMENT = "\ufffd"

logger = logging.getLogger(__name__)


def texts_of_tokens(tokenizer: Any, plan: RunPlan) -> dict[int, str]:
    """The texts of all tokens that occur in the samples of a run.

    Args:
        tokenizer: without one, or with what is none (an image processor), there are no texts.
        plan: of the run.

    Returns:
        By token id; a token that has no text that can be kept is left out.
    """
    if not callable(getattr(tokenizer, "decode", None)):
        return {}
    tokens: set[int] = set()
    for task in plan.tasks:
        for sample in task.samples:
            tokens.update(sample.input_ids)
            if plan.objective.label_range == "vocabulary":
                tokens.update(sample.labels)
    texts: dict[int, str] = {}
    for token in sorted(token for token in tokens if token >= 0):
        try:
            text = _text_of(tokenizer, token)
        except Exception as error:  # whatever a tokenizer raises: no run fails for want of a report's words
            logger.warning("the tokenizer cannot say how token %d reads: %s", token, error)
            break
        if can_be_kept(text):
            texts[token] = text
    return texts


def _text_of(tokenizer: Any, token: int) -> Any:
    """What a token stands for; its own spelling where that is no whole character, or nothing to be seen."""
    text = tokenizer.decode([token])
    if can_be_kept(text) and text and _REPLACEMENT not in text:
        return text
    return tokenizer.convert_ids_to_tokens(token)
