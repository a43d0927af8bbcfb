"""How tokens read: kept beside the samples where a tokenizer is there; no part of what a store must have."""

import errno
import json
import logging
import os
import pickle
import shutil
from random import Random

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fisherscope as fs
from fisherscope.demo import model_path
from fisherscope.errors import CorruptStoreError, StoreFullError
from fisherscope.store import StoreWriter, finalize, open_store, verify
from fisherscope.store.checksum import crc32_hex
from fisherscope.store.inspect import describe
from fisherscope.store.journal import canonical
from fisherscope.store.token_texts import MAX_CHARACTERS, MAX_TOKENS_BYTES
from tests import models
from tests.store import golden
from tests.store.contents import TOKENS, everything_of
from tests.store.disk_model import Disk, Recorder
from tests.store.faults import Calls, FailingAt, in_a_fork, killed_at, was_killed
from tests.store.forging import flip
from tests.store.store_cases import assert_holds, names

TEXTS = {0: "the", 7: " é", 12: "\n", 2**31 - 1: '":"'}


@pytest.fixture
def written(small, root):
    """A finished store with texts."""
    keep(small, root, TEXTS)
    small.write(root)
    return root


def keep(run, root, texts, **options):
    with StoreWriter.open(root, run.header, **options) as writer:
        writer.token_texts(texts)


def forged(tokens, crc32=None):
    """The bytes of a file that says these things, with the right checksum."""
    return canonical({"crc32": crc32 or crc32_hex(canonical(tokens)), "tokens": tokens})


def test_texts_come_back_and_are_added_to(small, written):
    """By id, None where there is none; later texts stand beside those before them."""
    store = open_store(written)
    assert store.token_texts([7, 1, 0, 12, 2**31 - 1]) == [" é", None, "the", "\n", '":"']
    assert pickle.loads(pickle.dumps(store)).token_texts([0]) == ["the"]
    keep(small, written, {1: "a"})
    assert store.token_texts([1]) == [None]
    store.refresh()
    assert store.token_texts([1, 7]) == ["a", " é"]
    assert json.loads((written / "tokens.json").read_bytes())["tokens"]["1"] == "a"
    assert_holds(store, small)


def test_a_store_without_texts_is_whole(small, root):
    """As are those of format version 1 that were written before there were any."""
    small.write(root)
    keep(small, root, {})
    assert "tokens.json" not in names(root)
    for path in (root, golden.ROOT):
        assert open_store(path).token_texts([0, 1]) == [None, None]
        assert verify(path).ok
        assert not verify(path).notes


@pytest.mark.parametrize("quick", [False, True])
def test_texts_are_part_of_the_store(written, quick):
    """verify neither complains nor calls the file debris, and counts its bytes, as the description does."""
    found = verify(written, quick=quick)
    assert (found.findings, found.notes) == ((), ())
    files = [path for path in written.rglob("*") if path.is_file()]
    read = [path for path in files if not (quick and path.suffix == ".h5")]
    assert found.nbytes == sum(path.stat().st_size for path in read)
    assert describe(written)["bytes"]["total"] == sum(path.stat().st_size for path in files)


def test_texts_survive_finalizing_and_other_ranks(small, written):
    """Merging shards leaves them alone; only rank 0 writes them."""
    finalize(written)
    keep(small, written, {1: "a"}, rank=1)
    store = open_store(written)
    assert store.token_texts([0, 1]) == ["the", None]
    assert verify(written).ok
    assert not verify(written).notes


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"[" * 200_000,
        b'{"tokens": {}}',
        b'{"tokens": {}, "crc32": NaN}',
        forged({"0": "the"}, crc32="00000000"),
        forged({"0": 1}),
        forged({"0": None}),
        forged({"0": ["the"]}),
        forged({"x": "the"}),
        forged({"00": "the"}),
        forged({"-1": "the"}),
        forged({"٣": "the"}),
        forged({str(2**31): "the"}),
        forged({"1" * 5000: "the"}),
        forged({"0": "\x1b[31m"}),
        forged({"0": "\ud800"}),
        forged({"0": "a" * (MAX_CHARACTERS + 1)}),
        forged({"0": "the"})[:-1],
    ],
)
def test_what_no_writer_wrote_is_refused(written, content):
    """Whatever the file says: one printable error for the texts, a finding, and samples stay readable."""
    (written / "tokens.json").write_bytes(content)
    store = open_store(written)
    with pytest.raises(CorruptStoreError, match=r"tokens\.json is damaged.*remove it") as error:
        store.token_texts([0])
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000
    (finding,) = verify(written, quick=True).findings
    assert finding.file == "tokens.json"
    assert len(store.samples("math")) == 4
    (written / "tokens.json").unlink()
    assert verify(written).ok


