"""What to do about conflicting samples: drop, weigh less, order, or keep and support them."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fisherscope.errors import UsageError
from fisherscope.words import counted

FILTER = ["sample", "task", "against", "reason", "degree", "mean_cosine"]
REWEIGHT = ["task", "sample", "weight"]
CURRICULUM = ["task", "sample", "order", "loss", "gradient_norm", "difficulty", "level", "degree"]
AUGMENT = ["sample", "task", "against", "degree", "own_cosine", "like"]

_KEY = ["task", "sample"]
_Key = tuple[str, str]
# A pair in conflict does not say which of its samples should go.
_LEAST_PAIRS = 2


@dataclass(frozen=True)
class Recommendations:
    """Four ways to act on tested conflicts: alternatives, of which to choose one.

    The conflicts are tested; these rules on top of them are heuristics, and only training tells whether one
    of them helps. A conflict may be what the tasks are about.

    Attributes:
        filter: samples to drop: sample, task, against, reason, degree, mean_cosine. Only samples that set
            another task back by more than they help their own: mean_cosine + own_cosine < 0. Rule: first
            those that the test of samples calls opposed to that task, the most opposed first. Of the found
            pairs whose samples both remain, the sample with most is dropped, again and again while it has
            two or more; ties go to the lower own_cosine, then to the id. A pair that meets no other drops
            nobody: it does not say which of the two should go.
        reweight: a weight in (0, 1] for every sample: task, sample, weight = 1 / (1 + s), where s is the sum
            of -excess over the found pairs of the sample, plus -mean_cosine for each task that the test of
            samples calls it opposed to. Without findings the weight is 1.
        curriculum: an order for every sample over all tasks: task, sample, order (0 first), loss,
            gradient_norm, difficulty, level, degree. Rule: samples without a finding against them before
            the others; of each, the easier first. difficulty is the mean of the sample's rank shares
            (rank - 1) / (n - 1) by loss and by gradient norm within its task, from 0 to 1; level ("easy",
            "medium", "hard") has the terciles of difficulty within the task as bounds.
        augment: samples to keep but to support with more data: sample, task, against, degree, own_cosine,
            like. Rule: samples with a finding against them that are not to be dropped, and whose mean cosine
            with the rest of their own task is above 0: without them their task would lose something.
            ``like`` is the sample of the task without a finding that is most similar, a pattern for more of
            its kind, where it is known.
    """

    filter: pd.DataFrame
    reweight: pd.DataFrame
    curriculum: pd.DataFrame
    augment: pd.DataFrame

    def weights_jsonl(self) -> str:
        """The weights of all samples, for a sampler or a loss: one JSON object per line.

        Returns:
            Lines ``{"id": "math_7", "task": "math", "row": 7, "weight": 0.8}``, the row as in the store.

        Raises:
            ValueError: an id is not its task's name, an underscore and a row.
        """
        lines = [
            {"id": sample, "task": task, "row": _row(task, sample), "weight": float(weight)}
            for task, sample, weight in self.reweight[REWEIGHT].itertuples(index=False)
        ]
        return "".join(json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n" for line in lines)

    def save_weights(self, path: str | Path) -> Path:
        """Write :meth:`weights_jsonl` to a file, UTF-8, and return its path."""
        target = Path(path)
        target.write_text(self.weights_jsonl(), encoding="utf-8")
        return target


def recommend(
    samples: pd.DataFrame, pairs: pd.DataFrame, neighbours: Mapping[str, str] | None = None
) -> Recommendations:
    """Turn tested conflicts into lists of samples; :class:`Recommendations` states the rules.

    Findings against several tasks add up.

    Args:
        samples: ``extra["samples"]`` of a conflict result: every sample, one row per task it was held
            against.
        pairs: all found pairs; rows that are not ``found`` do not count.
        neighbours: sample -> the most similar sample of its task without a finding.

    Returns:
        The four tables; their rows do not depend on the order of the rows given.
    """
    ends = _ends(pairs)
    table = _findings(samples, ends)
    dropped = _filter(table, ends)
    return Recommendations(
        filter=dropped,
        reweight=table.assign(weight=1 / (1 + table["strength"]))[REWEIGHT].reset_index(drop=True),
        curriculum=_curriculum(table),
        augment=_augment(table[~table["sample"].isin(dropped["sample"])], neighbours or {}),
    )


def _ends(pairs: pd.DataFrame) -> pd.DataFrame:
    """Each found pair once for either sample: task, sample, against, other, strength."""
    found = pairs[pairs["found"].astype(bool)]
    sides = []
    for one, two in ("ab", "ba"):
        names = {f"task_{one}": "task", f"sample_{one}": "sample", f"task_{two}": "against"}
        sides.append(found.rename(columns={**names, f"sample_{two}": "other"}))
    ends = pd.concat(sides, ignore_index=True)
    ends["strength"] = (-ends["excess"].astype(float)).clip(lower=0).fillna(0)
    # sorted, so that sums come out the same to the last bit
    return ends[[*_KEY, "against", "other", "strength"]].sort_values(
        [*_KEY, "against", "other"], ignore_index=True
    )


def _findings(samples: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    """One row per sample, by task and row: what was found against it."""
    held = samples.sort_values([*_KEY, "against"])
    table = held.groupby(_KEY, sort=False).agg(
        loss=("loss", "first"), gradient_norm=("gradient_norm", "first"), own_cosine=("own_cosine", "mean")
    )
    called = held[held["direction"] == -1].assign(strength=lambda rows: (-rows["mean_cosine"]).clip(lower=0))
    strength = (
        pd.concat([ends[[*_KEY, "strength"]], called[[*_KEY, "strength"]]]).groupby(_KEY)["strength"].sum()
    )
    either = pd.concat([ends[[*_KEY, "against"]], called[[*_KEY, "against"]]])
    counted = either.drop_duplicates().merge(held, how="left", on=[*_KEY, "against"])
    table["degree"] = ends.groupby(_KEY).size().reindex(table.index, fill_value=0).astype(int)
    table["strength"] = strength.reindex(table.index, fill_value=0.0).astype(float)
    table["opposes"] = _names(called).reindex(table.index, fill_value="")
    table["against"] = _names(either).reindex(table.index, fill_value="")
    table["opposed_by"] = called.groupby(_KEY)["mean_cosine"].min().reindex(table.index)
    table["lowest"] = counted.groupby(_KEY)["mean_cosine"].min().reindex(table.index)
    table = table.reset_index()
    rows = [_order(task, sample) for task, sample in zip(table["task"], table["sample"], strict=True)]
    return table.iloc[sorted(range(len(rows)), key=rows.__getitem__)].reset_index(drop=True)


def _names(rows: pd.DataFrame) -> pd.Series[str]:
    """The tasks that each sample conflicts with, a comma between two."""
    unique = rows[[*_KEY, "against"]].drop_duplicates().sort_values([*_KEY, "against"])
    return unique.groupby(_KEY)["against"].agg(", ".join)


def _filter(table: pd.DataFrame, ends: pd.DataFrame) -> pd.DataFrame:
    known = {(row["task"], row["sample"]): row for row in table.to_dict("records")}
    # a lone sample of its task has nothing to help
    own = {key: float(np.nan_to_num(row["own_cosine"])) for key, row in known.items()}
    harmful = {key for key, row in known.items() if own[key] + row["lowest"] < 0}
    called = sorted((key for key in harmful if known[key]["opposes"]), key=lambda k: known[k]["opposed_by"])
    dropped = {key: f"opposes {known[key]['opposes']} as a whole" for key in called}
    for key, left in _cover(ends, {key: own[key] for key in harmful}, set(dropped)):
        dropped[key] = f"conflicts with {counted(left, 'sample')} that would stay"
    rows = [
        {
            "sample": key[1],
            "task": key[0],
            "against": known[key]["opposes"] or known[key]["against"],
            "reason": reason,
            "degree": known[key]["degree"],
            "mean_cosine": known[key]["opposed_by" if known[key]["opposes"] else "lowest"],
        }
        for key, reason in dropped.items()
    ]
    return pd.DataFrame(rows, columns=FILTER)


def _cover(ends: pd.DataFrame, own_cosine: Mapping[_Key, float], gone: set[_Key]) -> list[tuple[_Key, int]]:
    """Samples to drop in turn, of those with an ``own_cosine``, and how many each conflicted with then."""
    partners: dict[_Key, set[_Key]] = {}
    for task, sample, against, other in ends[[*_KEY, "against", "other"]].itertuples(index=False, name=None):
        if (task, sample) not in gone and (against, other) not in gone:
            partners.setdefault((task, sample), set()).add((against, other))

    def entry(key: _Key) -> tuple[int, float, str, str]:
        return -len(partners[key]), own_cosine[key], key[1], key[0]

    heap = [entry(key) for key in partners if key in own_cosine]
    heapq.heapify(heap)
    dropped = []
    while heap and -heap[0][0] >= _LEAST_PAIRS:
        count, _, sample, task = heapq.heappop(heap)
        key = task, sample
        if -count > len(partners[key]):  # partners went meanwhile: it waits its turn
            heapq.heappush(heap, entry(key))
            continue
        dropped.append((key, -count))
        for other in partners[key]:
            partners[other].discard(key)
    return dropped


def _curriculum(table: pd.DataFrame) -> pd.DataFrame:
    shares = pd.DataFrame(
        {name: table.groupby("task")[name].transform(_rank_share) for name in CURRICULUM[3:5]}
    )
    table = table.assign(difficulty=shares.mean(axis=1).fillna(0.5), conflict=table["against"] != "")
    by_task = table.groupby("task")["difficulty"]
    easy, medium = (table["task"].map(by_task.quantile(share)) for share in (1 / 3, 2 / 3))
    hard = table["difficulty"] > medium
    table["level"] = np.where(table["difficulty"] <= easy, "easy", np.where(hard, "hard", "medium"))
    table = table.sort_values(["conflict", "difficulty"], kind="stable", ignore_index=True)
    return table.assign(order=np.arange(len(table)))[CURRICULUM]


def _rank_share(values: pd.Series[float]) -> pd.Series[float]:
    """(rank - 1) / (n - 1), equal values sharing their mean rank; a lone sample is in the middle."""
    n = int(values.notna().sum())
    return (values.rank() - 1) / (n - 1) if n > 1 else values.where(values.isna(), 0.5)


def _augment(table: pd.DataFrame, neighbours: Mapping[str, str]) -> pd.DataFrame:
    chosen = table[(table["against"] != "") & (table["own_cosine"] > 0)]
    chosen = chosen.sort_values(["degree", "own_cosine"], ascending=False, kind="stable", ignore_index=True)
    return chosen.assign(like=[neighbours.get(sample, "") for sample in chosen["sample"]])[AUGMENT]


def _order(task: str, sample: str) -> tuple[str, float, str]:
    """Sorts samples by task and row."""
    row = sample.removeprefix(f"{task}_")
    return task, int(row) if row.isdecimal() else math.inf, sample


def _row(task: str, sample: str) -> int:
    row = sample.removeprefix(f"{task}_")
    if row == sample or not row.isdecimal():
        raise UsageError(f"{sample!r} is no id of task {task!r}: ids are the task, an underscore and the row")
    return int(row)
