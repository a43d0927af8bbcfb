"""Lists of samples out of tested conflicts, against the rules followed one step at a time."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from fisherscope.analyses.conflict.recommendations import AUGMENT, CURRICULUM, FILTER, REWEIGHT, recommend

SAMPLES = ["task", "against", "sample", "mean_cosine", "own_cosine", "direction", "loss", "gradient_norm"]
PAIRS = ["task_a", "task_b", "sample_a", "sample_b", "cosine", "excess", "found"]


def samples_of(sizes, seed=0):
    """The frame of tested samples: every sample against every other task, nothing called."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "task": task, "against": other, "sample": f"{task}_{row}", "mean_cosine": rng.uniform(-0.1, 0.1),
            "own_cosine": rng.uniform(-0.05, 0.3), "direction": 0, "loss": loss, "gradient_norm": norm,
        }
        for task, n in sizes.items()
        for row, (loss, norm) in enumerate(rng.uniform(1, 4, (n, 2)))
        for other in sizes
        if other != task
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=SAMPLES)


def pairs_of(edges, a="math", b="code", excess=-0.4):
    rows = [(a, b, f"{a}_{i}", f"{b}_{j}", -0.4, 0.0, True) for i, j in edges]
    return pd.DataFrame(rows, columns=PAIRS).assign(excess=excess)


def call(samples, sample, against, mean=-0.2, direction=-1):
    row = (samples["sample"] == sample) & (samples["against"] == against)
    samples.loc[row, ["mean_cosine", "direction"]] = mean, direction
    return samples


def three_tasks(seed):
    """Random found pairs among three tasks, with ties in own_cosine, and some samples called."""
    rng = np.random.default_rng(seed)
    sizes = {"math": 12, "code": 10, "prosa é": 8}
    samples = samples_of(sizes, seed)
    samples["own_cosine"] = samples["own_cosine"].round(1)
    names = list(sizes)
    frames = []
    for k, a in enumerate(names):
        for b in names[k + 1 :]:
            edges = np.argwhere(rng.random((sizes[a], sizes[b])) < 0.12)
            frames.append(pairs_of(edges, a, b, -rng.uniform(0.1, 0.8, len(edges))))
    call(samples, "math_3", "code")
    call(samples, "code_4", "math", -0.3)
    call(samples, "code_4", "prosa é", -0.1)
    call(samples, "math_5", "code", 0.3, direction=1)
    return samples, pd.concat(frames, ignore_index=True)


def slow_filter(samples, pairs):
    """The rule, with everything counted anew before each step."""
    own = samples.groupby("sample")["own_cosine"].mean()
    harmful = set()
    for row in samples.to_dict("records"):
        opposed = row["direction"] == -1 or any(
            {row["sample"], row["against"]} <= {p["sample_a"], p["sample_b"], p["task_a"], p["task_b"]}
            for p in pairs.to_dict("records")
        )
        if opposed and own[row["sample"]] + row["mean_cosine"] < 0:
            harmful.add(row["sample"])
    dropped = sorted(set(samples.loc[samples["direction"] == -1, "sample"]) & harmful)
    while True:
        left = [
            (a, b)
            for a, b in zip(pairs["sample_a"], pairs["sample_b"], strict=True)
            if not {a, b} & set(dropped)
        ]
        degree = {s: sum(s in pair for pair in left) for pair in left for s in pair if s in harmful}
        if not degree or max(degree.values()) < 2:
            return dropped
        dropped.append(min(degree, key=lambda s: (-degree[s], own[s], s)))


@pytest.mark.parametrize("seed", range(8))
def test_the_filter_follows_the_rule_step_by_step(seed):
    """Called samples first, then the sample with most remaining pairs, in the same order as a slow loop."""
    samples, pairs = three_tasks(seed)
    table = recommend(samples, pairs).filter
    expected = slow_filter(samples, pairs)
    called = int(table["reason"].str.contains("as a whole").sum())
    assert sorted(table["sample"][:called]) == expected[:called] == ["code_4", "math_3"][:called]
    assert table["sample"].tolist()[called:] == expected[called:]


def test_samples_that_help_their_task_more_than_they_harm_are_kept_and_supported():
    """Neither a call nor many pairs drop a sample whose own task gains more than the other loses."""
    samples = samples_of({"math": 6, "code": 6}).assign(mean_cosine=-0.1)
    pairs = pairs_of([(0, 0), (0, 1), (0, 2)])
    call(samples, "math_1", "code", -0.1)
    for own, dropped in ((0.2, []), (0.05, ["math_1", "math_0"])):
        found = recommend(samples.assign(own_cosine=own), pairs)
        assert found.filter["sample"].tolist() == dropped
        kept = {"math_0", "math_1", "code_0", "code_1", "code_2"} - set(dropped)
        assert set(found.augment["sample"]) == kept


