"""The table of groups: what is in it, how large, in which order."""

import pytest
import torch

from fisherscope.layout import GroupTable


def names(layout):
    return [info.name for info in layout.parameters]


@pytest.fixture
def table(layout):
    return GroupTable.build(layout, names(layout))


def test_order(layout, table):
    """Parameters in model order, then heads by layer, block, part and head, then channels: a file format."""
    frame = table.frame()
    assert len(frame) == len(table)
    assert frame["kind"].drop_duplicates().tolist() == ["parameter", "head", "channel"]
    assert frame.query("kind == 'parameter'")["parameter"].tolist() == names(layout)
    heads = frame.query("kind == 'head'")
    places = heads[["layer", "block", "part", "index"]].apply(tuple, axis=1).tolist()
    expected = []
    for layer, counts in [(0, (6, 2, 2, 6)), (1, (4, 4, 4, 4))]:
        for block, count in zip("QKVO", counts, strict=True):
            for part in ("weight",) if block == "O" else ("weight", "bias"):
                expected += [(layer, block, part, head) for head in range(count)]
    assert places == expected
    channels = frame.query("kind == 'channel'")
    assert channels[["part", "index"]].apply(tuple, axis=1).tolist() == [
        (part, channel) for part in ("weight", "bias") for channel in range(5)
    ]


def test_sizes(layout, table):
    """A group's size is the number of its entries: over all members, that of their slices."""
    counted = torch.zeros(len(table), dtype=torch.long)
    for name, members in table.members.items():
        whole = torch.ones(1, *layout.parameter(name).shape)
        for member in members:
            if member.partition is None:
                counted[member.first] += whole.numel()
            else:
                pieces = member.partition.gather(whole).sum((1, 2)).long()
                counted[member.first : member.first + len(pieces)] += pieces
    assert counted.tolist() == [group.size for group in table.groups]


def test_grouped_queries(table):
    """K and V have one group per kv head, Q and O one per query head."""
    heads = table.frame().query("kind == 'head' and layer == 0 and part == 'weight'")
    assert heads.groupby("block").size().to_dict() == {"Q": 6, "K": 2, "V": 2, "O": 6}


def test_fused_parameter(layout, table):
    """One fused weight is a parameter group, block QKV, and the heads of three blocks."""
    name = "layers.1.attn.qkv.weight"
    members = table.members[name]
    assert [m.partition is None for m in members] == [True, False, False, False]
    assert table.groups[members[0].first].block == "QKV"
    assert [table.groups[m.first].block for m in members[1:]] == ["Q", "K", "V"]
    covered = torch.zeros(1, *layout.parameter(name).shape)
    for member in members[1:]:
        pieces = member.partition.gather(torch.ones_like(covered))
        member.partition.scatter(pieces, covered)
    assert covered.min() == 1


def test_channel_is_gate_row_up_row_and_down_column(table):
    """A channel collects from all weights of its MLP; with fewer weights it is smaller."""
    group = next(g for g in table.groups if g.kind == "channel" and g.part == "weight")
    assert (group.size, group.parameter) == (3 * 12, "layers.0.mlp")
    firsts = {table.members[f"layers.0.mlp.{name}.weight"][1].first for name in ("gate", "up", "down")}
    assert len(firsts) == 1


def test_a_selection(layout):
    """Only what is instrumented has groups; model order, whatever the order of the request."""
    table = GroupTable.build(layout, ["layers.0.mlp.up.weight", "layers.0.attn.k.weight"])
    assert [g.kind for g in table.groups] == ["parameter"] * 2 + ["head"] * 2 + ["channel"] * 5
    assert [g.parameter for g in table.groups[:2]] == ["layers.0.attn.k.weight", "layers.0.mlp.up.weight"]
    assert table.groups[-1].size == 12
    assert len(GroupTable.build(layout, [])) == 0


def test_blocks_and_parts_of_whole_parameters(table):
    """O's bias has no heads but belongs to O; parameters outside attention carry their kind."""
    found = {g.parameter: (g.block, g.part, g.layer) for g in table.groups if g.kind == "parameter"}
    assert found["layers.0.attn.o.bias"] == ("O", "bias", 0)
    assert found["layers.0.attn.q.bias"] == ("Q", "bias", 0)
    assert found["layers.0.mlp.down.bias"] == ("mlp", "bias", 0)
    assert found["embed.weight"] == ("embedding", "weight", -1)
    assert found["head.weight"] == ("output", "weight", -1)


def test_unknown_parameters_are_refused(layout):
    """A name that the model does not have is an error that names it."""
    with pytest.raises(KeyError, match="no parameter 'nothing'"):
        GroupTable.build(layout, ["embed.weight", "nothing"])
