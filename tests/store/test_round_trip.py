"""What is written comes back: every dataset, every view, in row order."""

import pickle

import numpy as np
import pytest
import torch

from fisherscope.layout import AttentionLayout, HeadBlock, ModelLayout, ParameterInfo, Partition
from fisherscope.store import StoreWriter, open_store
from tests.store.store_cases import Run, assert_holds, header_of, toy_layout


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_dataset_comes_back(root, dtype, bias):
    """Samples, ids, texts, groups, gradients and aggregates are what was put, in row order."""
    run = Run(header_of(toy_layout(bias=bias), gradient_dtype=dtype))
    run.write(root)
    assert_holds(open_store(root), run)


def test_bfloat16_is_rounded_as_torch_does(root):
    """Stored bits equal torch's cast: ties to even, subnormals, infinities, signed zeros, NaN."""
    layout = ModelLayout("one", (ParameterInfo("w", (9,), "other"),), ())
    run = Run(header_of(layout), n=1, batches=((0,),))
    special = [1 + 2**-8, 1 + 3 * 2**-8, 1e-40, -1e-40, float("inf"), -0.0, 3.4e38, float("nan"), -1e-30]
    run.gradients = {"w": torch.tensor([special])}
    with StoreWriter.open(root, run.header) as writer:
        writer.declare_task(run.task, run.keys)
        run.write_segment(writer, [0])
    found = open_store(root).gradients(run.task, "w")
    expected = run.gradients["w"].bfloat16().float()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_pieces_may_come_in_any_batch_size(root, toy, batch):
    """A segment written in batches of 1, 2 or all rows holds the same values."""
    rows = [4, 2, 0, 1, 3]
    with StoreWriter.open(root, toy.header) as writer:
        writer.declare_task(toy.task, toy.keys)
        with toy.open_segment(writer, rows) as segment:
            for start in range(0, 5, batch):
                toy.put(segment, rows[start : start + batch], start)
            segment.commit()
    store = open_store(root)
    for name, expected in toy.gradients.items():
        assert torch.equal(store.gradients(toy.task, name), expected.bfloat16().float()), name
    assert store.token_ids(toy.task, 3)[0].tolist() == toy.ids[3]


def test_weight_and_bias_may_come_in_any_order(root, toy):
    """The parts of a block wait for each other: all weights first, then the biases backwards."""
    rows = list(range(5))
    names = sorted(toy.gradients, key=lambda name: name.endswith("bias"))
    with StoreWriter.open(root, toy.header) as writer:
        writer.declare_task(toy.task, toy.keys)
        with toy.open_segment(writer, rows) as segment:
            toy.put(segment, rows, gradients=False)
            for name in [n for n in names if not n.endswith("bias")]:
                for start in (0, 3):
                    segment.put_gradient(name, start, toy.gradients[name][start : start + (3, 2)[start == 3]])
            for name in [n for n in names if n.endswith("bias")]:
                for start in (3, 0):
                    segment.put_gradient(name, start, toy.gradients[name][start : start + (3, 2)[start == 3]])
            segment.commit()
    store = open_store(root)
    for name, expected in toy.gradients.items():
        assert torch.equal(store.gradients(toy.task, name), expected.bfloat16().float()), name


