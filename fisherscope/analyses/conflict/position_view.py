"""Which positions carry the cosine of two samples: tables, and a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from fisherscope.analyses.conflict.position_factors import Tokens
from fisherscope.analyses.conflict.position_grams import Carried
from fisherscope.words import level

TOP_PAIRS = 20
_NAMED = 2  # positions of each sample that the summary names


@dataclass(frozen=True, eq=False)
class PositionView:
    """The cosine of two samples, position by position.

    Attributes:
        sample_a, sample_b: their ids.
        where: of which weights, in words.
        metric: "natural" or "euclidean".
        cosine: of the two gradients; NaN where one of them is zero.
        low, high: ends of its bootstrap interval over positions. No test: see docs/analyses.md.
        confidence: of the interval.
        frame: one row per position: side ("a" or "b"), sample, position, token_id (-1 for none), token (its
            text, or None), bears_loss (whether it predicts a label that bears loss), contribution. Those of
            a side add up to the cosine; one below 0 lowers it.
        pairs: the pairs of positions that take most from the cosine, lowest first: position_a, position_b,
            token_a, token_b, contribution.
        source: where the factors came from: the "store", or the "model".
    """

    sample_a: str
    sample_b: str
    where: str
    metric: Literal["natural", "euclidean"]
    cosine: float
    low: float
    high: float
    confidence: float
    frame: pd.DataFrame
    pairs: pd.DataFrame
    source: Literal["store", "model"]

    def to_frame(self) -> pd.DataFrame:
        """The table of positions, a copy."""
        return self.frame.copy()

    def summary(self) -> str:
        """One sentence."""
        pair = f"{self.sample_a} and {self.sample_b}"
        if self.cosine != self.cosine:
            return f"{pair}: no cosine over {self.where}, because one of them has no gradient there."
        interval = (
            f"{level(self.confidence)} interval {self.low:+.2f} to {self.high:+.2f} over positions"
            if self.low == self.low
            else "no interval"
        )
        return f"{pair}: cosine {self.cosine:+.2f} over {self.where} ({interval}); {self._carriers()}."

    def _carriers(self) -> str:
        named = [self._lowest("a", self.sample_a), self._lowest("b", self.sample_b)]
        named = [words for words in named if words]
        return f"it is lowered most by {' and '.join(named)}" if named else "no position lowers it"

    def _lowest(self, side: str, sample: str) -> str:
        rows = self.frame[(self.frame["side"] == side) & (self.frame["contribution"] < 0)]
        rows = rows.sort_values("contribution", kind="stable").head(_NAMED)
        words = [
            f"position {position}" if token is None else f"{token!r} (position {position})"
            for position, token in zip(rows["position"], rows["token"], strict=True)
        ]
        return f"{', '.join(words)} of {sample}" if words else ""

    def __repr__(self) -> str:
        return f"<PositionView: {self.summary()}>"


def position_frame(carried: Carried, samples: tuple[str, str], tokens: tuple[Tokens, Tokens]) -> pd.DataFrame:
    """The table of positions of both samples."""
    sides = []
    for side, sample, at, values in zip("ab", samples, tokens, (carried.of_a, carried.of_b), strict=True):
        sides.append(
            pd.DataFrame(
                {
                    "side": side,
                    "sample": sample,
                    "position": range(len(values)),
                    "token_id": at.ids,
                    "token": pd.Series(at.texts, dtype=object),
                    "bears_loss": at.bears_loss,
                    "contribution": values,
                }
            )
        )
    return pd.concat(sides, ignore_index=True)


def pair_frame(carried: Carried, tokens: tuple[Tokens, Tokens]) -> pd.DataFrame:
    """The table of the most opposed pairs of positions."""
    rows = [
        (t, s, tokens[0].texts[t], tokens[1].texts[s], value) for t, s, value in carried.lowest(TOP_PAIRS)
    ]
    columns = ["position_a", "position_b", "token_a", "token_b", "contribution"]
    return pd.DataFrame(rows, columns=columns)
