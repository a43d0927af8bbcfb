"""Gradients as factors, in low rank and in float16: what comes back, what is refused, what is read."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisherscope.errors import CorruptStoreError, MemoryBudgetError, NotStoredError, StoreFormatError
from fisherscope.linalg import Dense, Factored, LowRank
from fisherscope.linalg.rounding import rounded
from fisherscope.store import StoreWriter, factors, gradients, open_store
from fisherscope.store.checksum import BlockGrid
from fisherscope.store.encodings import Encodings
from fisherscope.store.factor_plan import FactoredPlace, LowRankPlace
from tests.store.store_cases import Run, header_of, small_layout, toy_layout

FUSED, OUTPUT = "h.0.c_attn.weight", "h.0.c_proj.weight"
SHARED = ("h.1.q.weight", "h.1.k.weight", "h.1.v.weight")
CUT = ("h.1.o.weight", "h.1.down.weight")
RANK = 3
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


def mixed(dtype="float32", **changes):
    """Factors of a fused and of separate projections, an O in low rank, and everything else dense."""
    of = dict.fromkeys((FUSED, OUTPUT, *SHARED), "factored") | dict.fromkeys(CUT, "lowrank")
    inputs = {FUSED: FUSED, OUTPUT: OUTPUT} | dict.fromkeys(SHARED, SHARED[0])
    made = Encodings(of, inputs, (FUSED, OUTPUT), RANK, dtype)
    return dataclasses.replace(made, **changes)


class Encoded(Run):
    """A run whose gradients are sums over the positions of its samples, stored in whatever encoding."""

    def __post_init__(self):
        super().__post_init__()
        generator = torch.Generator().manual_seed(7)
        encodings, layout = self.header.encodings, self.header.layout
        self.inputs, self.outputs = {}, {}
        for name in encodings.named("factored"):
            axis, shape = encodings.output_axis(name), layout.parameter(name).shape
            shared = encodings.inputs[name]
            if shared not in self.inputs:
                self.inputs[shared] = [
                    torch.randn(len(i), shape[1 - axis], generator=generator) for i in self.ids
                ]
            self.outputs[name] = [torch.randn(len(ids), shape[axis], generator=generator) for ids in self.ids]
            pairs = zip(self.outputs[name], self.inputs[shared], strict=True)
            products = torch.stack([d.T @ a for d, a in pairs])
            self.gradients[name] = products.mT.contiguous() if axis else products

    def put(self, segment, rows, start=0, *, gradients=True):
        rows, encodings = list(rows), self.header.encodings
        dense = [n for n in self.header.gradient_parameters if encodings.encoding(n) == "dense"]
        super().put(segment, rows, start, gradients=False)
        if not gradients:
            return
        for name in dense:
            segment.put_gradient(name, start, self.gradients[name][rows])
        for name, outputs in self.outputs.items():
            segment.gradients.put_output(name, start, torch.cat([outputs[row] for row in rows]))
        for name, inputs in self.inputs.items():
            segment.gradients.put_input(name, start, torch.cat([inputs[row] for row in rows]))
        for name in encodings.named("lowrank"):
            gradient = Dense(self.gradients[name][rows])
            found = LowRank.of(gradient, encodings.rank, lambda values: rounded(values, encodings.dtype, 1))
            segment.gradients.put_low_rank(name, start, found)


def encoded(dtype="float32", encodings=None, **changes):
    """A run over the layout with every kind of parameter."""
    encodings = mixed(dtype) if encodings is None else encodings
    return Encoded(header_of(toy_layout(), gradient_dtype=dtype, encodings=encodings, **changes))


@pytest.fixture(scope="module")
def run():
    return encoded()


def near(found, expected, dtype="float32"):
    """Relative to the largest entry."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    if not expected.numel():
        return True
    return float((found - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def assert_cuts(store, task, samples=None):
    """Every slice of every head equals that cut of the whole parameter."""
    for attention, block in store.layout.head_blocks():
        for part in ("weight", "bias"):
            partition = block.part(part)
            if partition is None:
                continue
            where = {"layer": attention.layer, "block": block.name, "part": part, "samples": samples}
            whole = store.gradients(task, partition.parameter, samples)
            every = store.slices(task, **where)
            for head, piece in enumerate(partition):
                assert near(every[head], piece.take(whole).flatten(1))
                assert near(store.slice(task, head=head, **where), every[head])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mixed_store_gives_gradients_back(dtype, root):
    """Dense, factored and low-rank parameters side by side: whole, in slices, with errors as recorded."""
    run = encoded(dtype)
    run.write(root)
    store = open_store(root)
    for name, expected in run.gradients.items():
        found = store.gradients(run.task, name)
        if store.encoding(name) == "lowrank":
            distance = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
            recorded = torch.tensor(store.encoding_errors(run.task)[name].to_numpy())
            assert torch.allclose(distance, recorded, rtol=1e-3, atol=1e-6)
        else:
            assert near(found, expected, dtype), name
    assert_cuts(store, run.task)
    errors = store.encoding_errors(run.task)
    assert list(errors.columns) == list(CUT)
    assert errors.index.tolist() == [f"math_{row}" for row in range(run.n)]
    assert (errors.to_numpy() > 0).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_representation_is_that_of_the_store(dtype, root):
    """Dense, factored or low rank, the same gradients in each; positions beyond a sample's own are zero."""
    run = encoded(dtype)
    run.write(root)
    store = open_store(root)
    kinds = {"dense": Dense, "factored": Factored, "lowrank": LowRank}
    for name in run.gradients:
        found = store.per_sample(run.task, name)
        assert type(found) is kinds[store.encoding(name)]
        assert near(found.dense(), store.gradients(run.task, name))
    factored = store.per_sample(run.task, SHARED[1])
    assert factored.positions == max(map(len, run.ids))
    for row, ids in enumerate(run.ids):
        assert not factored.left[row, len(ids) :].any()
        assert not factored.right[row, len(ids) :].any()
    low = store.per_sample(run.task, CUT[0])
    assert low.rank == RANK
    assert torch.equal(low.error, torch.tensor(store.encoding_errors(run.task)[CUT[0]].to_numpy()))


@pytest.mark.parametrize("chosen", [[4, 0, 0], slice(None, None, -2), [], [-1], [1, 2, 3]])
def test_samples_in_any_order(run, root, chosen):
    """Lists with repetitions, slices with steps, nothing at all: of parameters, slices and factors."""
    run.write(root)
    store = open_store(root)
    for name in run.gradients:
        every = store.gradients(run.task, name)
        places = np.arange(run.n)[chosen].tolist()
        assert near(store.gradients(run.task, name, chosen), every[places])
        assert near(store.per_sample(run.task, name, chosen).dense(), every[places])
    if len(np.arange(run.n)[chosen]):
        assert_cuts(store, run.task, chosen)


def test_a_shared_input_is_stored_once(run, root):
    """Q, K and V have one dataset of inputs, under the name of the first."""
    run.write(root)
    names = {d.name for s in open_store(root).task_index(run.task).segments for d in s.shard.datasets}
    inputs = {name for name in names if name.startswith("factors/input/")}
    assert inputs == {f"factors/input/{name}" for name in (FUSED, OUTPUT, SHARED[0])}
    assert {f"factors/output/{name}" for name in SHARED} <= names
    assert not any(name.startswith("scales/") for name in names)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_segment_may_be_committed_in_part(dtype, root):
    """What the first rows have of ragged factors, of singular vectors and of scales stays theirs."""
    run = encoded(dtype)
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        with run.open_segment(writer, [3, 1, 4]) as segment:
            run.put(segment, [3, 1])
            segment.commit(2)
    store = open_store(root)
    for name in run.gradients:
        if store.encoding(name) != "lowrank":
            assert near(store.gradients(run.task, name), run.gradients[name][[1, 3]], dtype)
    assert_cuts(store, run.task)


def test_pieces_of_memory_change_nothing(run, root, monkeypatch):
    """Read a few positions, rows or heads at a time, gradients are what they are when read at once."""
    run.write(root)
    store = open_store(root)
    whole = {name: store.gradients(run.task, name) for name in run.gradients}
    heads = store.slices(run.task, layer=1, block="Q")
    for module in (factors, gradients):
        monkeypatch.setattr(module, "PIECE_BYTES", 200)
    for name, expected in whole.items():
        assert near(store.gradients(run.task, name), expected)
        assert near(store.per_sample(run.task, name).dense(), expected)
    assert near(store.slices(run.task, layer=1, block="Q"), heads)
    assert_cuts(store, run.task)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_slice_of_dense_gradients_reads_no_other_head(dtype, root):
    """With the bytes of all other heads destroyed, scales included, a head's slice is still read."""
    run = encoded(dtype, Encodings())
    run.write(root)
    expected = open_store(root).slice(run.task, layer=1, block="Q", head=2)
    for segment in open_store(root).task_index(run.task).segments:
        path = root / "shards" / segment.shard.file
        content = bytearray(path.read_bytes())
        for dataset in segment.shard.datasets:
            if dataset.name.removeprefix("scales/") == "gradients/decoder/1/Q":
                head = dataset.spec.nbytes // 4
                for other in (0, 1, 3):
                    start = dataset.offset + other * head
                    content[start : start + head] = b"\xff" * head
        path.write_bytes(content)
    store = open_store(root)
    assert torch.equal(store.slice(run.task, layer=1, block="Q", head=2), expected)
    with pytest.raises(CorruptStoreError, match="gradients/decoder/1/Q"):
        store.slice(run.task, layer=1, block="Q", head=1)


@pytest.mark.parametrize(
    "name",
    [f"factors/input/{SHARED[0]}", f"scales/factors/output/{SHARED[1]}", f"lowrank/right/{CUT[0]}",
     f"scales/lowrank/left/{CUT[0]}", f"lowrank/error/{CUT[0]}", "positions/offsets"],
)  # fmt: skip
def test_damage_is_found_before_it_is_used(name, root):
    """A flipped bit in factors, scales, errors or offsets is an error that names the dataset."""
    run = encoded("float16")
    run.write(root)
    segment = open_store(root).task_index(run.task).segments[0]
    dataset = next(d for d in segment.shard.datasets if d.name == name)
    path = root / "shards" / segment.shard.file
    content = bytearray(path.read_bytes())
    content[dataset.offset] ^= 1
    path.write_bytes(content)
    store = open_store(root)
    with pytest.raises(CorruptStoreError, match=name):
        store.per_sample(run.task, CUT[0] if "lowrank" in name else SHARED[1])


def test_a_store_says_what_it_requires():
    """Features beyond format version 1, exactly those that are used."""
    layout = toy_layout()
    assert header_of(layout).requires == []
    assert encoded("float32").header.requires == ["factored", "lowrank"]
    assert encoded("float16").header.requires == ["factored", "float16-row-scale", "lowrank"]
    assert header_of(layout, gradient_dtype="float16").requires == ["float16-row-scale"]
    assert encoded("bfloat16", mixed("float16")).header.requires == [
        "factored",
        "float16-row-scale",
        "lowrank",
    ]
    assert header_of(layout, gradient_parameters=(), gradient_dtype="float16").requires == []


def rewrite(root, change):
    """Change ``store.json`` as it lies there."""
    path = root / "store.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("features", [["sparse-heads"], ["lowrank", "zip\x1b[31m"], [3]])
def test_an_unknown_feature_is_refused_by_name(run, root, features):
    """A store of a later version says what this one lacks, safely for a terminal."""
    run.write(root)
    rewrite(root, lambda data: data.update(requires=features))
    with pytest.raises(StoreFormatError, match="does not know") as error:
        open_store(root)
    assert str(features[-1]) in str(error.value) or "\\x1b" in str(error.value)
    assert "\x1b" not in str(error.value)


def _set(key, value):
    return lambda data: data.__setitem__(key, value)


def _under(key, name, value):
    return lambda data: data[key].__setitem__(name, value)


HOSTILE = {
    "requires no list": _set("requires", "factored"),
    "undeclared features": _set("requires", []),
    "encodings no object": _set("gradient_encodings", ["factored"]),
    "unknown encoding": _under("gradient_encodings", FUSED, "zip"),
    "encoding no name": _under("gradient_encodings", FUSED, 3),
    "encoding of a vector": _under("gradient_encodings", "h.0.c_attn.bias", "lowrank"),
    "encoding of nothing": _under("gradient_encodings", "nope", "factored"),
    "input missing": lambda data: data["gradient_inputs"].pop(FUSED),
    "input of a dense one": _under("gradient_inputs", "wte", "wte"),
    "input elsewhere": _under("gradient_inputs", SHARED[0], FUSED),
    "input of another width": _under("gradient_inputs", "h.1.q.weight", OUTPUT),
    "inputs in a circle": lambda data: data["gradient_inputs"].update({SHARED[0]: SHARED[1]}),
    "inputs no names": _under("gradient_inputs", FUSED, None),
    "transposed is dense": _set("gradient_transposed", ["wte"]),
    "transposed no names": _set("gradient_transposed", [[]]),
    "rank missing": _set("gradient_rank", None),
    "rank zero": _set("gradient_rank", 0),
    "rank huge": _set("gradient_rank", 10**12),
    "rank true": _set("gradient_rank", True),
    "rank a fraction": _set("gradient_rank", 2.0),
    "factors of integers": _set("factor_dtype", "int32"),
    "type of factors no name": _set("factor_dtype", {}),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(run, root, change):
    """Whatever stands in it, it is an error of the store, before anything is mapped."""
    run.write(root)
    rewrite(root, change)
    with pytest.raises(CorruptStoreError, match=r"store\.json is damaged"):
        open_store(root)


def test_a_resumed_run_keeps_the_encodings_of_the_store(run, root):
    """They are no part of the identity: what was settled when the store was made is what counts."""
    run.write(root)
    other = encoded(encodings=Encodings())
    with StoreWriter.open(root, other.header) as writer:
        assert writer.header.encodings == run.header.encodings
    run.write(root)
    assert open_store(root).gradients(run.task, FUSED).shape[0] == run.n


def test_gradients_that_are_not_stored(root):
    """Group values alone, or the first samples only: the errors say what to collect, or how to compute."""
    names = tuple(info.name for info in toy_layout().parameters)
    groups = Encoded(header_of(toy_layout(), gradient_parameters=()))
    groups.write(root)
    store = open_store(root)
    assert {store.encoding(name) for name in names} == {"groups"}
    assert store.encoding_errors(groups.task).shape == (groups.n, 0)
    for call in (store.gradients, store.per_sample, store.stream):
        with pytest.raises(NotStoredError, match=r"only their group values.*scope\.gradients\(store, ids\)"):
            call(groups.task, FUSED)
    with pytest.raises(NotStoredError, match="another encoding than 'groups'"):
        store.slice(groups.task, layer=1, block="Q", head=0)
    assert store.group_values(groups.task)["square"].shape[0] == groups.n


def test_gradients_of_the_first_samples_only(run, root):
    """Segments without gradients stand beside those with: the former are named when they are asked for."""
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        for rows, stored in (([0, 1, 2], True), ([3, 4], False)):
            with run.open_segment(writer, rows, gradients=stored) as segment:
                assert segment.has_gradients == stored
                run.put(segment, rows, gradients=stored)
                segment.commit()
    store = open_store(root)
    for name in (FUSED, CUT[0], "wte", "h.0.c_attn.bias"):
        assert len(store.gradients(run.task, name, slice(0, 3))) == 3
        for call in (store.gradients, store.per_sample):
            with pytest.raises(NotStoredError, match=r"math_3 were not stored.*scope\.gradients"):
                call(run.task, name)
    assert store.encoding_errors(run.task)[CUT[0]].isna().tolist() == [False] * 3 + [True] * 2


def test_what_does_not_fit_the_budget_is_refused(run, root):
    """The error says how many samples fit, these do, and a stream gives all in pieces that do."""
    run.write(root)
    whole = {name: open_store(root).gradients(run.task, name) for name in run.gradients}
    store = open_store(root, memory_budget=4 * 12 * 36 * 3 * 2)
    assert pickle.loads(pickle.dumps(store)).memory_budget == store.memory_budget
    with pytest.raises(MemoryBudgetError, match=r"slice\(0, 2\) fits") as error:
        store.gradients(run.task, FUSED)
    assert isinstance(error.value, MemoryError)
    assert near(store.gradients(run.task, FUSED, slice(0, 2)), whole[FUSED][:2])
    for name, expected in whole.items():
        pieces = list(store.stream(run.task, name))
        assert [rows.start for rows, _ in pieces] == [0, *(rows.stop for rows, _ in pieces)][:-1]
        assert pieces[-1][0].stop == run.n
        assert near(torch.cat([piece.dense() for _, piece in pieces]), expected)
    few = open_store(root, memory_budget=100)
    with pytest.raises(MemoryBudgetError, match="not even one fits"):
        few.slices(run.task, layer=1, block="Q")
    with pytest.raises(MemoryBudgetError, match="not even one fits"):
        next(few.stream(run.task, "wte"))


def test_budgets_in_words(run, root):
    """Bytes, or a text; nothing else."""
    run.write(root)
    assert open_store(root, memory_budget="2GB").memory_budget == 2 * 10**9
    assert open_store(root).memory_budget > 1 << 20
    with pytest.raises(ValueError, match="no amount of memory"):
        open_store(root, memory_budget="much")


def test_what_a_segment_refuses(run, root):
    """Gradients in another encoding than the store's, and factors of other lengths than the samples have."""
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        with run.open_segment(writer, [2, 3]) as segment:
            with pytest.raises(KeyError, match="put their factors"):
                segment.put_gradient(FUSED, 0, run.gradients[FUSED][:2])
            with pytest.raises(KeyError, match="not stored as factors"):
                segment.gradients.put_output("wte", 0, torch.zeros(1, 7))
            with pytest.raises(KeyError, match="not stored in low rank"):
                segment.gradients.put_low_rank(FUSED, 0, LowRank(*torch.zeros(2, 1, 1, 1), torch.zeros(1)))
            with pytest.raises(ValueError, match="do not have the lengths"):
                segment.gradients.put_output(FUSED, 0, torch.zeros(2, 36))
        with pytest.raises(ValueError, match=r"need the lengths of \['positions'\]"):
            writer.segment(run.task, [0], ragged={"labels": [1]})


def test_the_plan_knows_both_ways_round():
    """Left belongs to axis 0: the input of a transposed weight, the output gradient of any other."""
    places = encoded().header.gradients.places
    fused, plain, low = places[FUSED], places[SHARED[1]], places[CUT[0]]
    assert isinstance(fused, FactoredPlace)
    assert (fused.left.columns, fused.right.columns) == (12, 36)
    assert fused.left == fused.input
    assert plain.left == plain.output
    assert plain.input == places[SHARED[0]].input
    assert isinstance(low, LowRankPlace)
    assert (low.left.columns, low.right.columns) == (12, 8)


@given(
    st.integers(1, 6),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 60)), max_size=6),
)
def test_touched_blocks_are_those_of_every_range(spans, pairs):
    """The blocks of many ranges at once are those that each range covers, one by one."""
    grid = BlockGrid(spans * (9 << 20), spans)
    unit = grid.nbytes // 470
    ranges = [(start * unit, min((start + size) * unit, grid.nbytes)) for start, size in pairs]
    bounds = [grid.bounds(block) for block in range(len(grid))]
    expected = [any(max(a, start) < min(b, stop) for start, stop in ranges) for a, b in bounds]
    assert grid.touched(np.array(ranges, dtype=np.int64).reshape(-1, 2)).tolist() == expected


def test_small_layouts_without_factors_are_as_before(root):
    """Nothing changes in a store of dense gradients: the same datasets, with no word of scales."""
    run = Run(header_of(small_layout()), n=4, batches=((3, 1), (0, 2)))
    run.write(root)
    names = {d.name for s in open_store(root).task_index(run.task).segments for d in s.shard.datasets}
    assert {name for name in names if name.startswith(("scales/", "factors/", "lowrank/"))} == set()
    assert {f"gradients/decoder/0/{block}" for block in "QKVO"} <= names
