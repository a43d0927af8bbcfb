"""Readers in other processes: pickled, forked, in the workers of a DataLoader."""

import multiprocessing
import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from fisherscope.store import StoreWriter, open_store, verify
from tests.store.store_cases import Run, header_of, toy_layout

PARAMETER = "h.1.q.weight"


class Gradients(Dataset):
    """Gradients of one parameter, a sample at a time, from an open store."""

    def __init__(self, store, task):
        self.store, self.task = store, task

    def __len__(self):
        return self.store.committed(self.task)

    def __getitem__(self, index):
        return index, self.store.gradients(self.task, PARAMETER, [index])[0]


@pytest.fixture
def run():
    """Nine samples in five segments."""
    return Run(header_of(toy_layout()), n=9, batches=((3, 1), (0, 4), (2, 8), (5,), (7, 6)))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_read(run, root, context):
    """Two workers with one store that was read before: every sample comes once, and is right."""
    run.write(root)
    store = open_store(root)
    store.gradients(run.task, PARAMETER)  # maps are open when workers are forked
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside the threads of torch
        loader = DataLoader(
            Gradients(store, run.task), batch_size=2, num_workers=2, multiprocessing_context=context
        )
        seen = [(int(i), g) for indices, batch in loader for i, g in zip(indices, batch, strict=True)]
    assert [index for index, _ in seen] == list(range(9))
    for index, gradient in seen:
        assert torch.equal(gradient, run.gradients[PARAMETER][index].bfloat16().float())


def test_a_pickled_reader_is_small_and_sees_what_is_committed_then(run, root):
    """Only the path travels: neither maps nor data, and the other side opens the store anew."""
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        run.write_segment(writer, run.batches[0])
        store = open_store(root)
        store.gradients(run.task, PARAMETER)
        packed = pickle.dumps(store)
        run.write_segment(writer, run.batches[1])
    assert len(packed) < 1000
    assert (store.committed(run.task), pickle.loads(packed).committed(run.task)) == (2, 4)


def _verify_while(root, ready, stop, wrong):
    """Verify the store, and read its aggregates, again and again; nothing is ever wrong."""
    ready.set()
    while not stop.is_set():
        try:
            found = verify(root)
            if not found.ok:
                wrong.put(found.summary())
            store = open_store(root)
            for task in store.tasks:
                if store.fisher_count(task):
                    store.fisher(task, PARAMETER)
                    store.gradients(task, PARAMETER)
        except Exception as error:
            wrong.put(repr(error))
    wrong.put(None)


def test_verifying_beside_a_writer_finds_nothing(run, root):
    """Snapshots are replaced, tasks grow and lines are added between any two reads of another process."""
    context = multiprocessing.get_context("spawn")
    ready, stop, wrong = context.Event(), context.Event(), context.Queue()
    with StoreWriter.open(root, run.header, durability="none") as writer:
        writer.declare_task(run.task, run.keys[:5])
        run.write_segment(writer, run.batches[0])
    reader = context.Process(target=_verify_while, args=(root, ready, stop, wrong))
    reader.start()
    assert ready.wait(60)
    with StoreWriter.open(root, run.header, durability="none") as writer:
        writer.declare_task(run.task, run.keys)
        for number, rows in enumerate(run.batches, 1):
            if number > 1:
                run.write_segment(writer, rows)
            done = list(range(number))
            for _ in range(40):
                writer.snapshot(run.task, done, len(writer.committed_rows(run.task)), run.arrays(done))
                writer.evidence("note", {"batches": number})
    stop.set()
    assert wrong.get(timeout=60) is None
    reader.join(60)


def _read_while(root, task, ready, stop, counts):
    """Open the store again and again; every committed sample reads as what it is."""
    run = Run(header_of(toy_layout()), n=9, batches=((3, 1), (0, 4), (2, 8), (5,), (7, 6)))
    ready.set()
    while not stop.is_set():
        store = open_store(root)
        if task not in store.tasks:
            continue
        rows = store.samples(task)["row"].tolist()
        found = store.gradients(task, PARAMETER)
        assert torch.equal(found, run.gradients[PARAMETER][rows].bfloat16().float())
        counts.put(len(rows))


def test_readers_beside_a_writer_see_only_what_is_committed(run, root):
    """A reader in another process, opening without pause, never meets half a sample."""
    context = multiprocessing.get_context("spawn")
    ready, stop, counts = context.Event(), context.Event(), context.Queue()
    with StoreWriter.open(root, run.header, queue=2) as writer:
        reader = context.Process(target=_read_while, args=(root, run.task, ready, stop, counts))
        reader.start()
        assert ready.wait(60)
        writer.declare_task(run.task, run.keys)
        seen = 0
        for rows in run.batches:
            run.write_segment(writer, rows)
            writer.flush()
            committed = len(writer.committed_rows(run.task))
            while seen < committed:
                seen = counts.get(timeout=60)
                assert seen <= committed
        stop.set()
        reader.join(60)
    assert reader.exitcode == 0
    assert seen == 9