def test_every_flipped_byte_is_found(written):
    """No text is read that was not written: the file has a checksum of its own."""
    path = written / "tokens.json"
    for position in range(path.stat().st_size - 1):  # the newline behind the object says nothing
        flip(path, position, 0x01)
        assert [finding.file for finding in verify(written, quick=True).findings] == ["tokens.json"]
        flip(path, position, 0x01)
    assert verify(written).ok


@pytest.mark.parametrize("kind", ["link", "directory", "fifo", "sparse"])
def test_only_a_regular_file_of_bounded_size_is_read(written, tmp_path, kind):
    """Nothing outside the store is opened, nothing waits, and a hole in a file costs no memory."""
    path = written / "tokens.json"
    outside = tmp_path / "outside.json"
    path.rename(outside)
    if kind == "link":
        path.symlink_to(outside)
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.touch()
        os.truncate(path, MAX_TOKENS_BYTES + 1)
    with pytest.raises(CorruptStoreError, match=r"tokens\.json"):
        open_store(written).token_texts([0])
    assert [finding.file for finding in verify(written).findings] == ["tokens.json"]


@pytest.mark.parametrize("text", ["\x1b[31m", "\r", "\x00", "\ud800", "a" * (MAX_CHARACTERS + 1), b"a", None])
def test_a_harmful_text_is_not_written(small, written, text):
    """A terminal obeys control characters, and half a surrogate pair cannot be printed."""
    before = (written / "tokens.json").read_bytes()
    with pytest.raises(ValueError, match=r"token 3 .* cannot be kept"):
        keep(small, written, {3: text})
    for token in (-1, 2**31):
        with pytest.raises(ValueError, match="cannot be kept"):
            keep(small, written, {token: "a"})
    assert (written / "tokens.json").read_bytes() == before


def test_a_damaged_file_is_written_anew(small, written, caplog):
    """It holds nothing that a run would need to go on."""
    (written / "tokens.json").write_bytes(b"{")
    with caplog.at_level(logging.WARNING, "fisherscope"):
        keep(small, written, {7: "b"})
    assert "written anew" in caplog.text
    assert open_store(written).token_texts([7, 0]) == ["b", None]


def test_too_many_texts_are_left_out(small, written, caplog, monkeypatch):
    """What readers would refuse is not written: what was there stays."""
    monkeypatch.setattr("fisherscope.store.token_texts.MAX_TOKENS_BYTES", 200)
    with caplog.at_level(logging.WARNING, "fisherscope"):
        keep(small, written, {3: "a" * 200})
    assert "too large" in caplog.text
    assert open_store(written).token_texts([3, 0]) == [None, "the"]


def calls_of(run, root, texts):
    """How many system calls keeping texts takes, the opening of the store included."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        keep(run, root, texts)
    return len(calls.names)


@pytest.mark.parametrize("durability", ["power", "process"])
def test_a_kill_leaves_the_old_file_or_the_new_one(small, written, tmp_path, durability):
    """At every system call; the next writer removes what was not finished."""
    count = calls_of(small, shutil.copytree(written, tmp_path / "whole.fs"), {1: "a"})
    seen = set()
    for k in range(1, count + 1):
        root = shutil.copytree(written, tmp_path / f"{k}.fs")

        def run(root=root, k=k):
            with pytest.MonkeyPatch.context() as patch:
                Calls(patch, killed_at(k))
                keep(small, root, {1: "a"}, durability=durability)

        was_killed(in_a_fork(run))
        texts = open_store(root).token_texts([0, 1])
        assert texts in (["the", None], ["the", "a"])
        seen.add(texts[1])
        assert verify(root).ok
        keep(small, root, {})
        assert not verify(root).notes
    assert seen == {None, "a"}


def test_a_full_disk_leaves_what_was_there(small, written):
    """An error that says how much was needed, at whichever call there is no space."""
    refused = 0
    before = everything_of(open_store(written))
    for k in range(1, calls_of(small, written, {}) + 12):
        with pytest.MonkeyPatch.context() as patch:
            Calls(patch, FailingAt(k, errno.ENOSPC), names=("pwrite", "fsync"))
            try:
                keep(small, written, {1: f"a{k}"})
            except StoreFullError as error:
                refused += "tokens.json" in str(error)
            except OSError:
                pass
        store = open_store(written)
        assert store.token_texts([0]) == ["the"]
        assert everything_of(store) == before
        assert verify(written).ok
    assert refused >= 1
    keep(small, written, {})
    assert not verify(written).notes


def test_texts_survive_the_loss_of_power(tasks, tmp_path):
    """After the call that kept them they are there; before, none or all are."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch, tmp_path)
        with StoreWriter.open(tmp_path / "run.fs", tasks.header) as writer:
            before = len(recorder.operations)
            writer.token_texts(TOKENS)
            after = len(recorder.operations)
    disk = Disk(recorder.directories)
    for number, operation in enumerate(recorder.operations[:after], 1):
        disk.apply(operation)
        for choice in range(8 if number >= before else 0):
            target = tmp_path / f"{number}-{choice}"
            disk.after_power_loss(Random(f"{number} {choice}"), target)
            found = open_store(target / "run.fs").token_texts(TOKENS)
            assert found in ([*TOKENS.values()], [None, None])
            assert number < after or found == [*TOKENS.values()]


