"""The table of groups: what per-sample quantities are reduced over."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import pandas as pd

from fisherscope.layout.attention import role_of
from fisherscope.layout.mlp import ExpertsLayout, MlpLayout, RowsLayout
from fisherscope.layout.model import ModelLayout
from fisherscope.layout.partition import Partition

GroupKind = Literal["head", "channel", "parameter", "expert", "row"]


@dataclass(frozen=True, slots=True)
class Group:
    """One group of entries.

    Attributes:
        kind: "head" (a head slice of one weight or bias), "channel" (an MLP channel: gate row, up row
            and down column), "parameter" (a whole parameter), "expert" (one expert of a mixture) or "row"
            (an output feature of a linear map whose heads or channels are not described).
        stack, layer, block: place in the model; block is Q, K, V, O, "mlp", "experts", or the parameter's
            kind; "Q.default" or "mlp.default" for what an adapter of that name adds.
        index: number of the head, channel, expert or row; -1 for a whole parameter.
        part: "weight" or "bias".
        parameter: the parameter's name; for a channel or an expert, the path of its module.
        size: number of entries.
    """

    kind: GroupKind
    stack: str
    layer: int
    block: str
    index: int
    part: str
    parameter: str
    size: int


@dataclass(frozen=True, slots=True)
class Member:
    """What one parameter adds to the groups: its pieces go to the groups ``first, first + 1, ...``.

    A ``partition`` of None stands for the whole parameter, as one piece.
    """

    partition: Partition | None
    first: int


@dataclass(frozen=True)
class GroupTable:
    """All groups of a set of instrumented parameters, in a fixed order.

    The order is part of the store format: for each parameter in model order the whole parameter;
    then the head slices by layer, block, part and head; then the MLP channels by layer and part; then
    the experts likewise; then the rows by module and part.
    """

    groups: tuple[Group, ...]
    members: dict[str, tuple[Member, ...]] = field(hash=False)

    @classmethod
    def build(cls, layout: ModelLayout, parameters: Iterable[str]) -> GroupTable:
        """Groups of the given parameters; a channel has the entries of those of its parameters given."""
        chosen = set(parameters)
        groups: list[Group] = []
        members: dict[str, list[Member]] = {p.name: [] for p in layout.parameters if p.name in chosen}
        if unknown := chosen - members.keys():
            raise KeyError(f"the model has no parameter {min(unknown)!r}")
        blocks = _blocks(layout)
        for info in layout.parameters:
            if info.name in chosen:
                members[info.name].append(Member(None, len(groups)))
                block, part = blocks.get(info.name, (info.kind, _part_of(info.name)))
                size = math.prod(info.shape)
                groups.append(Group("parameter", info.stack, info.layer, block, -1, part, info.name, size))
        for attention, block_layout in layout.head_blocks():
            for part, partition in (("weight", block_layout.weight), ("bias", block_layout.bias)):
                if partition is None or partition.parameter not in chosen:
                    continue
                members[partition.parameter].append(Member(partition, len(groups)))
                groups.extend(
                    Group(
                        "head",
                        attention.stack,
                        attention.layer,
                        block_layout.name,
                        head,
                        part,
                        partition.parameter,
                        partition.slice_size,
                    )
                    for head in range(len(partition))
                )
        for mlp in layout.mlps:
            _add_pieces("channel", mlp.block, mlp, chosen, groups, members)
        for experts in layout.experts:
            _add_pieces("expert", "experts", experts, chosen, groups, members)
        for rows in layout.rows:
            _add_rows(rows, layout, chosen, groups, members)
        return cls(tuple(groups), {name: tuple(found) for name, found in members.items()})

    def __len__(self) -> int:
        return len(self.groups)

    def frame(self) -> pd.DataFrame:
        """One row per group: kind, stack, layer, block, index, part, parameter, size."""
        columns = list(Group.__dataclass_fields__)
        return pd.DataFrame({c: [getattr(g, c) for g in self.groups] for c in columns})


def _part_of(name: str) -> str:
    return "bias" if name.rpartition(".")[2] == "bias" else "weight"


def _blocks(layout: ModelLayout) -> dict[str, tuple[str, str]]:
    """Block and part of each parameter that is cut into heads (of a fused one "QKV", or "QKV.default")."""
    names: dict[str, str] = {}
    for attention, block in layout.head_blocks():
        for partition in (block.weight, block.bias):
            if partition is not None:
                before = role_of(names.get(partition.parameter, ""))
                names[partition.parameter] = before + block.name
        # O's bias belongs to no head, but it does belong to the block
        if block.name == "O":
            names.setdefault(f"{attention.output}.bias", "O")
    return {name: (blocks, _part_of(name)) for name, blocks in names.items()}


def _add_pieces(
    kind: GroupKind,
    block: str,
    module: MlpLayout | ExpertsLayout,
    chosen: set[str],
    groups: list[Group],
    members: dict[str, list[Member]],
) -> None:
    """Groups that have one piece of each of a module's parameters."""
    for part, partitions in (("weight", module.weights), ("bias", module.biases)):
        present = [p for p in partitions if p.parameter in chosen]
        if not present:
            continue
        first, size = len(groups), sum(p.slice_size for p in present)
        for partition in present:
            members[partition.parameter].append(Member(partition, first))
        groups.extend(
            Group(kind, module.stack, module.layer, block, index, part, module.module, size)
            for index in range(len(present[0]))
        )


def _add_rows(
    rows: RowsLayout,
    layout: ModelLayout,
    chosen: set[str],
    groups: list[Group],
    members: dict[str, list[Member]],
) -> None:
    for part, partition in (("weight", rows.weight), ("bias", rows.bias)):
        if partition is None or partition.parameter not in chosen:
            continue
        members[partition.parameter].append(Member(partition, len(groups)))
        block = layout.parameter(partition.parameter).kind
        groups.extend(
            Group("row", rows.stack, rows.layer, block, row, part, partition.parameter, partition.slice_size)
            for row in range(len(partition))
        )
