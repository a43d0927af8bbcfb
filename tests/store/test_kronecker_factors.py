"""Kronecker factors in the snapshots of a store: sums over ranks, cut into heads."""

import pytest
import torch

from fisherscope.errors import CorruptStoreError
from fisherscope.store import StoreWriter, open_store, verify
from fisherscope.store.inspect import describe
from fisherscope.store.size import snapshot_bytes
from tests.store.store_cases import WIDTH, Run, header_of, toy_layout

MODULE = "h.0.c_attn"


def sums(seed, *, positions, inputs=WIDTH + 1):
    """What one rank has added up, for a map with a bias."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"kronecker/A/{MODULE}": torch.randn(inputs, inputs, generator=generator),
        f"kronecker/S/{MODULE}": torch.randn(3 * WIDTH, 3 * WIDTH, generator=generator),
        f"kronecker/positions/{MODULE}": torch.tensor([positions]),
    }


def write(root, ranks):
    """A snapshot for each rank: batches, samples, arrays."""
    run = Run(header_of(toy_layout()))
    writers = [StoreWriter.open(root, run.header, rank=rank) for rank in range(len(ranks))]
    for writer, (batches, count, arrays) in zip(writers, ranks, strict=True):
        writer.declare_task(run.task, run.keys)
        for batch in batches:
            run.write_segment(writer, run.batches[batch])
        writer.snapshot(run.task, batches, count, arrays)
        writer.close()
    return run


def test_ranks_are_added_up(root):
    """A is the sum over ranks by positions, S by samples."""
    one, two = sums(0, positions=7), sums(1, positions=4)
    run = write(root, [([0], 2, one), ([1, 2], 3, two)])
    found = open_store(root).kronecker(run.task, MODULE)
    A, S = (
        (one[f"kronecker/{part}/{MODULE}"].double() + two[f"kronecker/{part}/{MODULE}"].double())
        for part in "AS"
    )
    assert (found.samples, found.positions, found.with_bias) == (5, 11, True)
    assert torch.equal(found.A, (A / 11).float())
    assert torch.equal(found.S, (S / 5).float())


def test_units_and_what_rounding_took(root):
    """Every rank has powers of two of its own, and a small part of every sum beside it."""
    ranks, expected = [], []
    for seed, exponents in ((0, [0, 60]), (1, [-4, 0])):
        arrays = sums(seed, positions=5)
        total = {part: arrays[f"kronecker/{part}/{MODULE}"].double() for part in "AS"}
        for part, exponent in zip("AS", exponents, strict=True):
            lost = (total[part] * 2.0**-25).bfloat16()
            arrays[f"lost/kronecker/{part}/{MODULE}"] = lost
            total[part] = (total[part] + lost.double()) * 4.0**-exponent
        arrays[f"kronecker/exponents/{MODULE}"] = torch.tensor(exponents)
        ranks.append(arrays)
        expected.append(total)
    run = write(root, [([0], 2, ranks[0]), ([1, 2], 3, ranks[1])])
    assert verify(root).ok
    for part, count in (("A", 10), ("S", 5)):
        found = getattr(open_store(root).kronecker(run.task, MODULE), part)
        assert torch.equal(found, ((expected[0][part] + expected[1][part]) / count).float())


def test_damaged_exponents_are_refused(root):
    """Exponents that no writer makes do not become numbers."""
    arrays = sums(0, positions=5) | {f"kronecker/exponents/{MODULE}": torch.tensor([5000, 0])}
    run = write(root, [([0], 2, arrays)])
    with pytest.raises(CorruptStoreError, match="holds no exponents"):
        open_store(root).kronecker(run.task, MODULE)


def test_heads_are_cut_by_the_layout(root):
    """The fused projection of the toy layout has three heads of four in each of Q, K and V."""
    run = write(root, [([0], 2, sums(0, positions=7))])
    factors = open_store(root).kronecker(run.task, MODULE)
    for place, block in enumerate("QKV"):
        first = WIDTH * place + 4 * 2
        head = factors.head(block, 2)
        assert torch.equal(head.S, factors.S[first : first + 4, first : first + 4])
        assert torch.equal(head.A, factors.A)
        assert head.with_bias


def test_factors_of_another_shape_are_refused(root):
    """A store whose factors do not fit the weight is called damaged."""
    run = write(root, [([0], 2, sums(0, positions=7, inputs=WIDTH))])
    with pytest.raises(CorruptStoreError, match=r"h\.0\.c_attn.*\(12, 12\)"):
        open_store(root).kronecker(run.task, MODULE)


def test_sizes_are_estimated(root):
    """The bytes of the factors are those that a snapshot takes, with what rounding took and exponents."""
    arrays = sums(0, positions=7)
    lost = {f"lost/{name}": v.bfloat16() for name, v in arrays.items() if "positions" not in name}
    exponents = {f"kronecker/exponents/{MODULE}": torch.tensor([3, -2])}
    run = write(root, [([0], 2, arrays | lost | exponents)])
    header = run.header
    names = (f"{MODULE}.weight",)
    sizes = snapshot_bytes(header.layout, header.parameters, fisher_shape="groups", kronecker=names)
    # at most so much: the layout does not say that the bias goes with the shorter side
    exact = describe(root)["bytes"]["aggregates"]
    assert exact <= sizes["kronecker"] <= exact + 6 * (2 * 3 * WIDTH + 1)
    assert snapshot_bytes(header.layout, header.parameters)["kronecker"] == 0
