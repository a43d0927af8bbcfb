"""Cosines under every metric, window and set of parameters, against one sample at a time."""

import numpy as np
import pytest
import torch

from fisherscope.analyses import AnalyzeConfig, ConflictConfig, run
from tests.analyses.synthetic import all_slices, slice_of, write_store

TASKS = ("math", "code")


def analysed(store, memory_budget=1 << 30, **options):
    config = AnalyzeConfig(
        conflict=ConflictConfig(calibration_splits=0, **options), memory_budget=memory_budget
    )
    return run(store, ["conflict"], config)["conflict"]


def by_hand(made, metric="natural", pool="pooled", weighting="contribution"):
    """The vectors of all samples over all attention weights, float64: one parameter, one sample at a time."""
    names = list(dict.fromkeys(parameter for *_, parameter in all_slices(made.layout)))
    norms = {
        task: sum((made.tasks[task].h(name) ** 2).flatten(1).sum(1) for name in names).sqrt()
        for task in TASKS
    }
    vectors = {task: [] for task in TASKS}
    for name in names:
        h = {task: made.tasks[task].h(name).flatten(1) for task in TASKS}
        averaged = h
        if weighting == "unit":
            averaged = {task: h[task] / norms[task][:, None] for task in TASKS}
        own = {task: (averaged[task] ** 2).mean(0) for task in TASKS}
        pooled = (own["math"] + own["code"]) / 2
        for task, other in zip(TASKS, reversed(TASKS), strict=True):
            rows = []
            for i, one in enumerate(h[task]):
                fisher = {"pooled": pooled, "per_task": own[task]}.get(pool)
                if fisher is None:
                    rest = [k for k in range(len(h[task])) if k != i]
                    fisher = ((averaged[task][rest] ** 2).mean(0) + own[other]) / 2
                lam = 1e-6 * (own[task] if pool == "per_task" else pooled).median()
                rows.append(one if metric == "euclidean" else one / (fisher + lam).sqrt())
            vectors[task].append(torch.stack(rows))
    u, v = (torch.cat(parts, 1) for parts in vectors.values())
    return u.numpy(), v.numpy()


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("budget", [1 << 30, 1 << 16])
@pytest.mark.parametrize("weighting", ["contribution", "unit"])
@pytest.mark.parametrize("pool", ["pooled", "per_task", "leave_one_out"])
def test_natural_cosines_equal_those_by_hand(made, lean, pool, weighting, budget):
    """Pooled, per task, or without the sample itself; F of h or of unit gradients; from the store or made."""
    u, v = map(unit, by_hand(made, pool=pool, weighting=weighting))
    for store in (made.store, lean.store):
        result = analysed(store, budget, fisher_pool=pool, fisher_weighting=weighting)
        np.testing.assert_allclose(result.cosines("math", "code"), u @ v.T, rtol=2e-4, atol=2e-6)


def test_euclidean_cosines_equal_those_by_hand(made):
    """Without F: h as it is, and the result says that there is none."""
    u, v = map(unit, by_hand(made, metric="euclidean"))
    result = analysed(made.store, metric="euclidean")
    np.testing.assert_allclose(result.cosines("math", "code"), u @ v.T, rtol=1e-5, atol=1e-6)
    assert result.config["fisher_source"] == "none"


def test_an_outlier_rules_f_but_not_that_of_unit_gradients(made, layout, tmp_path):
    """A sample with a thousand times the gradient changes others' cosines, unless F is of unit norms."""
    loud = made.tasks["math"].scaled(1.0)
    for gradient in loud.gradients.values():
        gradient[0] *= 1000
    other = write_store(tmp_path / "run.fs", layout, {"math": loud, "code": made.tasks["code"]})
    plain = [analysed(s).cosines("math", "code").to_numpy() for s in (made.store, other.store)]
    equal = [
        analysed(s, fisher_weighting="unit").cosines("math", "code").to_numpy()
        for s in (made.store, other.store)
    ]
    assert np.abs(plain[0] - plain[1]).max() > 0.01
    np.testing.assert_allclose(equal[0], equal[1], rtol=1e-3, atol=1e-5)


def test_a_single_sample_left_out_leaves_the_other_tasks_f(made, layout, tmp_path):
    """With one sample per task nothing is left of its own F; the other's, halved, divides."""
    tasks = {name: made.tasks[name].permuted([0]) for name in TASKS}
    small = write_store(tmp_path / "run.fs", layout, tasks)
    result = analysed(small.store, fisher_pool="leave_one_out")
    assert np.isfinite(result.cosines("math", "code")).all()
    names = dict.fromkeys(parameter for *_, parameter in all_slices(layout))
    dot, squares = 0.0, np.zeros(2)
    for name in names:
        h = [small.tasks[task].h(name).flatten() for task in TASKS]
        lam = 1e-6 * ((h[0] ** 2 + h[1] ** 2) / 2).median()
        u, v = (one / (other**2 / 2 + lam).sqrt() for one, other in zip(h, reversed(h), strict=True))
        dot += float(u @ v)
        squares += [float(u @ u), float(v @ v)]
    expected = dot / np.sqrt(squares.prod())
    np.testing.assert_allclose(result.cosines("math", "code").item(), expected, atol=1e-7)


