"""Which samples of two tasks are in conflict, in which heads, and how sure that is."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from fisherscope.analyses.config import ConflictConfig
from fisherscope.analyses.conflict.calibration import COLUMNS as CALIBRATION
from fisherscope.analyses.conflict.calibration import HISTOGRAM, Calibration
from fisherscope.analyses.conflict.carrying import look_into
from fisherscope.analyses.conflict.communities import communities
from fisherscope.analyses.conflict.frames import (
    HEADS,
    PAIRS,
    PLACE,
    SAMPLES,
    PairFrames,
    Side,
    with_sentences,
)
from fisherscope.analyses.conflict.grams import GramStream
from fisherscope.analyses.conflict.hot_spots import hot_spots
from fisherscope.analyses.conflict.modules import KEY, SharedLoad
from fisherscope.analyses.conflict.neighbours import unconflicted_neighbours
from fisherscope.analyses.conflict.recommendations import Recommendations, recommend
from fisherscope.analyses.conflict.result import ConflictResult, matrix_name, sample_axis
from fisherscope.analyses.conflict.study import Study
from fisherscope.analyses.conflict.verdicts import Findings, nothing_stored, verdict
from fisherscope.analyses.conflict.whitening import attention_norms
from fisherscope.analyses.conflict.windows import Windows
from fisherscope.analyses.context import Context
from fisherscope.analyses.registry import register
from fisherscope.analyses.slices import SliceReader, gqa_map
from fisherscope.analyses.units import head_maps
from fisherscope.store import ContributionStore
from fisherscope.words import counted, several

_PAIR = ["task_a", "task_b"]
_MAPS = ["mean", "min", "share_negative", "reference", "excess", "margin", "t", "p", "q"]
_VARIANCE = ["variance_within", "variance_between"]
_LEVELS = [*_PAIR, "level", *PLACE, *_MAPS, *_VARIANCE, "undefined", "ridge", "flat"]
_MODULES = [
    *_PAIR, *KEY, "kind", "size", "share_a", "share_b", "overlap", "overlap_within", *_MAPS, *_VARIANCE,
    "undefined",
]  # fmt: skip
_VERDICTS = [*_PAIR, "verdict", "slight", "reason", "pairs", "heads", "samples", "blocks", "detectable"]
_SPLIT_LEVELS = ("parameter", "module")
# Findings on heads that are listed per pair of tasks; all of them are counted.
_LISTED = 2_000


@register("conflict", requires=("gradients",), config=ConflictConfig, min_tasks=2)
def conflict(store: ContributionStore, config: ConflictConfig, context: Context) -> ConflictResult:
    """Which samples of two tasks are in conflict, in which heads, and how sure that is.

    Returns:
        A :class:`ConflictResult` over all pairs of tasks.
    """
    return _Run(store, config, context).result()


class _Run:
    """Goes through the pairs of tasks and puts their tables together."""

    def __init__(self, store: ContributionStore, config: ConflictConfig, context: Context) -> None:
        self.store, self.config, self.context = store, config, context
        self.reader = SliceReader(store, context.memory_budget, context.tasks)
        limit = config.max_samples_per_task
        self.rows = {task: self.reader.usable(task, limit) for task in context.tasks}
        width = config.contribution_averaging_window
        self.windows = {task: Windows(n, width) for task, n in self.rows.items()}
        self.sides = {task: self._side(task) for task, n in self.rows.items() if n}
        self.tables: dict[str, list[pd.DataFrame]] = {}
        self.matrices: dict[tuple[str, str], NDArray[np.float64]] = {}
        self.within: dict[str, NDArray[np.float64]] = {}
        self.bounds: list[float] = []

    def _side(self, task: str) -> Side:
        norms = attention_norms(self.reader, task) * self.reader.factors(task)
        return Side(task, self.windows[task], self.store.samples(task), norms.double().numpy())

    def result(self) -> ConflictResult:
        load = SharedLoad(self.store, self.rows, self.context.memory_budget)
        for number, (a, b) in enumerate(self.context.pairs, 1):
            self.context.tell(f"{a} and {b}, pair {number} of {len(self.context.pairs)}")
            if empty := [task for task in (a, b) if not self.rows[task]]:
                self._add("verdicts", pd.DataFrame([nothing_stored(a, b, empty)]), a, b)
            else:
                self._compare(a, b, load)
        extra = self._extra()
        frame = self._table("pairs", [*PAIRS, "text_a", "text_b"])
        self.context.tell("positions of the pairs that were found")
        frame, extra["positions"] = look_into(self.store, frame, self.config, self.context)
        heads = self._table("heads", HEADS)
        listed = heads.groupby(_PAIR, sort=False).head(_LISTED).reset_index(drop=True)
        extra["heads"] = self._with_texts(with_sentences(listed))
        extra["hot_spots"] = hot_spots(heads, extra["levels"])
        extra |= self._recommended(frame, extra["samples"])
        return ConflictResult(
            name="conflict",
            config={**asdict(self.config), "fisher_source": self._source()},
            frame=frame,
            data=self._data(extra["levels"]),
            extra=extra,
            details={"gqa": gqa_map(self.store), "samples": self.rows},
            warnings=self._warnings(extra["levels"]),
        )

    def _source(self) -> str:
        if self.config.metric == "euclidean":
            return "none"
        return "gradients" if self.config.fisher_weighting == "unit" else self.reader.source

    def _compare(self, a: str, b: str, load: SharedLoad) -> None:
        """Measure and test one pair of tasks."""
        counts = len(self.windows[a]), len(self.windows[b])
        calibration = Calibration.draw(
            counts,
            self.config.calibration_splits,
            self.config.level,
            self.config.correction,
            self.context.rng("conflict", a, b),
        )
        study = Study(self.config, counts, calibration, self.context.memory_budget // 4)
        study.run(GramStream(self.reader, {task: self.windows[task] for task in (a, b)}, self.config))
        frames = PairFrames(study, self.sides[a], self.sides[b])
        levels, pairs, heads, samples = frames.levels(), frames.pairs(), frames.heads(), frames.samples()
        apart = levels["level"].isin(_SPLIT_LEVELS)
        modules = load.frame(a, b).merge(levels[apart], how="left", on=KEY, suffixes=("", "_"))
        self._add("levels", levels[~apart], a, b)
        self._add("modules", modules, a, b)
        for name, table in (("pairs", pairs), ("heads", heads), ("samples", samples)):
            self._add(name, table, a, b)
        for name, table in zip(("calibration", "calibration_p"), frames.calibration(), strict=True):
            self._add(name, table, a, b)
        findings = _count(levels, frames, samples, heads)
        self._add("verdicts", pd.DataFrame([verdict(study, findings, a, b)]), a, b)
        if study.cosine.size <= self.config.matrix_limit:
            self.matrices[a, b] = study.cosine
        for task, within in zip((a, b), study.within, strict=True):
            self.within.setdefault(task, within)
        if study.bound is not None:
            self.bounds.append(study.bound)

    def _with_texts(self, heads: pd.DataFrame) -> pd.DataFrame:
        """The texts of both samples of each finding, where they are stored."""
        texts = {
            name: text
            for side in self.sides.values()
            if side.texts is not None
            for name, text in zip(side.names, side.texts, strict=True)
        }
        if not texts:
            return heads
        return heads.assign(**{f"text_{end}": heads[f"sample_{end}"].map(texts) for end in "ab"})

    def _add(self, name: str, table: pd.DataFrame, a: str, b: str) -> None:
        self.tables.setdefault(name, []).append(table.assign(task_a=a, task_b=b))

    def _table(self, name: str, columns: list[str]) -> pd.DataFrame:
        """All rows of a table; text columns only where there are texts."""
        parts = [part for part in self.tables.get(name, []) if len(part)]
        if not parts:
            return pd.DataFrame(columns=[c for c in columns if not c.startswith("text")])
        table = pd.concat(parts, ignore_index=True)
        return table[[c for c in columns if c in table]]

    def _extra(self) -> dict[str, pd.DataFrame]:
        wanted = {
            "verdicts": _VERDICTS,
            "levels": _LEVELS,
            "modules": _MODULES,
            "samples": [*SAMPLES, "text"],
            "calibration": [*_PAIR, *CALIBRATION],
            "calibration_p": [*_PAIR, *HISTOGRAM],
        }
        return {name: self._table(name, columns) for name, columns in wanted.items()}

    def _recommended(self, pairs: pd.DataFrame, samples: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """Clusters, and lists of samples for training."""
        found = self._of_samples(recommend(samples, pairs, self._neighbours(samples)))
        return {
            "clusters": communities(pairs, self.context.settings.seed),
            **{name: getattr(found, name) for name in ("filter", "reweight", "curriculum", "augment")},
        }

    def _neighbours(self, samples: pd.DataFrame) -> dict[str, str]:
        """For each sample in conflict with any task the most similar one of its task that is in none."""
        against = samples[(samples["degree"] > 0) | (samples["direction"] < 0)]["sample"]
        found: dict[str, str] = {}
        for task, within in self.within.items():
            names = self.sides[task].names
            found |= unconflicted_neighbours(names, within, pd.Series(names).isin(against).to_numpy())
        return found

    def _of_samples(self, found: Recommendations) -> Recommendations:
        """What is recommended for a window holds for each of its samples; those left out weigh 1."""
        if not self.sides:
            return found
        members = pd.concat([side.members() for side in self.sides.values()])

        def each(table: pd.DataFrame) -> pd.DataFrame:
            return table.assign(sample=table["sample"].map(members)).explode("sample", ignore_index=True)

        tables = {name: each(table) for name, table in vars(found).items()}
        tables["curriculum"]["order"] = np.arange(len(tables["curriculum"]))
        tables["augment"]["like"] = tables["augment"]["like"].map(
            lambda name: members[name][0] if name else ""
        )
        left = [
            pd.DataFrame({"task": task, "sample": side.table["id"].iloc[self.rows[task] :], "weight": 1.0})
            for task, side in self.sides.items()
            if self.rows[task] < len(side.table)
        ]
        tables["reweight"] = pd.concat([tables["reweight"], *left], ignore_index=True)
        return replace(found, **tables)

    def _data(self, levels: pd.DataFrame) -> xr.Dataset:
        tasks = self.context.tasks
        slices = levels[levels["level"] == "slice"]
        mirrored = slices.rename(columns={"task_a": "task_b", "task_b": "task_a"})
        both = pd.concat([slices, mirrored], ignore_index=True)
        data = head_maps(both, _MAPS, {"task_a": tasks, "task_b": tasks})
        for (a, b), values in self.matrices.items():
            i, j = tasks.index(a), tasks.index(b)
            for k in (i, j):
                data.coords[sample_axis(k)] = self.sides[tasks[k]].names.astype(str)
            attributes = {"task_a": a, "task_b": b}
            data[matrix_name(i, j)] = ((sample_axis(i), sample_axis(j)), values, attributes)
        return data

    def _warnings(self, levels: pd.DataFrame) -> list[str]:
        notes = []
        for task, used in self.rows.items():
            stored, n = self.reader.stored(task), self.reader.rows(task)
            if not used:
                notes.append(
                    f"no gradients of the {counted(n, 'sample')} of {task!r} are stored: collect it with the "
                    "extension sample_gradients"
                )
            elif used < stored:
                notes.append(f"pairs use the first {used} of the {n} samples of {task!r}; F uses all")
            elif used < n:
                notes.append(
                    f"pairs use the first {used} of the {n} samples of {task!r}: gradients of the others are "
                    "not stored"
                )
        slices = levels[levels["level"] == "slice"]
        if flat := int(slices["flat"].astype(bool).sum()):
            notes.append(
                f"{flat} of {counted(len(slices), 'slice')} {several(flat, 'has', 'have')} F = 0 "
                "throughout and no cosines"
            )
        if self.bounds:
            notes.append(
                f"on heads only p-values up to {min(self.bounds):.2g} were looked at, for want of memory: "
                "raise memory_budget to find what is less certain"
            )
        if not self.config.calibration_splits:
            notes.append("the tests were not tried on random halves of the tasks (calibration_splits=0)")
        return notes


def _count(levels: pd.DataFrame, frames: PairFrames, samples: pd.DataFrame, heads: pd.DataFrame) -> Findings:
    called = levels[levels["q"] <= frames.study.config.level]
    against = samples[samples["direction"] < 0].groupby("task")["mean_cosine"]
    number, mean = against.size(), against.mean()
    sides = [frames.first.task, frames.second.task]
    slices = called[called["level"] == "slice"]["mean"]
    whole = float(called[called["level"] == "whole"]["mean"].min())
    return Findings(
        pairs=int(frames.found.sum()),
        heads=len(heads[["sample_a", "sample_b"]].drop_duplicates()),
        samples=(int(number.get(sides[0], 0)), int(number.get(sides[1], 0))),
        opposed=(float(mean.get(sides[0], np.nan)), float(mean.get(sides[1], np.nan))),
        corroborated=tuple(tests.corroborated or not np.isnan(whole) for tests in frames.study.samples),
        blocks=len(slices),
        lowest=float(slices.min()),
        whole=whole,
    )