def test_after_the_filter_no_sample_has_two_conflicts_left():
    """What the rule promises of the samples that stay, and why each was dropped."""
    samples, pairs = three_tasks(1)
    samples["own_cosine"] -= 0.5
    table = recommend(samples, pairs).filter
    gone = set(table["sample"])
    left = pairs[~pairs["sample_a"].isin(gone) & ~pairs["sample_b"].isin(gone)]
    assert pd.concat([left["sample_a"], left["sample_b"]]).value_counts().max() <= 1
    called = table.set_index("sample").loc["code_4"]
    assert called["reason"] == "opposes math, prosa é as a whole"
    assert (called["against"], called["mean_cosine"]) == ("math, prosa é", -0.3)
    assert (
        table["reason"].str.contains("conflicts with [2-9] samples that would stay").sum() == len(table) - 2
    )


def test_one_pair_drops_nobody_and_ties_go_to_the_lower_own_cosine():
    """A single pair is no reason to drop a sample; of equals the one its own task supports less goes."""
    samples = samples_of({"math": 6, "code": 6}).assign(mean_cosine=-0.5)
    assert recommend(samples, pairs_of([(0, 0), (1, 1)])).filter.empty
    square = pairs_of([(0, 0), (0, 1), (1, 0), (1, 1)])
    for lowest in ("math_0", "math_1", "code_0", "code_1"):
        samples["own_cosine"] = np.where(samples["sample"] == lowest, -0.2, 0.1)
        first = recommend(samples, square).filter.iloc[0]
        assert (first["sample"], first["degree"]) == (lowest, 2)
    samples["own_cosine"] = np.nan
    assert recommend(samples, square).filter["sample"].iloc[0] == "code_0"


@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_the_formula(seed):
    """1 / (1 + s) for every sample, in (0, 1], 1 without findings; synergy lowers nothing."""
    samples, pairs = three_tasks(seed)
    table = recommend(samples, pairs).reweight
    assert sorted(table["sample"]) == sorted(samples["sample"].unique())
    for row in table.to_dict("records"):
        mine = (pairs["sample_a"] == row["sample"]) | (pairs["sample_b"] == row["sample"])
        calls = samples[(samples["sample"] == row["sample"]) & (samples["direction"] == -1)]
        s = -pairs.loc[mine, "excess"].sum() - calls["mean_cosine"].sum()
        assert row["weight"] == pytest.approx(1 / (1 + s))
    assert table["weight"].between(0, 1, inclusive="right").all()


def test_excess_that_is_unknown_or_positive_never_raises_a_weight():
    """Such a pair adds nothing to s: weights stay in (0, 1]."""
    samples = samples_of({"math": 4, "code": 4})
    pairs = pairs_of([(0, 0), (1, 1), (2, 2)], excess=[np.nan, 0.5, -1.0])
    weights = recommend(samples, pairs).reweight.set_index("sample")["weight"]
    assert weights["math_0"] == weights["code_1"] == 1
    assert weights["math_2"] == 0.5


def test_the_curriculum_is_free_of_conflict_first_and_easy_before_hard():
    """Every sample once; conflicts after the others; by difficulty within both; ranks as counted by hand."""
    samples, pairs = three_tasks(2)
    table = recommend(samples, pairs).curriculum
    assert table["order"].tolist() == list(range(30))
    conflicts = set(pairs["sample_a"]) | set(pairs["sample_b"]) | {"math_3", "code_4"}
    late = table["sample"].isin(conflicts)
    assert late.is_monotonic_increasing
    for _, part in table.groupby(late):
        assert part["difficulty"].is_monotonic_increasing
    once = samples.drop_duplicates("sample").set_index("sample")
    for row in table.to_dict("records"):
        task = once[once["task"] == row["task"]]
        shares = [
            (task[c] < once.at[row["sample"], c]).sum() / (len(task) - 1) for c in ("loss", "gradient_norm")
        ]
        assert row["difficulty"] == pytest.approx(np.mean(shares))
        assert row["level"] == level(row["difficulty"], table.loc[table["task"] == row["task"], "difficulty"])


def level(difficulty, all_of_task):
    easy, medium = np.quantile(all_of_task, [1 / 3, 2 / 3])
    return "easy" if difficulty <= easy else "medium" if difficulty <= medium else "hard"


