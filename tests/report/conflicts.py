"""A conflict result made by hand: one pair of tasks for each verdict, and every table filled."""

import itertools

import numpy as np
import pandas as pd
import xarray as xr

from fisherscope.analyses.conflict import ConflictResult
from fisherscope.analyses.conflict.communities import communities
from fisherscope.analyses.conflict.hot_spots import hot_spots
from fisherscope.analyses.conflict.recommendations import recommend
from fisherscope.analyses.conflict.result import matrix_name, sample_axis
from tests.report.conftest import HOSTILE

NAMES = ("math", f"code {HOSTILE}", "prose")
SIZES = dict.fromkeys(NAMES, 12)
PLACE = ["stack", "layer", "block", "head"]
REASONS = {
    "found": f"10 pairs of 144 conflict over all attention weights {HOSTILE}.",
    "nothing found": "No test found a conflict between math and prose.",
    "cannot tell": "The test of pairs called something in 4 of 20 random splits, so they are withheld.",
}
VERDICTS = dict(zip(itertools.combinations(NAMES, 2), REASONS, strict=True))
# Two clusters and a line between them, by row of either task.
FOUND = [*itertools.product(range(3), range(3)), *itertools.product(range(4, 6), range(4, 6)), (2, 5)]


def ids(task):
    return [f"{task}_{row}" for row in range(SIZES[task])]


def pairs_frame(found=FOUND):
    """Found pairs of the first two tasks, the strongest first, and one opposed pair of each other two."""
    rng = np.random.default_rng(0)
    rows = []
    for a, b in VERDICTS:
        edges = found if (a, b) == NAMES[:2] else [(0, 0)]
        cosine = np.sort(rng.uniform(-0.8, -0.2, len(edges)))
        for (i, j), c in zip(edges, cosine, strict=True):
            rows.append({
                "task_a": a, "task_b": b, "sample_a": f"{a}_{i}", "sample_b": f"{b}_{j}", "cosine": c,
                "reference": 0.1, "excess": c - 0.1, "effect_size": np.sqrt((1 - c) / 2), "p": 1e-6,
                "q": 0.003 if edges is found else 0.7, "found": edges is found, "stack": "decoder",
                "layer": i % 2, "block": "QKVO"[j % 4], "head": j % 2, "slice_cosine": c - 0.1,
                "slice_q": 0.01 if edges is found else np.nan,
                "cosine_low": c - 0.05, "cosine_high": c + 0.05,
                "text_a": f"{HOSTILE} sum {i}", "text_b": f"long text {j} " * 60,
            })  # fmt: skip
    frame = pd.DataFrame(rows)
    frame.loc[1, ["cosine_low", "cosine_high"]] = np.nan
    return frame


def levels_frame():
    """Slices, and the whole; q is below .05 on three slices of the first pair of tasks."""
    rng = np.random.default_rng(1)
    rows = []
    for a, b in VERDICTS:
        slices = [(layer, block, head) for layer in (0, 1) for block in "QKVO" for head in range(4)]
        slices = [s for s in slices if s[1] in "QO" or s[2] < 2]
        places = [("slice", "decoder", *s) for s in slices] + [("whole", "", -1, "", -1)]
        for level, stack, layer, block, head in places:
            low = (a, b) == NAMES[:2] and (layer, block, head) in {(0, "Q", 3), (1, "V", 1), (1, "O", 0)}
            mean = -0.3 if low else rng.uniform(-0.05, 0.1)
            rows.append({
                "task_a": a, "task_b": b, "level": level, "stack": stack, "layer": layer, "block": block,
                "head": head, "mean": mean, "min": mean - 0.4, "share_negative": 0.6, "reference": 0.1,
                "excess": mean - 0.1, "margin": 0.02, "t": -5.0 if low else 1.0, "p": 1e-4 if low else 0.8,
                "q": 0.004 if low else 0.9, "variance_within": 0.9, "variance_between": 0.1, "undefined": 0.0,
                "ridge": 1e-9, "flat": False,
            })  # fmt: skip
    return pd.DataFrame(rows)


def heads_frame(pairs):
    heads = pairs[pairs["found"]].drop(
        columns=["found", "slice_q", "slice_cosine", "cosine_low", "cosine_high"]
    )
    told = heads["sample_a"] + " conflicts with " + heads["sample_b"] + " in layer 1, V, head 1"
    return heads.drop(columns=["text_a", "text_b"]).assign(finding=told)


