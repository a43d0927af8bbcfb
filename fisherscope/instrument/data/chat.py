"""Chats: loss on the assistant's turns only, as the tokenizer's chat template marks them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.sample import IGNORED

_MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def encode_messages(tokenizer: Any, messages: Any, tools: Any, place: Place) -> Encoded:
    """Render a chat through the tokenizer's template; tokens of assistant turns bear loss.

    Raises:
        DataError: the messages are malformed, there is no chat template, the template does not mark the
            assistant's turns, or rendering fails.
    """
    conversation = _checked(messages, place)
    _check_template(tokenizer, tools, place)
    try:
        encoding = tokenizer.apply_chat_template(
            conversation, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        text = tokenizer.apply_chat_template(conversation, tools=tools, tokenize=False)
    except Exception as error:  # a template is a program of its own: it raises what it likes
        raise place.error(
            f"the chat template cannot render these messages ({type(error).__name__}: {error}); "
            "check their roles and order against the template"
        ) from error
    ids = [int(token) for token in encoding["input_ids"]]
    mask = encoding["assistant_masks"]
    labels = [token if bears else IGNORED for token, bears in zip(ids, mask, strict=True)]
    return Encoded(ids, labels, text)


def _checked(messages: Any, place: Place) -> list[dict[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise place.error('"messages" must be a non-empty list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise place.error(f'message {number} must be an object with a "role" and a "content"')
    if not any(message["role"] == "assistant" for message in messages):
        roles = [message["role"] for message in messages]
        raise place.error(f"no assistant turn, so no token bears loss: the roles are {roles}")
    return [dict(message) for message in messages]


def _check_template(tokenizer: Any, tools: Any, place: Place) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise place.error(
            "the tokenizer has no chat template to render messages with; "
            'set tokenizer.chat_template, or give rows of {"prompt", "completion"}'
        )
    if not getattr(tokenizer, "is_fast", False):
        raise place.error(
            "only fast tokenizers can tell which tokens are the assistant's; "
            'load one, or give rows of {"prompt", "completion"} or {"input_ids", "labels"}'
        )
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise place.error(f"no chat template could be chosen: {error}") from error
    if not _MARKER.search(template):
        raise place.error(
            "the chat template does not mark the assistant's turns: put {% generation %} and "
            "{% endgeneration %} around them in tokenizer.chat_template, "
            'or give rows of {"prompt", "completion"} or {"input_ids", "labels"}'
        )
