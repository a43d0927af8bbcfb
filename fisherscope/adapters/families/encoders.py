"""Encoders, and encoders with decoders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from fisherscope.adapters.build import Stack
from fisherscope.adapters.modules import is_linear_map
from fisherscope.adapters.patterns import Mlp, Separate
from fisherscope.adapters.registry import register

_BERT = Separate("attention", "self.query", "self.key", "self.value", "output.dense")


@register("bert", "camembert", "electra", "roberta", "xlm-roberta", "xlm-roberta-xl")
def bert(model: nn.Module, config: Any) -> Stack | list[Stack]:
    """Separate projections; with cross attention where it is configured.

    The output module adds the residual and a norm, so only its projection is looked at.
    """
    del model
    heads = config.num_attention_heads
    mlp = Mlp("", expand=("intermediate.dense",), contract="output.dense")
    if not config.is_decoder:
        return Stack("encoder.layer", _BERT, mlp, heads, heads, name="encoder")
    own = Stack("encoder.layer", _BERT, mlp, heads, heads)
    if not config.add_cross_attention:
        return own
    return [own, replace(own, attention=replace(_BERT, module="crossattention"), mlp=None, name="cross")]


@register("vit")
def vit(model: nn.Module, config: Any) -> Stack:
    """Separate projections, whose names differ between versions of transformers."""
    heads = config.num_attention_heads
    base: Any = getattr(model, "base_model", model)
    if hasattr(base, "encoder"):
        attention = Separate(
            "attention", "attention.query", "attention.key", "attention.value", "output.dense"
        )
        mlp = Mlp("", expand=("intermediate.dense",), contract="output.dense")
        return Stack("encoder.layer", attention, mlp, heads, heads, name="encoder")
    return Stack(
        "layers",
        Separate("attention"),
        Mlp("mlp", expand=("fc1",), contract="fc2"),
        heads,
        heads,
        name="encoder",
    )


@register("mt5", "t5", "umt5")
def t5(model: nn.Module, config: Any) -> list[Stack]:
    """Separate projections in encoder, decoder and cross attention; the MLP may have a gate."""
    attention = Separate("layer.0.SelfAttention", "q", "k", "v", "o")
    gated = any(name.endswith(".wi_1") and is_linear_map(m) for name, m in model.named_modules())
    expand = ("wi_0", "wi_1") if gated else ("wi",)
    stacks = []
    for name, block in (("encoder", 1), ("decoder", 2)):
        mlp = Mlp(f"layer.{block}.DenseReluDense", expand, contract="wo")
        stacks.append(Stack(f"{name}.block", attention, mlp, config.num_heads, config.num_heads, name=name))
        if name == "decoder":
            cross = replace(attention, module="layer.1.EncDecAttention")
            stacks.append(replace(stacks[-1], attention=cross, mlp=None, name="cross"))
        if not any(path.endswith("decoder") for path, _ in model.named_modules()):
            break  # T5EncoderModel
    return stacks
