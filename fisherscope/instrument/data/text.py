"""Tokenising texts, and prompts with completions.

Special tokens are exactly those that the tokenizer adds of itself; nothing is appended.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fisherscope.instrument.data.place import Encoded, Place
from fisherscope.instrument.data.sample import IGNORED


def encode_text(tokenizer: Any, text: str, place: Place) -> Encoded:
    """Tokenise a text; every token bears loss (the first one none after the causal shift)."""
    if not text:
        raise place.error("the text is empty; remove the row or give it text")
    check_encodable(text, place)
    ids = [int(token) for token in tokenizer(text)["input_ids"]]
    return Encoded(ids, list(ids), text)


def encode_completion(tokenizer: Any, prompt: str, completion: str, place: Place) -> Encoded:
    """Tokenise prompt and completion as one string; only the completion bears loss.

    The string is tokenised whole, as the model would meet it. A token that straddles the boundary belongs to
    the completion and bears loss; so do special tokens that the tokenizer adds after it, such as an end of
    sequence. Tokenizers without character offsets are handled by comparison with the prompt's own tokens.
    """
    if not completion:
        raise place.error("the completion is empty, so no token bears loss; remove the row or complete it")
    text = prompt + completion
    check_encodable(text, place)
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_offsets_mapping=True)
        ids = [int(token) for token in encoding["input_ids"]]
        first = _first_by_offsets(encoding["offset_mapping"], len(prompt))
    else:
        ids = [int(token) for token in tokenizer(text)["input_ids"]]
        first = _common_prefix(tokenizer, ids, prompt)
    labels = [IGNORED] * first + ids[first:]
    return Encoded(ids, labels, text)


def string(row: Mapping[str, Any], key: str, place: Place) -> str:
    """The text of one key.

    Raises:
        DataError: it is no text.
    """
    value = row[key]
    if not isinstance(value, str):
        hint = '; for lists of messages use {"messages"}' if isinstance(value, list | tuple) else ""
        raise place.error(f"{key!r} must be a string, it is a {type(value).__name__}{hint}")
    return value


def check_encodable(text: str, place: Place) -> None:
    """Refuse half of a surrogate pair, which JSON can escape and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise place.error(
            f"character {error.start} of the text is half a surrogate pair, which is no text; repair the row"
        ) from None


def _first_by_offsets(offsets: list[tuple[int, int]], boundary: int) -> int:
    """Index of the first token that ends after the boundary.

    The end decides, not the start: it is right for straddling tokens, for special tokens (0, 0), and for
    white space that a tokenizer trims from its offsets, which leaves (end, end).
    """
    return next((index for index, (_, end) in enumerate(offsets) if end > boundary), len(offsets))


def _common_prefix(tokenizer: Any, ids: list[int], prompt: str) -> int:
    """Number of leading tokens which the prompt alone has too: the way without character offsets.

    Where the prompt's end is tokenised differently once the completion follows, the tokens that differ bear
    loss.
    """
    alone = [int(token) for token in tokenizer(prompt)["input_ids"]]
    for index, (whole, part) in enumerate(zip(ids, alone, strict=False)):
        if whole != part:
            return index
    return min(len(ids), len(alone))
