"""Clusters of found pairs, and the places where they were called, against slow counts."""

import importlib
import itertools

import networkx as nx
import numpy as np
import pandas as pd
import pytest

from fisherscope.analyses.conflict.communities import COLUMNS, communities
from fisherscope.analyses.conflict.hot_spots import COLUMNS as SPOT_COLUMNS
from fisherscope.analyses.conflict.hot_spots import hot_spots

TEXT = ["task_a", "task_b", "sample_a", "sample_b"]


def pairs_of(edges, a="math", b="code", cosine=-0.4, excess=-0.4):
    """A frame of found pairs, out of rows of either task."""
    rows = [
        {"task_a": a, "task_b": b, "sample_a": f"{a}_{i}", "sample_b": f"{b}_{j}", "found": True}
        for i, j in edges
    ]
    frame = pd.DataFrame(rows, columns=[*TEXT, "found"])
    return frame.assign(cosine=cosine, excess=excess)


def block(rows, columns):
    return list(itertools.product(rows, columns))


def members(row):
    return set(row["members_a"].split("; ")), set(row["members_b"].split("; "))


def noisy():
    """Three dense blocks, and a few pairs between them."""
    rng = np.random.default_rng(3)
    dense = [
        *block(range(8), range(6)),
        *block(range(8, 13), range(6, 13)),
        *block(range(13, 16), range(13, 16)),
    ]
    kept = [edge for edge in dense if rng.random() < 0.8]
    return pairs_of([*kept, (0, 7), (9, 2), (14, 8)], cosine=-0.3, excess=-0.35)


def test_planted_clusters_are_found():
    """Dense blocks of pairs come back as clusters, most pairs first, also where single pairs join them."""
    table = communities(noisy())
    assert list(table.columns) == COLUMNS
    assert table["cluster"].tolist() == [0, 1, 2]
    assert table["pairs"].is_monotonic_decreasing
    found = [
        ({int(s[5:]) for s in a}, {int(s[5:]) for s in b}) for a, b in map(members, table.to_dict("records"))
    ]
    expected = [(set(range(8)), set(range(6))), (set(range(8, 13)), set(range(6, 13)))]
    assert found == [*expected, (set(range(13, 16)), set(range(13, 16)))]


def test_numbers_equal_a_slow_count():
    """Pairs, density and mean cosine of a cluster are those of the found pairs inside it."""
    pairs = noisy().assign(cosine=np.random.default_rng(0).uniform(-0.9, -0.2, len(noisy())))
    for row in communities(pairs).to_dict("records"):
        a, b = members(row)
        inside = [p["cosine"] for p in pairs.to_dict("records") if p["sample_a"] in a and p["sample_b"] in b]
        assert (row["samples_a"], row["samples_b"], row["pairs"]) == (len(a), len(b), len(inside))
        assert row["density"] == pytest.approx(len(inside) / (len(a) * len(b)))
        assert row["mean_cosine"] == pytest.approx(np.mean(inside))


def test_every_sample_is_in_one_cluster_and_components_stay_apart():
    """Clusters partition the samples of found pairs and never join what no pair connects."""
    rng = np.random.default_rng(1)
    edges = sorted({(int(i), int(j)) for i, j in rng.integers(0, 30, (40, 2))})
    table = communities(pairs_of(edges))
    listed = [m for row in table.to_dict("records") for side in members(row) for m in side]
    assert sorted(listed) == sorted({f"math_{i}" for i, _ in edges} | {f"code_{j}" for _, j in edges})
    graph = nx.Graph((f"math_{i}", f"code_{j}") for i, j in edges)
    for row in table.to_dict("records"):
        a, b = members(row)
        assert len({frozenset(nx.node_connected_component(graph, m)) for m in a | b}) == 1


def test_plain_modularity_is_that_of_bipartite_graphs_less_the_imbalance():
    """The reason given for Louvain: Barber's modularity minus the sum of ((K - D) / 2m)^2, exactly."""
    rng = np.random.default_rng(2)
    graph = nx.Graph()
    graph.add_weighted_edges_from((f"a{i}", f"b{j}", rng.random()) for i, j in block(range(6), range(5)))
    parts = [{"a0", "a1", "b0"}, {"a2", "a3", "b1", "b2"}, {"a4", "a5", "b3", "b4"}]
    m = graph.size("weight")
    barber = imbalance = 0.0
    for part in parts:
        inside = graph.subgraph(part).size("weight")
        k, d = (sum(graph.degree(n, "weight") for n in part if n[0] == side) for side in "ab")
        barber += inside / m - k * d / m**2
        imbalance += ((k - d) / (2 * m)) ** 2
    assert nx.community.modularity(graph, parts) == pytest.approx(barber - imbalance)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_order_of_rows_changes_nothing(seed):
    """The same pairs in any order, of several tasks at once, give the same table for a seed."""
    both = pd.concat([noisy(), noisy().assign(task_b="prose"), pairs_of([(1, 1)], "code", "prose")])
    first = communities(both, seed)
    for state in range(3):
        pd.testing.assert_frame_equal(communities(both.sample(frac=1, random_state=state), seed), first)


