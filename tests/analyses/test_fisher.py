"""Values and intervals of the group Fisher."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from fisherscope.analyses import AnalyzeConfig, FisherConfig, bootstrap, run
from fisherscope.analyses.fisher import GroupStatistics, ema_weights, t_interval
from fisherscope.analyses.units import Units, head_maps
from fisherscope.linalg import Moments
from tests.analyses.synthetic import all_slices, make_task, slice_of, write_store


def fisher(store, **options):
    return run(store, ["fisher"], AnalyzeConfig(fisher=FisherConfig(**options)))["fisher"]


@pytest.fixture(scope="module")
def result(made):
    return fisher(made.store)


def row_of(result, task, **place):
    rows = result.frame[result.frame["task"] == task]
    for column, value in place.items():
        rows = rows[rows[column] == value]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def test_mean_variance_and_t_interval_equal_numpy_and_scipy(made, result):
    """F of a head slice is the mean over samples of the group mean of h^2, with Student's interval."""
    task = made.tasks["math"]
    for layer, block, head, parameter in all_slices(made.layout):
        values = slice_of(made.layout, task.h(parameter) ** 2, layer, block, head).mean(1).numpy()
        row = row_of(result, "math", kind="head", layer=layer, block=block, index=head, part="weight")
        np.testing.assert_allclose(row["mean"], values.mean(), rtol=1e-6)
        np.testing.assert_allclose(row["sum"], values.mean() * 32, rtol=1e-6)
        np.testing.assert_allclose(row["variance"], values.var(ddof=1), rtol=1e-5)
        low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        ends = [row["ci_low"], row["ci_high"]]
        np.testing.assert_allclose(ends, [max(low, 0), high], rtol=1e-5, atol=1e-14)
        assert row["largest_sample"] == f"math_{values.argmax()}"
        np.testing.assert_allclose(row["largest_share"], values.max() / values.sum(), rtol=1e-6)


def test_fisher_is_the_mean_square_and_differs_from_the_squared_mean_by_the_variance(made, result):
    """F = E[h^2] = signal + noise; signal is (E h)^2 and noise the population variance of h."""
    task = made.tasks["code"]
    for layer, block, head, parameter in all_slices(made.layout):
        h = slice_of(made.layout, task.h(parameter), layer, block, head)
        row = row_of(result, "code", kind="head", layer=layer, block=block, index=head, part="weight")
        np.testing.assert_allclose(row["signal"], (h.mean(0) ** 2).mean(), rtol=1e-5)
        np.testing.assert_allclose(row["noise"], h.var(0, correction=0).mean(), rtol=1e-5)
        assert row["mean"] > 1.5 * row["signal"]


def test_other_normalizations_stand_beside(made, result):
    """Raw, per-token and token-mean F come from the same store."""
    task = made.tasks["math"]
    g = task.gradients["layers.0.norm.weight"].double()
    tokens = torch.from_numpy(task.tokens).double()[:, None]
    row = row_of(result, "math", kind="parameter", parameter="layers.0.norm.weight")
    for name, h in (("none", g), ("per_token", g / tokens.sqrt()), ("mean", g / tokens)):
        np.testing.assert_allclose(row[f"fisher_{name}"], (h**2).mean(), rtol=1e-6)
    assert row["fisher_per_token"] == row["mean"]


def test_derived_rows_are_sums_of_groups(made, result):
    """Block, layer and model rows hold the sum of their groups, and uncertainty of that sum."""
    rows = result.frame[result.frame["task"] == "math"]
    block = row_of(result, "math", kind="block", layer=1, block="Q", part="weight")
    heads = rows[(rows["kind"] == "head") & (rows["layer"] == 1) & (rows["block"] == "Q")]
    np.testing.assert_allclose(block["sum"], heads[heads["part"] == "weight"]["sum"].sum())
    assert block["size"] == 4 * 32
    mlp = row_of(result, "math", kind="block", layer=0, block="mlp")
    assert mlp["size"] == 3 * 8 * 6
    parameters = rows[rows["kind"] == "parameter"]
    layer = row_of(result, "math", kind="layer", layer=1)
    np.testing.assert_allclose(layer["sum"], parameters[parameters["layer"] == 1]["sum"].sum())
    model = row_of(result, "math", kind="model")
    np.testing.assert_allclose(model["sum"], parameters["sum"].sum())
    assert model["size"] == parameters["size"].sum()
    total = sum((made.tasks["math"].h(name) ** 2).flatten(1).sum(1) for name in made.store.parameters)
    np.testing.assert_allclose(model["variance"], total.var().item() / model["size"] ** 2, rtol=1e-5)


