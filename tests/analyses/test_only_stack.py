"""A model with one stack needs no ``stack=``, whatever that stack is called."""

import numpy as np
import pytest

import fisherscope as fs
from fisherscope.analyses.conflict import carrying_positions
from fisherscope.analyses.interference import compute_heatmap, compute_sample_pair, matrix
from tests import models

PLACE = {"layer": 1, "block": "V", "head": 2}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """BERT: its only stack is an encoder."""
    kept = fs.SampleGradients(encoding="factored", dtype="float32")
    rows = {"math": models.rows(4), "code": models.rows(3, seed=5)}
    path = tmp_path_factory.mktemp("bert") / "run.fs"
    scope = fs.wrap(models.build(models.named("bert")))
    return scope.collect(rows, path, extensions=("fisher", kept), quiet=True)


def test_the_only_stack_is_meant(encoder):
    """Everything that takes a stack gives for None what it gives for the name."""
    store, layout = encoder, encoder.layout
    assert {a.stack for a in layout.attention} == {"encoder"}
    assert layout.attention_layer(1) is layout.attention_layer(1, "encoder")
    assert layout.slice(1, "V", 2) == layout.slice(1, "V", 2, stack="encoder")
    assert layout.query_head_slice(1, "K", 3) == layout.query_head_slice(1, "K", 3, stack="encoder")
    one = store.slice("math", **PLACE)
    assert one.equal(store.slice("math", **PLACE, stack="encoder"))
    assert one.any()
    assert store.slices("math", layer=1, block="V")[2].equal(one)
    assert store.fisher_slice("math", **PLACE).equal(store.fisher_slice("math", **PLACE, stack="encoder"))
    scores = [matrix(store, "math", "code", **PLACE, **named) for named in ({}, {"stack": "encoder"})]
    assert scores[0].identical(scores[1])
    assert scores[0].attrs["stack"] == "encoder"
    pair = compute_sample_pair(store, "math", 0, "code", 1, 1, 2)
    assert pair == compute_sample_pair(store, "math", 0, "code", 1, 1, 2, stack="encoder")
    heat = compute_heatmap(store, "math", "code")["Q"]["layer_head_avg"]
    assert heat.shape == (2, 4)
    np.testing.assert_array_equal(
        heat, compute_heatmap(store, "math", "code", stack="encoder")["Q"]["layer_head_avg"]
    )
    views = [carrying_positions(store, "math_0", "code_0", **PLACE, stack=s) for s in (None, "encoder")]
    assert views[0].cosine == views[1].cosine


def test_of_two_stacks_it_is_the_decoder():
    """An encoder-decoder is asked as ever; a stack that is not there is named with those that are."""
    layout = fs.wrap(models.build(models.named("t5"))).layout
    assert layout.attention_layer(1).stack == "decoder"
    assert layout.slice(1, "Q", 0) == layout.slice(1, "Q", 0, stack="decoder")
    with pytest.raises(KeyError, match=r"no attention of the tower: .*\['encoder', 'decoder', 'cross'\]"):
        layout.attention_layer(0, "tower")
