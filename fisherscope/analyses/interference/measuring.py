"""One pass over all slices: numbers of each pair of tasks, pairs of samples that stand out, and the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from fisherscope.analyses.config import InterferenceConfig
from fisherscope.analyses.interference.denominator import Health, Pair, Ridge, denominators
from fisherscope.analyses.interference.full import FullScorer
from fisherscope.analyses.interference.pairs import PairScorer
from fisherscope.analyses.interference.permutation import NAMES, OverlapTest
from fisherscope.analyses.interference.totals import Extremes, Totals
from fisherscope.analyses.slices import Block, Loaded, SliceReader, damping, stored_blocks
from fisherscope.words import counted

Scorer = PairScorer | FullScorer


def scorer_for(reader: SliceReader, tasks: tuple[str, ...], config: InterferenceConfig) -> Scorer:
    """What scores pairs of these tasks in the form that the config asks for."""
    return (FullScorer if config.form == "full" else PairScorer)(reader, tasks, config)


def rows_to_load(scorer: Scorer) -> dict[str, int]:
    """Samples per task whose gradients a scorer needs: for the full form all that F is made of."""
    return scorer.all_rows if isinstance(scorer, FullScorer) else scorer.rows


def applied(config: InterferenceConfig) -> dict[str, Any]:
    """The options as applied: what None stands for is written out."""
    found = {**asdict(config), "fisher_pool": config.pool, "ridge_rel": config.relative_ridge}
    return {**found, "aggregate": "none"} if config.form == "full" else found


def nothing_stored(reader: SliceReader, task: str) -> str:
    """Warning about a task that has samples but no gradients."""
    return (
        f"no gradients of the {counted(reader.rows(task), 'sample')} of {task!r} are stored: its scores are "
        "0 and mean "
        "nothing; collect it with the extension sample_gradients"
    )


@dataclass
class Measured:
    """What the pass found.

    Attributes:
        rows: one per slice and ordered pair of tasks.
        extremes: the pairs of samples that stand out, per ordered pair of tasks.
        places: stack, layer, block and head of each label in ``extremes``.
        barely_damped: slices and pairs of tasks whose lam is below the smallest non-zero eigenvalue of F.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    extremes: dict[Pair, Extremes] = field(default_factory=dict)
    places: list[dict[str, Any]] = field(default_factory=list)
    barely_damped: int = 0


class Measurement:
    """Measures all slices of a store for some ordered pairs of tasks.

    Attributes:
        scorer: what scores pairs of samples.
        empty: tasks without any stored gradient; their scores are 0.
    """

    def __init__(
        self,
        reader: SliceReader,
        tasks: tuple[str, ...],
        config: InterferenceConfig,
        rng: Callable[..., np.random.Generator],
        tell: Callable[[str], None],
    ) -> None:
        self._reader, self._config, self._rng, self._tell = reader, config, rng, tell
        self.scorer = scorer_for(reader, tasks, config)
        self.empty = tuple(task for task in tasks if not self.scorer.rows[task])

    def run(self, pairs: list[Pair]) -> Measured:
        """Go once through all slices, one in memory at a time."""
        scored = [pair for pair in pairs if not {*pair} & {*self.empty}]
        found = Measured(
            extremes={p: Extremes(self._config.top_pairs, signed=self._config.signed) for p in pairs}
        )
        tests = self._tests(scored)
        loads = {task: n for task, n in rows_to_load(self.scorer).items() if n}
        by_pair: dict[Pair, list[dict[str, Any]]] = {pair: [] for pair in pairs}
        blocks = stored_blocks(self._reader.store, self._config.part)
        for number, block in enumerate(blocks, 1):
            self._tell(f"block {number} of {len(blocks)}")
            self._reader.hold(block, loads)
            made = denominators(self._reader, block, scored, self._config)
            pooled = {pair: self._all_samples(block, pair) for pair in tests}
            for head in range(len(block)):
                place = {**block.key, "head": head}
                loaded = Loaded(self._reader, block, head, loads)
                for pair in pairs:
                    row = {"task_a": pair[0], "task_b": pair[1], **place}
                    if pair in made:
                        fisher, lam = made[pair]
                        row |= self._score(found, loaded, pair, fisher[head], lam)
                    else:
                        row |= {**Totals.nothing(), **asdict(Health.unknown())}
                    found.rows.append(row)
                    by_pair[pair].append(row)
                for pair, test in tests.items():
                    fisher, lam = pooled[pair]
                    test.slice(loaded, *pair, fisher[head], lam)
                found.places.append(place)
        _note_tests(by_pair, tests)
        return found

    def _score(
        self, found: Measured, loaded: Loaded, pair: Pair, fisher: Tensor, lam: float
    ) -> dict[str, Any]:
        a, b = pair
        totals = Totals(self.scorer.rows[a])
        for stretch in self.scorer.stretches(loaded, a, b, fisher, lam):
            totals.add(stretch, same=a == b)
            found.extremes[pair].offer(stretch, len(found.places))
        if isinstance(self.scorer, FullScorer):
            solved = self.scorer.solve(loaded, a, b)
            lam = solved.lam
            found.barely_damped += solved.barely_damped
        return {
            **totals.numbers(),
            **asdict(Health.of(fisher, lam, self._config.epsilon, self._reader.exponent)),
        }

    def _tests(self, pairs: list[Pair]) -> dict[Pair, OverlapTest]:
        """One test for both orders of two tasks, under the first that is asked for."""
        found: dict[Pair, OverlapTest] = {}
        draws, rows = self._config.permutations, rows_to_load(self.scorer)
        for a, b in pairs if draws else []:
            if a != b and (b, a) not in found:
                rng = self._rng("interference", *sorted((a, b)))
                found[a, b] = OverlapTest(rows[a], rows[b], draws, rng)
        return found

    def _all_samples(self, block: Block, pair: Pair) -> tuple[Tensor, float]:
        """F over all samples of both tasks ``[heads, size]``, and lam: whose a sample is does not matter."""
        count = self._reader.rows if self._reader.source == "full" else self._reader.stored
        n_a, n_b = (count(task) for task in pair)
        first, second = (self._reader.fisher(task, block) for task in pair)
        fisher = (first * n_a + second * n_b) / (n_a + n_b)
        return fisher, damping(fisher, Ridge.of(self._config), self._reader.exponent)


def _note_tests(by_pair: dict[Pair, list[dict[str, Any]]], tests: dict[Pair, OverlapTest]) -> None:
    """Add effect, p and q to the rows; NaN where nothing was tested."""
    for rows in by_pair.values():
        for row in rows:
            row.update(dict.fromkeys(NAMES, float("nan")))
    for (a, b), test in tests.items():
        for pair, results in zip(((a, b), (b, a)), test.results(), strict=True):
            for row, numbers in zip(by_pair.get(pair, []), results, strict=False):
                row.update(numbers)
