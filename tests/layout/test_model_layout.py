"""Looking things up in a layout, and what it refuses to be told."""

import dataclasses

import pytest

from fisherscope.layout import MlpLayout, Partition


def test_grouped_queries_share_kv_heads(layout):
    """Query head h uses kv head h // (H / H_kv); K and V have fewer slices than Q and O."""
    attention = layout.attention_layer(0)
    assert [attention.kv_head(h) for h in range(6)] == [0, 0, 0, 1, 1, 1]
    assert [attention.block(name).heads for name in "QKVO"] == [6, 2, 2, 6]
    for head in (-1, 6):
        with pytest.raises(IndexError, match="has 6 query heads"):
            attention.kv_head(head)


def test_slice_of_a_head(layout):
    """Rows for Q, columns for O, columns in the middle of a fused weight; biases on their own."""
    assert layout.slice(0, "Q", 4).slice_shape == (3, 12)
    assert layout.slice(0, "O", 4).slice_shape == (12, 3)
    assert layout.slice(0, "K", 1, part="bias").cuts[0].start == 3
    fused = layout.slice(1, "V", 2)
    assert fused.parameter == "layers.1.attn.qkv.weight"
    assert (fused.cuts[0].axis, fused.cuts[0].start, fused.cuts[0].stop) == (1, 30, 33)


def test_what_does_not_exist_is_named(layout):
    """Unknown layers, blocks, heads, biases, stacks and parameters: the message says what there is."""
    with pytest.raises(KeyError, match=r"no attention in layer 2 .* are \[0, 1\]"):
        layout.slice(2, "Q", 0)
    with pytest.raises(KeyError, match="of the encoder"):
        layout.slice(0, "Q", 0, stack="encoder")
    with pytest.raises(KeyError, match=r"no block 'X': it has \['Q', 'K', 'V', 'O'\]"):
        layout.slice(0, "X", 0)
    with pytest.raises(IndexError, match="has 2 pieces, asked for 2"):
        layout.slice(0, "K", 2)
    with pytest.raises(KeyError, match="O of layer 0 has no per-head bias"):
        layout.slice(0, "O", 0, part="bias")
    with pytest.raises(KeyError, match="no parameter 'nothing'"):
        layout.parameter("nothing")
    assert layout.parameter("layers.0.attn.o.bias").kind == "attention"


def test_head_counts_must_agree(layout):
    """A block with the wrong number of heads, or kv heads that do not divide the query heads."""
    attention = layout.attention_layer(0)
    with pytest.raises(ValueError, match="Q has 6 heads, expected 8"):
        dataclasses.replace(attention, n_heads=8)
    with pytest.raises(ValueError, match="cannot share 4 kv heads"):
        dataclasses.replace(attention, n_kv_heads=4)
    with pytest.raises(ValueError, match="cannot share 0 kv heads"):
        dataclasses.replace(attention, n_kv_heads=0)


def test_channel_counts_must_agree():
    """Gate, up and down of one MLP have the same channels."""
    up = Partition.regular("up", (5, 3), 0, 5, 1)
    down = Partition.regular("down", (3, 4), 1, 4, 1)
    with pytest.raises(ValueError, match=r"number of pieces: \[4, 5\]"):
        MlpLayout(0, "mlp", (up, down))


def test_layouts_are_immutable(layout):
    """Layouts are shared by everything: nobody changes one in place."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.model_type = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.slice(0, "Q", 0).parameter = "other"
