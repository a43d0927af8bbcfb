"""A layout survives JSON exactly, and junk is refused."""

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.layout import HeadBlock, MlpLayout, ModelLayout, ParameterInfo, Partition


def test_round_trip(layout):
    """Separate and fused projections, biases and channels come back equal, through real JSON text."""
    assert ModelLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@given(st.from_type(Partition))
def test_round_trip_of_any_partition(partition):
    """Pieces in any order and at any distance, also evenly spaced ones that run backwards."""
    info = ParameterInfo(partition.parameter, partition.shape, "mlp", 0)
    layout = ModelLayout("tiny", (info,), (), (MlpLayout(0, "mlp", (partition,)),))
    assert ModelLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_evenly_spaced_pieces_take_constant_space(layout):
    """An MLP of ten thousand channels is three numbers, not ten thousand."""
    wide = Partition.regular("up", (10_000, 2), 0, 10_000, 1)
    info = ParameterInfo("up", wide.shape, "mlp", 0)
    encoded = ModelLayout("tiny", (info,), (), (MlpLayout(0, "mlp", (wide,)),)).to_json()
    assert len(json.dumps(encoded)) < 1000


def _without(*path):
    def damage(data):
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return damage


def _with(value, *path):
    def damage(data):
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return damage


WEIGHT = ("attention", 0, "blocks", 0, "weight")


@pytest.mark.parametrize(
    "damage",
    [
        _without("model_type"),
        _without("attention", 0, "n_heads"),
        _without(*WEIGHT, "starts"),
        _without(*WEIGHT, "starts", "stride"),
        _with(None, "parameters"),
        _with("junk", "attention"),
        _with(["junk"], "mlps"),
        _with(0, "attention", 0, "n_kv_heads"),
        _with(5, "attention", 0, "n_kv_heads"),
        _with(7, *WEIGHT, "axis"),
        _with("0", *WEIGHT, "axis"),
        _with(-1, *WEIGHT, "starts", "first"),
        _with(0, *WEIGHT, "starts", "stride"),
        _with(0, *WEIGHT, "starts", "count"),
        _with(10**12, *WEIGHT, "starts", "count"),
        _with(2.5, *WEIGHT, "starts", "count"),
        _with([0, 0, 0], *WEIGHT, "starts"),
        _with("another", *WEIGHT, "parameter"),
        _with([180, 12], *WEIGHT, "shape"),
        _with("ab", "parameters", 0, "shape"),
        _with([-7, 12], "parameters", 0, "shape"),
        _with("head.weight", "parameters", 0, "name"),
    ],
)
def test_junk_is_refused(layout, damage):
    """A store may come from a stranger: what contradicts itself is a ValueError, never a half-read layout."""
    data = copy.deepcopy(layout.to_json())
    damage(data)
    with pytest.raises(ValueError, match=r"\w"):
        ModelLayout.from_json(json.loads(json.dumps(data)))


@pytest.mark.parametrize("junk", [None, [], "layout", 3, {}])
def test_what_is_no_layout_is_refused(junk):
    """Another kind of JSON altogether."""
    with pytest.raises(ValueError, match="not a model layout"):
        ModelLayout.from_json(junk)


def test_block_bias_is_optional(layout):
    """O has no per-head bias, before and after."""
    blocks = ModelLayout.from_json(layout.to_json()).attention[0].blocks
    assert isinstance(blocks[3], HeadBlock)
    assert blocks[3].bias is None
    assert blocks[0].bias is not None
