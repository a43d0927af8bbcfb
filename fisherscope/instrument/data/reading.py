"""What encoders of rows may use, and what an encoder is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fisherscope.instrument.data.place import Encoded, Place


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are read.

    Attributes:
        tokenizer: a transformers tokenizer, an image processor for images, or None.
        config: of the model, or None.
        max_length: how many positions of a sample will be kept; None for all.
        seed: of what is drawn at random.
    """

    tokenizer: Any = None
    config: Any = None
    max_length: int | None = None
    seed: int = 0

    def needed_tokenizer(self, place: Place) -> Any:
        """The tokenizer.

        Raises:
            DataError: there is none.
        """
        if self.tokenizer is None:
            raise place.error(
                'text needs a tokenizer: pass one to fisherscope.wrap(model, tokenizer), or give "input_ids"'
            )
        return self.tokenizer


Encoder = Callable[[Any, Reading, Place], Encoded]
