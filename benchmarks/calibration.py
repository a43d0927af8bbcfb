"""What the tests of sample conflict find where nothing is there, and where something was planted.

Synthetic gradients of two tasks with 100 samples each (``null_models.py``), natural gradients under F of
these very samples, 10,000 pairs, BH at q = .05. Beside the tests stand naive ones, and the pair test with its
fitted tail but without the check of corroboration. Numbers are means over seeds, with standard errors.
Every row is printed when it is done, and ``--json`` is rewritten after each: a run that is cut off has lost
only the row it was at, and Ctrl-C prints that row from the seeds it has.

    python benchmarks/calibration.py                # 20 seeds, about a minute
    python benchmarks/calibration.py --seeds 400    # the long form
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import scipy
from naive_tests import NAIVE, random_direction
from null_models import GROUPS, MODELS, WIDTH, D, natural, plant, unit

from fisherscope.analyses.conflict import (
    adjust,
    adjust_directional,
    block_test,
    group_test,
    pair_statistics,
    pair_test,
    sample_test,
)

SEED = 20
N = 100
LEVEL = 0.05
STRENGTH = 0.92  # a mean cosine of about -.45
CLAIMED = (0.94, 0.032)  # true and false positive rate to be beaten

Numbers = dict[str, float]


@dataclass
class Row:
    """One setting: the numbers of each seed."""

    table: str
    setting: str
    numbers: list[Numbers] = field(default_factory=list)

    def summary(self) -> dict[str, tuple[float, float]]:
        """Mean and standard error of each number, over the seeds that have it."""
        found = {}
        for name in self.numbers[0]:
            values = np.array([row[name] for row in self.numbers])
            values = values[~np.isnan(values)]
            error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            found[name] = (float(values.mean()) if len(values) else np.nan, float(error))
        return found


def rates(called: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """False discovery proportion and power."""
    false = np.count_nonzero(called & ~truth)
    return false / max(np.count_nonzero(called), 1), float(called[truth].mean())


def grams(u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Across, within the first, within the second."""
    return u @ v.T, u @ u.T, v @ v.T


def null(model: str, rng: np.random.Generator) -> Numbers:
    """Any rejection where there is no conflict; naive tests as the share of all pairs too."""
    u, v = natural(*MODELS[model](rng, N))
    statistics = pair_statistics(*grams(u, v))
    found = {
        "T1": float((adjust(statistics.p_values()) <= LEVEL).any()),
        "T1 p <= .05": float((statistics.p_values() <= LEVEL).mean()),
        "tail alone": float((adjust(statistics.p_values(extrapolate=True)) <= LEVEL).any()),
        "corroborated": float(statistics.corroborated),
    }
    for name, test in NAIVE.items():
        called = adjust(test(u, v)) <= LEVEL
        found |= {name: float(called.any()), f"{name} share": float(called.mean())}
    # a topic that both tasks share makes real means: no null for the tests of means
    exact = model != "realistic"
    cross = u @ v.T
    found["T2"] = float((adjust(sample_test(cross)) <= LEVEL).any()) if exact and model != "S5" else np.nan
    found["T4 p <= .05"] = float(block_test(cross)[1] <= LEVEL) if exact else np.nan
    return found


def planted(model: str, kind: str, strength: float, rng: np.random.Generator) -> Numbers:
    """False discovery proportion and power for conflicts of a known place."""
    first, second, truth = plant(rng, *MODELS[model](rng, N), kind, strength)
    u, v = natural(first, second)
    statistics = pair_statistics(*grams(u, v))
    p = statistics.p_values()
    found = {"cosine": float((u @ v.T)[truth].mean())}
    for name, q in {
        "T1": adjust(p),
        "BY": adjust(p, "by"),
        "e-BH": adjust(p, "ebh"),
        "tail alone": adjust(statistics.p_values(extrapolate=True)),
        "naive z": adjust(random_direction(u, v)),
    }.items():
        found[f"{name} FDR"], found[f"{name} power"] = rates(q <= LEVEL, truth)
    called = p <= CLAIMED[1]
    found["TPR at p <= .032"] = float(called[truth].mean())
    found["FPR at p <= .032"] = float(called[~truth].mean())
    return found


def opposing_samples(model: str, rng: np.random.Generator) -> Numbers:
    """T2: 10 samples of the first task oppose what the second shares; wrong directions and power."""
    first, second = MODELS[model](rng, 10 * N)
    first = first[:N].copy()
    scale = np.sqrt((np.mean(first**2, 0) + np.mean(second[:N] ** 2, 0)) / 2)
    direction = unit(rng.standard_normal(D)) * scale
    opposing = np.zeros(N, bool)
    opposing[rng.permutation(N)[:10]] = True
    second = second + 0.4 * np.linalg.norm(second / scale, axis=1, keepdims=True) * direction
    first[opposing] -= 0.6 * np.linalg.norm(first[opposing] / scale, axis=1, keepdims=True) * direction
    fisher = np.sqrt((np.mean(first**2, 0) + np.mean(second[:N] ** 2, 0)) / 2)
    u, v = unit(first / fisher), unit(second / fisher)
    q, sign = adjust_directional(sample_test(u @ v[:N].T))
    called = q <= LEVEL
    # the second task has a mean now, so that most samples lean one way: the truth is in 900 fresh samples
    wrong = np.count_nonzero(called & (sign != np.sign((u @ v[N:].T).mean(1))))
    return {
        "called": float(called.mean()),
        "wrong direction": wrong / max(np.count_nonzero(called), 1),
        "power": float((called & (sign < 0))[opposing].mean()),
    }


