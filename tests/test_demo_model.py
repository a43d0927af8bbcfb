"""The embedded demo: its files agree with each other, and its model solves what it is said to solve."""

import json
import string
from pathlib import Path

import pytest

from fisherscope import demo

TASKS = ["math", "code", "math_flipped"]
SHIPPED = Path(demo.__file__).parent


def rows(task):
    return [json.loads(line) for line in demo.task_files()[task].read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(demo.model_path()).eval()


TEXTS = [
    *string.printable.strip(),
    string.ascii_letters + string.digits + string.punctuation,
    "47+25=72\n",
    " leading and trailing ",
    "two  spaces,   three\n\nand\n\n\nnewlines \n ",
    "it's we're I'll",
    "a , b . c ! d ' s",
    "tab\tand bytes beyond ASCII: é ∑ 🙂",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(tokenizer, text):
    """AutoTokenizer loses nothing: neither spaces nor newlines nor any other byte."""
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_tokenizer_is_the_class_that_transformers_expects_beside_qwen2(tokenizer):
    """Any other class would be replaced on load; padding is a token of its own."""
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    assert len(tokenizer) == 258
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert tokenizer("47+25=\n", padding="max_length", max_length=9)["attention_mask"].count(0) == 2


def test_shape_of_the_model(model):
    """Grouped-query attention with 8 query heads on 2 key/value heads, tokens within the vocabulary."""
    config = model.config
    assert config.model_type == "qwen2"
    assert (config.num_hidden_layers, config.hidden_size) == (4, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert config.vocab_size == 258


def test_everything_fits_in_four_megabytes():
    """Package data stays small."""
    total = sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file())
    assert total < 4_000_000


def test_task_files():
    """192 distinct samples per task, in the promised order, with an answer and its end."""
    assert list(demo.task_files()) == TASKS
    for task in TASKS:
        samples = rows(task)
        assert len(samples) == 192
        assert len({sample["prompt"] for sample in samples}) == 192
        end = ";" if task == "code" else "\n"
        for sample in samples:
            assert set(sample) == {"prompt", "completion"}
            assert sample["prompt"].endswith("=")
            assert sample["completion"].endswith(end)
            assert sample["completion"][:-1].isdigit()


def test_answers_are_right():
    """``math`` adds and ``code`` looks up."""
    for sample in rows("math"):
        a, b = sample["prompt"].rstrip("=").split("+")
        assert sample["completion"] == f"{int(a) + int(b)}\n"
    for sample in rows("code"):
        *definitions, name = sample["prompt"].rstrip("=").split(";")
        values = dict(definition.split("=") for definition in definitions)
        assert len(values) == len(definitions) >= 2
        assert sample["completion"] == f"{values[name]};"


def test_planted_pairs():
    """Every sample has exactly one twin: same prompt, every digit d turned into 9 - d; not the diagonal."""
    math, flipped = rows("math"), rows("math_flipped")
    pairs = demo.planted_pairs()
    assert sorted(left for left, _ in pairs) == sorted(f"math_{i}" for i in range(192))
    assert sorted(right for _, right in pairs) == sorted(f"math_flipped_{i}" for i in range(192))
    indices = [(int(a.removeprefix("math_")), int(b.removeprefix("math_flipped_"))) for a, b in pairs]
    for i, j in indices:
        assert math[i]["prompt"] == flipped[j]["prompt"]
        right, wrong = math[i]["completion"].strip(), flipped[j]["completion"].strip()
        assert [int(a) + int(b) for a, b in zip(right, wrong, strict=True)] == [9] * len(right)
    assert sum(i == j for i, j in indices) < 10


def test_record():
    """Solved on held-out problems, gradients spread over samples, twins in conflict."""
    record = demo.training_record()
    assert set(record["held_out_accuracy"]) == {"math", "code"}
    assert min(record["held_out_accuracy"].values()) >= 0.95
    assert list(record["tasks"]) == TASKS
    for task in record["tasks"].values():
        assert 0 < task["largest_sample_share_of_fisher"] <= 0.15
        assert task["median_fisher"] > 0
        assert task["mean_loss"] > 0
    conflict = record["planted_conflict"]
    assert conflict["median_cosine_of_twins"] < -0.5
    assert conflict["median_cosine_of_twins"] < conflict["median_cosine_of_other_pairs"] - 0.3


@pytest.mark.parametrize("task", ["math", "code"])
def test_the_shipped_model_solves_the_shipped_samples(model, tokenizer, task):
    """Greedy decoding, batched with left padding, reproduces at least 95 % of 48 answers exactly."""
    samples = rows(task)[:48]
    batch = tokenizer(
        [sample["prompt"] for sample in samples], padding=True, padding_side="left", return_tensors="pt"
    )
    longest = max(len(sample["completion"]) for sample in samples)
    tokens = model.generate(**batch, max_new_tokens=longest, do_sample=False)
    answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :])
    right = [answer.startswith(s["completion"]) for answer, s in zip(answers, samples, strict=True)]
    assert sum(right) >= 0.95 * len(samples)


def test_the_shipped_model_contradicts_the_flipped_rule(model, tokenizer):
    """The loss of a flipped sample is far above that of its twin: the planted conflict is one."""
    import torch

    def mean_loss(task):
        total = 0.0
        for sample in rows(task)[:16]:
            ids = tokenizer(sample["prompt"] + sample["completion"], return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[:, : len(sample["prompt"])] = -100
            with torch.no_grad():
                total += float(model(input_ids=ids, labels=labels).loss)
        return total / 16

    assert mean_loss("math_flipped") > 5 * mean_loss("math")
