"""Tiny random models of every supported family, and the literal loop that everything is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 61
_OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 1)


@dataclass(frozen=True)
class Setting:
    """One model: its id in test names, how to build its config, and how many attention layers it has."""

    name: str
    config: Callable[[], transformers.PretrainedConfig]
    auto: str = "AutoModelForCausalLM"
    attention_layers: int = 2


def _config(name: str, **changes: object) -> Callable[[], transformers.PretrainedConfig]:
    common = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 40,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return lambda: getattr(transformers, name)(**(common | changes))


def _gpt(name: str, **changes: object) -> Callable[[], transformers.PretrainedConfig]:
    common = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return lambda: getattr(transformers, name)(**(common | changes))


def _gpt_neo() -> transformers.PretrainedConfig:
    return transformers.GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
        window_size=4,
        bos_token_id=1,
        eos_token_id=2,
    )


def _moe(name: str, **changes: object) -> Callable[[], transformers.PretrainedConfig]:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return _config(name, **(sizes | changes))


def _latent(**changes: object) -> Callable[[], transformers.PretrainedConfig]:
    """DeepSeek's attention: the sizes of query, key and value all differ."""
    sizes = {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 10,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    return _moe("DeepseekV3Config", **(sizes | changes))


def _vit() -> transformers.PretrainedConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    return transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)


def _t5(**changes: object) -> Callable[[], transformers.PretrainedConfig]:
    sizes = {"d_model": 32, "d_kv": 6, "num_layers": 2, "num_heads": 4, "d_ff": 40, "vocab_size": VOCABULARY}
    return lambda: transformers.T5Config(
        **(sizes | {"decoder_start_token_id": 0, "pad_token_id": 0} | changes)
    )


