"""Where each head lives inside each parameter: immutable index data, JSON in and out."""

from fisherscope.layout.attention import BLOCKS, AttentionLayout, HeadBlock
from fisherscope.layout.groups import Group, GroupTable, Member
from fisherscope.layout.mlp import ExpertsLayout, MlpLayout, RowsLayout
from fisherscope.layout.model import ModelLayout, ParameterInfo
from fisherscope.layout.partition import Partition
from fisherscope.layout.query_heads import per_query_head
from fisherscope.layout.shared import SharedModule
from fisherscope.layout.slices import Cut, ParameterSlice

__all__ = [
    "BLOCKS",
    "AttentionLayout",
    "Cut",
    "ExpertsLayout",
    "Group",
    "GroupTable",
    "HeadBlock",
    "Member",
    "MlpLayout",
    "ModelLayout",
    "ParameterInfo",
    "ParameterSlice",
    "Partition",
    "RowsLayout",
    "SharedModule",
    "per_query_head",
]
