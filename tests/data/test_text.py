"""Rows of text, and of prompts with completions: which tokens bear loss."""

import pytest

from fisherscope.errors import DataError
from fisherscope.instrument.data import prepare_task


def one(row, tokenizer, **options):
    (sample,) = prepare_task("t", [row], tokenizer, **options)
    return sample


def with_loss(sample, tokenizer):
    return [tokenizer.decode([label]) for label in sample.labels if label != -100]


@pytest.mark.parametrize("row", ["ab cd\n", {"text": "ab cd\n"}])
def test_text_bears_loss_everywhere(characters, row):
    """A string and {"text"} are one: labels are the ids."""
    sample = one(row, characters)
    assert sample.input_ids == sample.labels == tuple(characters("ab cd\n")["input_ids"])
    assert sample.text == "ab cd\n"
    assert sample.tokens == 5


def test_special_tokens_are_those_the_tokenizer_adds(framing):
    """Nothing is appended to or dropped from what the tokenizer returns."""
    assert one("one two", framing).input_ids == (0, 3, 4, 1)


def test_loss_on_the_completion_only(characters, speed):
    """Every character of the completion bears loss, and nothing else."""
    sample = one({"prompt": "47+25=", "completion": "72\n"}, speed(characters))
    assert with_loss(sample, characters) == ["7", "2", "\n"]
    assert sample.tokens == 3
    assert sample.text == "47+25=72\n"
    assert sample.labels[:6] == (-100,) * 6


def test_completion_with_characters_of_several_tokens(characters, speed):
    """Bytes of one character share their offsets: all of them lie on the same side of the boundary."""
    sample = one({"prompt": "é∑", "completion": "🙂é"}, speed(characters))
    assert [label != -100 for label in sample.labels] == [False] * 5 + [True] * 6


def test_a_straddling_token_belongs_to_the_completion(merging, speed):
    """The text is tokenised as a whole: " world" is one token even if the prompt ends with the space."""
    sample = one({"prompt": "x ", "completion": "world"}, speed(merging))
    assert with_loss(sample, merging) == [" world"]
    sample = one({"prompt": "a", "completion": "bc"}, speed(merging))
    assert with_loss(sample, merging) == ["ab", "c"]


def test_a_clean_boundary(merging, speed):
    """The space that opens the completion makes one token with the word."""
    sample = one({"prompt": "x", "completion": " world"}, speed(merging))
    assert with_loss(sample, merging) == [" world"]
    assert sample.labels[0] == -100


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("x  ", "y", ["y"]),  # the last space has the offsets (3, 3) and closes the prompt
        ("x", "  ", ["  "]),  # here it is the completion
        ("x\n", "\ny", ["\n", "y"]),
        ("x ", "world", [" world"]),
    ],
)
def test_trimmed_offsets(trimming, prompt, completion, expected):
    """White space that has lost its offsets is still put on the right side of the boundary."""
    sample = one({"prompt": prompt, "completion": completion}, trimming)
    assert with_loss(sample, trimming) == expected


def test_special_tokens_around_a_completion(framing, speed):
    """The opening token bears no loss; the closing one, which the model is to predict, does."""
    sample = one({"prompt": "one two", "completion": " three"}, speed(framing))
    assert sample.input_ids == (0, 3, 4, 5, 1)
    assert sample.labels == (-100, -100, -100, 5, 1)
    sample = one({"prompt": "", "completion": "three"}, speed(framing))
    assert sample.labels[1:] == (5, 1)


def test_empty_prompt(characters, speed):
    """Without a prompt all of the completion but its first token is predicted."""
    sample = one({"prompt": "", "completion": "abc"}, speed(characters))
    assert sample.tokens == 2


def test_truncation_is_counted(characters):
    """The right end is cut, the number of cut tokens and the whole text are kept."""
    sample = one({"prompt": "ab", "completion": "cdef"}, characters, max_length=4)
    assert sample.length == 4
    assert sample.truncated == 2
    assert sample.text == "abcdef"
    assert sample.tokens == 2
    assert one("abc", characters, max_length=4).truncated == 0


def test_truncation_of_all_loss_is_an_error(characters):
    """A sample that would be left without loss is named, with the length that would do."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a" * 9, "completion": "b"}]
    with pytest.raises(DataError, match=r"sample t_1 .*max_length=8 cuts off.*raise max_length above 9"):
        prepare_task("t", rows, characters, max_length=8)
    assert len(prepare_task("t", rows, characters, max_length=10)) == 2


def test_longer_than_the_model(characters):
    """Positions that the model does not have are refused before it runs, with the option that cuts."""
    with pytest.raises(DataError, match=r"sample t_1 .*6 tokens, and the model takes 4; pass max_length=4"):
        prepare_task("t", ["abcd", "abcdef"], characters, max_positions=4)
    assert len(prepare_task("t", ["abcd", "abcdef"], characters, max_positions=4, max_length=4)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("", "the text is empty"),
        ({"text": ""}, "the text is empty"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"text": 3}, "'text' must be a string, it is a int"),
        ({"prompt": [{"role": "user"}], "completion": "x"}, 'use {"messages"}'),
        ({"prompt": "a"}, r"unknown form, with the keys \['prompt'\]"),
        ({"text": "a", "prompt": "b"}, "unknown form"),
        ({"question": "a", "answer": "b"}, r"\['question', 'answer'\]; accepted are"),
        (3.5, "unknown form, a float"),
        ({"text": None}, "'text' must be a string, it is a NoneType"),
        ({"text": None, "id": 3}, r"unknown form, with the keys \['id'\]"),
        ("a", "no loss-bearing token"),
    ],
)
def test_unusable_rows(characters, row, message):
    """Each is refused with the reason."""
    with pytest.raises(DataError, match=message):
        prepare_task("t", [row], characters)


@pytest.mark.parametrize("row", ["abc", {"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": []}])
def test_text_without_a_tokenizer(row):
    """The message says where to pass one."""
    with pytest.raises(DataError, match=r"text needs a tokenizer: pass one to fisherscope\.wrap"):
        prepare_task("t", [row])
