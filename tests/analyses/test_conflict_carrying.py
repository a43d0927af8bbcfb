"""Positions of the first found pairs in the conflict analysis: where they are shown, and where not."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import fisherscope as fs
from fisherscope.analyses import AnalyzeConfig, ConflictConfig, Context, run
from fisherscope.analyses.conflict import carrying_positions
from fisherscope.analyses.conflict.carrying import look_into
from fisherscope.demo import model_path, task_files


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Sums and flipped sums with the demo's trained model, in two encodings."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(model_path())
    scope = fs.wrap(model, AutoTokenizer.from_pretrained(model_path()))
    tasks = {name: task_files()[name] for name in ("math", "math_flipped")}
    path = tmp_path_factory.mktemp("carrying")
    found = {
        encoding: scope.collect(
            tasks,
            path / encoding,
            extensions=("fisher", fs.SampleGradients(encoding=encoding, dtype="float32")),
            max_samples=96,
            quiet=True,
        )
        for encoding in ("factored", "dense")
    }
    return {**found, "model": model}


def analysed(store, **options):
    config = AnalyzeConfig(conflict=ConflictConfig(calibration_splits=0, **options))
    return run(store, ["conflict"], config)["conflict"]


def positions_of(store, frame, **options):
    settings = ConflictConfig(**options)
    return look_into(store, frame, settings, Context(store, AnalyzeConfig()))[1]


@pytest.mark.parametrize("metric", ["natural", "euclidean"])
def test_contributions_add_up_to_the_cosine_of_each_pair(stores, metric):
    """Of the first found pairs, on both sides, with the interval that the view gives."""
    result = analysed(stores["factored"], metric=metric, position_pairs=3)
    found = result.frame[result.frame["found"]]
    assert len(found) > 3
    positions = result.extra["positions"]
    sums = positions.groupby(["sample_a", "sample_b", "side"], sort=False)["contribution"].sum().unstack()
    assert [*sums.index] == [*zip(found["sample_a"][:3], found["sample_b"][:3], strict=True)]
    for side in "ab":
        np.testing.assert_allclose(sums[side], found["cosine"][:3], atol=1e-5)
    view = carrying_positions(
        stores["factored"], *sums.index[0], config=ConflictConfig(metric=metric), resamples=1000
    )
    assert (found["cosine_low"].iloc[0], found["cosine_high"].iloc[0]) == (view.low, view.high)
    assert found["cosine_low"][3:].isna().all()
    assert (found["cosine_low"][:3] <= found["cosine"][:3]).all()
    first = positions[(positions["sample_a"] == sums.index[0][0]) & (positions["side"] == "a")]
    assert "".join(first["token"]) == found["text_a"].iloc[0]


@pytest.fixture(scope="module")
def frame(stores):
    """Found pairs, before anything was looked into."""
    return analysed(stores["dense"]).frame


def test_found_pairs_of_a_dense_store_have_none(stores, frame):
    """Without factors there are no positions."""
    assert frame["found"].sum() > 3
    assert frame["cosine_low"].isna().all()
    assert len(positions_of(stores["factored"], frame)) > 0
    assert positions_of(stores["dense"], frame).empty


@pytest.mark.parametrize(
    "options",
    [
        {"fisher_pool": "per_task"},
        {"fisher_weighting": "unit"},
        {"position_pairs": 0},
        {"contribution_averaging_window": 2},
    ],
)
def test_other_metrics_have_none(stores, frame, options):
    """An F that positions cannot be divided under, averages of samples; or not asked for."""
    assert positions_of(stores["factored"], frame, **options).empty


def test_too_much_work_is_not_begun(stores, frame, monkeypatch):
    """The first pairs that fit are looked into, then none."""
    whole = positions_of(stores["factored"], frame, position_pairs=3)
    weights = sum(
        p.numel() for n, p in stores["model"].named_parameters() if "_proj.weight" in n and "attn" in n
    )
    first = frame[frame["found"]].iloc[0]
    length = stores["factored"].samples("math").set_index("id")["length"]
    other = stores["factored"].samples("math_flipped").set_index("id")["length"]
    work = (length[first["sample_a"]] + other[first["sample_b"]]) ** 2 / 2 * weights
    monkeypatch.setattr("fisherscope.analyses.conflict.carrying._MOST_WORK", work)
    one = positions_of(stores["factored"], frame, position_pairs=3)
    assert one.equals(whole.iloc[: len(one)])
    assert one["sample_a"].unique().tolist() == [first["sample_a"]]
    monkeypatch.setattr("fisherscope.analyses.conflict.carrying._MOST_WORK", work - 1)
    assert positions_of(stores["factored"], frame, position_pairs=3).empty


def test_results_of_both_encodings_agree(stores, frame):
    """The pairs are the same, whatever the gradients are stored as."""
    first, second = analysed(stores["factored"]).frame, frame
    both = first.merge(second, on=["sample_a", "sample_b"], validate="1:1")
    assert len(both) == len(first)
    np.testing.assert_allclose(both["cosine_x"], both["cosine_y"], atol=1e-5)
