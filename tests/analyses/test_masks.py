"""What masks keep."""

import math

import numpy as np
import pytest
import torch

from fisherscope.analyses import AnalyzeConfig, MasksConfig, run
from fisherscope.analyses.masks import structured_keep
from fisherscope.errors import NotStoredError


def masks(store, memory_budget=1 << 30, **options):
    config = AnalyzeConfig(masks=MasksConfig(**options), memory_budget=memory_budget)
    return run(store, ["masks"], config)["masks"]


@pytest.fixture(scope="module")
def result(made):
    return masks(made.store)


def matrices(made):
    return [p for p in made.store.parameters if len(made.layout.parameter(p).shape) == 2]


def test_structured_masks_keep_the_highest_scores_and_the_exact_number(result):
    """24 head slices and 12 channels: what stays is the exact count with the highest F."""
    for task in ("math", "code"):
        for sparsity, heads, channels in ((0.5, 12, 6), (0.7, 7, 4), (0.9, 2, 1)):
            table = result.heads(task, sparsity)
            assert table["keep"].sum() == heads
            assert table.loc[table["keep"], "score"].min() >= table.loc[~table["keep"], "score"].max()
            assert result.channels(task, sparsity)["keep"].sum() == channels
            assert {"stack", "layer", "block", "head", "score", "keep"} <= set(table.columns)


def test_masks_are_monotone_in_sparsity(made, result):
    """What stays at a higher sparsity stays at every lower one, structured or not."""
    for dense, sparse in ((0.5, 0.7), (0.7, 0.9)):
        assert (result.heads("math", sparse)["keep"] <= result.heads("math", dense)["keep"]).all()
        for parameter in matrices(made):
            assert (result.mask("math", sparse, parameter) <= result.mask("math", dense, parameter)).all()


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_unstructured_masks_equal_a_sort_of_all_weights(made, scope):
    """Exactly the right number of weights with the highest F stay, over the model or in each layer."""
    result = masks(made.store, scope=scope, sparsities=(0.33, 0.8))
    groups = (
        [matrices(made)]
        if scope == "global"
        else [[p for p in matrices(made) if made.layout.parameter(p).layer == layer] for layer in (0, 1)]
    )
    for sparsity in (0.33, 0.8):
        for names in groups:
            fisher = torch.cat([made.store.fisher("math", name).flatten() for name in names]).numpy()
            keep = torch.cat([result.mask("math", sparsity, name).flatten() for name in names]).numpy()
            assert keep.sum() == len(fisher) - math.floor(sparsity * len(fisher) + 0.5)
            assert fisher[keep].min() >= fisher[~keep].max()


def test_masks_beyond_the_memory_budget_are_made_when_asked_for(made, result):
    """The same masks come from F and the threshold where the bits are not kept."""
    small = masks(made.store, memory_budget=1 << 16)
    assert small.unstructured.packed  # tiny model: even this budget holds the bits
    small.unstructured.packed.clear()
    for parameter in matrices(made):
        assert torch.equal(small.mask("code", 0.7, parameter), result.mask("code", 0.7, parameter))


def test_ties_are_deterministic():
    """Among equal scores the first stay, in the model and in each layer."""
    scores, layers = np.ones(8), np.repeat([0, 1], 4)
    np.testing.assert_array_equal(structured_keep(scores, layers, 0.5, "global"), [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(structured_keep(scores, layers, 0.5, "layer"), [1, 1, 0, 0, 1, 1, 0, 0])


def test_layer_scope_has_the_same_sparsity_in_every_layer(made):
    """Ranked within each layer, each layer loses the same share."""
    frame = masks(made.store, scope="layer").frame
    rows = frame[(frame["level"] == "layer") & (frame["kind"] == "head")]
    assert rows.groupby(["task", "sparsity"])["kept"].nunique().eq(1).all()


def test_layer_table_adds_up(made, result):
    """Kept units of the layers sum to those of the model; achieved is the share that goes."""
    frame = result.frame
    keys = ["task", "kind", "sparsity"]
    layers = frame[frame["level"] == "layer"].groupby(keys)[["units", "kept"]].sum()
    whole = frame[frame["level"] == "all"].set_index(keys).sort_index()
    assert (layers.sort_index() == whole[["units", "kept"]]).all(axis=None)
    np.testing.assert_allclose(whole["achieved"], 1 - whole["kept"] / whole["units"])
    assert set(whole.reset_index()["kind"]) == {"head", "channel", "unstructured"}
    parameters = result.extra["parameters"]
    assert parameters["parameter"].nunique() == len(matrices(made))
    heads = result.extra["heads"]
    assert heads["keep_0.9"].sum() == 2 * 2
    assert len(heads) == 48


def test_without_full_shape_there_are_structured_masks_only(lean):
    """What is missing is named with what to collect; the structured masks are there."""
    result = masks(lean.store)
    assert any("no unstructured masks" in note and 'Fisher(shape="full")' in note for note in result.warnings)
    assert result.heads("math", 0.9)["keep"].sum() == 2
    with pytest.raises(NotStoredError, match="shape="):
        result.mask("math", 0.9, "layers.0.attn.q.weight")


def test_unstructured_masks_can_be_left_out(made):
    """Without the kind, nothing of full shape is read, and asking for a mask says why there is none."""
    result = masks(made.store, kinds=("head",))
    assert not result.warnings
    with pytest.raises(NotStoredError, match=r"MasksConfig\.kinds"):
        result.mask("math", 0.9, "layers.0.attn.q.weight")
    with pytest.raises(KeyError, match="kind 'channel'"):
        result.channels("math", 0.9)


def test_unknown_masks_are_named(result):
    """A task, sparsity or parameter that was not masked is an error that lists what there is."""
    with pytest.raises(KeyError, match=r"0\.6"):
        result.heads("math", 0.6)
    with pytest.raises(KeyError, match=r"norm\.weight.*\[0\.5, 0\.7, 0\.9\]"):
        result.mask("math", 0.5, "layers.0.norm.weight")


def test_summary_and_top(result):
    """The summary tells counts at the highest sparsity; the top list holds the barest layers."""
    assert "math: at 90% sparsity 2 of 24 head slices stay" in result.summary()
    assert result.top(4)["achieved"].is_monotonic_decreasing
