"""Shards are plain HDF5 files: libhdf5 reads in them what the package reads without it."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from fisherscope.store import StoreWriter, finalize, open_store
from fisherscope.store.names import escape_path, is_dataset_name, unescape_path
from fisherscope.store.skeleton import DatasetSpec, lay_out
from tests.store.store_cases import Run, header_of, toy_layout


@pytest.fixture(scope="module")
def shards(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "run.fs"
    toy.write(root)
    return root / "shards"


def _segment(shards):
    """The shard with rows 3 and 1."""
    for path in sorted(shards.iterdir()):
        with h5py.File(path) as file:
            if "sample" in file and file["sample/row"][0] == 3:
                return path
    raise AssertionError


def test_h5py_reads_the_same_values(shards, toy):
    """bfloat16 reads as float32 through HDF5's own conversion; the layout is the documented one."""
    store = open_store(shards.parent)
    with h5py.File(_segment(shards)) as file:
        assert file["sample/row"][:].tolist() == [3, 1]
        dataset = file["gradients/decoder/0/K"]
        assert dataset.shape == (3, 2, 12 * 4 + 4)
        assert dataset.dtype == np.float32 or dataset.dtype.itemsize == 2
        values = dataset.astype("f4")[:]
        for head in range(3):
            weight = store.slice(toy.task, layer=0, block="K", head=head, samples=[3, 1])
            bias = store.slice(toy.task, layer=0, block="K", head=head, part="bias", samples=[3, 1])
            np.testing.assert_array_equal(values[head], torch.cat([weight, bias], 1).numpy())
        expected = toy.gradients["wte"][[3, 1]].bfloat16().float().numpy()
        np.testing.assert_array_equal(file["parameters/wte"].astype("f4")[:], expected)
        assert escape_path("parameters/h.1.ln-é..weight") in file
        assert file["text/bytes"][:].tobytes().decode() == toy.texts[3] + toy.texts[1]


def test_the_files_keep_to_what_old_readers_and_maps_can_use(shards):
    """Contiguous, page-aligned, unfiltered, superblock 3, fixed-length attributes, nothing external."""
    for path in shards.iterdir():
        with h5py.File(path) as file:
            assert file.id.get_create_plist().get_version()[0] == 3
            assert file.attrs["format"] == b"fisherscope-shard"
            assert all(not h5py.check_string_dtype(a.dtype) or a.dtype.kind == "S" for a in _attributes(file))

            def check(name, item):
                if isinstance(item, h5py.Dataset):
                    assert item.chunks is None
                    assert item.compression is None
                    assert item.external is None
                    assert not item.is_virtual
                    assert item.nbytes == 0 or item.id.get_offset() % 4096 == 0

            file.visititems(check)


def _attributes(file):
    return [file.attrs.get_id(name) for name in file.attrs]


def test_journal_offsets_are_those_of_the_file(shards, toy):
    """What the journal says about offset, shape and size is what libhdf5 says."""
    store = open_store(shards.parent)
    for ledger in store.ledgers:
        for shard in ledger.shards():
            with h5py.File(shards / shard.file) as file:
                for dataset in shard.datasets:
                    found = file[dataset.name]
                    assert found.shape == dataset.spec.shape
                    assert (found.id.get_offset() or 0) == dataset.offset or not dataset.spec.nbytes
                    assert found.id.get_storage_size() == dataset.spec.nbytes


def test_the_same_commits_give_the_same_bytes(toy, tmp_path):
    """No times, no addresses, no hash order: two runs give equal journals and equal shards."""
    roots = [tmp_path / "a.fs", tmp_path / "b.fs"]
    for root in roots:
        toy.write(root)
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in roots]
    assert files[0] == files[1]
    for name in files[0]:
        assert (roots[0] / name).read_bytes() == (roots[1] / name).read_bytes(), name


@pytest.mark.parametrize("count", [1, 9, 300])
def test_any_number_of_datasets_packs_its_metadata_in_front(count):
    """Metadata never lies among the data, whichever way HDF5 stores the links of a group."""
    specs = [DatasetSpec(f"a/b{i % 3}/c{i}", (i % 5, 3, 2), "bfloat16") for i in range(1, count + 1)]
    skeleton = lay_out(specs, {"kind": b"test", "rank": 3})
    placed = sorted((skeleton.offsets[s.name], s.nbytes) for s in specs if s.nbytes)
    end = len(skeleton.metadata)
    for offset, nbytes in placed:
        assert offset % 4096 == 0
        assert offset >= end
        end = offset + nbytes
    assert skeleton.size >= end


def test_scalars_and_empty_arrays_come_back(root):
    """Aggregates may hold scalars and arrays without entries."""
    run = Run(header_of(toy_layout()))
    from fisherscope.store import StoreWriter

    arrays = {"a/scalar": torch.tensor(2.5), "a/empty": torch.zeros(0, 3), "b-c é/..": np.arange(3)}
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        writer.snapshot(run.task, [], 0, arrays)
        found = writer.load_snapshot(run.task)
    assert found.arrays.keys() == arrays.keys()
    assert found.arrays["a/scalar"].item() == 2.5
    assert found.arrays["a/empty"].shape == (0, 3)
    assert found.arrays["b-c é/.."].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name",
    ["a.b.c", "", ".", "..", "a..b", "a/../b", "a//b", "-", "a-b", "é", "a b\n", "-2d", "x.", ".x", "a/"],
)
def test_names_are_escaped_without_loss(name):
    """Every name has a safe form of its own, from which it comes back."""
    escaped = escape_path(name)
    assert is_dataset_name(escaped)
    assert ".." not in escaped
    assert unescape_path(escaped) == name


@pytest.mark.parametrize("what", ["plain", "finalized", "torn", "without gradients"])
def test_the_documented_way_to_read_a_store_works(toy, root, monkeypatch, what):
    """The example of docs/store-format.md reads every sample with h5py and the standard library."""
    page = Path(__file__).resolve().parents[2] / "docs" / "store-format.md"
    example = page.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    if what == "without gradients":
        with StoreWriter.open(root, toy.header) as writer:
            writer.declare_task(toy.task, toy.keys)
            for rows in toy.batches:
                with toy.open_segment(writer, rows, gradients=rows != (2,)) as segment:
                    toy.put(segment, rows, gradients=rows != (2,))
                    segment.commit()
    else:
        toy.write(root)
    if what == "finalized":
        finalize(root)
    if what == "torn":
        journal = root / "journal" / "r0000.journal"
        journal.write_bytes(journal.read_bytes() + journal.read_bytes().splitlines()[-1])
    monkeypatch.chdir(root.parent)
    found = {}
    exec(example, found)
    weight = toy.header.layout.attention_layer(0).block("Q").weight
    bias = toy.header.layout.attention_layer(0).block("Q").bias
    assert found["samples"].keys() == {("math", row) for row in range(toy.n)}
    for (_, row), (loss, queries) in found["samples"].items():
        assert loss == toy.loss[row]
        if what == "without gradients" and row == 2:
            assert queries is None
            continue
        parts = [p.gather(toy.gradients[p.parameter][[row]])[:, 0] for p in (weight, bias)]
        np.testing.assert_array_equal(queries, torch.cat(parts, 1).bfloat16().float())
