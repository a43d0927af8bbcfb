"""Whatever state torch and numpy are in, numbers are those of a fresh process, and the state stays."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import fisherscope as fs
from fisherscope import torch_state
from fisherscope.linalg import Factored
from tests import models
from tests.instrument import torch_states as states
from tests.instrument.interrupting import interrupted_after

DTYPES = ("float16", "bfloat16", "float64")
STORED = fs.SampleGradients(parameters="all")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return states.run(tmp_path_factory.mktemp("plain") / "run.fs")


@pytest.fixture(scope="module")
def plain_classifier(tmp_path_factory):
    return of_classifier(tmp_path_factory.mktemp("classifier") / "run.fs", nullcontext())


def of_classifier(out, state):
    """Everything of a model that classifies whole texts."""
    rows, options = {"a": states.classified()}, {"extensions": ("fisher", STORED)}
    return states.collected(states.classifier(), rows, out, state, **options)


def differing(found, expected):
    return [name for name in found if found[name] != expected[name]]


@pytest.mark.parametrize("state", states.STATES)
def test_numbers_are_the_same(state, plain, tmp_path):
    """Collecting, reading, computing again and analysing give the same bits; the state is left as it was."""
    assert not differing(states.run(tmp_path / "run.fs", state), plain)


@pytest.mark.parametrize("state", DTYPES)
def test_our_own_tensors_have_their_dtype(state, plain, tmp_path, monkeypatch):
    """The same where the default dtype is not set aside: no tensor of the package depends on it."""
    monkeypatch.setattr(torch_state, "_default_dtype", lambda undo: None)
    assert not differing(states.run(tmp_path / "run.fs", state), plain)


@pytest.mark.parametrize("state", [*DTYPES, "default-device-meta", "inference-mode"])
def test_numbers_of_a_classifier(state, plain_classifier, tmp_path):
    """The same for a model that classifies whole texts."""
    found = of_classifier(tmp_path / "run.fs", states.STATES[state]())
    assert not differing(found, plain_classifier)


@pytest.mark.parametrize(
    "kept",
    [
        {"encoding": "dense", "dtype": "float16"},
        {"encoding": "dense", "dtype": "bfloat16"},
        {"encoding": "factored", "dtype": "float32"},
        {"encoding": "lowrank", "rank": 2},
    ],
    ids=str,
)
def test_every_encoding(kept, tmp_path):
    """Each encoding is written and read alike under a default dtype that holds eight bits."""
    rows = {"a": models.rows(5)}
    options = {"extensions": ("fisher", fs.SampleGradients(parameters="attention", **kept))}
    found = []
    for name, state in (("plain.fs", nullcontext()), ("run.fs", states.STATES["bfloat16"]())):
        model = models.build(models.named("qwen2"), layers=1)
        found.append(states.collected(model, rows, tmp_path / name, state, **options))
    assert not differing(*found)


def test_resumed_under_another_default_dtype(tmp_path, monkeypatch):
    """A run that began under bfloat16 goes on under float16 as the same run, bit by bit."""
    rows, options = {"a": models.rows(8)}, {"batch_size": 2, "quiet": True, "extensions": ("fisher", STORED)}
    scope = fs.wrap(models.build(models.named("qwen2")))
    expected = scope.collect(rows, tmp_path / "plain.fs", **options)
    with (
        states.STATES["bfloat16"](),
        interrupted_after(2, monkeypatch),
        pytest.raises(fs.errors.Interrupted),
    ):
        scope.collect(rows, tmp_path / "run.fs", **options)
    assert 0 < fs.open_store(tmp_path / "run.fs").committed("a") < 8
    with states.STATES["float16"]():
        resumed = scope.collect(rows, tmp_path / "run.fs", **options)
    assert not differing(states.everything(resumed), states.everything(expected))


@pytest.mark.parametrize("state", ["float16", "default-device-meta"])
def test_an_objective_that_relies_on_defaults(state, tmp_path):
    """A function of the user's own gets float32 beside the model where it names no dtype and no device."""

    def objective(model, batch):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        losses = F.cross_entropy(logits.mT, batch.labels[:, 1:], ignore_index=-100, reduction="none")
        return torch.zeros(len(batch)).index_add(0, torch.arange(len(batch)), losses.sum(1))

    scope, rows = fs.wrap(models.build(models.named("qwen2"))), {"a": models.rows(5)}
    name = scope.parameters[0]
    expected = scope.collect(rows, tmp_path / "plain.fs", objective=objective, quiet=True)
    with states.STATES[state]():
        found = scope.collect(rows, tmp_path / "run.fs", objective=objective, quiet=True)
    assert torch.equal(found.fisher("a", name), expected.fisher("a", name))


def test_products_of_what_a_store_gives():
    """Gradients that are held as factors are multiplied in float32, whatever torch is set to round to."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 40, 300, generator=generator) for _ in range(2))
    expected = Factored(left, right)
    with states.STATES["matmul-medium"]():
        found = Factored(left, right)
        assert torch.equal(found.dense(), expected.dense())
        assert torch.equal(found.gram(), expected.gram())


def test_denormal_numbers_are_kept():
    """Squares of tiny gradients do not become zero where the user has torch flush such numbers."""
    with states.STATES["flush-denormal"]():
        assert not states.observed()["keeps denormals"]
        with torch_state.standard_state():
            assert states.observed()["keeps denormals"]


def test_states_of_threads_do_not_mix():
    """The default dtype comes back when the last of those who set it aside is done, not before."""
    with states.STATES["float64"]():
        first, second = torch_state.standard_state(), torch_state.standard_state()
        with first:
            torch_state._thread.is_inside = False  # as another thread sees it
            second.__enter__()
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float64


def test_a_failure_restores_the_state():
    """An error leaves as little behind as success."""
    with states.STATES["bfloat16"](), torch.inference_mode(), np.errstate(all="raise"):
        before = states.observed()
        with pytest.raises(KeyError, match="no such"), torch_state.standard_state(torch.device("cpu")):
            raise KeyError("no such thing")
        assert states.observed() == before