def samples_frame(pairs):
    """Every sample against every other task; two of the first task are called."""
    rng = np.random.default_rng(2)
    found = pairs[pairs["found"]]
    degree = pd.concat([found["sample_a"], found["sample_b"]]).value_counts()
    rows = []
    for task, against in itertools.permutations(NAMES, 2):
        for sample in ids(task):
            called = sample in {"math_0", "math_4"} and against == NAMES[1]
            rows.append({
                "task": task, "against": against, "sample": sample, "mean_cosine": -0.2 if called else 0.01,
                "own_cosine": rng.uniform(-0.1, 0.3),
                "p": 1e-5 if called else 0.6, "q": 1e-3 if called else 0.9,
                "direction": -int(called), "degree": int(degree.get(sample, 0)), "loss": rng.uniform(1, 4),
                "gradient_norm": rng.uniform(1, 4), "text": HOSTILE,
            })  # fmt: skip
    return pd.DataFrame(rows)


def calibration_frames():
    """Tests that hold on all pairs of tasks but the last, where the test of pairs does not."""
    verdicts, bins = [], []
    edges = np.linspace(0, 1, 21)
    for a, b in VERDICTS:
        for test in ("pairs", "heads", "blocks"):
            bad = (a, b) == NAMES[1:] and test == "pairs"
            verdicts.append({
                "task_a": a, "task_b": b, "test": test, "splits": 20, "rejecting": 4 if bad else 0,
                "upper": 0.4 if bad else 0.139, "chance": 0.016 if bad else 1.0, "calibrated": not bad,
                "samples": 6,
            })  # fmt: skip
            counts = np.arange(20) * 3 if not bad else np.full(20, 30)
            bins += [
                {"task_a": a, "task_b": b, "test": test, "low": low, "high": high, "count": int(count)}
                for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
            ]
    return pd.DataFrame(verdicts), pd.DataFrame(bins)


def positions_frame(pairs):
    """Tokens of the first two pairs: a hostile one carries the first, the others have no text."""
    rows = []
    for number, pair in enumerate(pairs.head(2).to_dict("records")):
        tokens = [f" {HOSTILE}", " plus", " zwölf", " is"] if number == 0 else [None] * 4
        for side in "ab":
            for position, (token, value) in enumerate(zip(tokens, (-0.4, 0.1, -0.1, 0.0), strict=True)):
                rows.append({
                    **{key: pair[key] for key in ("task_a", "task_b", "sample_a", "sample_b")},
                    "side": side, "position": position, "token": token, "contribution": value,
                })  # fmt: skip
    return pd.DataFrame(rows)


def make_conflict(found=FOUND):
    """The result; ``found`` are the found pairs of the first two tasks."""
    pairs, levels = pairs_frame(found), levels_frame()
    heads, samples = heads_frame(pairs), samples_frame(pairs)
    calibration, calibration_p = calibration_frames()
    verdicts = [
        {
            "task_a": a, "task_b": b, "verdict": word, "slight": False, "reason": REASONS[word],
            "pairs": len(found) if word == "found" else 0, "heads": 0, "samples": 2 if word == "found" else 0,
            "blocks": 3 if word == "found" else 0, "detectable": -0.4,
        }
        for (a, b), word in VERDICTS.items()
    ]  # fmt: skip
    modules = levels.assign(parameter="layers.0.attn.q.weight", kind="attention", share_a=0.1, share_b=0.2)
    data = xr.Dataset(coords={sample_axis(k): ids(task) for k, task in enumerate(NAMES)})
    rng = np.random.default_rng(3)
    for i, j in itertools.combinations(range(3), 2):
        data[matrix_name(i, j)] = ((sample_axis(i), sample_axis(j)), rng.uniform(-0.5, 0.5, (12, 12)))
    advice = recommend(samples, pairs, {"math_0": "math_7"})
    return ConflictResult(
        name="conflict",
        config={"level": 0.05, "matrix_limit": 1000},
        frame=pairs,
        data=data,
        extra={
            "verdicts": pd.DataFrame(verdicts),
            "heads": heads,
            "levels": levels,
            "modules": modules,
            "samples": samples,
            "calibration": calibration,
            "calibration_p": calibration_p,
            "clusters": communities(pairs),
            "hot_spots": hot_spots(heads, levels),
            "positions": positions_frame(pairs),
            **vars(advice),
        },
        details={"samples": SIZES},
    )
