"""Clusters within a task, by which the margin of the test of means is set."""

import numpy as np
import pytest

from fisherscope.analyses.conflict import clusters, cosines, different_cluster_mean
from fisherscope.analyses.conflict.cosines import Blocks
from fisherscope.analyses.conflict.levels import Level, own_margin


def groups(centres, each, spread, seed=0):
    """Unit vectors around some centres."""
    rng = np.random.default_rng(seed)
    vectors = np.repeat(centres, each, 0) + spread * rng.normal(size=(len(centres) * each, centres.shape[1]))
    return cosines(vectors @ vectors.T)


def by_hand(cosine):
    """Average linkage, one merge after the other, on centred cosines."""
    n = len(cosine)
    h = np.eye(n) - 1 / n
    centred = cosines(h @ cosine @ h)
    members = [[i] for i in range(n)]
    while len(members) > 1:
        pairs = [(a, b) for a in range(len(members)) for b in range(a)]
        means = [centred[np.ix_(members[a], members[b])].mean() for a, b in pairs]
        if max(means) < 0:
            break
        a, b = pairs[int(np.argmax(means))]
        members[b] += members.pop(a)
    return {frozenset(m) for m in members}


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_merged_while_their_mean_cosine_is_above_zero(seed):
    """The same sets as merging by hand, where groups are clear and where there are none."""
    rng = np.random.default_rng(seed)
    for cosine in (groups(rng.normal(size=(3, 30)), 6, 0.3, seed), groups(np.zeros((1, 30)), 15, 1.0, seed)):
        label = clusters(cosine)
        found = {frozenset(np.flatnonzero(label == k).tolist()) for k in set(label.tolist())}
        assert found == by_hand(cosine)


@pytest.mark.parametrize("seed", range(10))
def test_copies_up_to_rounding_are_one_cluster(seed):
    """Their cosines come out beyond 1 by rounding; no distance is below 0 for that."""
    rng = np.random.default_rng(seed)
    vectors = np.repeat(rng.normal(size=(4, 50)), 5, 0) * rng.uniform(0.5, 2, (20, 1))
    label = clusters(cosines((vectors.astype(np.float32) @ vectors.astype(np.float32).T).astype(np.float64)))
    assert all(len(set(part.tolist())) == 1 for part in label.reshape(4, 5))


def test_mean_of_different_clusters():
    """Groups that compete, such as labels under a softmax, have a mean below 0."""
    centres = np.eye(4) - 0.25  # four labels: cosines of -1/3
    assert different_cluster_mean(groups(centres, 10, 0.0)) == pytest.approx(-1 / 3)
    assert np.isnan(different_cluster_mean(np.ones((1, 1))))


def test_means_within_a_task_excuse_those_across():
    """Draws of competing labels: tested against 0 they conflict, against the margin they do not."""
    rng = np.random.default_rng(0)
    centres = np.concatenate([np.eye(8) - 1 / 8, np.zeros((8, 60))], 1)
    # one half of the labels in either task
    u, v = (np.repeat(c, 25, 0) + 0.3 * rng.normal(size=(100, 68)) for c in (centres[:4], centres[4:]))
    blocks = Blocks(np.concatenate([u, v]) @ np.concatenate([u, v]).T, 100)
    assert Level.of(blocks, 0.0).p < 1e-6
    level = Level.of(blocks, None)
    assert level.margin == own_margin(blocks) > 0
    assert level.p > 0.05
    # what opposes more than that is found
    blocks = Blocks(np.concatenate([u, -u + v]) @ np.concatenate([u, -u + v]).T, 100)
    assert Level.of(blocks, None).mean < -0.02


def test_coherent_tasks_have_no_margin():
    """Clusters of one task that agree on the whole: 0, not below."""
    centres = np.ones((3, 20)) + np.eye(3, 20)
    cosine = groups(centres, 8, 0.1)
    assert own_margin(Blocks(cosine, 12)) == 0