def test_streaming_over_samples_changes_nothing(made, result):
    """A small memory budget reads samples in pieces and gives the same table to rounding."""
    small = run(made.store, ["fisher"], AnalyzeConfig(memory_budget=1 << 16))["fisher"].frame
    pd.testing.assert_frame_equal(small, result.frame, rtol=1e-12)


def test_store_table_agrees(made, result):
    """The reader's own group table and this analysis agree."""
    groups = made.store.groups("math")
    mine = result.frame[result.frame["task"] == "math"].head(len(groups))
    for column in ("sum", "mean", "variance"):
        np.testing.assert_allclose(mine[column], groups[column], rtol=1e-9)


def test_bootstrap_is_seeded_and_close_to_scipy(made, result):
    """The same seed gives the same interval, another seed another; both near that of scipy."""
    again = fisher(made.store).frame
    pd.testing.assert_frame_equal(again, result.frame, check_exact=True)
    other = run(made.store, ["fisher"], AnalyzeConfig(seed=1))["fisher"].frame
    assert (other["bootstrap_low"] != result.frame["bootstrap_low"]).any()
    values = (made.tasks["math"].h("layers.0.norm.weight") ** 2).mean(1).numpy()
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=0)
    row = row_of(result, "math", kind="parameter", parameter="layers.0.norm.weight")
    spread = expected.standard_error
    assert abs(row["bootstrap_low"] - expected.confidence_interval.low) < 0.25 * spread
    assert abs(row["bootstrap_high"] - expected.confidence_interval.high) < 0.25 * spread


def test_channels_have_bootstrap_intervals_only_on_request(made, result):
    """There are very many channels: their bootstrap is an option."""
    channels = result.frame["kind"] == "channel"
    assert result.frame.loc[channels, "bootstrap_low"].isna().all()
    asked = fisher(made.store, bootstrap=50, bootstrap_kinds=("channel",)).frame
    assert asked.loc[channels, "bootstrap_low"].notna().all()
    assert asked.loc[~channels, "bootstrap_low"].isna().all()
    assert fisher(made.store, bootstrap=0).frame["bootstrap_low"].isna().all()


def test_t_interval_covers_the_truth():
    """On normal data the 95 % interval holds the true mean in about 95 % of runs."""
    values = np.random.default_rng(0).normal(3, 2, (8, 4000))
    moments = Moments.of(values)
    low, high = t_interval(moments.mean, moments.variance, 8, 0.95)
    assert 0.935 < ((low < 3) & (high > 3)).mean() < 0.965
    assert (low >= 0).all()  # what is not negative has no interval below 0
    assert (low == 0).any()


def test_bootstrap_means_are_those_of_the_drawn_samples():
    """Weights are counts of draws over n, and the interval does not depend on the size of the steps."""
    drawn = bootstrap.weights(7, 200, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.sum(1), 1)
    np.testing.assert_array_equal(drawn * 7, np.round(drawn * 7))
    values = np.random.default_rng(1).normal(size=(7, 5))
    whole = bootstrap.percentile_interval(values, drawn, 0.9, 1 << 30)
    np.testing.assert_allclose(whole, bootstrap.percentile_interval(values, drawn, 0.9, 1), rtol=1e-12)


def test_ema_equals_the_loop(made, result):
    """The moving average equals the step-by-step update with bias correction, in sample order."""
    values = (made.tasks["math"].h("layers.0.norm.weight") ** 2).mean(1).numpy()
    average = 0.0
    for value in values:
        average = 0.99 * average + 0.01 * value
    row = row_of(result, "math", kind="parameter", parameter="layers.0.norm.weight")
    np.testing.assert_allclose(row["ema"], average / (1 - 0.99 ** len(values)), rtol=1e-6)
    np.testing.assert_allclose(ema_weights(5, 0.0), [0, 0, 0, 0, 1])
    np.testing.assert_allclose(ema_weights(5, 0.9).sum(), 1)