@pytest.fixture(scope="module")
def stored(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("store") / "run.fs"
    toy.write(root)
    return open_store(root)


@pytest.mark.parametrize(
    ("layer", "block", "part"),
    [(0, b, p) for b in "QKV" for p in ("weight", "bias")]
    + [(0, "O", "weight"), (1, "Q", "weight"), (1, "Q", "bias"), (1, "K", "weight"), (1, "V", "bias")]
    + [(1, "O", "weight")],
)
def test_head_slices_equal_plain_slicing(stored, toy, layer, block, part):
    """One head, all heads and the Fisher of a head equal cutting the parameter's gradients by hand."""
    attention = toy.header.layout.attention_layer(layer)
    partition = attention.block(block).part(part)
    samples = [3, 0, 4]
    everything = stored.slices(toy.task, layer=layer, block=block, part=part, samples=samples)
    for head, piece in enumerate(partition):
        gradients = toy.gradients[piece.parameter].bfloat16().float()[samples]
        expected = piece.take(gradients).flatten(1)
        found = stored.slice(toy.task, layer=layer, block=block, head=head, part=part, samples=samples)
        assert torch.equal(found, expected)
        assert torch.equal(everything[head], expected)
        fisher = stored.fisher_slice(toy.task, layer=layer, block=block, head=head, part=part)
        assert torch.equal(fisher, piece.take(stored.fisher(toy.task, piece.parameter)).reshape(-1))


@pytest.mark.parametrize(
    "samples", [None, slice(None), slice(1, 4), slice(None, None, -2), [4, 0, 0], [-1], []]
)
def test_samples_are_chosen_in_the_order_asked(stored, toy, samples):
    """Slices, lists, repeated and negative positions, and none at all."""
    name = "h.0.c_attn.weight"
    chosen = np.arange(toy.n)[slice(None) if samples is None else samples].tolist()
    expected = toy.gradients[name].bfloat16().float()[chosen]
    assert torch.equal(stored.gradients(toy.task, name, samples), expected)


def test_samples_out_of_range_are_refused(stored, toy):
    """A position beyond the last sample is an IndexError, never zeros."""
    with pytest.raises(IndexError, match="5 samples"):
        stored.gradients(toy.task, "wte", [5])
    with pytest.raises(IndexError, match="flatnonzero"):
        stored.gradients(toy.task, "wte", np.ones(5, dtype=bool))


def test_gradients_may_be_changed_by_their_reader(stored, toy):
    """A tensor read is a copy: writing to it touches neither the store nor the next read."""
    first = stored.gradients(toy.task, "wte")
    first.zero_()
    assert stored.gradients(toy.task, "wte").abs().sum() > 0


def test_a_parameter_that_heads_do_not_cover_is_kept_whole(root):
    """Entries outside every head slice (here a quarter of the rows) are stored, and heads still read back."""
    infos = (ParameterInfo("w", (8, 6), "attention", 0), ParameterInfo("o", (6, 6), "attention", 0))
    attention = AttentionLayout(
        0,
        "h",
        "h.o",
        3,
        3,
        (
            HeadBlock("Q", Partition("w", (8, 6), 0, (6, 0, 3), 2)),
            HeadBlock("O", Partition("o", (6, 6), 1, (4, 0, 2), 2)),
        ),
    )
    run = Run(header_of(ModelLayout("odd", infos, (attention,))))
    run.write(root)
    store = open_store(root)
    assert_holds(store, run)
    for block, name in (("Q", "w"), ("O", "o")):
        for head, piece in enumerate(attention.block(block).weight):
            expected = piece.take(run.gradients[name].bfloat16().float()).flatten(1)
            assert torch.equal(store.slice(run.task, layer=0, block=block, head=head), expected)


def test_only_the_weight_of_a_block_may_be_stored(root):
    """With the biases left out, a block's dataset holds its weights alone."""
    run = Run(header_of(toy_layout()))
    weights = tuple(name for name in run.gradients if not name.endswith("bias"))
    run.header = header_of(toy_layout(), gradient_parameters=weights)
    run.gradients = {name: run.gradients[name] for name in weights}
    run.write(root)
    assert_holds(open_store(root), run)


def test_groups_are_normalised_and_reduced_in_float64(stored, toy):
    """Mean, variance and count per group equal numpy's over C_i = sum g^2 / T_i."""
    contributions = toy.square.double().numpy() / np.array(toy.tokens)[:, None]
    np.testing.assert_allclose(stored.group_contributions(toy.task), contributions, rtol=1e-15)
    frame = stored.groups(toy.task)
    size = frame["size"].to_numpy()
    np.testing.assert_allclose(frame["sum"], contributions.mean(0), rtol=1e-12)
    np.testing.assert_allclose(frame["mean"], contributions.mean(0) / size, rtol=1e-12)
    np.testing.assert_allclose(frame["variance"], (contributions / size).var(0, ddof=1), rtol=1e-9)
    np.testing.assert_array_equal(frame["theta_square"], np.arange(len(frame)))
    assert (frame["count"] == 5).all()
    assert list(frame.columns) == [
        *("kind", "stack", "layer", "block", "index", "part", "parameter", "size"),
        *("count", "sum", "mean", "variance", "theta_square"),
    ]


def test_group_values_of_some_samples(stored, toy):
    """Chosen samples come in the order asked, with their ids and tokens."""
    found = stored.group_values(toy.task, [4, 1])
    assert found["id"].values.tolist() == ["math_4", "math_1"]
    assert found["tokens"].values.tolist() == [toy.tokens[4], toy.tokens[1]]
    np.testing.assert_array_equal(found["dot"].values, toy.dot[[4, 1]].numpy())


@pytest.mark.parametrize(("normalization", "power"), [("none", 0), ("per_token", 1), ("mean", 2)])
def test_normalization_decides_the_factor(root, normalization, power):
    """C_i is the raw square divided by T_i to the power 0, 1 or 2."""
    run = Run(header_of(toy_layout(), normalization=normalization))
    run.write(root)
    expected = run.square.double().numpy() / np.array(run.tokens, dtype=float)[:, None] ** power
    np.testing.assert_allclose(open_store(root).group_contributions(run.task), expected, rtol=1e-15)


def test_two_tasks_stay_apart(root, toy):
    """Tasks come back in order of declaration, each with its own samples and aggregates."""
    other = Run(toy.header, n=3, task="code", seed=1, batches=((2, 0), (1,)))
    toy.write(root)
    other.write(root)
    store = open_store(root)
    assert store.tasks == ["math", "code"]
    assert_holds(store, toy)
    assert_holds(store, other)


def test_a_reader_survives_pickling(stored, toy):
    """A pickled reader opens the same store by its path in the other process."""
    again = pickle.loads(pickle.dumps(stored))
    assert_holds(again, toy)
    assert again.path == stored.path


def test_it_describes_itself(stored):
    """repr and HTML name the tasks, the counts and the model."""
    for text in (repr(stored), stored._repr_html_()):
        assert "math" in text
        assert "5 of 5" in text
        assert "toy" in text


def test_segments_without_gradients(root, toy):
    """Samples beyond the first few may be stored without gradients: asking for theirs says so."""
    from fisherscope.errors import NotStoredError

    with StoreWriter.open(root, toy.header) as writer:
        writer.declare_task(toy.task, toy.keys)
        toy.write_segment(writer, [0, 1])
        with toy.open_segment(writer, [2, 3, 4], gradients=False) as segment:
            toy.put(segment, [2, 3, 4], gradients=False)
            with pytest.raises(KeyError, match="stores no gradients"):
                segment.put_gradient("wte", 0, toy.gradients["wte"][2:])
            segment.commit()
    store = open_store(root)
    assert torch.equal(store.gradients(toy.task, "wte", [1]), toy.gradients["wte"][[1]].bfloat16().float())
    with pytest.raises(NotStoredError, match="math_2"):
        store.gradients(toy.task, "wte")
    with pytest.raises(NotStoredError, match="math_4"):
        store.slice(toy.task, layer=0, block="Q", head=0, samples=[4])
    assert len(store.samples(toy.task)) == 5
