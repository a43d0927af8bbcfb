"""Everything that is measured and tested of one pair of tasks, in one pass over the gradients."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.calibration import Calibration, Verdict
from fisherscope.analyses.conflict.corrections import adjust
from fisherscope.analyses.conflict.cosines import Blocks, cosines
from fisherscope.analyses.conflict.detectable import detectable_cosine
from fisherscope.analyses.conflict.grams import Gram, GramStream, Place
from fisherscope.analyses.conflict.head_tests import Called, HeadTests, testable
from fisherscope.analyses.conflict.levels import Level
from fisherscope.analyses.conflict.pair_test import pair_statistics
from fisherscope.analyses.conflict.sample_tests import SampleTests, samples_against_tasks

Values = NDArray[np.float64]


@dataclass
class Lowest:
    """Where each pair is most opposed.

    Attributes:
        cosine: lowest over the slices ``[n_a, n_b]``; infinite where no slice has one.
        slice: number of that slice ``[n_a, n_b]``; -1 where there is none.
    """

    cosine: NDArray[np.float32]
    slice: NDArray[np.int32]

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> Lowest:
        """Before any slice."""
        return cls(np.full(shape, np.inf, np.float32), np.full(shape, -1, np.int32))

    def take(self, number: int, blocks: Blocks) -> None:
        """Consider one slice."""
        across = blocks.spread(blocks.cross, fill=np.nan)
        lower = across < self.cosine
        np.copyto(self.cosine, across, where=lower, casting="same_kind")
        self.slice[lower] = number


@dataclass
class Study:
    """What was found for one pair of tasks.

    Attributes:
        config: options of the analysis.
        counts: samples (or windows of samples) of both tasks.
        calibration: the splits on which the tests are tried.
        budget: bytes for p-values that are kept.
        rows: one per place: its columns, and the numbers of
            :class:`~fisherscope.analyses.conflict.levels.Level`.
        slices: the places of the slices, by number.
        cosine: over all attention weights ``[n_a, n_b]``.
        reference: mean cosine of samples of one task there.
        p, q: of the pair test ``[n_a, n_b]``; NaN where it could not be made.
        detectable: see :func:`~fisherscope.analyses.conflict.detectable.detectable_cosine`.
        called: pairs that conflict in some head, and where.
        bound: the largest p-value on a slice that was looked at for that, where memory was short.
        samples: of both tasks.
        within: cosines over all attention weights within each task, ``[n_a, n_a]`` and ``[n_b, n_b]``.
    """

    config: ConflictConfig
    counts: tuple[int, int]
    calibration: Calibration
    budget: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    slices: list[Place] = field(default_factory=list)
    cosine: Values = field(init=False)
    reference: float = float("nan")
    p: Values = field(init=False)
    q: Values = field(init=False)
    detectable: float = float("nan")
    called: Called | None = None
    bound: float | None = None
    samples: tuple[SampleTests, SampleTests] = field(init=False)
    within: tuple[Values, Values] = field(init=False)
    lowest: Lowest = field(init=False)

    def __post_init__(self) -> None:
        self.lowest = Lowest.empty(self.counts)
        self._heads = HeadTests(self.counts, self.config.level, self.config.correction, self.budget)

    def run(self, stream: GramStream) -> None:
        """Go through all slices, blocks and layers, the whole, and then single parameters."""
        for place, gram in stream.attention():
            blocks, level = self._note(place, gram)
            if place.level == "slice":
                self._take_slice(place, gram, blocks, level)
            elif place.level == "whole":
                self._take_whole(gram, blocks)
        for place, gram in stream.parameters():
            self._note(place, gram)
        self.called, self.bound = self._heads.called(), self._heads.bound
        self._correct_levels()

    def verdict(self, test: str) -> Verdict:
        """What the calibration says of one test."""
        return next(verdict for verdict in self.calibration.verdicts() if verdict.test == test)

    def _note(self, place: Place, gram: Gram) -> tuple[Blocks, Level]:
        blocks = Blocks(gram, self.counts[0])
        level = Level.of(blocks, self.config.margin)
        self.rows.append({**asdict(place), **level.row(), "q": float("nan")})
        return blocks, level

    def _take_slice(self, place: Place, gram: Gram, blocks: Blocks, level: Level) -> None:
        self.lowest.take(len(self.slices), blocks)
        self.slices.append(place)
        self._heads.take(blocks)
        self.calibration.take_slice(gram, level.margin)

    def _take_whole(self, gram: Gram, blocks: Blocks) -> None:
        self.cosine = blocks.spread(blocks.cross, fill=np.nan)
        first, cosine = self.counts[0], cosines(gram)
        self.within = cosine[:first, :first], cosine[first:, first:]
        self.reference = blocks.reference
        self.p, self.q = (np.full(self.counts, np.nan) for _ in range(2))
        if testable(blocks):
            statistics = pair_statistics(blocks.cross, blocks.within_a, blocks.within_b)
            p = statistics.p_values()
            self.p = blocks.spread(p, fill=np.nan)
            self.q = blocks.spread(adjust(p, self.config.correction), fill=np.nan)
            self.detectable = detectable_cosine(blocks.cross, statistics, self.config.level)
        self.samples = samples_against_tasks(
            blocks, self.config.level, self.config.correction, self.config.min_effect_size
        )
        self.calibration.take_whole(gram)

    def _correct_levels(self) -> None:
        """Correct the tests of means over all places of one level."""
        for level in {row["level"] for row in self.rows}:
            rows = [row for row in self.rows if row["level"] == level and not np.isnan(row["p"])]
            if rows:
                for row, q in zip(
                    rows, adjust([row["p"] for row in rows], self.config.correction), strict=True
                ):
                    row["q"] = float(q)