def in_groups(model: str, strength: float, rng: np.random.Generator) -> Numbers:
    """T3: 30 pairs conflict in 3 of 12 groups; strength 0 plants nothing."""
    first, second = MODELS[model](rng, N)
    truth = np.zeros((GROUPS, N, N), bool)
    if strength:
        scale = np.sqrt((np.mean(first**2, 0) + np.mean(second**2, 0)) / 2)
        for i, j in zip(rng.permutation(N)[:30], rng.permutation(N)[:30], strict=True):
            for g in rng.permutation(GROUPS)[:3]:
                part = slice(g * WIDTH, (g + 1) * WIDTH)
                direction = unit(rng.standard_normal(WIDTH)) * scale[part]
                first[i, part] += strength * np.linalg.norm(first[i, part] / scale[part]) * direction
                second[j, part] -= strength * np.linalg.norm(second[j, part] / scale[part]) * direction
                truth[g, i, j] = True
    fisher = np.sqrt((np.mean(first**2, 0) + np.mean(second**2, 0)) / 2)
    u, v = (unit((x / fisher).reshape(N, GROUPS, WIDTH).swapaxes(0, 1)) for x in (first, second))
    p = np.stack([pair_test(*grams(u[g], v[g])) for g in range(GROUPS)])
    blocks = block_test(np.stack([u[g] @ v[g].T for g in range(GROUPS)]))[1]
    result = group_test(p, level=LEVEL)
    calls = {
        "flat": (adjust(p) <= LEVEL, truth),
        "pairs": (result.selected, truth.any(0)),
        "inside": (result.rejected, truth),
    }
    if not strength:
        found = {f"{name}: any": float(called.any()) for name, (called, _) in calls.items()}
        return found | {"T4 over groups: any": float((adjust(blocks) <= LEVEL).any())}
    return {
        f"{name} {what}": value
        for name, (called, true) in calls.items()
        for what, value in zip(("FDR", "power"), rates(called, true), strict=True)
    }


@dataclass(frozen=True)
class Setting:
    """What is done for each seed of a row; ``share`` of the seeds for the slow ones."""

    table: str
    name: str
    run: Callable[[np.random.Generator], Numbers]
    share: float = 1.0


def settings() -> Iterator[Setting]:
    """All rows, in the order of the tables."""
    for model in MODELS:
        yield Setting("null", model, lambda rng, m=model: null(m, rng))
    for kind in ("pairs", "cluster"):
        for model in MODELS:
            run = lambda rng, m=model, k=kind: planted(m, k, STRENGTH, rng)  # noqa: E731
            yield Setting(f"planted {kind}", model, run)
    for strength in (0.5, 0.65, 0.75, 0.85, 1.0, 1.3):
        run = lambda rng, s=strength: planted("S3", "pairs", s, rng)  # noqa: E731
        yield Setting("sweep on S3", f"strength {strength}", run)
    for model in ("S2", "S3", "S4", "S5", "heavy"):
        run = lambda rng, m=model: opposing_samples(m, rng)  # noqa: E731
        yield Setting("opposing samples (T2)", model, run, 0.25)
    for strength, table in ((0.0, "groups, null (T3, T4)"), (1.3, "groups, planted (T3)")):
        for model in ("S3", "S5", "heavy"):
            run = lambda rng, m=model, s=strength: in_groups(m, s, rng)  # noqa: E731
            yield Setting(table, model, run, 0.25)


def show(row: Row, *, header: bool) -> None:
    """One line of a Markdown table."""
    summary = row.summary()
    if header:
        print(f"\n**{row.table}**\n\n| setting | seeds | {' | '.join(summary)} |")
        print(f"|---|{'---|' * (len(summary) + 1)}")
    cells = ["-" if np.isnan(mean) else f"{mean:.3f} ({error:.3f})" for mean, error in summary.values()]
    print(f"| {row.setting} | {len(row.numbers)} | {' | '.join(cells)} |", flush=True)


def write(path: Path, rows: Iterable[Row], seconds: float) -> None:
    """All rows so far."""
    about = {
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
        "samples": N,
    }
    found = [
        {
            "table": row.table,
            "setting": row.setting,
            "seeds": len(row.numbers),
            "numbers": {
                name: {"mean": None if np.isnan(m) else m, "error": None if np.isnan(e) else e}
                for name, (m, e) in row.summary().items()
            },
        }
        for row in rows
    ]
    text = json.dumps({"about": about | {"seconds": round(seconds)}, "rows": found}, indent=1)
    path.write_text(text, encoding="utf-8")


def speed() -> None:
    """How long the pair test takes for a million pairs, beside the matrix products that it starts from."""
    rng = np.random.default_rng(SEED)
    u, v = unit(rng.standard_t(4, (2, 1000, 20 * D)).astype(np.float32))
    begun = time.perf_counter()
    matrices = grams(u, v)
    between = time.perf_counter()
    pair_test(*matrices)
    products, test = between - begun, time.perf_counter() - between
    print(
        f"\npair_test on 10^6 pairs: {test:.1f} s, {test / products:.1f} times the three Gram matrices of "
        f"1000 + 1000 gradients with {20 * D} entries"
    )


def main() -> None:
    """Run the rows and print the tables."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="tables whose name starts so")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    begun = time.monotonic()
    rows: list[Row] = []
    stopped = False
    for setting in settings():
        if stopped or not setting.table.startswith(arguments.only):
            continue
        row = Row(setting.table, setting.name)
        try:
            for seed in range(max(1, round(arguments.seeds * setting.share))):
                row.numbers.append(setting.run(np.random.default_rng([SEED, seed])))
        except KeyboardInterrupt:
            stopped = True
        if row.numbers:
            show(row, header=not rows or rows[-1].table != row.table)
            rows.append(row)
            if arguments.json:
                write(arguments.json, rows, time.monotonic() - begun)
    if not stopped and not arguments.only:
        speed()


if __name__ == "__main__":
    main()
