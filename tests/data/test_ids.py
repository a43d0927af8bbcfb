"""Rows of token ids: padding, labels, packing, the vocabulary."""

import numpy as np
import pytest
import torch

from fisherscope.errors import DataError
from fisherscope.instrument.data import prepare_task

PACKED = {"input_ids": [1, 2, 3, 4], "position_ids": [0, 1, 0, 1]}


def one(row, tokenizer=None, **options):
    (sample,) = prepare_task("t", [row], tokenizer, **options)
    return sample


@pytest.mark.parametrize(
    "row",
    [
        [1, 2, 3],
        (1, 2, 3),
        torch.tensor([1, 2, 3]),
        np.array([1, 2, 3], dtype=np.int32),
        {"input_ids": [1, 2, 3]},
        {"input_ids": torch.tensor([1, 2, 3]), "labels": None},
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [True, True, True]},
        {"input_ids": [torch.tensor(1), torch.tensor(2), torch.tensor(3)]},
        {"input_ids": [0, 1, 2, 3], "attention_mask": [0, 1, 1, 1]},
        {"input_ids": [1, 2, 3, 0, 0], "attention_mask": torch.tensor([1, 1, 1, 0, 0])},
        {"input_ids": [0, 1, 2, 3, 0], "labels": [9, 1, 2, 3, -100], "attention_mask": [0, 1, 1, 1, 0]},
        {"input_ids": [0, 0, 1, 2, 3], "attention_mask": [0, 0, 1, 1, 1], "position_ids": [0, 0, 0, 1, 2]},
        {"input_ids": [0, 0, 1, 2, 3], "attention_mask": [0, 0, 1, 1, 1], "position_ids": range(5)},
        {"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 0], "seq_lengths": [3], "idx": 5},
    ],
)
def test_one_sample_in_many_forms(row):
    """Lists, tensors, arrays, padding on either side: the same sample, with the same key."""
    if isinstance(row, dict) and isinstance(row.get("position_ids"), range):
        row["position_ids"] = list(row["position_ids"])
    sample = one(row)
    assert sample.input_ids == sample.labels == (1, 2, 3)
    assert sample.text is None
    assert all(type(token) is int for token in sample.input_ids)


def test_labels_are_kept(characters):
    """-100 stays where it is, and labels may differ from the ids."""
    sample = one({"input_ids": [1, 2, 3, 4], "labels": [-100, 5, -100, 6]})
    assert sample.labels == (-100, 5, -100, 6)
    assert sample.tokens == 2


def test_text_of_ids(characters):
    """Decoded where there is a tokenizer; a row's own text is kept."""
    ids = characters("a b\n")["input_ids"]
    assert one(ids, characters).text == "a b\n"
    assert one({"input_ids": ids, "text": "mine"}, characters).text == "mine"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (PACKED, "position_ids go from 1 to 0 at position 2, so the row is packed.*packing=False"),
        ({"input_ids": [1, 2], "position_ids": [5, 6]}, "position_ids begin at 5"),
        ({"input_ids": [1, 2], "position_ids": [0]}, "1 position_ids for 2"),
        ({"input_ids": [1, 2], "seq_idx": [0, 1]}, "'seq_idx' says that the row is packed"),
        ({"input_ids": [1, 2], "cu_seq_lens_q": [0, 1]}, "'cu_seq_lens_q' says"),
        ({"input_ids": [1, 2], "cu_seqlens": [0, 1]}, "'cu_seqlens' says"),
        ({"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}, "packs 2 samples"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 0, 1]}, "0 at position 1, between"),
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 2]}, "holds 2, which numbers packed"),
        ({"input_ids": [1, 2], "attention_mask": torch.ones(2, 2)}, "2 axes per sample"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, "nothing but padding"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "1 entries of attention_mask for 2"),
        ({"input_ids": [1, 2], "labels": [1]}, "1 labels for 2 input_ids"),
        ({"input_ids": [1, 2], "labels": 1}, "labels must be one list of whole numbers"),
        ({"input_ids": [1, 2.5]}, "input_ids must be whole numbers, it holds 2.5"),
        ({"input_ids": torch.tensor([0.5, 1.0])}, "must be whole numbers, it holds 0.5"),
        ({"input_ids": "abc"}, "a str of other things"),
        ({"input_ids": [1, None]}, "list of other things"),
        ([], "the row has no tokens"),
        ([1, -2], "input_ids hold -2"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels hold -1; token ids are 0 or more, or -100"),
        ([1, 10], "input_ids hold 10, but the model's vocabulary has 10 entries"),
        ({"input_ids": [1, 2], "labels": [-100, 10]}, r"labels hold 10.*or -100 for no loss"),
    ],
)
def test_refused(row, message):
    """Packed rows, holes, wrong lengths and ids outside the vocabulary: named, with the next step."""
    with pytest.raises(DataError, match=rf"(?s)sample t_1 \(row 1 of task 't'\): .*{message}"):
        prepare_task("t", [[1, 2], row], vocab_size=10)


def test_padding_without_a_mask(characters):
    """Ids that end with the pad token and no mask would train on padding: refused."""
    pad = characters.pad_token_id
    for ids in ([5, 6, pad], [pad, 5, 6]):
        with pytest.raises(DataError, match=r"begin or end with the pad token \(257\)"):
            prepare_task("t", [ids], characters)
    assert one({"input_ids": [5, 6, pad], "attention_mask": [1, 1, 1]}, characters).length == 3


def test_ids_beyond_the_tokenizer_are_decoded_all_the_same(characters):
    """An embedding may be larger than the tokenizer's vocabulary."""
    assert one([65, 66, 300], characters, vocab_size=512).length == 3
