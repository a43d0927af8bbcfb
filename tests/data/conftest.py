"""Small tokenizers of the kinds that differ in what matters here: special tokens, offsets, merges."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}~{% endgeneration %}"
    "{% else %}{{ m.role[0] | upper }}:{{ m.content }}~{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="session")
def characters():
    """One token per byte, no special tokens added: the demo's kind."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<eos>", "<pad>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return Qwen2Tokenizer(
        vocab=vocabulary, merges=[], unk_token="<eos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.fixture
def chatty(characters):
    """The character tokenizer with a chat template that marks assistant turns."""
    characters.chat_template = CHAT
    yield characters
    characters.chat_template = None


def byte_pairs(*, trim_offsets):
    """Byte-level merges of a small corpus: tokens such as " world" that straddle boundaries."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("w", "o"), ("r", "l"), ("rl", "d"), ("wo", "rld"), ("Ġ", "world"), ("Ġ", "Ġ"), ("a", "b")]
    symbols = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(scope="session")
def merging():
    return byte_pairs(trim_offsets=False)


@pytest.fixture(scope="session")
def trimming():
    """As RoBERTa's: white space is trimmed from the offsets, so some tokens have none left."""
    return byte_pairs(trim_offsets=True)


@pytest.fixture(scope="session")
def framing():
    """Adds a token at the beginning and one at the end, as Llama's (or BERT's) does."""
    words = ["<s>", "</s>", "<unk>", "one", "two", "three", "four"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


class SlowView:
    """A tokenizer seen without its character offsets, as one written in Python is."""

    is_fast = False
    pad_token_id = None
    eos_token_id = None

    def __init__(self, fast):
        self._fast = fast
        self.chat_template = fast.chat_template

    def __call__(self, text):
        return {"input_ids": self._fast(text)["input_ids"]}

    def decode(self, ids):
        return self._fast.decode(ids)


@pytest.fixture(params=["fast", "slow"])
def speed(request):
    """Runs a test with a tokenizer that gives offsets and with one that does not."""
    return (lambda tokenizer: tokenizer) if request.param == "fast" else SlowView
