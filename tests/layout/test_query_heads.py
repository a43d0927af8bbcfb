"""Tables and slices seen from query heads."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from fisherscope.adapters import resolve
from fisherscope.layout import (
    GroupTable,
    HeadBlock,
    MlpLayout,
    ModelLayout,
    ParameterInfo,
    Partition,
    per_query_head,
)
from tests import models


def test_query_heads_of_one_group_share_keys_and_values() -> None:
    """K and V rows come once per query head that uses them, with the same value, and the table says so."""
    layout = resolve(models.build(models.named("llama")))  # 4 query heads, 2 kv heads
    frame = pd.DataFrame(
        {
            "kind": ["head"] * 4 + ["channel"],
            "stack": "decoder",
            "layer": 1,
            "block": ["Q", "K", "K", "V", "mlp"],
            "index": [3, 0, 1, 1, 7],
            "value": [1.0, 2.0, 3.0, 4.0, 5.0],
        }
    )
    found = per_query_head(layout, frame)
    rows = list(found[["block", "query_head", "shared", "value"]].itertuples(index=False, name=None))
    assert rows == [
        ("Q", 3, 1, 1.0),
        ("K", 0, 2, 2.0),
        ("K", 1, 2, 2.0),
        ("K", 2, 2, 3.0),
        ("K", 3, 2, 3.0),
        ("V", 2, 2, 4.0),
        ("V", 3, 2, 4.0),
    ]
    assert "kv head" in found.attrs["note"]
    named = per_query_head(
        layout, frame[frame["kind"] == "head"].rename(columns={"index": "head"}).drop(columns="kind")
    )
    assert named["value"].tolist() == found["value"].tolist()


def test_the_slice_of_a_query_head() -> None:
    """Query head h uses kv head h // (H / H_kv); Q and O are its own."""
    layout = resolve(models.build(models.named("llama")))
    for head in range(4):
        for block, own in (("Q", head), ("K", head // 2), ("V", head // 2), ("O", head)):
            assert layout.query_head_slice(0, block, head) == layout.slice(0, block, own)
    attention = layout.attention[0]
    assert [list(attention.query_heads(kv)) for kv in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(IndexError, match="4 query heads, asked for 4"):
        layout.query_head_slice(0, "K", 4)
    with pytest.raises(IndexError, match="2 kv heads, asked for 2"):
        attention.query_heads(2)


def test_blocks_of_adapters_have_the_heads_of_their_block() -> None:
    """ "K.default" has kv heads as "K" has, in layouts, slices and tables; an MLP's block is kept in JSON."""
    layout = resolve(models.build(models.named("llama")))
    attention = layout.attention[0]
    matrix = Partition.regular("B", (16, 3), 0, 2, 8)
    block = HeadBlock("K.default", matrix)
    assert block.role == "K"
    attention = replace(attention, blocks=(*attention.blocks, block))
    mlp = MlpLayout(0, "mlp", (Partition.regular("up.B", (40, 3), 0, 40, 1),), block="mlp.default")
    infos = [ParameterInfo("B", (16, 3), "attention", 0), ParameterInfo("up.B", (40, 3), "mlp", 0)]
    layout = replace(
        layout,
        attention=(attention, *layout.attention[1:]),
        mlps=(*layout.mlps, mlp),
        parameters=(*layout.parameters, *infos),
    )
    assert layout.query_head_slice(0, "K.default", 3) == matrix[1]
    assert layout.flags("B") == {"per_group"}
    frame = pd.DataFrame(
        {"stack": "decoder", "layer": 0, "block": ["K.default", "Q.default"], "head": [1, 1]}
    )
    assert per_query_head(layout, frame)["query_head"].tolist() == [2, 3, 1]
    assert ModelLayout.from_json(layout.to_json()) == layout
    groups = GroupTable.build(layout, ["B", "up.B"]).frame()
    assert groups.groupby(["kind", "block"]).size().to_dict() == {
        ("channel", "mlp.default"): 40,
        ("head", "K.default"): 2,
        ("parameter", "K.default"): 1,
        ("parameter", "mlp"): 1,
    }
    with pytest.raises(ValueError, match=r"V\.default has 3 heads, expected 2"):
        replace(attention, blocks=(HeadBlock("V.default", Partition.regular("B", (24, 3), 0, 3, 8)),))


def test_widths_of_latent_attention() -> None:
    """Queries and values have sizes of their own; keys without position are narrower than queries."""
    attention = resolve(models.build(models.named("deepseek_v3"))).attention[0]
    assert (attention.head_dim_qk, attention.head_dim_v) == (10, 10)
    assert attention.block("K").weight.width == 6


def test_experts_have_a_place() -> None:
    """Stacked weights of a mixture are cut by expert: all of each parameter, once."""
    layout = resolve(models.build(models.named("gpt_oss")))
    assert [e.experts for e in layout.experts] == [4, 4]
    names = {p.parameter.rpartition(".")[2] for p in layout.experts[0].partitions}
    assert names == {"gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"}
    for partition in layout.experts[0].partitions:
        assert sum(piece.size for piece in partition) == layout_size(partition.shape)
    kinds = {p.kind for p in layout.parameters if ".experts." in p.name}
    assert kinds == {"experts"}


def layout_size(shape: tuple[int, ...]) -> int:
    """Entries of a parameter."""
    size = 1
    for n in shape:
        size *= n
    return size
