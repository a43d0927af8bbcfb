"""Rankings and how sure they are."""

import numpy as np
import pytest
from scipy import stats

from fisherscope.analyses import AnalyzeConfig, ImportanceConfig, bootstrap, run
from fisherscope.analyses.importance import rank_bootstrap, ranks, shares, spearman


def importance(store, **options):
    config = AnalyzeConfig(importance=ImportanceConfig(**options))
    return run(store, ["importance"], config)["importance"]


@pytest.fixture(scope="module")
def result(made):
    return importance(made.store)


def test_scores_are_fisher_means(made, result):
    """The raw score of a unit is the mean F per entry of its group."""
    groups = made.store.groups("math")
    for kind in ("head", "channel"):
        expected = groups[(groups["kind"] == kind) & (groups["part"] == "weight")]["mean"]
        rows = result.frame[(result.frame["task"] == "math") & (result.frame["kind"] == kind)]
        np.testing.assert_allclose(rows["score"], expected, rtol=1e-9)


def test_shares_sum_to_one(result):
    """Per layer and over the model, per task and kind."""
    for _, rows in result.frame.groupby(["task", "kind"]):
        np.testing.assert_allclose(rows["global_share"].sum(), 1)
        np.testing.assert_allclose(rows.groupby("layer")["layer_share"].sum(), 1)
        assert sorted(rows["rank"]) == list(range(1, len(rows) + 1))
        assert rows.sort_values("rank")["score"].is_monotonic_decreasing


def test_ranks_and_shares_of_ties_and_zeros():
    """Equal scores rank in order of position; nothing is divided by a sum of zero."""
    np.testing.assert_array_equal(ranks(np.array([1.0, 3, 3, 0])), [3, 1, 2, 4])
    np.testing.assert_array_equal(ranks(np.array([[1.0, 2], [2, 1]])), [[2, 1], [1, 2]])
    np.testing.assert_array_equal(shares(np.zeros(3)), np.zeros(3))
    np.testing.assert_allclose(shares(np.array([1.0, 3, 5]), np.array([0, 0, 1])), [0.25, 0.75, 1])


def test_probability_of_the_top_equals_a_loop_over_resamples():
    """P(in top-k) and the rank interval are those of a plain loop, for any size of the steps."""
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(15, 6)) * np.array([1, 1.2, 3, 0.9, 1, 0.1])
    drawn = bootstrap.weights(15, 300, rng)
    found = np.array([ranks(row @ values) for row in drawn])
    for budget in (1, 1 << 30):
        p_top, low, high = rank_bootstrap(values, 2, drawn, budget)
        np.testing.assert_array_equal(p_top, (found <= 2).mean(0))
        np.testing.assert_array_equal(low, np.quantile(found, 0.025, axis=0, method="nearest"))
        np.testing.assert_array_equal(high, np.quantile(found, 0.975, axis=0, method="nearest"))
    assert p_top[2] > 0.95
    assert p_top[5] == 0


def test_probabilities_are_reproducible_and_add_up(made, result):
    """The same seed gives the same numbers; over all units P(in top-k) sums to k."""
    again = importance(made.store).frame
    np.testing.assert_array_equal(again["p_top"], result.frame["p_top"])
    heads = result.frame[(result.frame["kind"] == "head") & (result.frame["task"] == "code")]
    np.testing.assert_allclose(heads["p_top"].sum(), 10)
    assert result.frame[result.frame["kind"] == "channel"]["p_top"].isna().all()
    asked = importance(made.store, bootstrap_kinds=("channel",), bootstrap=20, top_k=4).frame
    channels = asked[(asked["kind"] == "channel") & (asked["task"] == "math")]
    np.testing.assert_allclose(channels["p_top"].sum(), 4)


def test_saliencies_equal_their_formulas(made, result):
    """Taylor from <g, theta>, OBD from mean F and sum theta^2."""
    task, name = made.tasks["math"], "layers.1.attn.o.weight"
    piece = made.layout.slice(1, "O", 2)
    g = piece.take(task.gradients[name].double()).flatten(1)
    theta = piece.take(made.theta[name][None].double()).flatten()
    rows = result.frame[result.frame["task"] == "math"]
    row = rows[(rows["layer"] == 1) & (rows["block"] == "O") & (rows["index"] == 2)].iloc[0]
    dots = (g @ theta).numpy()
    np.testing.assert_allclose(row["taylor"], abs(dots.mean()), rtol=1e-5)
    np.testing.assert_allclose(row["taylor_abs"], np.abs(dots).mean(), rtol=1e-5)
    np.testing.assert_allclose(row["obd"], row["score"] * (theta**2).sum().item() / 2, rtol=1e-5)


def test_tasks_are_compared_by_rank_correlation_and_differences(result):
    """Spearman per kind as scipy has it; differences of global shares, largest first."""
    frame = result.frame[result.frame["kind"] == "head"]
    a, b = (frame[frame["task"] == task].reset_index() for task in ("math", "code"))
    tasks = result.extra["tasks"].set_index("kind")
    np.testing.assert_allclose(
        tasks.loc["head", "spearman"], stats.spearmanr(a["score"], b["score"]).statistic
    )
    differences = result.extra["differences"]
    assert differences["difference"].abs().is_monotonic_decreasing
    np.testing.assert_allclose(differences["difference"].sum(), 0, atol=1e-12)
    assert len(differences) == len(a)


def test_spearman_without_spread_is_undefined():
    """A constant or single score has no rank correlation, and gives no warning either."""
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    assert np.isnan(spearman(np.ones(1), np.ones(1)))


def test_top_and_summary(result):
    """The top list is by share within a kind; the summary names the slice and its share."""
    top = result.top(5)
    assert top["kind"].eq("head").all()
    assert top["global_share"].is_monotonic_decreasing
    best = top.iloc[0]
    line = f"{best['task']}: L{best['layer']} {best['block']} head {best['index']} carries"
    assert line in result.summary()
    assert f"{best['global_share']:.1%}" in result.summary()
