"""A layout in a few lines, for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from fisherscope.layout.mlp import ExpertsLayout, MlpLayout
from fisherscope.words import counted

if TYPE_CHECKING:
    from fisherscope.layout.attention import AttentionLayout
    from fisherscope.layout.model import ModelLayout

_MOST_SHARED = 3
_SOURCES = {
    "registered": "described by a registered adapter",
    "detected": "heads found from the structure",
    "modules": "heads not found: modules and rows only",
}


def in_one_line(layout: ModelLayout) -> str:
    """What the model is: type, layers, parameters, who described it."""
    weights = sum(math.prod(info.shape) for info in layout.parameters)
    return (
        f"{layout.model_type}: {counted(len(layout.attention), 'attention layer')}, "
        f"{counted(len(layout.parameters), 'parameter')} with {counted(weights, 'weight')}; "
        f"{_SOURCES[layout.source]}"
    )


def in_lines(layout: ModelLayout) -> str:
    """That line, then one per kind of attention layer, and one each for MLPs, experts and the rest."""
    shared = [str(module) for module in layout.shared[:_MOST_SHARED]]
    if (more := len(layout.shared) - _MOST_SHARED) > 0:
        shared.append(f"{more} more like that")
    lines = [
        *(("heads", words) for words in _attention(layout)),
        ("MLPs", _pieces(layout.mlps, "MLP", "channel")),
        ("experts", _pieces(layout.experts, "mixture", "expert")),
        ("rows", f"{counted(len(layout.rows), 'linear map')} of no known role" if layout.rows else ""),
        ("shared", "; ".join(shared)),
    ]
    return "\n".join([in_one_line(layout), *(f"  {name}: {words}" for name, words in lines if words)])


def _attention(layout: ModelLayout) -> Iterable[str]:
    kinds: dict[str, list[int]] = {}
    for attention in layout.attention:
        kinds.setdefault(_heads(attention), []).append(attention.layer)
    several = len({attention.stack for attention in layout.attention}) > 1
    for words, layers in kinds.items():
        stack, _, what = words.partition("|")
        where = f"{stack} " if several else ""
        yield f"{counted(len(layers), where + 'layer')} with {what}"


def _heads(attention: AttentionLayout) -> str:
    """Stack, number of heads, and blocks: ``decoder|8 query heads on 2 kv heads; Q K V O``."""
    heads = counted(attention.n_heads, "head")
    if attention.n_kv_heads != attention.n_heads:
        kv = counted(attention.n_kv_heads, "kv head")
        heads = f"{counted(attention.n_heads, 'query head')} on {kv}"
    blocks = " ".join(block.name for block in attention.blocks)
    biased = " ".join(block.name for block in attention.blocks if block.bias is not None)
    biases = f", biases of {biased}" if biased else ""
    coupled = f", a norm over all heads of {' '.join(attention.coupled)}" if attention.coupled else ""
    return f"{attention.stack}|{heads}; blocks {blocks}{biases}{coupled}"


def _pieces(modules: Sequence[MlpLayout | ExpertsLayout], module: str, piece: str) -> str:
    if not modules:
        return ""
    sizes = sorted({len(each) for each in modules})
    some = f"{sizes[0]:,} to {sizes[-1]:,} {piece}s" if len(sizes) > 1 else counted(sizes[0], piece)
    return f"{counted(len(modules), module)} of {some}"
