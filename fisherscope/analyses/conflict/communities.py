"""Clusters of conflicting samples: communities of the bipartite graph of found pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Places = NDArray[np.intp]

COLUMNS = [
    "task_a", "task_b", "cluster", "samples_a", "samples_b", "pairs", "density", "mean_cosine", "members_a",
    "members_b",
]  # fmt: skip

# Louvain takes seconds for so many, and minutes for a million.
MOST_PAIRS = 200_000
# A pair that a test found without an excess below 0 is still an edge: a weight of 0 would cut it.
_LEAST_WEIGHT = 1e-6


def communities(pairs: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Groups of samples of two tasks that conflict with each other rather than with the rest.

    The found pairs of two tasks are the edges of a bipartite graph, with weight -excess. Each connected
    component is taken by itself, and divided by the Louvain method (Blondel et al. 2008).

    Louvain maximises plain modularity, whose null model also expects edges between samples of one task,
    where there can be none. That costs little here. With K and D the total weights at the samples of either
    task in a community, of m in all, plain modularity is that of bipartite graphs (Barber 2007, Phys. Rev. E
    76) less the sum over communities of ((K - D) / 2m)^2; and K - D counts only edges that leave the
    community, from one side less from the other. Communities that few edges leave are rated alike by both.

    Of more than 200,000 found pairs of two tasks those with the lowest excess make the graph.

    Clusters describe found pairs and are no finding of their own: a sparse random graph has communities too.

    Args:
        pairs: ``frame`` of a conflict result; rows that are not ``found`` do not count, their order neither.
        seed: of the order in which Louvain visits samples.

    Returns:
        One row per cluster, by pair of tasks, most pairs first: task_a, task_b, cluster (0, 1, ...),
        samples_a, samples_b (how many), pairs (found inside), density = pairs / (samples_a samples_b),
        mean_cosine (of these pairs), members_a, members_b (ids, with "; " between two). Found pairs between
        clusters are in none.
    """
    found = pairs[pairs["found"].astype(bool)].sort_values(["task_a", "task_b", "sample_a", "sample_b"])
    rows: list[dict[str, Any]] = []
    for (a, b), part in found.groupby(["task_a", "task_b"], sort=True):
        if len(part) > MOST_PAIRS:
            lowest = np.argsort(part["excess"].to_numpy(np.float64), kind="stable")[:MOST_PAIRS]
            part = part.iloc[np.sort(lowest)]  # noqa: PLW2901
        rows.extend({"task_a": a, "task_b": b, **row} for row in _clusters(part, seed))
    return pd.DataFrame(rows, columns=COLUMNS)


def _clusters(pairs: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """The clusters of two tasks; ``pairs`` are sorted."""
    i, ids_a = pd.factorize(pairs["sample_a"], sort=True)
    j, ids_b = pd.factorize(pairs["sample_b"], sort=True)
    weight = (-pairs["excess"].to_numpy(np.float64, na_value=np.nan)).clip(_LEAST_WEIGHT)
    member = _partition(i, j + len(ids_a), np.nan_to_num(weight, nan=_LEAST_WEIGHT), seed)
    left, right = member[: len(ids_a)], member[len(ids_a) :]
    inside = left[i] == right[j]
    cosine = pairs["cosine"].to_numpy(np.float64)
    rows: list[dict[str, Any]] = []
    for number in range(int(member.max()) + 1):
        a, b, here = ids_a[left == number], ids_b[right == number], inside & (left[i] == number)
        count = int(here.sum())
        rows.append({
            "samples_a": len(a),
            "samples_b": len(b),
            "pairs": count,
            "density": count / (len(a) * len(b)) if len(a) and len(b) else np.nan,
            "mean_cosine": float(cosine[here].mean()) if count else np.nan,
            "members_a": "; ".join(a),
            "members_b": "; ".join(b),
        })  # fmt: skip
    rows.sort(key=lambda row: (-row["pairs"], row["members_a"], row["members_b"]))
    return [{"cluster": number, **row} for number, row in enumerate(rows)]


def _partition(i: Places, j: Places, weight: NDArray[np.float64], seed: int) -> Places:
    """Community of each node of a graph with the edges (i, j)."""
    import networkx as nx

    graph = nx.Graph()  # of numbers: the order of a set of texts changes from run to run
    graph.add_nodes_from(range(int(j.max()) + 1))
    graph.add_weighted_edges_from(zip(i.tolist(), j.tolist(), weight.tolist(), strict=True))
    member = np.zeros(len(graph), np.intp)
    number = 0
    for component in sorted(nx.connected_components(graph), key=min):
        part = nx.Graph()
        part.add_nodes_from(sorted(component))
        part.add_weighted_edges_from(
            (a, b, graph[a][b]["weight"]) for a in sorted(component) for b in sorted(graph[a]) if a < b
        )
        for community in nx.community.louvain_communities(part, seed=seed):
            member[list(community)] = number
            number += 1
    return member
