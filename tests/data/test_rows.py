"""Iterables of rows: lists, datasets, loaders of batches."""

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fisherscope.errors import DataError
from fisherscope.instrument.data import prepare_task

TEXTS = ["ab", "cde", "fghi"]
ROWS = [{"prompt": text, "completion": "!"} for text in TEXTS]


def ids(samples):
    return [sample.input_ids for sample in samples]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_a_batch_is_its_rows(characters, side, tensors):
    """A padded batch gives the samples that its rows give, whatever side the padding is on."""
    batch = characters(TEXTS, padding=True, padding_side=side, return_tensors=tensors)
    assert prepare_task("t", [batch], characters) == prepare_task("t", TEXTS, characters)
    assert prepare_task("t", batch, characters) == prepare_task("t", TEXTS, characters)


def test_a_loader_of_padded_batches(characters):
    """With a collate_fn that pads, over several batches; rows are numbered through."""

    def collate(rows):
        batch = dict(characters(rows, padding=True, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    loader = DataLoader(TEXTS, batch_size=2, collate_fn=collate)
    assert prepare_task("t", loader, characters) == prepare_task("t", TEXTS, characters)

    def spoilt(rows):
        batch = collate(rows)
        batch["labels"][-1, -1] = 999
        return batch

    with pytest.raises(DataError, match="sample t_1 "):
        prepare_task("t", DataLoader(TEXTS, batch_size=2, collate_fn=spoilt), characters, vocab_size=258)


@pytest.mark.parametrize("wrap", [lambda t: t, TensorDataset], ids=["tensor", "TensorDataset"])
def test_a_loader_of_tensors(wrap):
    """Bare 2-D tensors, alone or as the only member of a TensorDataset."""
    data = torch.arange(1, 7).reshape(3, 2)
    samples = prepare_task("t", DataLoader(wrap(data), batch_size=2))
    assert ids(samples) == [(1, 2), (3, 4), (5, 6)]
    assert ids(prepare_task("t", data)) == ids(samples)


@pytest.mark.parametrize("rows", [TEXTS, ROWS, [{"text": text} for text in TEXTS]])
def test_a_loader_of_texts(characters, rows):
    """What default_collate makes of strings and of dicts of strings."""
    loader = DataLoader(rows, batch_size=2)
    assert prepare_task("t", loader, characters) == prepare_task("t", rows, characters)


def test_loaders_that_do_not_say_what_they_hold():
    """Two nameless tensors, and the exchanged rows of default_collate, are refused."""
    data = torch.arange(1, 7).reshape(3, 2)
    with pytest.raises(DataError, match="list of 2 tensors does not say which is which"):
        prepare_task("t", DataLoader(TensorDataset(data, data), batch_size=2))
    with pytest.raises(DataError, match="rows and positions exchanged"):
        prepare_task("t", DataLoader([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}], batch_size=2))
    with pytest.raises(DataError, match="list of 2 tensors"):
        prepare_task("t", DataLoader([[1, 2], [3, 4]], batch_size=2))


def test_batch_of_unequal_parts():
    """Three rows of ids with two of labels."""
    with pytest.raises(DataError, match="different numbers of rows"):
        prepare_task("t", [{"input_ids": torch.ones(3, 2).long(), "labels": torch.ones(2, 2).long()}])


def test_positions_of_a_batch():
    """Positions of shape [1, length] hold for all rows; packed ones are refused."""
    batch = {"input_ids": torch.ones(3, 4).long(), "position_ids": torch.arange(4)[None]}
    assert len(prepare_task("t", [batch])) == 3
    flattened = {"input_ids": torch.ones(1, 4).long(), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    with pytest.raises(DataError, match="packed"):
        prepare_task("t", [flattened])
    with pytest.raises(DataError, match="packed"):
        prepare_task("t", [{"input_ids": torch.ones(1, 4).long(), "cu_seq_lens_q": torch.tensor([0, 2, 4])}])


@pytest.mark.parametrize("tensors", [None, "torch", "numpy"])
def test_a_dataset(characters, tensors):
    """A datasets.Dataset of texts, and one of ids in every format."""
    texts = datasets.Dataset.from_list(ROWS)
    expected = prepare_task("t", ROWS, characters)
    assert prepare_task("t", texts, characters) == expected
    tokens = datasets.Dataset.from_list(
        [{"input_ids": list(s.input_ids), "labels": list(s.labels)} for s in expected]
    ).with_format(tensors)
    assert prepare_task("t", tokens, characters) == expected
    assert prepare_task("t", tokens.to_iterable_dataset(), characters) == expected


def test_a_dataset_of_several_forms(characters):
    """Columns that a row does not use are None there, and count as absent."""
    data = datasets.Dataset.from_list(
        [{"text": "abc", "prompt": None, "completion": None}, {"prompt": "a", "completion": "b"}]
    )
    assert [sample.tokens for sample in prepare_task("t", data, characters)] == [2, 1]


def test_max_samples_reads_no_further(characters):
    """An endless stream is fine."""

    def forever():
        while True:
            yield "abc"

    assert len(prepare_task("t", forever(), characters, max_samples=5)) == 5


def test_repetitions_have_their_own_keys(characters):
    """Keys are unique within a task, and the first occurrence has the key it has alone."""
    samples = prepare_task("t", ["abc", "xyz", "abc", "abc"], characters)
    assert [sample.occurrence for sample in samples] == [0, 0, 1, 2]
    assert len({sample.key for sample in samples}) == 4
    assert samples[0].key == prepare_task("u", ["abc"], characters)[0].key


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "task 't' is empty"),
        (iter(()), "task 't' is empty"),
        ("math.jsonl", "a str, not rows; read a file with"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), r"keys \['train'\].*one split"),
        ({"text": ["a"]}, "a mapping with the keys"),
        (3, "a int is no list of rows"),
        (None, "a NoneType is no list of rows"),
        ([[-100]], "input_ids hold -100"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}] * 2, "no loss-bearing token in any of its 2 samples"),
        ([[1, 2], {"input_ids": [1, 2], "labels": [1, -100]}], r"sample t_1 .*in 1 of 2 samples"),
    ],
)
def test_unusable_tasks(characters, rows, message):
    """Each is refused with the reason and the next step."""
    with pytest.raises(DataError, match=message):
        prepare_task("t", rows, characters)


@pytest.mark.parametrize("options", [{"max_length": 1}, {"max_samples": 0}])
def test_unusable_options(options):
    """Options out of range are the caller's mistake."""
    with pytest.raises(ValueError, match="must be at least"):
        prepare_task("t", [[1, 2]], **options)