SETTINGS = [
    Setting("llama", _config("LlamaConfig")),
    Setting("llama-biases", _config("LlamaConfig", attention_bias=True, mlp_bias=True)),
    Setting("mistral-head-dim", _config("MistralConfig", head_dim=12)),
    Setting("qwen2", _config("Qwen2Config")),
    Setting("qwen2-tied-mqa", _config("Qwen2Config", num_key_value_heads=1, tie_word_embeddings=True)),
    Setting("qwen3-head-dim", _config("Qwen3Config", head_dim=16)),
    Setting("gpt2", _gpt("GPT2Config")),
    Setting("gpt_neo", _gpt_neo),
    Setting("gptj", _gpt("GPTJConfig", rotary_dim=4)),
    Setting("opt", _config("OPTConfig", ffn_dim=40, word_embed_proj_dim=32)),
    Setting("gpt_neox", _config("GPTNeoXConfig", num_key_value_heads=4)),
    Setting("bloom", _config("BloomConfig", n_layer=2, n_head=4)),
    Setting("falcon-mqa", _config("FalconConfig", multi_query=True, bias=True)),
    Setting("falcon-mha-alibi", _config("FalconConfig", multi_query=False, alibi=True, parallel_attn=False)),
    Setting("falcon-new-decoder", _config("FalconConfig", new_decoder_architecture=True, num_kv_heads=2)),
    Setting(
        "mpt",
        lambda: transformers.MptConfig(
            d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY, max_seq_len=64, expansion_ratio=2
        ),
    ),
    Setting("codegen", _gpt("CodeGenConfig", n_head=8, rotary_dim=4)),
    Setting("phi", _config("PhiConfig", qk_layernorm=True)),
    Setting("phi3", _config("Phi3Config")),
    Setting("gemma", _config("GemmaConfig", head_dim=12)),
    Setting("gemma2", _config("Gemma2Config", head_dim=12, sliding_window=4)),
    Setting("gemma3-text", _config("Gemma3TextConfig", head_dim=12, sliding_window=4)),
    Setting("olmo", _config("OlmoConfig")),
    Setting("olmo2", _config("Olmo2Config")),
    Setting("olmo3", _config("Olmo3Config")),
    Setting("stablelm", _config("StableLmConfig", use_qkv_bias=True, qk_layernorm=True)),
    Setting("starcoder2", _config("Starcoder2Config")),
    Setting("granite", _config("GraniteConfig", attention_bias=True)),
    Setting("cohere", _config("CohereConfig", use_qk_norm=True)),
    Setting("cohere2", _config("Cohere2Config", sliding_window=4)),
    Setting("cwm", _config("CwmConfig", head_dim=8)),
    Setting("ernie4_5", _config("Ernie4_5Config", head_dim=8)),
    Setting("exaone4", _config("Exaone4Config")),
    Setting("seed_oss", _config("SeedOssConfig", head_dim=12)),
    Setting("smollm3", _config("SmolLM3Config")),
    Setting("vaultgemma", _config("VaultGemmaConfig", head_dim=12)),
    Setting("glm", _config("GlmConfig", head_dim=8)),
    Setting("glm4", _config("Glm4Config", head_dim=8)),
    Setting("apertus", _config("ApertusConfig")),
    Setting("arcee", _config("ArceeConfig")),
    Setting("nemotron", _config("NemotronConfig")),
    Setting("mixtral", _config("MixtralConfig", num_local_experts=4)),
    Setting("qwen2_moe", _moe("Qwen2MoeConfig", shared_expert_intermediate_size=24, decoder_sparse_step=2)),
    Setting("qwen3_moe", _moe("Qwen3MoeConfig", head_dim=12)),
    Setting("olmoe", _config("OlmoeConfig", num_experts=4, num_experts_per_tok=2)),
    Setting("gpt_oss", _moe("GptOssConfig", num_local_experts=4, head_dim=8, sliding_window=4)),
    Setting(
        "qwen3_next",
        _moe(
            "Qwen3NextConfig",
            head_dim=8,
            num_hidden_layers=4,
            layer_types=["full_attention", "linear_attention"] * 2,
            shared_expert_intermediate_size=24,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    Setting(
        "llama4",
        _config(
            "Llama4TextConfig",
            head_dim=8,
            intermediate_size_mlp=24,
            num_local_experts=4,
            interleave_moe_layer_step=2,
            attention_chunk_size=8,
        ),
    ),
    Setting("deepseek_v3", _latent()),
    Setting("deepseek_v3-direct-queries", _latent(q_lora_rank=None, attention_bias=True)),
]

# Models that are no causal language models.
OTHERS = [
    Setting("bert", _config("BertConfig"), "AutoModelForMaskedLM"),
    Setting("roberta", _config("RobertaConfig"), "AutoModelForMaskedLM"),
    Setting("vit", _vit, "AutoModelForImageClassification"),
    Setting("t5", _t5(), "AutoModelForSeq2SeqLM", attention_layers=6),
    Setting(
        "t5-gated",
        _t5(feed_forward_proj="gated-gelu", num_decoder_layers=1),
        "AutoModelForSeq2SeqLM",
        attention_layers=4,
    ),
]
ALL = [*SETTINGS, *OTHERS]


def named(name: str) -> Setting:
    """The setting of that name."""
    return next(setting for setting in ALL if setting.name == name)


def build(setting: Setting, *, seed: int = 0, layers: int | None = None) -> nn.Module:
    """A random model whose biases and norms are random, too, so that nothing is accidentally zero.

    With as many layers as its setting says, or ``layers``.
    """
    torch.manual_seed(seed)
    config = setting.config()
    if layers is not None:
        config.num_hidden_layers = layers
    model = getattr(transformers, setting.auto).from_config(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def rows(n: int, *, seed: int = 0, longest: int = 11) -> list[dict[str, list[int]]]:
    """Rows of unequal length with a prompt that bears no loss."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = int(torch.randint(4, longest + 1, (1,), generator=generator)) if i else longest
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        prompt = int(torch.randint(0, length - 2, (1,), generator=generator))
        out.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return out


def loop(model: nn.Module, data: list[dict[str, list[int]]]) -> list[dict[str, Tensor]]:
    """The oracle: one unpadded sample at a time, one backward each, gradients of the summed loss."""
    out = []
    for row in data:
        model.zero_grad()
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").backward()
        out.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    return out


def tokens(row: dict[str, list[int]]) -> int:
    """T: labels that bear loss after the causal shift."""
    return sum(label != -100 for label in row["labels"][1:])


def relative_error(found: Tensor, expected: Tensor, *, floor: float = 0.0) -> float:
    """Largest difference relative to the largest expected entry, or to ``floor`` if that is larger."""
    scale = expected.abs().max().clamp_min(max(floor, torch.finfo(torch.float32).tiny))
    return float((found - expected).abs().max() / scale)


def skip_where_old(reason: str) -> None:
    """Skip a test of what transformers 5.0 does otherwise than what came after it."""
    if _OLD:
        pytest.skip(f"transformers {transformers.__version__}: {reason}")


class PadsOnTheLeft:
    """The least that a collection needs to know of a tokenizer: where it pads, and no pad token."""

    padding_side = "left"
    pad_token_id = None
    chat_template = None

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {}

    def get_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))
