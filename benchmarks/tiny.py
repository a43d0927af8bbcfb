"""Tiny random models out of any config class of transformers: sizes are brought down by what they are called.

Nothing is downloaded. A model keeps its kinds of layers and its special cases; only widths, depths and
numbers of things shrink. ``CHANGES`` holds what the rules cannot know of single model types.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

HIDDEN = 32
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
LAYERS = 4
VOCABULARY = 64
IMAGE = 32
LENGTH = 5
LARGEST = 3_000_000

# The first pattern that matches a whole name decides; a size is never made larger than its default.
RULES: list[tuple[str, int]] = [
    (r".*vocab.*|.*codebook_size|num_centroids", VOCABULARY),
    (r".*positions|.*position_embeddings|max_seq_len|n_ctx|context_length", 64),
    (r".*(num_key_value_heads|kv_n_heads|num_kv_heads)", KV_HEADS),
    (r".*(attention_heads|num_heads|n_heads?|key_heads|value_heads|mamba_heads)", HEADS),
    (r".*rope_head_dim|rotary_dim", 4),
    (r"(qk_nope|v|linear_key|linear_value|mamba|index)_head_dim|mamba_d_head|mamba_headdim", 8),
    (r".*head_dim|kv_channels|dim_head|d_kv|attention_head_size", HEAD_DIM),
    (r".*rank", 16),
    (r".*(per_tok|topk|top_k|moe_k|top_k_experts)", 2),
    (r".*shared_experts|zero_expert_num|topk_group|n_group", 1),
    (r".*groups", 2),
    (r".*(num|routed|local)_experts", 4),
    (r".*(intermediate|ffn|feed_forward|inner|dff|dim_ff|mlp_dim|d_ff).*", 40),
    (r".*(d_state|state_size)", 8),
    (r".*(chunk_size|chunk_length|block_size)", 16),
    (r".*(window|local_attention).*", 4),
    (r"image_size|crop_size|.*input_size", IMAGE),
    (r"patch_size", 8),
    (r".*(hidden|embd|emb|d_model|dim|size|width|channels?|features?)(_.*)?", HIDDEN),
]

DEPTH = re.compile(r".*(hidden_layers|num_layers|n_layers?|coder_layers|num_blocks)|depth")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKEN = re.compile(r".*token(_id|_index)?|(mask|unk|image)_(index|token)")

# Arguments by model type that no rule gives; configs inside a config are looked up by their own type.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), HEADS),
        **dict.fromkeys(("swa_q_lora_rank", "swa_kv_lora_rank", "swa_head_dim"), 16),
        **dict.fromkeys(("swa_qk_nope_head_dim", "swa_v_head_dim"), 8),
        "sliding_window": 4,
    },
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "intermediate_size": 40,
    },
    "gemma4_text": {"global_head_dim": 2 * HEAD_DIM},
    "gemma4_unified_text": {"global_head_dim": 2 * HEAD_DIM},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "helium": {"head_dim": HIDDEN // HEADS},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 4, "num_layers": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 8)},
    "swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "patch_size": 4},
    "swinv2": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 16, "patch_size": 4},
    "xlstm": {"hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "use_mamba_kernels": False},
}


def tiny_config(config_class: type[PretrainedConfig], *, causal: bool = True) -> PretrainedConfig:
    """A config of that class with every size brought down.

    Args:
        config_class: the class; it has a default for every argument.
        causal: make a decoder of what may be an encoder or a decoder.
    """
    arguments = tiny_arguments(config_class)
    if causal and hasattr(config_class(), "is_decoder"):
        arguments["is_decoder"] = True
    return config_class(**arguments)


def tiny_arguments(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    """Arguments of a config class: its sizes and token ids, lists per layer, and the configs inside it."""
    default = config_class()
    own = _own_arguments(config_class)
    special = iter(range(VOCABULARY - 1, 0, -1))
    arguments: dict[str, Any] = {}
    for name, value in own.items():
        if TOKEN.fullmatch(name) and type(value) is int:
            arguments[name] = TOKENS[name] if name in TOKENS else next(special)
        elif type(value) is int:
            arguments[name] = _small(name, value)
    if "vocab_size" in own:
        arguments |= {name: token for name, token in TOKENS.items() if not hasattr(default, name)}
    if "num_key_value_heads" in own:
        arguments["num_key_value_heads"] = HEADS if "kv_lora_rank" in own else KV_HEADS
    if "head_dim" in own and vars(default).get("head_dim") is None:
        arguments["head_dim"] = HIDDEN // HEADS
    arguments |= _per_layer(default, own.keys())
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            arguments[name] = {"model_type": value.model_type} | tiny_arguments(type(value))
    return _merged(arguments, CHANGES.get(config_class.model_type, {}))


def random_model(model_class: Any, config: PretrainedConfig) -> nn.Module:
    """A model in evaluation mode, in float32, whose weights are random and finite, biases and norms too.

    Raises:
        ValueError: the model is not tiny; its config has a size with a name that no rule knows.
    """
    config = _config_of(model_class, config)
    size = _size(model_class, config)
    if size > LARGEST:
        raise ValueError(f"its tiny config has {size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    with _unset_is_nan():
        model: nn.Module = model_class._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[parameter.isnan()] = 0
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.eval()
    return model


def text(config: PretrainedConfig) -> dict[str, Any]:
    """One row of ids that no special token has, or one row for each codebook of a model of music."""
    generator = torch.Generator().manual_seed(0)
    rows = getattr(config, "num_codebooks", 1) if config.model_type.startswith("musicgen") else 1
    return {"input_ids": torch.randint(8, VOCABULARY // 2, (rows, LENGTH), generator=generator)}


def image(config: PretrainedConfig) -> dict[str, Any]:
    """One image of the size that the model takes."""
    size = (1, getattr(config, "num_channels", 3), config.image_size, config.image_size)
    return {"pixel_values": torch.rand(size, generator=torch.Generator().manual_seed(0))}


def _size(model_class: Any, config: PretrainedConfig) -> int:
    """Number of parameters, before any is allocated; 0 for a model that cannot be built without data."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in model_class._from_config(config).parameters())
    except (NotImplementedError, RuntimeError):
        return 0