def test_equal_and_missing_losses():
    """Equal samples are equally hard and keep their order; one number is enough, none is the middle."""
    samples = samples_of({"math": 11, "code": 1}).assign(loss=2.0, gradient_norm=np.nan)
    table = recommend(samples, pairs_of([])).curriculum
    assert table["difficulty"].eq(0.5).all()
    assert table["sample"].tolist() == ["code_0", *(f"math_{row}" for row in range(11))]
    samples["loss"] = np.nan
    assert recommend(samples, pairs_of([])).curriculum["difficulty"].eq(0.5).all()


def test_augment_lists_conflicting_samples_that_their_task_supports():
    """In conflict by pair or as a whole, own cosine above 0; the most similar sample is the caller's."""
    samples = samples_of({"math": 6, "code": 6})
    samples["own_cosine"] = np.where(samples["sample"].isin(["math_2", "code_1"]), -0.1, 0.2)
    call(samples, "math_4", "code")
    call(samples, "math_5", "code", 0.2, direction=1)
    pairs = pairs_of([(0, 0), (0, 1), (2, 1)])
    samples["mean_cosine"] = samples["mean_cosine"].clip(-0.05)
    table = recommend(samples, pairs, {"math_0": "math_3", "math_4": "math_5"}).augment
    assert table[["sample", "degree", "like"]].to_numpy().tolist() == [
        ["math_0", 2, "math_3"], ["code_0", 1, ""], ["math_4", 0, "math_5"],
    ]  # fmt: skip
    assert table["against"].tolist() == ["code", "math", "code"]


def test_the_order_of_rows_changes_nothing():
    """Shuffled frames give the same four tables."""
    samples, pairs = three_tasks(4)
    first = recommend(samples, pairs)
    other = recommend(samples.sample(frac=1, random_state=0), pairs.sample(frac=1, random_state=1))
    for name in ("filter", "reweight", "curriculum", "augment"):
        pd.testing.assert_frame_equal(getattr(first, name), getattr(other, name))


def test_nothing_found_recommends_nothing():
    """No findings: nobody dropped or supported, all weights 1, a curriculum; no samples: no rows."""
    found = recommend(samples_of({"math": 5, "code": 4}), pairs_of([]))
    assert (len(found.filter), len(found.augment)) == (0, 0)
    assert found.reweight["weight"].tolist() == [1.0] * 9
    assert len(found.curriculum) == 9
    unfound = recommend(samples_of({"math": 5, "code": 4}), pairs_of([(0, 0), (0, 1)]).assign(found=False))
    assert unfound.filter.empty
    none = recommend(samples_of({}), pairs_of([]))
    columns = [list(t.columns) for t in (none.filter, none.reweight, none.curriculum, none.augment)]
    assert columns == [FILTER, REWEIGHT, CURRICULUM, AUGMENT]
    assert none.weights_jsonl() == ""


def test_weights_drive_a_sampler_and_a_loss(tmp_path):
    """The file read back: one object per sample, rows of the store, usable as they are in torch."""
    samples, pairs = three_tasks(0)
    found = recommend(samples, pairs)
    path = found.save_weights(tmp_path / "weights.jsonl")

    def refuse(name):
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines()]
    assert {tuple(line) for line in lines} == {("id", "task", "row", "weight")}
    assert len(lines) == 30
    assert all(line["id"] == f"{line['task']}_{line['row']}" for line in lines)
    assert {line["id"]: line["weight"] for line in lines} == dict(
        zip(found.reweight["sample"], found.reweight["weight"], strict=True)
    )
    math = sorted((line for line in lines if line["task"] == "math"), key=lambda line: line["row"])
    weights = torch.tensor([line["weight"] for line in math], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    sampler = WeightedRandomSampler(weights, 6000, generator=generator)
    loader = DataLoader(TensorDataset(torch.arange(12)), batch_size=100, sampler=sampler)
    drawn = torch.bincount(torch.cat([batch for (batch,) in loader]), minlength=12) / 6000
    torch.testing.assert_close(drawn, (weights / weights.sum()).float(), atol=0.02, rtol=0)
    losses = torch.rand(12, generator=generator, dtype=torch.float64, requires_grad=True)
    (losses * weights).sum().backward()
    torch.testing.assert_close(losses.grad, weights)


def test_ids_that_are_none_are_refused_by_name():
    """Weights need the row of each sample: an id without one is an error that names it."""
    samples = samples_of({"math": 3, "code": 3}).replace({"math_1": "the second"})
    with pytest.raises(ValueError, match="'the second' is no id of task 'math'"):
        recommend(samples, pairs_of([])).weights_jsonl()
