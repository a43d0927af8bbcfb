"""The store that was written when format version 1 was settled is read by every later release."""

import shutil

import numpy as np
import pytest
import torch

from fisherscope.errors import StoreFormatError
from fisherscope.store import StoreWriter, finalize, open_store, verify
from fisherscope.store.inspect import describe
from tests.store import golden
from tests.store.golden import LENGTHS, TASKS, O, Q, gradient, header, key, numbers


def check(store, tasks=TASKS):
    """Every value of the golden store, from the formula that made it."""
    assert store.tasks == list(tasks)
    groups = len(header().groups)
    for task, n in tasks.items():
        assert store.is_complete(task)
        frame = store.samples(task)
        assert frame["key"].tolist() == [key(task, row) for row in range(n)]
        assert frame["length"].tolist() == list(LENGTHS[task])
        assert frame["tokens"].tolist() == [row + 1 for row in range(n)]
        assert frame["loss"].tolist() == [row / 4 for row in range(n)]
        assert frame["truncated"].tolist() == [row % 2 for row in range(n)]
        assert frame["text"].tolist() == [f"{task} {row}" for row in range(n)]
        for row in range(n):
            ids, labels = store.token_ids(task, row)
            assert ids.tolist() == list(range(row, row + LENGTHS[task][row]))
            assert set(labels.tolist()) == {-100}
        values = store.group_values(task)
        for which, letter in (("square", "s"), ("dot", "d")):
            expected = torch.stack([numbers(f"{task} {letter} {row}", groups) for row in range(n)])
            expected = expected.abs() if which == "square" else expected
            np.testing.assert_array_equal(values[which].values, expected.numpy())
        found = store.position_contributions(task, Q)
        for row, mine in enumerate(found):
            assert torch.equal(mine, numbers(f"{task} p {row}", LENGTHS[task][row], 5)[:, 0])
        for name in header().gradient_parameters:
            expected = torch.stack([gradient(task, name, row) for row in range(n)])
            got = store.gradients(task, name)
            if name == O:  # singular vectors are rounded
                torch.testing.assert_close(got, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
            else:
                assert torch.equal(got, expected), name
            np.testing.assert_allclose(store.fisher(task, name), expected.square().mean(0), rtol=1e-6)
            np.testing.assert_allclose(store.mean(task, name), expected.mean(0), rtol=1e-6, atol=1e-7)
        errors = store.encoding_errors(task)
        assert errors.columns.tolist() == [O]
        assert (errors.to_numpy() < 1e-3).all()
    theta = numbers("theta", groups).abs().double().numpy()
    np.testing.assert_array_equal(store.constants()["groups/theta_square"], theta)


def test_it_is_read():
    """Every value; nothing is found wrong with it, and it says what it is."""
    store = open_store(golden.ROOT)
    check(store)
    found = verify(golden.ROOT)
    assert found.ok, found.summary()
    described = describe(golden.ROOT)
    assert described["format_version"] == 1
    assert described["encodings"] == {"factored": 2, "dense": 3, "lowrank": 1}
    assert [ledger.rank for ledger in store.ledgers] == [0, 1]
    assert store.header == header()


@pytest.fixture
def copied(tmp_path):
    """A copy that may be written to."""
    return shutil.copytree(golden.ROOT, tmp_path / "golden.fs")


def test_it_can_be_resumed_and_finalized(copied):
    """A writer of today takes its locks, finds nothing to do, merges what is small; all values stay."""
    with StoreWriter.open(copied, header()) as writer:
        for task, n in TASKS.items():
            writer.declare_task(task, [key(task, row) for row in range(n)])
            assert writer.committed_rows(task) == set(range(n))
    check(open_store(copied))
    finalize(copied)
    check(open_store(copied))
    assert verify(copied).ok


def test_writing_it_again_gives_the_same_content(tmp_path):
    """What is written today reads the same, so the formula and the store belong together."""
    check(open_store(golden.write(tmp_path / "again.fs")))


def test_what_a_store_requires_must_be_known(copied):
    """A later release may require more: this one then refuses, and names it."""
    path = copied / "store.json"
    path.write_text(path.read_text().replace('"requires": [', '"requires": ["quantum", '))
    with pytest.raises(StoreFormatError, match="quantum"):
        open_store(copied)
