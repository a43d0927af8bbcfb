"""Every objective, on real models with the head it is for, against transformers' own loss of one sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fisherscope as fs
from fisherscope.instrument.objectives import resolve_objective
from tests import models

EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
CLASSES = 5
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "vocab_size": models.VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": models.VOCABULARY, "pad_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": models.VOCABULARY,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
}


def ids(n: int, seed: int = 0) -> list[list[int]]:
    """Rows of 3 to 9 ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (n,), generator=generator).tolist()
    return [torch.randint(3, models.VOCABULARY, (k,), generator=generator).tolist() for k in lengths]


def classes(n: int) -> list[int]:
    return [(3 * i + 1) % CLASSES for i in range(n)]


def per_position(n: int, top: int) -> list[dict[str, Any]]:
    """Rows with a label at every second position, the first one, too."""
    return [
        {
            "input_ids": row,
            "labels": [(7 * token) % top if i % 2 == 0 else -100 for i, token in enumerate(row)],
        }
        for row in ids(n)
    ]


def whole(n: int) -> list[dict[str, Any]]:
    return [{"input_ids": row, "label": label} for row, label in zip(ids(n), classes(n), strict=True)]


def pairs(n: int) -> list[dict[str, Any]]:
    """Pairs of texts, told apart by token types."""
    return [{**row, "token_type_ids": [0] * 2 + [1] * (len(row["input_ids"]) - 2)} for row in whole(n)]


def several(n: int) -> list[dict[str, Any]]:
    """Classes that are not exclusive."""
    return [
        {"input_ids": row, "labels": [(i >> c) & 1 for c in range(CLASSES)]} for i, row in enumerate(ids(n))
    ]


def targets(n: int) -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": target} for row, target in zip(ids(n), ids(n, seed=1), strict=True)]


def images(n: int) -> list[dict[str, Any]]:
    pixels = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "label": label} for image, label in zip(pixels, classes(n), strict=True)]


def make(cls: str, config: str, **sizes: Any) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model.eval()

    return build


CASES = {
    "bert-masked": (
        "masked_lm",
        make("BertForMaskedLM", "BertConfig", **SMALL),
        lambda n: per_position(n, 61),
    ),
    "roberta-masked": (
        "masked_lm",
        make("RobertaForMaskedLM", "RobertaConfig", **SMALL),
        lambda n: per_position(n, 61),
    ),
    "bert-class": (
        "sequence_classification",
        make("BertForSequenceClassification", "BertConfig", **SMALL),
        whole,
    ),
    "bert-class-of-pairs": (
        "sequence_classification",
        make("BertForSequenceClassification", "BertConfig", **SMALL),
        pairs,
    ),
    "bert-several-classes": (
        "sequence_classification",
        make(
            "BertForSequenceClassification",
            "BertConfig",
            **SMALL,
            problem_type="multi_label_classification",
        ),
        several,
    ),
    "gpt2-class": (
        "sequence_classification",
        make("GPT2ForSequenceClassification", "GPT2Config", **GPT, num_labels=CLASSES),
        whole,
    ),
    "llama-class": (
        "sequence_classification",
        make("LlamaForSequenceClassification", "LlamaConfig", **SMALL),
        whole,
    ),
    "bert-tokens": (
        "token_classification",
        make("BertForTokenClassification", "BertConfig", **SMALL),
        lambda n: per_position(n, CLASSES),
    ),
    "t5": (
        "seq2seq",
        make(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_kv=8,
            num_layers=1,
            num_heads=4,
            d_ff=40,
            vocab_size=models.VOCABULARY,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        targets,
    ),
    "bart": ("seq2seq", make("BartForConditionalGeneration", "BartConfig", **BART), targets),
    "vit": (
        "image_classification",
        make(
            "ViTForImageClassification",
            "ViTConfig",
            **{k: v for k, v in SMALL.items() if k not in {"vocab_size", "max_position_embeddings"}},
            image_size=16,
            patch_size=8,
        ),
        images,
    ),
}


def alone(model: torch.nn.Module, row: dict[str, Any]) -> dict[str, Tensor]:
    """One sample's gradients, by the loss that transformers itself computes: a mean over the labels."""
    model.zero_grad()
    labels = torch.as_tensor(row.get("label", row.get("labels")))
    inputs = {k: torch.as_tensor(v).unsqueeze(0) for k, v in row.items() if k not in {"label", "labels"}}
    count = max(int((labels != -100).sum()), 1)
    several_classes = model.config.problem_type == "multi_label_classification"
    labels = labels.float() if several_classes else labels
    (model(**inputs, labels=labels.unsqueeze(0)).loss * count).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers_own_loss(case: str, tmp_path: Path) -> None:
    """Every parameter of each head, in padded batches; "auto" finds the objective."""
    name, build, make_rows = CASES[case]
    if case.startswith("t5"):
        models.skip_where_old("T5's encoder gives its table of positions no axis over samples")
    model, rows = build(), make_rows(5)
    assert resolve_objective("auto", model).name == name
    scope = fs.wrap(model, parameters="all")
    store = scope.collect({"a": rows}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, quiet=True)
    expected = [alone(model, row) for row in rows]
    assert scope.coverage()["covered"].all()
    floor = 1e-3 * max(float(g.abs().max()) for sample in expected for g in sample.values())
    for parameter in scope.parameters:
        zero = torch.zeros(model.get_parameter(parameter).shape)
        g = torch.stack([sample.get(parameter, zero) for sample in expected])
        assert models.relative_error(store.gradients("a", parameter), g, floor=floor) <= 1e-5, parameter
    labels = [torch.as_tensor(row.get("label", row.get("labels"))).reshape(-1) for row in rows]
    assert list(store.samples("a")["tokens"]) == [int((each != -100).sum()) for each in labels]
    for i, each in enumerate(labels):
        assert store.token_ids("a", i)[1].tolist() == each.tolist()
