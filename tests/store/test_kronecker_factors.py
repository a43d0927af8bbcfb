"""Kronecker factors in the snapshots of a store: sums over ranks, cut into heads."""

import pytest
import torch

from fisherscope.errors import CorruptStoreError
from fisherscope.store import StoreWriter, open_store
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
    """The bytes of the factors are those that a snapshot takes."""
    run = write(root, [([0], 2, sums(0, positions=7))])
    header = run.header
    names = (f"{MODULE}.weight",)
    sizes = snapshot_bytes(header.layout, header.parameters, fisher_shape="groups", kronecker=names)
    # at most so much: the layout does not say that the bias goes with the shorter side
    exact = describe(root)["bytes"]["aggregates"]
    assert exact <= sizes["kronecker"] <= exact + 4 * (2 * 3 * WIDTH + 1)
    assert snapshot_bytes(header.layout, header.parameters)["kronecker"] == 0