def test_running_statistics_do_not_depend_on_the_pieces():
    """Fed at once or in pieces, mean, variance, largest sample and moving average agree."""
    values = np.random.default_rng(0).exponential(size=(10, 3))
    values[7] = values[2]
    whole, parts = GroupStatistics(10, 3, 0.9), GroupStatistics(10, 3, 0.9)
    whole.add(values)
    for part in np.split(values, [1, 4, 8]):
        parts.add(part)
    np.testing.assert_array_equal(whole.largest_row, values.argmax(0))
    np.testing.assert_array_equal(parts.largest_row, whole.largest_row)
    for name in ("ema", "largest_share"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)
    np.testing.assert_allclose(parts.moments.variance, values.var(0, ddof=1), rtol=1e-12)


def test_without_full_shape_signal_is_absent_and_the_rest_stays(lean, result):
    """Signal needs mean gradients; nothing else does."""
    frame = fisher(lean.store).frame
    assert frame[["signal", "noise"]].isna().to_numpy().all()
    pd.testing.assert_frame_equal(
        frame.drop(columns=["signal", "noise"]), result.frame.drop(columns=["signal", "noise"])
    )


def test_a_dominating_sample_is_named(layout, tmp_path):
    """A task whose F is one sample's is no statement about the task: the result warns."""
    task = make_task(layout, "math", 40, 0)
    for gradient in task.gradients.values():
        gradient[17] *= 50
    result = fisher(write_store(tmp_path / "run.fs", layout, {"math": task}).store, bootstrap=0)
    assert any("math_17 carries 9" in note for note in result.warnings), result.warnings
    assert "math_17 alone carries" in result.summary()


def test_heat_map_has_no_value_where_there_is_no_head(made, result):
    """K and V have two heads, Q and O four: the map is NaN for heads that do not exist."""
    assert result.data["mean"].dims == ("task", "layer", "block", "head")
    assert result.data["mean"].sel(block="K", head=[2, 3]).isnull().all()
    assert result.data["mean"].sel(block=["Q", "O"]).notnull().all()
    row = row_of(result, "code", kind="head", layer=1, block="V", index=1, part="weight")
    assert float(result.data["mean"].sel(task="code", layer=1, block="V", head=1)) == row["mean"]


def test_two_stacks_become_an_axis():
    """With an encoder and a decoder the maps have an axis ``stack``; with one they have not."""
    frame = pd.DataFrame(
        {"task": "a", "stack": ["encoder", "decoder"], "layer": 0, "block": "Q", "head": 0, "x": [1.0, 2]}
    )
    assert head_maps(frame, ["x"], {"task": ["a"]})["x"].dims == ("task", "stack", "layer", "block", "head")
    one = head_maps(frame.head(1), ["x"], {"task": ["a"]})
    assert one["x"].dims == ("task", "layer", "block", "head")
    assert one.coords["stack"].item() == "encoder"


def test_units_of_nothing_but_norms():
    """A store without heads and channels still has its layer and model rows."""
    groups = pd.DataFrame(
        [("parameter", "decoder", 0, "norm", -1, "weight", "n", 8)],
        columns=["kind", "stack", "layer", "block", "index", "part", "parameter", "size"],
    )
    units = Units.build(groups)
    assert units.frame["kind"].tolist() == ["parameter", "layer", "model"]
    np.testing.assert_array_equal(units.expand(np.array([[3.0]])), [[3.0, 3.0, 3.0]])


def test_summary_names_heads_and_numbers(result):
    """The summary has one line per task, with an interval and a slice by name."""
    lines = result.summary().splitlines()
    assert [line.split(":")[0] for line in lines] == ["math", "code"]
    assert all("head" in line and "%" in line for line in lines)
    assert result.top(3)["mean"].is_monotonic_decreasing
    assert result.top(50, kind="channel", task="code")["task"].eq("code").all()