def test_a_star_is_one_cluster():
    """One sample in conflict with many: nothing divides them."""
    (row,) = communities(pairs_of(block([4], range(9)))).to_dict("records")
    assert (row["samples_a"], row["samples_b"], row["pairs"], row["density"]) == (1, 9, 9, 1.0)


def test_pairs_that_were_not_found_do_not_count_and_none_gives_an_empty_table():
    """Only ``found`` rows are edges; without any the table has its columns and no rows."""
    pairs = noisy().assign(found=False)
    assert communities(pairs).empty
    assert list(communities(pairs).columns) == COLUMNS
    assert communities(pairs_of([])).empty
    pairs.loc[0, "found"] = True
    assert communities(pairs)["pairs"].tolist() == [1]


def test_unicode_ids_and_excess_that_is_unknown():
    """Names in any script; a pair without a usable excess is an edge all the same."""
    pairs = pairs_of([(0, 0), (1, 0), (5, 5)], "数学", "código", excess=[np.nan, 0.1, -0.4])
    table = communities(pairs)
    assert table["members_a"].tolist() == ["数学_0; 数学_1", "数学_5"]
    assert table["members_b"].tolist() == ["código_0", "código_5"]


def heads_of(rows):
    names = ["sample_a", "sample_b", "layer", "block", "head"]
    frame = pd.DataFrame([dict(zip(names, row, strict=True)) for row in rows])
    return frame.assign(task_a="math", task_b="code", stack="decoder")


@pytest.fixture
def called():
    """Two slices of layer 1, one of layer 0; one pair was called in three places."""
    return heads_of([
        ("math_0", "code_0", 1, "Q", 0), ("math_0", "code_0", 1, "V", 1), ("math_0", "code_0", 0, "O", 2),
        ("math_1", "code_0", 1, "Q", 0), ("math_2", "code_3", 1, "V", 1), ("math_2", "code_4", 1, "Q", 0),
    ])  # fmt: skip


@pytest.fixture
def levels():
    """All slices and layers, tested or not."""
    rows = [("slice", layer, block, head) for layer in (0, 1) for block in "QKVO" for head in range(3)]
    rows += [("layer", layer, "", -1) for layer in (0, 1)] + [("whole", -1, "", -1)]
    frame = pd.DataFrame(rows, columns=["level", "layer", "block", "head"])
    frame["stack"] = np.where(frame["level"] == "whole", "", "decoder")
    frame["mean"] = np.linspace(-0.3, 0.1, len(frame))
    return frame.assign(task_a="math", task_b="code", q=frame["mean"].where(frame["mean"] < 0))


def test_hot_spots_count_pairs_by_slice_and_layer(called, levels):
    """Pairs per place against a count by hand; a layer counts a pair once; mean and q are those of T4."""
    table = hot_spots(called, levels)
    assert list(table.columns) == SPOT_COLUMNS
    places = table[["level", "layer", "block", "head", "pairs"]].to_numpy().tolist()
    assert places == [
        ["slice", 1, "Q", 0, 3], ["slice", 1, "V", 1, 2], ["slice", 0, "O", 2, 1],
        ["layer", 1, "", -1, 4], ["layer", 0, "", -1, 1],
    ]  # fmt: skip
    np.testing.assert_allclose(table["share"], np.array([3, 2, 1, 4, 1]) / 4)
    for row in table.to_dict("records"):
        same = (levels[["level", "layer", "block", "head"]] == [row[c] for c in places_columns()]).all(axis=1)
        np.testing.assert_equal(row["mean"], levels.loc[same, "mean"].item())
        np.testing.assert_equal(row["q"], levels.loc[same, "q"].item())


def places_columns():
    return ["level", "layer", "block", "head"]


def test_hot_spots_do_not_depend_on_the_order_of_rows(called, levels):
    """Shuffled findings give the same table; no findings an empty one."""
    first = hot_spots(called, levels)
    shuffled = called.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(hot_spots(shuffled, levels.sample(frac=1, random_state=1)), first)
    none = hot_spots(called.head(0), levels)
    assert none.empty
    assert list(none.columns) == SPOT_COLUMNS


def test_only_the_strongest_pairs_make_the_graph_where_there_are_very_many(monkeypatch):
    """Those with the lowest excess, in any order of rows; what is left out is in no count."""
    module = importlib.import_module("fisherscope.analyses.conflict.communities")  # not the function
    monkeypatch.setattr(module, "MOST_PAIRS", 12)
    strong = pairs_of(block(range(4), range(3)), excess=-0.8)
    weak = pairs_of(block(range(4, 9), range(3, 8)), excess=-0.2)
    table = communities(pd.concat([weak, strong]).sample(frac=1, random_state=0))
    assert table[["samples_a", "samples_b", "pairs", "density"]].to_numpy().tolist() == [[4, 3, 12, 1.0]]
