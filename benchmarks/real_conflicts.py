"""What the tests of sample conflict call on real gradients, where the answer is known in part.

- **halves**: random halves of one task, where every call is an error, on the tasks of the demo's model and on
  those of a small GPT-2 (``trained_gpt2.py``) that is trained for a minute. Bar: not more splits in which
  something is called than a test that keeps its level gives with probability .05. Beside it, on the same
  splits, the share of all pairs that naive tests call.
- **demo**: ``math`` against ``math_flipped`` has planted twins, one prompt with contradicting answers. Bars:
  half of the twins are called in the natural metric, and no pair of ``math`` against ``code``. What the other
  called pairs have in common is counted against pairs at large.

    python benchmarks/real_conflicts.py [--splits 40] [--seeds 1] [--only demo] [--json FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from bars import Row
from demo_answers import rows_of, shared
from harness import write
from naive_tests import NAIVE
from numpy.typing import NDArray
from scipy import stats
from trained_gpt2 import Trained, trained
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig, ConflictConfig
from fisherscope.analyses.conflict import ConflictResult, adjust, calibrate, whiten
from fisherscope.analyses.conflict.calibration import Calibration
from fisherscope.analyses.context import Context
from fisherscope.analyses.slices import SliceReader, damping, stored_blocks
from fisherscope.demo import model_path
from fisherscope.store import ContributionStore

Flags = NDArray[np.bool_]
Gradients = NDArray[np.float32]
# By setting and variant: a number, and of how many splits it is one; 0 where it is no number of splits.
Numbers = dict[tuple[str, str], tuple[float, int]]

PARTS = ("halves", "demo")
LEVEL, DOUBT = 0.05, 0.05
TESTS = {"pairs": "T1, pairs", "heads": "T3, pairs in some head", "blocks": "T4, means of head slices"}
NAMES = {
    "naive z": "cos sqrt(d) as normal",
    "naive t": "t over coordinates",
    "naive d_eff": "cos sqrt(effective dimension) as normal",
}
AGAINST = (("math", "math_flipped"), ("math", "code"), ("code", "math_flipped"))


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        samples: per task of the demo; the first number is that of the random halves.
        gpt2: per task of the small GPT-2.
        steps: of its training.
        metrics: of the planted conflict.
    """

    samples: tuple[int, ...] = (192, 96)
    gpt2: int = 160
    steps: int = 1000
    metrics: tuple[str, ...] = ("natural", "euclidean")


SMOKE = Size((48,), 24, 20, ("natural",))


@contextmanager
def collected(
    model: Any, tokenizer: Any, tasks: dict[str, list[dict[str, Any]]]
) -> Iterator[ContributionStore]:
    """A temporary store of the attention weights' gradients."""
    scope = fs.wrap(model, tokenizer, parameters="attention")
    with tempfile.TemporaryDirectory() as directory:
        yield scope.collect(tasks, Path(directory) / "run.fs", durability="none", quiet=True)


@contextmanager
def demo(n: int) -> Iterator[ContributionStore]:
    """A store of the demo's tasks."""
    model = AutoModelForCausalLM.from_pretrained(model_path())
    with collected(model, AutoTokenizer.from_pretrained(model_path()), rows_of(n)) as store:
        yield store


def number(
    setting: str, variant: str, values: float | Sequence[float], bar: str = "", *, ok: bool = True
) -> Row:
    """One row: median and quartiles over the seeds, or a number that no seed changes."""
    seeds = [float(v) for v in values] if isinstance(values, Sequence) else [float(values)]
    low, middle, high = statistics.quantiles(seeds, n=4) if len(seeds) > 1 else seeds * 3
    return Row(setting, variant, middle, low, high, bar, bool(ok))


def show(rows: Sequence[Row]) -> None:
    """Print, counts as counts."""
    last = ""
    for one in rows:
        if one.setting != last:
            print(f"\n{one.setting}")
        last = one.setting
        spread = f"({one.low:.3g} to {one.high:.3g})" if one.low < one.high else ""
        value = f"{one.ratio:.0f}" if one.ratio == round(one.ratio) else f"{one.ratio:.3g}"
        told = f"bar: {one.bar}" + ("" if one.ok else "  MISSED") if one.bar else ""
        print(f"  {one.variant:<62} {value:>7} {spread:<18} {told}".rstrip(), flush=True)


# Random halves.


def most(splits: int) -> int:
    """So many rejecting splits are still taken for chance: P(Bin(splits, level) >= k) >= .05."""
    return int(max(k for k in range(splits + 1) if stats.binom.sf(k - 1, splits, LEVEL) >= DOUBT))