@pytest.mark.parametrize("width", [2, 5, 20])
def test_windows_average_neighbours_before_cosines(made, width):
    """Averages of natural gradients, also in a last window that is shorter; ids name first and last."""
    averaged = []
    for vectors in by_hand(made):
        windows = [vectors[k : k + width].mean(0) for k in range(0, len(vectors), width)]
        averaged.append(unit(np.stack(windows)))
    result = analysed(made.store, contribution_averaging_window=width)
    found = result.cosines("math", "code")
    np.testing.assert_allclose(found, averaged[0] @ averaged[1].T, rtol=1e-4, atol=2e-6)
    assert found["sample_a"].to_numpy()[0] == f"math_0..math_{min(width, 12) - 1}"
    samples = result.extra["samples"]
    loss = made.tasks["math"].tokens[:width]
    np.testing.assert_allclose(samples["loss"].iloc[0], loss.sum() / loss.sum())
    # lists for training speak of samples, not of windows
    assert sorted(result.extra["reweight"]["sample"]) == sorted(
        [f"math_{i}" for i in range(12)] + [f"code_{i}" for i in range(9)]
    )
    assert len(result.files()["weights.jsonl"].splitlines()) == 21


@pytest.fixture(scope="module")
def everything(made, layout, tmp_path_factory):
    """The same samples with gradients of MLPs and norms, too."""
    path = tmp_path_factory.mktemp("all") / "run.fs"
    return write_store(path, layout, made.tasks, kinds=("attention", "mlp", "norm"))


def whitened(made, names):
    rows = {task: [] for task in TASKS}
    for name in names:
        h = {task: made.tasks[task].h(name).flatten(1) for task in TASKS}
        pooled = sum((h[task] ** 2).mean(0) for task in TASKS) / 2
        for task in TASKS:
            rows[task].append(h[task] / (pooled + 1e-6 * pooled.median()).sqrt())
    return [unit(torch.cat(parts, 1).numpy()) for parts in rows.values()]


def test_parameters_and_mlps_have_cosines_where_gradients_are_stored(made, everything):
    """One row per parameter and MLP, equal to cosines by hand; whole-model pairs stay those of attention."""
    result = analysed(everything.store)
    np.testing.assert_allclose(
        result.cosines("math", "code"), analysed(made.store).cosines("math", "code"), atol=1e-6
    )
    modules = result.extra["modules"].set_index("parameter")
    assert set(modules.index) == {*everything.store.parameters, "layers.0.mlp", "layers.1.mlp"}
    members = {name: [name] for name in everything.store.parameters}
    for layer in (0, 1):
        path = f"layers.{layer}.mlp"
        members[path] = [name for name in everything.store.parameters if name.startswith(f"{path}.")]
    for name, parts in members.items():
        u, v = whitened(made, parts)
        row = modules.loc[name]
        np.testing.assert_allclose(
            [row["mean"], row["min"]], [(u @ v.T).mean(), (u @ v.T).min()], rtol=2e-3, atol=1e-5
        )
        assert row["level"] == ("parameter" if name in parts else "module")
    levels = result.extra["levels"]
    np.testing.assert_allclose(
        modules.loc["layers.0.attn.q.weight", "mean"],
        levels.query("level == 'block' and layer == 0 and block == 'Q'")["mean"].item(),
    )


def test_modules_without_gradients_have_loads(made):
    """From group values alone: shares of F, and overlap of the channels of an MLP, against loops."""
    modules = analysed(made.store).extra["modules"].set_index("parameter")
    assert (modules["task_a"] == "math").all()
    assert (modules["task_b"] == "code").all()
    names = made.store.parameters
    for side, task in (("share_a", "math"), ("share_b", "code")):
        sums = {name: float((made.tasks[task].h(name) ** 2).mean(0).sum()) for name in names}
        total = sum(sums.values())
        for name in names:
            np.testing.assert_allclose(modules.loc[name, side], sums[name] / total, rtol=1e-5)
    assert modules.loc["layers.0.mlp.up.weight", "mean"] != modules.loc["layers.0.mlp.up.weight", "mean"]

    def channels(task):
        gate, up, down = (
            made.tasks[task].h(f"layers.0.mlp.{part}.weight") for part in ("gate", "up", "down")
        )
        return unit(((gate**2).sum(2) + (up**2).sum(2) + (down**2).sum(1)).sqrt().numpy())

    u, v = channels("math"), channels("code")
    within = [(w @ w.T)[~np.eye(len(w), dtype=bool)].mean() for w in (u, v)]
    row = modules.loc["layers.0.mlp"]
    np.testing.assert_allclose(
        [row["overlap"], row["overlap_within"]], [(u @ v.T).mean(), np.mean(within)], rtol=1e-4
    )


def test_unknown_choices_are_refused():
    """Each names what there is."""
    for option, value in (
        ("metric", "cosine"),
        ("fisher_pool", "A"),
        ("fisher_weighting", "norm"),
        ("correction", "bonferroni"),
        ("level", 0.0),
        ("contribution_averaging_window", 0),
        ("margin", -0.1),
    ):
        with pytest.raises(ValueError, match=option):
            ConflictConfig(**{option: value})


def test_head_slices_add_up(made):
    """The Gram of a block is the sum of those of its slices: their cosines, weighted by norms, make its."""
    rows = analysed(made.store).extra["levels"]
    u, v = [], []
    for task, out in zip(TASKS, (u, v), strict=True):
        pooled = sum((made.tasks[t].h("layers.0.attn.q.weight") ** 2).mean(0) for t in TASKS) / 2
        scaled = made.tasks[task].h("layers.0.attn.q.weight") / (pooled + 1e-6 * pooled.median()).sqrt()
        out.extend(slice_of(made.layout, scaled, 0, "Q", head).numpy() for head in range(4))
    gram = sum(a @ b.T for a, b in zip(u, v, strict=True))
    norms = [np.sqrt(sum((w**2).sum(1) for w in side)) for side in (u, v)]
    block = rows.query("level == 'block' and layer == 0 and block == 'Q'").iloc[0]
    np.testing.assert_allclose(block["mean"], (gram / np.outer(*norms)).mean(), rtol=1e-3, atol=1e-6)
