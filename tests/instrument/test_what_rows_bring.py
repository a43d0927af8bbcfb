"""What rows bring reaches the model, or is refused by name; padding is no part of a sample."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import DataError, FisherscopeError
from tests import models

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
PAIR = [2, 5, 6, 3, 7, 8, 3]
TYPES = [0, 0, 0, 0, 1, 1, 1]


def bert(kind: type = transformers.BertForSequenceClassification) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=3,
        initializer_range=0.3,
    )
    return kind(config).eval()


def llama(kind: type = transformers.LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **({"pad_token_id": 0} | changes),
    )
    return kind(config).eval()


def t5(pad: int = 0, eos: int = 1) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=pad,
        eos_token_id=eos,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


class Starred(transformers.BertForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class ByKeyword(transformers.BertForSequenceClassification):
    def forward(self, **kwargs: Any) -> Any:
        return super().forward(**kwargs)


class Strict(transformers.BertForSequenceClassification):
    def forward(self, **kwargs: Any) -> Any:
        if set(kwargs) - {"input_ids", "attention_mask"}:
            raise TypeError(f"unknown {sorted(kwargs)}")
        return super().forward(**kwargs)


def off(found: Any, right: torch.Tensor) -> float:
    return float((torch.as_tensor(found) - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("kind", [transformers.BertForSequenceClassification, Starred, ByKeyword])
def test_token_types_reach_a_model_whose_signature_hides_them(kind: type, tmp_path: Path) -> None:
    """F is that of the loop which gives the token types, whatever forward's signature shows."""
    model = bert(kind)
    rows = [{"input_ids": PAIR, "token_type_ids": TYPES, "label": i % 3} for i in range(3)]
    store = fs.wrap(model).collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    right = torch.zeros(32, 32)
    for row in rows:
        types = torch.tensor([TYPES])
        logits = model(input_ids=torch.tensor([PAIR]), token_type_ids=types).logits
        loss = F.cross_entropy(logits, torch.tensor([row["label"]]))
        right += torch.autograd.grad(loss, model.get_parameter(QUERY))[0] ** 2 / len(rows)
    assert off(store.fisher("a", QUERY), right) < 1e-5


def test_token_types_that_a_model_does_not_take(tmp_path: Path) -> None:
    """Types that tell texts apart are refused with row and key; types of one kind change nothing."""
    scope = fs.wrap(bert(Strict))
    rows = [{"input_ids": PAIR, "label": 0}, {"input_ids": PAIR, "token_type_ids": TYPES, "label": 1}]
    with pytest.raises(DataError, match=r"a_1.*token_type_ids"):
        scope.collect({"a": rows}, tmp_path / "no.fs", quiet=True)
    zeros = [{"input_ids": PAIR, "token_type_ids": [0] * 7, "label": 0}]
    with pytest.warns(UserWarning, match="single sample"):
        given = scope.collect({"a": zeros}, tmp_path / "a.fs", quiet=True)
    with pytest.warns(UserWarning, match="single sample"):
        bare = scope.collect({"a": [{"input_ids": PAIR, "label": 0}]}, tmp_path / "b.fs", quiet=True)
    assert list(given.samples("a")["key"]) == list(bare.samples("a")["key"])


@pytest.mark.parametrize("kind", [transformers.BertForSequenceClassification, Starred])
@pytest.mark.parametrize("key", ["inputs_embeds", "encoder_hidden_states"])
def test_a_key_that_the_model_would_take_is_named(kind: type, key: str, tmp_path: Path) -> None:
    """What would reach the model in a loop over the rows, and not through fisherscope, is refused."""
    rows = [{"input_ids": PAIR, "label": 0, key: [[0.0]]}]
    with pytest.raises(DataError, match=rf"a_0.*'{key}'"):
        fs.wrap(bert(kind)).collect({"a": rows}, tmp_path / "run.fs", quiet=True)


def test_bookkeeping_passes(tmp_path: Path) -> None:
    """Columns that no forward takes are left alone."""
    rows = [{"input_ids": PAIR, "label": i, "id": i, "source": "web", "sample_weight": 2.0} for i in (0, 1)]
    assert fs.wrap(bert()).collect({"a": rows}, tmp_path / "run.fs", quiet=True).n("a") == 2


class AsDict(transformers.LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        return {"logits": super().forward(**kwargs).logits}


class AsTuple(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask, return_dict=False)


@pytest.mark.parametrize("kind", [AsDict, AsTuple])
def test_outputs_of_other_forms(kind: type, tmp_path: Path) -> None:
    """A dict or a tuple gives the F of the model's own output."""
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 8, 7]}]
    name = "model.layers.0.self_attn.q_proj.weight"
    plain = fs.wrap(llama()).collect({"a": rows}, tmp_path / "plain.fs", quiet=True)
    other = fs.wrap(llama(kind)).collect({"a": rows}, tmp_path / "other.fs", quiet=True)
    assert off(other.fisher("a", name), torch.as_tensor(plain.fisher("a", name))) < 1e-6


