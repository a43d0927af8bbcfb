"""Where each head lives inside each parameter: immutable index data, JSON in and out."""

from fisherscope.layout.groups import Group, GroupTable, Member
from fisherscope.layout.model import (
    BLOCKS,
    AttentionLayout,
    HeadBlock,
    MlpLayout,
    ModelLayout,
    ParameterInfo,
)
from fisherscope.layout.partition import Partition
from fisherscope.layout.slices import Cut, ParameterSlice

__all__ = [
    "BLOCKS",
    "AttentionLayout",
    "Cut",
    "Group",
    "GroupTable",
    "HeadBlock",
    "Member",
    "MlpLayout",
    "ModelLayout",
    "ParameterInfo",
    "ParameterSlice",
    "Partition",
]
