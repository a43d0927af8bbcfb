"""Everything that a reader can say about a store, sample by sample, as digests that compare bit for bit."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from fisherscope.errors import NotStoredError
from fisherscope.store import StoreWriter, open_store, verify
from tests.store.store_cases import Run, header_of, small_layout


def _bytes(value):
    """The bits of a tensor, an array, a number or a text, with its type and shape."""
    if isinstance(value, torch.Tensor):
        bits = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}".encode() + bits
    if isinstance(value, np.ndarray | np.generic):
        value = np.ascontiguousarray(value)
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    return repr(value).encode()


def digest(values):
    """sha256 over named values."""
    whole = hashlib.sha256()
    for name, value in values:
        whole.update(repr(name).encode() + b"\0" + _bytes(value) + b"\0")
    return whole.hexdigest()


def _gradients(store, task):
    """Per name the gradients of all committed samples, sample first: whole and by head."""
    stored = set(store.gradient_parameters)
    for name in store.gradient_parameters:
        yield name, store.gradients(task, name)
    for attention, block in store.layout.head_blocks():
        for part, partition in (("weight", block.weight), ("bias", block.bias)):
            if partition is not None and partition.parameter in stored:
                where = {"layer": attention.layer, "block": block.name, "part": part}
                heads = store.slices(task, stack=attention.stack, **where)
                yield (attention.stack, *where.values()), heads.transpose(0, 1)


def samples_of(store):
    """Per task and committed row a digest of all that is stored of the sample."""
    found = {}
    for task in store.tasks:
        frame = store.samples(task)
        arrays = dict(_gradients(store, task)) if len(frame) else {}
        values = store.group_values(task)
        arrays |= {"square": values["square"].values, "dot": values["dot"].values}
        arrays["contributions"] = store.group_contributions(task)
        for i, row in enumerate(frame["row"].tolist()):
            ids, labels = store.token_ids(task, row)
            each = [(name, frame[name].iloc[i]) for name in frame.columns]
            each += [("ids", ids), ("labels", labels)]
            each += [(name, array[i]) for name, array in arrays.items()]
            found["sample", task, row] = digest(each)
    return found


def aggregates_of(store):
    """Per task how many samples its aggregates cover and a digest of them; absent where there are none."""
    found = {}
    for task in store.tasks:
        count = store.fisher_count(task)
        if not count:
            continue
        each = [(("fisher", name), store.fisher(task, name)) for name in store.parameters]
        each += [(("mean", name), store.mean(task, name)) for name in store.parameters]
        moments = [name for name in ("moments/mean", "moments/m2") if _has(store, task, name)]
        each += [(name, store.aggregate(task, name)) for name in moments]
        found["aggregate", task, count] = digest(each)
    return found


def _has(store, task, name):
    try:
        store.aggregate(task, name)
    except NotStoredError:
        return False
    return True


def everything_of(store):
    """Samples, aggregates, constants and the tables over whole tasks."""
    columns = ("count", "sum", "mean", "variance")
    tables = {
        ("groups", task): digest((name, store.groups(task)[name].to_numpy()) for name in columns)
        for task in store.tasks
        if store.committed(task)
    }
    constants = {"constants": digest(sorted(store.constants().items()))}
    complete = {("complete", task): store.is_complete(task) for task in store.tasks}
    return samples_of(store) | aggregates_of(store) | tables | constants | complete


TOKENS = {0: "the", 7: " é"}


class TwoTasks:
    """Two tasks of four samples in one store: two segments and two snapshots each, and constants."""

    def __init__(self):
        header = header_of(small_layout())
        self.header = header
        self.runs = [
            Run(header, n=4, task="math", batches=((3, 1), (0, 2))),
            Run(header, n=4, task="code", seed=1, batches=((2,), (1, 0, 3))),
        ]

    def finish(self, writer):
        """What is missing: all segments in a row, so that a thread that seals has several; then the rest."""
        writer.token_texts(TOKENS)
        for run in self.runs:
            writer.declare_task(run.task, run.keys)
            done = writer.committed_rows(run.task)
            for rows in run.batches:
                if not done.issuperset(rows):
                    run.write_segment(writer, rows)
        for run in self.runs:
            run.finish(writer)

    def write(self, path, **options):
        with StoreWriter.open(path, self.header, **options) as writer:
            self.finish(writer)

    def states(self, root):
        """Every state of the aggregates that a reader may ever see, and the samples: of a run that looks."""
        seen = {}
        with StoreWriter.open(root, self.header) as writer:
            real = writer.snapshot

            def snapshot(*args, **options):
                real(*args, **options)
                seen.update(aggregates_of(open_store(root)))

            writer.snapshot = snapshot
            self.finish(writer)
        return seen | everything_of(open_store(root))


@dataclass(frozen=True)
class Seen:
    """What a reader of an unfinished store sees: samples, and how many the aggregates of each task cover."""

    samples: frozenset = frozenset()
    counts: dict = field(default_factory=dict)

    def holds(self, other):
        """Whether nothing of the other is lost."""
        fewer = {task for task, count in other.counts.items() if self.counts.get(task, 0) < count}
        return self.samples >= other.samples and not fewer


def committed(root, truth):
    """What a reader sees, each value of it right, in a store that :func:`verify` finds nothing wrong with.

    The aggregates are those of some moment of the undisturbed run. Where there is no store nothing is seen.
    """
    if not (root / "store.json").exists():
        return Seen()
    store = open_store(root)
    samples, aggregates = samples_of(store), aggregates_of(store)
    for key, value in (samples | aggregates).items():
        assert truth[key] == value, key
    verified = verify(root)
    assert verified.ok, verified.summary()
    return Seen(frozenset(samples), {task: count for _, task, count in aggregates})


def assert_finished(root, whole):
    """Everything is there, to the bit, and nothing else is left in the directory."""
    store = open_store(root)
    assert everything_of(store) == whole
    assert store.token_texts(TOKENS) in ([*TOKENS.values()], [None, None])
    verified = verify(root)
    assert verified.ok, verified.summary()
    assert not verified.notes
