"""Contributions of single positions: ragged rows with a column per head, in the segments of a store."""

import json

import pytest
import torch

from fisherscope.errors import CorruptStoreError, FingerprintError, StoreError
from fisherscope.store import StoreWriter, open_store
from fisherscope.store.inspect import describe
from fisherscope.store.position_plan import side_of
from fisherscope.store.schema import StoreHeader
from fisherscope.store.size import bytes_per_sample
from tests.store.store_cases import Run, header_of, toy_layout

FUSED, OUTPUT, UP = "h.0.c_attn.weight", "h.1.o.weight", "h.1.up.weight"
COLUMNS = {FUSED: 1 + 9, OUTPUT: 1 + 4, UP: 1}


@pytest.fixture
def run():
    """A run whose segments hold contributions to three matrices."""
    return Run(header_of(toy_layout(), position_parameters=(UP, FUSED, OUTPUT)))


def values_of(run):
    """Per matrix and row ``[positions, columns]``."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: [torch.randn(len(ids), columns, generator=generator) for ids in run.ids]
        for name, columns in COLUMNS.items()
    }


def write(run, root, values, *, batch=2, kept=None):
    """All rows in one segment, backwards, some at a time; commit the first ``kept``."""
    rows = list(reversed(range(run.n)))
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        with run.open_segment(writer, rows) as segment:
            for start in range(0, run.n, batch):
                chosen = rows[start : start + batch]
                run.put(segment, chosen, start)
                for name, each in values.items():
                    segment.put_ragged(f"positions/{name}", start, [each[row] for row in chosen])
            segment.commit(kept)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_every_value_comes_back(run, root, batch):
    """Whole matrices and the heads of each block, in row order, whatever the batches were."""
    values = values_of(run)
    write(run, root, values, batch=batch)
    store = open_store(root)
    for name, each in values.items():
        found = store.position_contributions(run.task, name)
        assert all(torch.equal(f, e[:, 0]) for f, e in zip(found, each, strict=True))
    for place, block in enumerate("QKV"):
        found = store.position_contributions(run.task, FUSED, [3, 1], block=block)
        columns = slice(1 + 3 * place, 4 + 3 * place)
        for values_found, row in zip(found, (3, 1), strict=True):
            assert torch.equal(values_found, values[FUSED][row][:, columns].T)
    for name, expected in run.gradients.items():
        assert torch.equal(store.gradients(run.task, name), expected.bfloat16().float())


def test_a_segment_that_is_cut_short(run, root):
    """Committing the first rows of a segment keeps their values."""
    values = values_of(run)
    write(run, root, values, kept=3)
    found = open_store(root).position_contributions(run.task, OUTPUT, block="O")
    assert [tuple(f.shape) for f in found] == [(4, len(run.ids[row])) for row in (2, 3, 4)]
    for f, row in zip(found, (2, 3, 4), strict=True):
        assert torch.equal(f, values[OUTPUT][row][:, 1:].T)


def test_what_does_not_fit_is_refused(run, root):
    """Other lengths, other columns and a missing matrix never reach the journal."""
    values = values_of(run)
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        with run.open_segment(writer, [1, 2]) as segment:
            run.put(segment, [1, 2])
            assert segment.lengths(f"positions/{FUSED}", 0, 2) == [2, 3]
            with pytest.raises(ValueError, match="lengths"):
                segment.put_ragged(f"positions/{FUSED}", 0, [values[FUSED][2], values[FUSED][1]])
            with pytest.raises(ValueError, match=r"x \(10,\)"):
                segment.put_ragged(f"positions/{FUSED}", 0, [values[OUTPUT][1]])
            for name in (FUSED, OUTPUT):
                segment.put_ragged(f"positions/{name}", 0, values[name][1:3])
            with pytest.raises(StoreError, match=r"'positions/h\.1\.up\.weight' was not written"):
                segment.commit()
        with pytest.raises(ValueError, match=r"need the lengths of \['positions'\]"):
            writer.segment(run.task, [1], ragged={"labels": [2]})


def test_lengths_of_their_own(run, root):
    """Images have positions and no ids: lengths of the family are then given."""
    values = torch.arange(40.0).reshape(4, 10)
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        ragged = {"ids": [0], "labels": [1], "text": [0], "positions": [4]}
        with writer.segment(run.task, [2], ragged=ragged) as segment:
            assert segment.lengths(f"positions/{FUSED}", 0, 1) == [4]
            assert segment.lengths("ids/input", 0, 1) == [0]
            segment.put_ragged(f"positions/{FUSED}", 0, values)


def test_damage_is_found_and_named(run, root):
    """A flipped bit in a contribution is an error that names the dataset."""
    write(run, root, values_of(run))
    store = open_store(root)
    (segment,) = store.task_index(run.task).segments
    (dataset,) = [d for d in segment.shard.datasets if d.name == "positions/h.1.o.weight"]
    with (root / "shards" / segment.shard.file).open("r+b") as file:
        file.seek(dataset.offset + 5)
        byte = file.read(1)[0]
        file.seek(dataset.offset + 5)
        file.write(bytes([byte ^ 1]))
    store = open_store(root)
    with pytest.raises(CorruptStoreError, match=r"positions/h\.1\.o\.weight"):
        store.position_contributions(run.task, OUTPUT)
    assert len(store.position_contributions(run.task, UP)) == run.n


def test_sizes_are_estimated_exactly(run, root):
    """The bytes of contributions, and of their offsets, are those that the store then takes."""
    write(run, root, values_of(run))
    header = run.header
    mean = sum(map(len, run.ids)) / run.n
    sizes = bytes_per_sample(
        header.layout, header.parameters, (), mean_tokens=mean, position_parameters=header.position_parameters
    )
    assert sizes["positions"] == 4 * mean * sum(COLUMNS.values()) + 8
    found = describe(root)["bytes"]["positions"]
    assert found == pytest.approx(run.n * sizes["positions"] + 8)  # one offset more than samples
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")


def test_the_header(run, root):
    """The matrices are part of a store's identity; headers without the key hold none."""
    data = json.loads(json.dumps(run.header.to_json()))
    assert StoreHeader.from_json(data) == run.header
    del data["position_parameters"]
    assert StoreHeader.from_json(data).position_parameters == ()
    with pytest.raises(ValueError, match="no matrix"):
        header_of(toy_layout(), position_parameters=("h.0.c_attn.bias",))
    with pytest.raises(ValueError, match="position_parameters"):
        StoreHeader.from_json({**data, "position_parameters": [3]})
    write(run, root, values_of(run))
    with pytest.raises(FingerprintError, match=r"header\.position_parameters"):
        StoreWriter.open(root, header_of(toy_layout()))


def test_models_without_an_encoder_have_one_kind_of_positions():
    """Every parameter of a decoder runs over the positions of the input."""
    layout = toy_layout()
    assert {side_of(layout, info.name) for info in layout.parameters} == {"input"}
