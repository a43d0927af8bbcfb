"""The demo's architecture and its tokenizer."""

from __future__ import annotations

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

EOS, PAD = "<|endoftext|>", "<|pad|>"


def build_tokenizer() -> Qwen2Tokenizer:
    """Returns a byte-level tokenizer without merges: one token per byte, so one per ASCII character.

    It is a genuine ``Qwen2Tokenizer`` because that class is what transformers builds beside a Qwen2
    configuration: another kind of character tokenizer would silently lose its spaces and newlines there. All
    256 bytes are in the vocabulary because that class also drops, without a word, every byte that is not.
    """
    symbols = [*sorted(ByteLevel.alphabet()), EOS, PAD]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=EOS, eos_token=EOS, pad_token=PAD)


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Returns the untrained model: 4 layers, 8 query heads on 2 key/value heads, width 128."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)
