"""Tables out of what was found for a pair of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fisherscope.analyses.conflict.cosines import effect_size
from fisherscope.analyses.conflict.grams import Place
from fisherscope.analyses.conflict.study import Study
from fisherscope.analyses.conflict.windows import Windows
from fisherscope.analyses.top import TopPairs
from fisherscope.analyses.units import layer_name

PLACE = ["stack", "layer", "block", "head"]
NUMBERS = ["cosine", "reference", "excess", "effect_size", "p", "q"]
ENDS = ["task_a", "task_b", "sample_a", "sample_b"]
PAIRS = [*ENDS, *NUMBERS, "found", *PLACE, "slice_cosine", "slice_q", "cosine_low", "cosine_high"]
HEADS = [*ENDS, *PLACE, *NUMBERS, "finding"]
SAMPLES = [
    "task", "against", "sample", "mean_cosine", "own_cosine", "p", "q", "direction", "degree", "loss",
    "gradient_norm",
]  # fmt: skip

Places = NDArray[np.int64]


def sentence(a: str, b: str, place: Mapping[Any, Any], cosine: float, d: float, q: float) -> str:
    """What was found of a pair: "math_7 conflicts with code_23 in layer 3, Q, head 5 (cos -0.41, ...)"."""
    where = f"{layer_name(place)}, {place['block']}, head {place['head']}"
    return f"{a} conflicts with {b} in {where} (cos {cosine:.2f}, d {d:.2f}, q {q:.2g})"


def with_sentences(heads: pd.DataFrame) -> pd.DataFrame:
    """Findings on head slices, with a sentence for each."""
    told = [
        sentence(row["sample_a"], row["sample_b"], row, row["cosine"], row["effect_size"], row["q"])
        for row in heads.to_dict("records")
    ]
    return heads.assign(finding=pd.Series(told, index=heads.index, dtype="str"))


@dataclass(frozen=True)
class Side:
    """The samples of one task, or windows of them, by number.

    Attributes:
        task: the task.
        windows: which samples take part, and what is averaged.
        table: the store's table of samples.
        norms: norm of each sample's h over the attention weights ``[n]``.
    """

    task: str
    windows: Windows
    table: pd.DataFrame
    norms: NDArray[np.float64]

    @cached_property
    def names(self) -> NDArray[np.object_]:
        """Names of the windows."""
        return np.array(self.windows.names(self.table["id"].tolist()), dtype=object)

    @cached_property
    def texts(self) -> NDArray[np.object_] | None:
        """Texts of the windows, of which several stand one below the other; None where none are stored."""
        if "text" not in self.table:
            return None
        text = self.table["text"].iloc[: self.windows.rows]
        if self.windows.width == 1:
            return text.to_numpy(object)
        return text.fillna("").groupby(self.windows.of_rows()).agg("\n".join).to_numpy(object)

    def members(self) -> pd.Series[Any]:
        """Ids of the samples of each window, by its name."""
        ids = self.table["id"].iloc[: self.windows.rows]
        return ids.groupby(self.names[self.windows.of_rows()], sort=False).agg(list)

    def numbers(self) -> dict[str, NDArray[np.float64]]:
        """Loss in nats per loss-bearing token, and mean norm of h, per window."""
        part = self.windows.of_rows()
        sums = [
            np.bincount(part, values[: self.windows.rows])
            for values in (self.table["loss"].to_numpy(np.float64), self.table["tokens"].to_numpy(np.float64))
        ]
        norms = np.bincount(part, self.norms[: self.windows.rows]) / np.bincount(part)
        return {"loss": sums[0] / np.maximum(sums[1], 1), "gradient_norm": norms}


@dataclass
class PairFrames:
    """The tables of one pair of tasks, whose names are left to who puts tables together.

    Attributes:
        study: what was measured.
        first, second: the samples of both tasks.
    """

    study: Study
    first: Side
    second: Side

    @property
    def withheld(self) -> bool:
        """Whether the test of pairs is not to be believed here."""
        return self.study.verdict("pairs").withheld

    @cached_property
    def found(self) -> NDArray[np.bool_]:
        """Pairs that are called and far enough below the reference ``[n_a, n_b]``."""
        if self.withheld:
            return np.zeros(self.study.counts, bool)
        return (self.study.q <= self.study.config.level) & self._reported

    @cached_property
    def _reported(self) -> NDArray[np.bool_]:
        # without a reference (one sample per task) there is no excess to filter by
        excess = self.study.cosine - self.study.reference
        return ~(excess > -self.study.config.min_effect_size) & ~np.isnan(self.study.cosine)

    def pairs(self) -> pd.DataFrame:
        """All pairs that are found and the most opposed others, smallest p first."""
        study = self.study
        top = TopPairs(self.study.config.top_pairs)
        top.offer(np.where(self._reported, -study.cosine, np.nan), 0)
        chosen = self.found.copy()
        chosen[top.places[:, 1], top.places[:, 2]] = True
        i, j = np.nonzero(chosen)
        order = np.lexsort([j, i, study.cosine[i, j], study.p[i, j]])
        i, j = i[order], j[order]
        q = np.full(len(i), np.nan) if self.withheld else study.q[i, j]
        frame = self._rows(i, j, study.cosine[i, j], study.reference, study.p[i, j], q)
        frame["found"] = self.found[i, j]
        place, cosine, slice_q = self._carriers(i, j)
        # -1, where no slice has a gradient of both samples, is the last one
        slices = [*study.slices, Place("slice")]
        for column in PLACE:
            frame[column] = np.array([getattr(s, column) for s in slices], dtype=object)[place]
        frame["slice_cosine"], frame["slice_q"] = cosine, slice_q
        frame["cosine_low"] = frame["cosine_high"] = np.nan
        frame = frame.astype({"layer": "int64", "head": "int64"})
        for letter, side, rows in (("a", self.first, i), ("b", self.second, j)):
            if side.texts is not None:
                frame[f"text_{letter}"] = side.texts[rows]
        return frame

    def _carriers(self, i: Places, j: Places) -> tuple[Places, NDArray[np.float64], NDArray[np.float64]]:
        """The slice that carries each pair: that with the smallest q, else that with the lowest cosine."""
        place = self.study.lowest.slice[i, j].astype(np.int64)
        cosine = self.study.lowest.cosine[i, j].astype(np.float64)
        q = np.full(len(i), np.nan)
        called = self.study.called
        if called is not None and self._heads_shown:
            number = {(a, b): k for k, (a, b) in enumerate(zip(i.tolist(), j.tolist(), strict=True))}
            # calls of a pair come with the smallest p first
            for k in reversed(range(len(called.row))):
                pair = number.get((int(called.row[k]), int(called.column[k])))
                if pair is not None:
                    place[pair], cosine[pair], q[pair] = called.slice[k], called.cosine[k], called.slice_q[k]
        return place, cosine, q

    @property
    def _heads_shown(self) -> bool:
        return not self.study.verdict("heads").withheld

    def heads(self) -> pd.DataFrame:
        """Pairs that conflict on a head slice, one row for each, smallest p first; without a sentence."""
        called = self.study.called
        if called is None or not self._heads_shown:
            return pd.DataFrame(columns=HEADS[:-1])
        kept = np.flatnonzero(~(called.cosine - called.reference > -self.study.config.min_effect_size))
        kept = kept[np.lexsort([called.cosine[kept], called.slice_p[kept]])]
        parts = (called.cosine, called.reference, called.slice_p, called.slice_q)
        frame = self._rows(called.row[kept], called.column[kept], *(part[kept] for part in parts))
        for column in PLACE:
            values = np.array([getattr(place, column) for place in self.study.slices], dtype=object)
            frame[column] = values[called.slice[kept]]
        return frame.astype({"layer": "int64", "head": "int64"})

    def _rows(self, i: Places, j: Places, cosine: Any, reference: Any, p: Any, q: Any) -> pd.DataFrame:
        frame = pd.DataFrame({"sample_a": self.first.names[i], "sample_b": self.second.names[j]})
        frame["cosine"], frame["reference"] = cosine, reference
        frame["excess"] = frame["cosine"] - frame["reference"]
        frame["effect_size"] = effect_size(frame["cosine"].to_numpy())
        frame["p"], frame["q"] = p, q
        return frame

    def samples(self) -> pd.DataFrame:
        """Each sample of either task against the other task."""
        frames = []
        sides = (self.first, self.second), (self.second, self.first)
        degrees = self.found.sum(1), self.found.sum(0)
        for (side, other), tests, degree in zip(sides, self.study.samples, degrees, strict=True):
            frame = pd.DataFrame({"task": side.task, "against": other.task, "sample": side.names})
            frame["mean_cosine"], frame["own_cosine"] = tests.mean, tests.own
            frame["p"], frame["q"], frame["direction"] = tests.p, tests.q, tests.direction
            frame = frame.assign(degree=degree, **side.numbers())[SAMPLES]
            frames.append(frame if side.texts is None else frame.assign(text=side.texts))
        return pd.concat(frames, ignore_index=True)

    def levels(self) -> pd.DataFrame:
        """Means and tests of all places; q is left out where the test is not calibrated."""
        frame = pd.DataFrame(self.study.rows)
        if self.study.verdict("blocks").withheld:
            frame["q"] = np.nan
        return frame

    def calibration(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The verdicts of the splits, and their p-values in bins."""
        return self.study.calibration.frame(), self.study.calibration.histogram()
