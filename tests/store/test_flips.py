"""Single bytes flipped in the shards of a real collection: each is found, and none is read as a number."""

import json
import os
import random
from dataclasses import dataclass

import pytest

import fisherscope as fs
from fisherscope.analyses import ConflictConfig, FisherConfig, ImportanceConfig
from fisherscope.errors import CorruptStoreError
from fisherscope.store import open_store, verify
from fisherscope.store.check_shard import NO_DATASET
from fisherscope.store.names import unescape_path
from tests.store.collected import collect, wrapped

QUICK = fs.AnalyzeConfig(
    fisher=FisherConfig(bootstrap=20),
    importance=ImportanceConfig(bootstrap=20),
    conflict=ConflictConfig(calibration_splits=4),
)


@dataclass(frozen=True)
class Region:
    """Bytes of a shard: those of one dataset, or a stretch that belongs to none."""

    shard: str
    task: str
    name: str
    start: int
    stop: int


SLOW = [pytest.param(encoding, marks=pytest.mark.slow) for encoding in ("dense", "lowrank")]


@pytest.fixture(scope="module", params=["auto", *SLOW])
def store(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param) / "run.fs"
    gradients = fs.SampleGradients("all", encoding=request.param, rank=2)
    return collect(wrapped(), root, extensions=("fisher", gradients), durability="none")


@pytest.fixture(scope="module")
def regions(store):
    """Every byte of every shard, once."""
    found = []
    for ledger in store.ledgers:
        tasks = {r.shard.file: r.task for s in ledger.segments.values() for r in s.values()}
        tasks |= {r.shard.file: r.task for r in ledger.snapshots.values()}
        for shard in ledger.shards():
            task, end = tasks.get(shard.file, ""), 0
            for d in sorted((d for d in shard.datasets if d.spec.nbytes), key=lambda d: d.offset):
                if d.offset > end:
                    found.append(Region(shard.file, task, NO_DATASET, end, d.offset))
                end = d.offset + d.spec.nbytes
                found.append(Region(shard.file, task, d.name, d.offset, end))
            if end < shard.nbytes:
                found.append(Region(shard.file, task, NO_DATASET, end, shard.nbytes))
    return found


class Flipped:
    """One byte of one file is another while this lasts."""

    def __init__(self, path, position, mask):
        self._path, self._position, self._mask = path, position, mask

    def _flip(self):
        fd = os.open(self._path, os.O_RDWR)
        (byte,) = os.pread(fd, 1, self._position)
        os.pwrite(fd, bytes([byte ^ self._mask]), self._position)
        os.close(fd)

    def __enter__(self):
        self._flip()

    def __exit__(self, *_):
        self._flip()


def read(store, region):
    """Ask a reader for what lies in a dataset, by the call that a user would make."""
    task, (kind, *rest) = region.task, unescape_path(region.name).split("/")
    match kind:
        case "sample" | "text":
            return store.samples(task)
        case "ids" | "labels":
            return [store.token_ids(task, row) for row in store.samples(task)["row"]]
        case "groups" | "probe" if not task:
            return store.constants()
        case "groups":
            return store.group_values(task)
        case "gradients" | "parameters" | "factors" | "lowrank" | "scales" | "positions":
            store.encoding_errors(task)
            return [store.gradients(task, name) for name in store.gradient_parameters]
        case "fisher":
            return store.fisher(task, "/".join(rest[1:]))
        case "mean":
            return store.mean(task, "/".join(rest))
    return store.aggregate(task, "/".join((kind, *rest)))


def one_of_each_kind(regions, rng):
    """One dataset of each kind, and one stretch that is none."""
    return list({region.name.split("/")[0]: region for region in rng.sample(regions, len(regions))}.values())


@pytest.mark.parametrize("flips", [150, pytest.param(500, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_found_and_never_read(store, regions, flips):
    """verify() names shard, dataset and enclosing offsets; the reader raises where it is asked for them."""
    rng = random.Random(0)
    chosen = one_of_each_kind(regions, rng)
    chosen += rng.choices(regions, k=flips - len(chosen))
    kinds = {region.name.split("/")[0] for region in chosen}
    assert kinds >= {"sample", "ids", "labels", "groups", "fisher", "mean", "moments", NO_DATASET}
    assert kinds & {"gradients", "factors", "lowrank"}
    for region in chosen:
        position, mask = rng.randrange(region.start, region.stop), 1 << rng.randrange(8)
        with Flipped(store.path / "shards" / region.shard, position, mask):
            (finding,) = verify(store.path).findings
            assert (finding.file, finding.dataset) == (f"shards/{region.shard}", region.name)
            assert region.start <= finding.start <= position < finding.stop <= region.stop
            if region.name != NO_DATASET:
                with pytest.raises(CorruptStoreError, match=region.shard):
                    read(open_store(store.path), region)
    assert verify(store.path).ok


def shown(store):
    """Per analysis what its section shows: numbers as JSON, or its error; or why there is no report."""
    try:
        report = fs.analyze(store, config=QUICK)
    except CorruptStoreError as error:
        return {"report": f"CorruptStoreError: {error}"}
    return {name: report.failed.get(name) or json.dumps(report[name].to_json()) for name in report.outcomes}


def test_no_analysis_shows_a_number_from_a_damaged_dataset(store, regions):
    """A section is what it was, or an error that names the shard; or there is no report at all."""
    clean = shown(open_store(store.path))
    assert len(clean) > 5
    assert [text for text in clean.values() if not text.startswith("{")] == []
    rng = random.Random(1)
    failed = {}
    for region in one_of_each_kind(regions, rng):
        position = rng.randrange(region.start, region.stop)
        with Flipped(store.path / "shards" / region.shard, position, 0x40):
            sections = shown(open_store(store.path))
        wrong = {name: text for name, text in sections.items() if text != clean.get(name)}
        for name, text in wrong.items():
            assert "CorruptStoreError" in text or "which failed" in text, (name, region)
            assert region.shard in text
        failed.setdefault(region.name.split("/")[0], set()).update(wrong)
    assert set().union(*failed.values()) >= clean.keys()
    assert not failed[NO_DATASET]
