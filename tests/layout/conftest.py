"""Partitions of any kind, and the layout of a small model that has every kind of parameter."""

import pytest
from hypothesis import strategies as st

from fisherscope.layout import (
    AttentionLayout,
    HeadBlock,
    MlpLayout,
    ModelLayout,
    ParameterInfo,
    Partition,
)

WIDTH, HEADS, KV_HEADS, HEAD_DIM, CHANNELS = 12, 6, 2, 3, 5


@st.composite
def partitions(draw):
    """Pieces anywhere along any axis of a small parameter, in any order, not necessarily adjacent."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    axis = draw(st.integers(0, len(shape) - 1))
    width = draw(st.integers(1, 3))
    gaps = draw(st.lists(st.integers(0, 2), min_size=1, max_size=5))
    starts, end = [], 0
    for gap in gaps:
        starts.append(end + gap)
        end = starts[-1] + width
    length = end + draw(st.integers(0, 2))
    shape = (*shape[:axis], length, *shape[axis + 1 :])
    return Partition("p", shape, axis, tuple(draw(st.permutations(starts))), width)


st.register_type_strategy(Partition, partitions())


def _separate(layer):
    """Grouped-query attention with separate projections and an MLP with gate, up and down."""
    at, mlp = f"layers.{layer}.attn", f"layers.{layer}.mlp"
    queries, keys = (HEADS * HEAD_DIM, WIDTH), (KV_HEADS * HEAD_DIM, WIDTH)

    def block(name, shape, axis, count):
        weight = Partition.regular(f"{at}.{name.lower()}.weight", shape, axis, count, HEAD_DIM)
        if name == "O":
            return HeadBlock(name, weight)
        bias = Partition.regular(f"{at}.{name.lower()}.bias", shape[:1], 0, count, HEAD_DIM)
        return HeadBlock(name, weight, bias)

    attention = AttentionLayout(
        layer=layer,
        module=at,
        output=f"{at}.o",
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        blocks=(
            block("Q", queries, 0, HEADS),
            block("K", keys, 0, KV_HEADS),
            block("V", keys, 0, KV_HEADS),
            block("O", queries[::-1], 1, HEADS),
        ),
    )
    channels = MlpLayout(
        layer=layer,
        module=mlp,
        weights=(
            Partition.regular(f"{mlp}.gate.weight", (CHANNELS, WIDTH), 0, CHANNELS, 1),
            Partition.regular(f"{mlp}.up.weight", (CHANNELS, WIDTH), 0, CHANNELS, 1),
            Partition.regular(f"{mlp}.down.weight", (WIDTH, CHANNELS), 1, CHANNELS, 1),
        ),
        biases=(Partition.regular(f"{mlp}.up.bias", (CHANNELS,), 0, CHANNELS, 1),),
    )
    infos = [ParameterInfo(f"{at}.norm.weight", (WIDTH,), "norm", layer)]
    for part in attention.blocks:
        infos.append(ParameterInfo(part.weight.parameter, part.weight.shape, "attention", layer))
        if part.bias is not None:
            infos.append(ParameterInfo(part.bias.parameter, part.bias.shape, "attention", layer))
    infos.append(ParameterInfo(f"{at}.o.bias", (WIDTH,), "attention", layer))
    infos += [
        ParameterInfo(p.parameter, p.shape, "mlp", layer) for p in (*channels.weights, *channels.biases)
    ]
    infos.append(ParameterInfo(f"{mlp}.down.bias", (WIDTH,), "mlp", layer))
    return attention, channels, infos


def _fused(layer):
    """Q, K and V side by side along axis 1 of one transposed weight, as in GPT-2."""
    at, heads = f"layers.{layer}.attn", WIDTH // HEAD_DIM
    fused = {"weight": (WIDTH, 3 * WIDTH), "bias": (3 * WIDTH,)}

    def block(name, offset):
        weight, bias = (
            Partition.regular(f"{at}.qkv.{part}", shape, len(shape) - 1, heads, HEAD_DIM, offset=offset)
            for part, shape in fused.items()
        )
        return HeadBlock(name, weight, bias)

    output = HeadBlock("O", Partition.regular(f"{at}.o.weight", (WIDTH, WIDTH), 0, heads, HEAD_DIM))
    blocks = (block("Q", 0), block("K", WIDTH), block("V", 2 * WIDTH), output)
    infos = [ParameterInfo(f"{at}.qkv.{part}", shape, "attention", layer) for part, shape in fused.items()]
    infos.append(ParameterInfo(f"{at}.o.weight", (WIDTH, WIDTH), "attention", layer))
    return AttentionLayout(layer, at, f"{at}.o", heads, heads, blocks), infos


@pytest.fixture(scope="session")
def layout():
    """Layer 0 has separate projections with grouped queries, layer 1 a fused one, layer 2 no attention."""
    separate, channels, first = _separate(0)
    fused, second = _fused(1)
    return ModelLayout(
        model_type="tiny",
        parameters=(
            ParameterInfo("embed.weight", (7, WIDTH), "embedding"),
            *first,
            *second,
            ParameterInfo("layers.2.norm.weight", (WIDTH,), "norm", 2),
            ParameterInfo("head.weight", (7, WIDTH), "output"),
        ),
        attention=(separate, fused),
        mlps=(channels,),
    )