def natural(store: ContributionStore, task: str) -> Gradients:
    """Unit natural gradients over all attention weights, under the task's own F ``[n, d]``."""
    reader = SliceReader(store, 1 << 30)
    everyone = slice(0, reader.rows(task))
    parts = []
    for block in stored_blocks(store):
        fisher = reader.fisher(task, block)
        lam = damping(fisher, ConflictConfig())
        parts += [
            whiten(reader.normalised(task, block, head, everyone), fisher[head], lam)
            for head in range(len(block))
        ]
    found = torch.cat(parts, 1)
    return np.asarray((found / found.norm(dim=1, keepdim=True)).numpy())


def halves_of(store: ContributionStore, task: str, splits: int, config: AnalyzeConfig) -> Calibration:
    """The splits that ``calibrate`` draws."""
    rng = Context(store, config).rng("calibrate", task)
    return Calibration.draw((len(store.samples(task)),), splits, LEVEL, config.conflict.correction, rng)


def naive_shares(gradients: Gradients, splits: Calibration) -> dict[str, float]:
    """Share of all pairs across the halves that each naive test calls, mean over the splits."""
    return {
        name: float(
            np.mean(
                [
                    (adjust(test(gradients[half.first], gradients[half.second])) <= LEVEL).mean()
                    for half in splits.halves
                ]
            )
        )
        for name, test in NAIVE.items()
    }


def effective_dimension(gradients: Gradients) -> float:
    """tr(C)^2 / tr(C^2) of unit gradients, from pairs of different samples."""
    gram = gradients.astype(np.float64) @ gradients.T.astype(np.float64)
    n = len(gram)
    return float(n * (n - 1) / (np.sum(gram**2) - np.sum(gram.diagonal() ** 2)))


def halves(name: str, store: ContributionStore, splits: int, seed: int) -> Numbers:
    """What is called on random halves of each task: numbers by setting and variant."""
    config = AnalyzeConfig(seed=seed)
    frame = calibrate(store, config, splits=splits).frame
    found: Numbers = {}
    for task, tests in frame.groupby("task", sort=False):
        n = len(store.samples(str(task)))
        setting = f"{name}, {task}: {splits} random halves of {n} samples"
        for one in tests.to_dict("records"):
            tried = int(one["splits"])
            found[setting, f"splits with calls, of {tried}: {TESTS[one['test']]}"] = one["rejecting"], tried
        gradients = natural(store, str(task))
        drawn = halves_of(store, str(task), splits, config)
        for test, share in naive_shares(gradients, drawn).items():
            found[setting, f"share of pairs called: {NAMES[test]}"] = share, 0
        found[setting, "effective dimension"] = effective_dimension(gradients), 0
    return found


def gpt2_halves(size: Size, splits: int, seed: int) -> Numbers:
    """The same of a small GPT-2, with its losses."""
    made: Trained = trained(seed, size.gpt2, steps=size.steps)
    with collected(made.model, None, made.tasks) as store:
        found = halves("GPT-2", store, splits, seed)
    for setting in dict.fromkeys(setting for setting, _ in found):
        task = next(task for task in made.losses if f", {task}:" in setting)
        found[setting, "loss, nats per token of the answer"] = made.losses[task], 0
    return found


def all_halves(size: Size, splits: int, seeds: int) -> list[Row]:
    """Rows over the seeds: of the splits, and of the small model."""
    with demo(size.samples[0]) as store:
        runs = [halves("demo", store, splits, seed) for seed in range(seeds)]
    return [*_rows(runs), *_rows([gpt2_halves(size, splits, seed) for seed in range(seeds)])]


def _rows(runs: Sequence[Numbers]) -> list[Row]:
    settings = list(dict.fromkeys(setting for setting, _ in runs[0]))
    rows = []
    for setting, variant in sorted(runs[0], key=lambda key: settings.index(key[0])):
        values = [run[setting, variant][0] for run in runs]
        if tried := runs[0][setting, variant][1]:
            # 0 is the goal, and the bar what chance may do to any of the seeds
            bar = f"0, at most {most(tried)} of {tried}"
            rows.append(number(setting, variant, values, bar, ok=max(values) <= most(tried)))
        else:
            rows.append(number(setting, variant, values))
    return rows


# The planted conflict.


def meaning(setting: str, called: Flags, common: dict[str, Any]) -> list[Row]:
    """What called pairs that are no twins have in common, against all pairs that are no twins."""
    others = ~np.eye(len(called), dtype=bool)
    rows = []
    for name, has in common.items():
        if name == "places":
            continue
        here, base = float(has[called & others].mean()), float(has[others].mean())
        rows.append(number(setting, f"{name}: share of called others", here))
        rows.append(number(setting, f"{name}: share of all others", base))
        if base:
            rows.append(number(setting, f"{name}: times as frequent", here / base))
    places = common["places"]
    for k in range(int(places.max()) + 1):
        some = others & (places == k)
        if some.any():
            rate = called[some].mean()
            rows.append(number(setting, f"called share of others with {k} digits in place", rate))
    return rows