class NoLogits(transformers.LlamaForCausalLM):
    def forward(self, **kwargs: Any) -> Any:
        return {"scores": super().forward(**kwargs).logits}


def test_outputs_without_logits(tmp_path: Path) -> None:
    """One sentence says what is missing and what is there."""
    with pytest.raises(FisherscopeError, match=r"without logits \(it holds \['scores'\]"):
        fs.wrap(llama(NoLogits)).collect({"a": [[5, 6, 7], [5, 6]]}, tmp_path / "run.fs", quiet=True)


def padded(rows: list[dict[str, Any]], size: int, fill: int) -> Any:
    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(row["labels"]) for row in batch)
        labels = [row["labels"] + [fill] * (width - len(row["labels"])) for row in batch]
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {"input_ids": ids, "labels": torch.tensor(labels)}

    return torch.utils.data.DataLoader(rows, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pad", "fill"), [(0, -100), (0, 0), (1, -100), (1, 1)])
def test_padding_of_targets_is_no_part_of_a_sample(pad: int, fill: int, tmp_path: Path) -> None:
    """A list and loaders of 2 and 4 resume each other, with -100 and pad ids, also where pad is eos."""
    g = np.random.default_rng(0)
    lengths = [2, 5, 3, 3, 6, 2, 4, 3]
    rows = [
        {"input_ids": g.integers(2, 60, 5).tolist(), "labels": [*g.integers(2, 60, n).tolist(), 1]}
        for n in lengths
    ]
    scope, path = fs.wrap(t5(pad)), tmp_path / "run.fs"
    first = scope.collect({"a": padded(rows, 2, fill)}, path, quiet=True)
    assert list(first.samples("a")["tokens"]) == [n + 1 for n in lengths]
    for again in (padded(rows, 4, fill), rows):
        store = scope.collect({"a": again}, path, quiet=True)
        assert list(store.samples("a")["key"]) == list(first.samples("a")["key"])


def test_decoder_masks_and_inputs(tmp_path: Path) -> None:
    """A mask of the decoder is respected; inputs that are not the shifted labels are refused."""
    row = {"input_ids": [5, 6, 7], "labels": [8, 9, 1, 33], "decoder_attention_mask": [1, 1, 1, 0]}
    row["decoder_input_ids"] = [0, 8, 9, 1]
    other = {"input_ids": [5, 6], "labels": [8, 9, 0, 7, 1]}
    store = fs.wrap(t5()).collect({"a": [row, other]}, tmp_path / "run.fs", quiet=True)
    # a pad id between others is a target
    assert list(store.samples("a")["tokens"]) == [3, 5]
    wrong = {**row, "decoder_input_ids": [0, 8, 8, 1, 0][:4]}
    with pytest.raises(DataError, match=r"a_0.*decoder_input_ids"):
        fs.wrap(t5()).collect({"a": [wrong]}, tmp_path / "no.fs", quiet=True)


@pytest.mark.parametrize("pad", [64, -1, None])
def test_pad_ids_that_the_vocabulary_does_not_have(pad: Any, tmp_path: Path) -> None:
    """Padding uses an id that there is, and F is that of a model with a usual pad id."""
    rows = [{"input_ids": [5, 6, 7, 8]}, {"input_ids": [9, 8]}]
    name = "model.layers.0.self_attn.q_proj.weight"
    right = fs.wrap(llama()).collect({"a": rows}, tmp_path / "right.fs", quiet=True)
    model = llama()
    model.config.pad_token_id = pad
    store = fs.wrap(model).collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    assert off(store.fisher("a", name), torch.as_tensor(right.fisher("a", name))) < 1e-5


def test_a_head_that_looks_for_the_pad_id(tmp_path: Path) -> None:
    """It would take other padding for text: refused, and right with one row at a time."""
    model = llama(transformers.LlamaForSequenceClassification, num_labels=3)
    model.config.pad_token_id = 64
    rows = [{"input_ids": [5, 6, 7, 8], "label": 0}, {"input_ids": [9, 8], "label": 1}]
    with pytest.raises(DataError, match=r"config\.pad_token_id=64"):
        fs.wrap(model).collect({"a": rows}, tmp_path / "no.fs", quiet=True)
    store = fs.wrap(model).collect({"a": rows}, tmp_path / "run.fs", batch_size=1, quiet=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    right = torch.zeros(32, 32)
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        loss = F.cross_entropy(logits, torch.tensor([row["label"]]))
        right += torch.autograd.grad(loss, model.get_parameter(name))[0] ** 2 / 2
    assert off(store.fisher("a", name), right) < 1e-5


@dataclasses.dataclass
class Row:
    input_ids: list[int]
    labels: list[int]


Named = collections.namedtuple("Named", ["input_ids", "labels"])  # noqa: PYI024 - as people have them
IDS = [[5, 6, 7], [8, 9]]
FRAME = pd.DataFrame({"input_ids": IDS, "labels": IDS})


@pytest.mark.parametrize(
    "rows",
    [
        FRAME,
        [row for _, row in FRAME.iterrows()],
        list(FRAME.iterrows()),
        list(FRAME.itertuples()),
        [Row(ids, ids) for ids in IDS],
        [Named(ids, ids) for ids in IDS],
        [{"input_ids": [np.int64(i) for i in ids], "labels": np.array(ids, np.int32)} for ids in IDS],
        [np.array([(ids,)], dtype=[("input_ids", object)])[0] for ids in IDS],
    ],
    ids=["frame", "series", "iterrows", "itertuples", "dataclass", "namedtuple", "numpy", "record"],
)
def test_rows_of_other_libraries(rows: Any, tmp_path: Path) -> None:
    """They are the samples that dicts are."""
    store = fs.wrap(llama()).collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    plain = fs.wrap(llama()).collect(
        {"a": [{"input_ids": ids} for ids in IDS]}, tmp_path / "b.fs", quiet=True
    )
    assert list(store.samples("a")["key"]) == list(plain.samples("a")["key"])


def test_half_a_surrogate_pair_beside_ids(tmp_path: Path) -> None:
    """The row is named; a NUL and control characters are text and come back."""
    scope, text = fs.wrap(llama()), "a\x00b\x1bc"
    with pytest.raises(DataError, match=r"a_0.*surrogate"):
        scope.collect({"a": [{"input_ids": [1, 2, 3], "text": "bad \ud83d"}]}, tmp_path / "no.fs", quiet=True)
    rows = [{"input_ids": ids, "text": text} for ids in IDS]
    store = scope.collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    assert list(store.samples("a")["text"]) == [text, text]


def test_generators_are_read_once(tmp_path: Path) -> None:
    """A second reading, by another call or under another name, says why there are no rows."""
    scope = fs.wrap(llama())
    rows = ({"input_ids": ids} for ids in IDS)
    scope.estimate({"a": rows}, measure=False)
    with pytest.raises(DataError, match="only once"):
        scope.collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    both = ({"input_ids": ids} for ids in IDS)
    with pytest.raises(DataError, match=r"'b'.*only once"):
        scope.collect({"a": both, "b": both}, tmp_path / "run.fs", quiet=True)


@pytest.mark.parametrize("name", ["NA", "nan", "None", "null", "1e5", "true"])
def test_names_that_tables_would_lose(name: str, tmp_path: Path) -> None:
    """pandas.read_csv would read them as something else from the report's tables."""
    with pytest.raises(DataError, match="read_csv"):
        fs.wrap(llama()).collect({name: IDS}, tmp_path / "run.fs", quiet=True)


def test_task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gzip and JSON lists are read by content, ~ is the home directory; others are named."""
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = "".join(json.dumps({"input_ids": ids}) + "\n" for ids in IDS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.txt").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps([{"input_ids": ids} for ids in IDS]), encoding="utf-8")
    scope = fs.wrap(llama())
    tasks = {name[0]: f"~/{name}" for name in ("a.jsonl", "b.txt", "c.json")}
    store = scope.collect(tasks, tmp_path / "run.fs", quiet=True)
    assert len({tuple(store.samples(task)["key"]) for task in "abc"}) == 1
    (tmp_path / "cut.gz").write_bytes(gzip.compress(lines)[:-9])
    (tmp_path / "link").symlink_to("gone.jsonl")
    (tmp_path / "t.csv").write_text("text\nx\n", encoding="utf-8")
    for name, message in (("cut.gz", "damaged"), ("link", "link to gone"), ("t.csv", "frame")):
        with pytest.raises(DataError, match=message):
            scope.collect({"a": tmp_path / name}, tmp_path / "no.fs", quiet=True)


def test_images_of_a_wrong_size(tmp_path: Path) -> None:
    """The row, its shape and the wanted one, before anything is written."""
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=2,
    )
    model: nn.Module = transformers.ViTForImageClassification(config).eval()
    for shape in ((3, 24, 24), (1, 16, 16)):
        rows = [{"pixel_values": torch.zeros(shape), "label": 0}] * 2
        with pytest.raises(DataError, match=r"a_0.*\(3, 16, 16\)"):
            fs.wrap(model).collect({"a": rows}, tmp_path / "run.fs", quiet=True)


def test_token_types_for_some_rows_only(tmp_path: Path) -> None:
    """Zeros stand for those of the others: that is nothing to BERT, and something to GPT-2."""
    rows = [{"input_ids": [5, 6, 7, 8], "token_type_ids": [0, 0, 1, 1]}, {"input_ids": [5, 7, 9]}]
    gpt2 = models.build(models.named("gpt2"), layers=1)
    with pytest.raises(DataError, match=r"a_1 has no token_type_ids.*zeros are not the same as none"):
        fs.wrap(gpt2).collect({"a": rows}, tmp_path / "run.fs", quiet=True)
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    bert = models.build(models.named("bert"), layers=1)
    store = fs.wrap(bert).collect({"a": labelled}, tmp_path / "bert.fs", objective="masked_lm", quiet=True)
    assert store.is_complete("a")