def wrapped(tokenizer, name="llama", **changes):
    """A tiny model with as many token ids as the tokenizer has."""
    config = models.named(name).config()
    config.vocab_size = max(len(tokenizer), config.vocab_size)
    setting = models.Setting(name, lambda: config, **changes)
    return fs.wrap(models.build(setting), tokenizer, parameters="attention", verify=False)


@pytest.fixture(scope="module")
def demo_tokenizer():
    """One token per byte."""
    return AutoTokenizer.from_pretrained(model_path())


def test_a_collection_keeps_the_texts_of_its_tokens(demo_tokenizer, tmp_path):
    """Tokens of all samples, and no others; those of tasks that are added later come beside them."""
    scope = wrapped(demo_tokenizer)
    options = {"extensions": (), "quiet": True}
    store = scope.collect({"a": ["1+1=2\n", "3-1=2"]}, tmp_path / "run.fs", **options)
    for row, text in enumerate(("1+1=2\n", "3-1=2")):
        ids, _ = store.token_ids("a", row)
        assert store.token_texts(ids) == [*text]
    other = demo_tokenizer("xy")["input_ids"]
    assert store.token_texts(other) == [None, None]
    more = scope.collect({"b": ["xy", "yx"]}, tmp_path / "run.fs", **options)
    assert more.token_texts([*other, *ids]) == [*"xy", *"3-1=2"]
    assert verify(tmp_path / "run.fs").ok
    assert not verify(tmp_path / "run.fs").notes
    mtime = (tmp_path / "run.fs" / "tokens.json").stat().st_mtime_ns
    scope.collect({"b": ["xy", "yx"]}, tmp_path / "run.fs", **options)  # nothing is new
    assert (tmp_path / "run.fs" / "tokens.json").stat().st_mtime_ns == mtime


def test_parts_of_characters_and_control_characters_have_the_tokenizers_spelling(demo_tokenizer, tmp_path):
    """Half of an é decodes to no character, and a reader shows no control character."""
    scope = wrapped(demo_tokenizer)
    store = scope.collect({"a": ["é\r\x1b1", "11"]}, tmp_path / "run.fs", extensions=(), quiet=True)
    ids, _ = store.token_ids("a", 0)
    spelt = demo_tokenizer.convert_ids_to_tokens(ids.tolist())
    assert store.token_texts(ids) == [*spelt[:-1], "1"]
    assert verify(tmp_path / "run.fs").ok


@pytest.mark.parametrize("how", ["no text", "no tokenizer", "no texts"])
def test_without_a_tokenizer_or_texts_there_is_no_file(demo_tokenizer, tmp_path, how, caplog):
    """Nor does a tokenizer that cannot say how a single token reads stop a run."""

    class Fails(models.PadsOnTheLeft):
        def decode(self, ids, **_):
            if len(ids) > 1:
                return super().decode(ids)
            raise OSError("no vocabulary")

        def __len__(self):
            return 3

    tokenizer = Fails() if how == "no texts" else demo_tokenizer
    scope = wrapped(tokenizer)
    scope.tokenizer = None if how == "no tokenizer" else tokenizer
    with caplog.at_level(logging.WARNING, "fisherscope"):
        store = scope.collect(
            {"a": models.rows(3)},
            tmp_path / "run.fs",
            extensions=(),
            quiet=True,
            store_text=how != "no text",
        )
    assert ("no vocabulary" in caplog.text) == (how == "no texts")
    assert caplog.text.count("cannot say") <= 1
    assert "tokens.json" not in names(tmp_path / "run.fs")
    assert store.token_texts(store.token_ids("a", 0)[0][:2]) == [None, None]


def test_classes_are_no_tokens(tmp_path):
    """Labels of a classification are left out; those that a model of language predicts are not."""
    vocabulary = {f"t{i}": i for i in range(models.VOCABULARY)}
    inner = Tokenizer(token_models.WordLevel(vocabulary, unk_token="t0"))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="t0", pad_token="t1")
    classifier = wrapped(tokenizer, "bert", auto="AutoModelForSequenceClassification")
    rows = [{"input_ids": [5, 6, 7], "label": 0}, {"input_ids": [8, 9], "label": 1}]
    store = classifier.collect({"a": rows}, tmp_path / "classes.fs", extensions=(), quiet=True)
    assert store.token_texts([0, 1, 5, 9]) == [None, None, "t5", "t9"]
    masked = wrapped(tokenizer, "bert", auto="AutoModelForMaskedLM")
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 11, -100]}, {"input_ids": [8], "labels": [9]}]
    store = masked.collect({"a": rows}, tmp_path / "masked.fs", extensions=(), quiet=True)
    assert store.token_texts([11, 5]) == ["t11", "t5"]