def twins(setting: str, found: ConflictResult, n: int, *, barred: bool) -> list[Row]:
    """How many planted pairs are called, and what the other calls are."""
    called, cosine = np.zeros((n, n), bool), found.cosines("math", "math_flipped").to_numpy()
    pairs = found.frame[found.frame["found"]]
    called[tuple(pairs[side].map(_row).to_numpy(int) for side in ("sample_a", "sample_b"))] = True
    planted, common = np.eye(n, dtype=bool), shared(n)
    first = np.argsort(cosine, axis=None, kind="stable")[:n]
    numbers = {
        f"pairs called of {n * n}": called.sum(),
        f"twins called of {n}": called[planted].sum(),
        f"twins among the {n} most opposed pairs": planted.flat[first].sum(),
        "samples of math most opposed to their twin": (cosine.argmin(1) == np.arange(n)).sum(),
        "mean cosine of twins": cosine[planted].mean(),
        "mean cosine of other called pairs": cosine[called & ~planted].mean(),
        "mean cosine of pairs not called": cosine[~called].mean(),
        "false share if only twins are true": (called & ~planted).sum() / called.sum(),
        "false share if a digit in place is true": (called & (common["places"] == 0)).sum() / called.sum(),
    }
    recall = float(called[planted].mean())
    bar = "at least 0.5" if barred else ""
    rows = [number(setting, "recall of twins", recall, bar, ok=not barred or recall >= 0.5)]
    rows += [number(setting, name, float(value)) for name, value in numbers.items()]
    return [*rows, *meaning(setting, called, common)]


def _row(sample: str) -> int:
    return int(sample.rpartition("_")[2])


def findings(setting: str, found: ConflictResult, a: str, b: str) -> list[Row]:
    """What each test finds of two tasks."""
    told = found.extra["verdicts"].set_index(["task_a", "task_b"]).loc[(a, b)]
    samples = found.extra["samples"]
    against = samples[samples["direction"] < 0].groupby(["task", "against"]).size()
    levels = found.extra["levels"]
    slices = (levels["task_a"] == a) & (levels["task_b"] == b) & (levels["level"] == "slice")
    unrelated = (a, b) == ("math", "code")
    calls = int(told["pairs"])
    return [
        number(setting, "T1: pairs called", calls, "0" if unrelated else "", ok=not unrelated or not calls),
        number(setting, f"T2: samples of {a} against {b}", float(against.get((a, b), 0))),
        number(setting, f"T2: samples of {b} against {a}", float(against.get((b, a), 0))),
        number(setting, "T3: pairs in some head", float(told["heads"])),
        number(setting, f"T4: head slices of {slices.sum()}", float(told["blocks"])),
        number(setting, "T4: lowest mean cosine of a slice", levels[slices]["mean"].min()),
        number(setting, "mean cosine over all attention weights", float(found.cosines(a, b).mean())),
    ]


def planted(size: Size) -> list[Row]:
    """The three pairs of tasks of the demo."""
    rows = []
    for n in size.samples:
        with demo(n) as store:
            for metric in size.metrics:
                # the tests are tried on random halves elsewhere
                options = ConflictConfig(metric=metric, calibration_splits=0, position_pairs=0)
                found = fs.analyze(store, ["conflict"], AnalyzeConfig(conflict=options))["conflict"]
                for a, b in AGAINST:
                    setting = f"{a} against {b}, {metric}, {n} samples each"
                    rows += findings(setting, found, a, b)
                    if (a, b) == AGAINST[0]:
                        rows += twins(setting, found, n, barred=metric == "natural")
    return rows


def main() -> None:
    """Measure and print."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=40, help="random halves of each task")
    parser.add_argument("--seeds", type=int, default=1, help="of the splits, and of the small GPT-2")
    parser.add_argument("--only", choices=PARTS, help="one part; all otherwise")
    parser.add_argument("--smoke", action="store_true", help="few samples")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    size = SMOKE if arguments.smoke else Size()
    rows: list[Row] = []
    parts: dict[str, Callable[[], list[Row]]] = {
        "halves": partial(all_halves, size, arguments.splits, arguments.seeds),
        "demo": partial(planted, size),
    }
    for name, measure in parts.items():
        if arguments.only in {None, name}:
            found = measure()
            show(found)
            rows += found
    if arguments.json:
        write(arguments.json, rows, splits=arguments.splits, seeds=arguments.seeds)


if __name__ == "__main__":
    main()