@contextmanager
def _unset_is_nan() -> Iterator[None]:
    """Parameters that a model leaves as they were allocated are NaN, not whatever was in memory."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _own_arguments(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


def _small(name: str, value: int) -> int:
    if DEPTH.fullmatch(name):
        return LAYERS
    for pattern, size in RULES:
        if re.fullmatch(pattern, name):
            return min(value, size)
    return min(value, HIDDEN) if value > 256 else value


def _per_layer(default: PretrainedConfig, accepted: Any) -> dict[str, Any]:
    """Lists with an entry per layer, cut to layers that show every combination of entries, in their order."""
    depth: int = getattr(default, "num_hidden_layers", 0)
    lists = {
        name: list(value)
        for name, value in vars(default).items()
        if name in accepted and isinstance(value, list | tuple) and len(value) == depth
    }
    if not depth or not lists:
        return {}
    seen: dict[str, int] = {}
    for number, entries in enumerate(zip(*lists.values(), strict=True)):
        seen.setdefault(repr(entries), number)
    # some models insist on the kind of their last layer
    chosen = {*seen.values(), depth - 1}
    chosen |= set([n for n in range(depth) if n not in chosen][: max(0, LAYERS - len(chosen))])
    cut = {name: [_entry(name, values[n]) for n in sorted(chosen)] for name, values in lists.items()}
    return cut | {"num_hidden_layers": len(chosen)}


def _entry(name: str, value: Any) -> Any:
    return _small(name.removesuffix("_per_layer"), value) if type(value) is int else value


def _merged(arguments: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    out = dict(arguments)
    for name, value in changes.items():
        inside = out.get(name)
        out[name] = _merged(inside, value) if isinstance(inside, dict) and isinstance(value, dict) else value
    return out


def _config_of(model_class: Any, config: PretrainedConfig) -> PretrainedConfig:
    """The config that the class itself takes: a model of text may be named by the config of several parts."""
    wanted: type[PretrainedConfig] = model_class.config_class
    if isinstance(config, wanted):
        return config
    return next((part for part in vars(config).values() if isinstance(part, wanted)), config)
