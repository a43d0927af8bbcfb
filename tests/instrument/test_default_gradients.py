"""Whose gradients the plain call stores: those of attention, and in models without it the first that fit."""

from __future__ import annotations

import pytest
import transformers

import fisherscope as fs
from fisherscope.errors import CoverageError
from fisherscope.instrument.extensions import sample_gradients
from tests import models


def mamba():
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, pad_token_id=0)).eval()


@pytest.mark.filterwarnings("ignore:no adapter is registered")
def test_a_model_without_attention(tmp_path):
    """The plain call collects, analyses and reports by module, and what is skipped promises nothing."""
    model, rows = mamba(), models.rows(4)
    scope = fs.wrap(model)
    tasks = {"a": rows, "b": models.rows(3, seed=1)}
    assert scope.estimate(tasks, measure=False).gradient_bytes_per_sample > 0
    store = scope.collect(tasks, tmp_path / "run.fs", quiet=True)
    matrices = [name for name in scope.parameters if store.layout.parameter(name).shape[1:]]
    assert list(store.gradient_parameters) == matrices
    name = matrices[0]
    for i, one in enumerate(models.loop(model, rows)):
        error = models.relative_error(store.gradients("a", name)[i].float(), one[name], floor=1e-3)
        assert error < 1e-2, name  # bfloat16
    report = fs.analyze(store)
    assert not report.failed
    assert set(report) == {"fisher", "importance", "masks", "overlap"}
    assert set(report.skipped) == {"conflict", "interference"}
    assert all("collecting again changes nothing" in reason for reason in report.skipped.values())
    report.save(tmp_path / "report")
    # again, by the names that it is known by
    kept = fs.SampleGradients(
        parameters=list(store.header.fingerprint["extensions"]["sample_gradients"]["parameters"])
    )
    again = scope.collect(tasks, tmp_path / "run.fs", extensions=("fisher", kept), quiet=True)
    assert again.n("a") == 4


@pytest.mark.filterwarnings("ignore:no adapter is registered")
@pytest.mark.parametrize(("most", "count"), [(1, 1), (32 * 128 + 64 * 10, 2), (10**9, 8)])
def test_matrices_are_taken_while_they_fit(most, count, monkeypatch, tmp_path):
    """From the first on, within the bound, and one at least."""
    monkeypatch.setattr(sample_gradients, "MOST_ENTRIES", most)
    scope = fs.wrap(mamba())
    store = scope.collect({"a": models.rows(2)}, tmp_path / "run.fs", quiet=True)
    shapes = [store.layout.parameter(name).shape for name in scope.parameters]
    matrices = [name for name, shape in zip(scope.parameters, shapes, strict=True) if len(shape) > 1]
    assert list(store.gradient_parameters) == matrices[:count]


@pytest.mark.parametrize("first", ["auto", "attention"])
def test_the_former_default_goes_on(first, tmp_path):
    """A store with the gradients of attention is the same run, however that choice was made."""
    scope, rows = fs.wrap(models.build(models.named("llama"), layers=1)), models.rows(4)
    second = {"auto": "attention", "attention": "auto"}[first]
    for parameters, n in ((first, 2), (second, 4)):
        kept = ("fisher", fs.SampleGradients(parameters=parameters))
        store = scope.collect({"a": rows[:n]}, tmp_path / "run.fs", extensions=kept, quiet=True)
    assert store.n("a") == 4
    assert store.header.fingerprint["extensions"]["sample_gradients"]["parameters"] == "attention"


def test_advice_of_a_store_without_gradients_of_heads(tmp_path):
    """What a skipped analysis says to do is what makes it run."""
    model, tasks = (
        models.build(models.named("llama"), layers=1),
        {"a": models.rows(4), "b": models.rows(4, seed=1)},
    )
    narrow = fs.wrap(model, parameters=["*.mlp.*"])
    store = narrow.collect(tasks, tmp_path / "narrow.fs", quiet=True)
    reason = fs.analyze(store, ["interference"]).skipped["interference"]
    assert 'wrap the model with parameters="linear"' in reason
    again = fs.wrap(model, parameters="linear").collect(
        tasks,
        tmp_path / "wide.fs",
        extensions=("fisher", fs.SampleGradients(parameters="attention")),
        quiet=True,
    )
    assert "interference" in fs.analyze(again, ["interference"])


@pytest.mark.filterwarnings("ignore:no adapter is registered")
def test_a_choice_that_matches_nothing_names_a_way_on(tmp_path):
    """Asking for attention where there is none says what to ask for."""
    kept = fs.SampleGradients(parameters="attention")
    with pytest.raises(CoverageError, match="Leave parameters out for a choice that fits the model"):
        fs.wrap(mamba()).collect({"a": models.rows(2)}, tmp_path / "run.fs", extensions=(kept,), quiet=True)
