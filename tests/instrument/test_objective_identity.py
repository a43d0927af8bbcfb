"""What makes a function of the user's own another one, and what does not."""

from __future__ import annotations

import functools
import random
import re
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from torch import nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import FingerprintError
from fisherscope.instrument.objectives.content import parts_of
from tests import models

TEMPERATURE = 1.0
TABLE = {"a": np.array([1.0, 2.0]), "b": {"c": (1, 2.5)}}
CALLS = 0


@dataclass
class Options:
    """Of a loss."""

    scale: float = 1.0
    weights: Any = field(default_factory=lambda: np.ones(3))


class Loss(nn.Module):
    """A loss with a parameter, a buffer and an attribute."""

    share = 0.5

    def __init__(self, t: float = 1.0) -> None:
        super().__init__()
        self.t = t
        self.gain = nn.Parameter(torch.ones(2))
        self.register_buffer("shift", torch.zeros(2), persistent=False)
        self.inner = nn.CrossEntropyLoss(label_smoothing=0.1)
        self.calls = 0

    def forward(self, model: Any, batch: Any) -> Any:
        """Count, and scale."""
        self.calls += 1
        return _by_global(model, batch) * self.t * self.share


def _by_global(model: Any, batch: Any) -> Any:
    logits = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).logits[:, :-1]
    loss = F.cross_entropy(logits.mT / TEMPERATURE, batch.labels[:, 1:], reduction="none")
    return loss.sum(1)


def _by_helper(model: Any, batch: Any) -> Any:
    return next(_by_global(m, batch) for m in [model]) * TABLE["b"]["c"][0]


def _counting(model: Any, batch: Any) -> Any:
    global CALLS  # noqa: PLW0603 - that is what is tested
    CALLS += 1
    return _by_global(model, batch)


def _closing(value: Any) -> Callable[..., Any]:
    return lambda model, batch: _by_global(model, batch) * float(np.asarray(value).ravel()[0])


def _options(**values: Any) -> Callable[..., Any]:
    options = Options(**values)
    return lambda model, batch: _by_global(model, batch) * options.scale


def _module(change: Callable[[Loss], None] = lambda _: None) -> Loss:
    loss = Loss()
    change(loss)
    return loss


def _wrapped(factor: float) -> Callable[..., Any]:
    @functools.wraps(_by_global)
    def outer(model: Any, batch: Any) -> Any:
        return factor * _by_global(model, batch)

    return outer


class Slotted:
    """A callable with slots."""

    __slots__ = ("t",)

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, model: Any, batch: Any) -> Any:
        """Scale."""
        return _by_global(model, batch) * self.t


PAIRS: dict[str, tuple[Any, Any]] = {
    "float": (_closing(1.0), _closing(5.0)),
    "numpy scalar": (_closing(np.float32(1)), _closing(np.float32(5))),
    "array": (_closing(np.array([1.0])), _closing(np.array([5.0]))),
    "dtype of an array": (_closing(np.ones(2, "f4")), _closing(np.ones(2, "f8"))),
    "array of objects": (_closing(np.array([1, None])), _closing(np.array([2, None]))),
    "tensor": (_closing(torch.tensor([1e-30])), _closing(torch.tensor([2e-30]))),
    "list in a dict": (_options(weights={"a": [1, 2]}), _options(weights={"a": [1, 3]})),
    "dataclass": (_options(scale=1.0), _options(scale=2.0)),
    "deep": (_closing([[[[[[[[[1.0]]]]]]]]]), _closing([[[[[[[[[2.0]]]]]]]]])),
    "namespace": (_closing(types.SimpleNamespace(t=1)), _closing(types.SimpleNamespace(t=2))),
    "pandas": (_closing(pd.DataFrame({"a": [1.0]})), _closing(pd.DataFrame({"a": [1.1]}))),
    "series of texts": (_closing(pd.Series(["a"])), _closing(pd.Series(["b"]))),
    "pattern": (_closing(re.compile("a")), _closing(re.compile("b"))),
    "sparse matrix": (_closing(sparse.eye(2).tocsr()), _closing(2 * sparse.eye(2).tocsr())),
    "path": (_closing(Path("a")), _closing(Path("b"))),
    "module attribute": (_module(), _module(lambda m: setattr(m, "t", 5.0))),
    "module parameter": (_module(), _module(lambda m: m.gain.data.mul_(2))),
    "module buffer": (_module(), _module(lambda m: m.shift.add_(1))),
    "submodule attribute": (_module(), _module(lambda m: setattr(m.inner, "label_smoothing", 0.2))),
    "wraps": (_wrapped(1.0), _wrapped(2.0)),
    "slots": (Slotted(1.0), Slotted(2.0)),
    "partial": (functools.partial(_by_global, t=1), functools.partial(_by_global, t=np.float64(2))),
    "bound method": (Slotted(1.0).__call__, Slotted(2.0).__call__),
    "cached": (functools.lru_cache(_wrapped(1.0)), functools.lru_cache(_wrapped(2.0))),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_values_that_decide_are_part_of_it(pair: str) -> None:
    """Whatever holds the value: two functions that differ in it are two, and each is itself again."""
    first, second = PAIRS[pair]
    assert parts_of(first) != parts_of(second)
    assert parts_of(first) == parts_of(first)


def test_globals_count_through_functions_classes_and_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A global of the function, of what it calls, of a class and of a module that the user wrote."""
    own = types.ModuleType("losses_of_mine")
    own.scale = 1.0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "losses_of_mine", own)
    monkeypatch.setattr(sys.modules[__name__], "losses", own, raising=False)
    by_module = types.FunctionType(
        compile("lambda m, b: losses.scale", "x", "eval").co_consts[0], globals(), "by_module"
    )
    functions = (_by_global, _by_helper, Loss(), by_module)
    before = [parts_of(f) for f in functions]
    monkeypatch.setattr(sys.modules[__name__], "TEMPERATURE", 5.0)
    own.scale = 2.0  # type: ignore[attr-defined]
    assert all(a != b for a, b in zip(before, map(parts_of, functions), strict=True))
    monkeypatch.setattr(sys.modules[__name__], "TEMPERATURE", 1.0)
    own.scale = 1.0  # type: ignore[attr-defined]
    assert before == [parts_of(f) for f in functions]
    monkeypatch.setitem(TABLE["b"], "c", (2, 2.5))
    assert parts_of(_by_helper) != before[1]
    monkeypatch.setattr(Loss, "share", 0.25)
    assert parts_of(Loss()) != before[2]


def test_what_decides_nothing_is_no_part_of_it() -> None:
    """Lines, comments, addresses, the order of sets and dicts, what a cache remembers."""
    plain = "def loss(model, batch):\n    return {1, 2, 3} and len('abc')\n"
    moved = f"\n\n# a comment\n{plain}"
    documented = plain.replace(":\n", ":\n    'What it does.'\n", 1)
    found = []
    for text in (plain, moved, documented):
        space: dict[str, Any] = {"__name__": "mine"}
        exec(compile(text, "elsewhere.py", "exec"), space)
        found.append(parts_of(space["loss"]))
    assert found[0] == found[1]
    assert parts_of(_closing({"a": 1, "b": 2})) == parts_of(_closing({"b": 2, "a": 1}))
    assert parts_of(_closing({"x", "y", "z"})) == parts_of(_closing({"z", "y", "x"}))
    assert parts_of(_closing(random.Random(1))) == parts_of(_closing(random.Random(2)))
    assert parts_of(_closing(object())) == parts_of(_closing(object()))
    assert parts_of(_closing(threading.Lock())) == parts_of(_closing(threading.Lock()))
    cached = functools.lru_cache(lambda x: x)
    before = parts_of(_closing(cached))
    cached(3)
    loss = Loss()
    first = parts_of(loss)
    loss.eval().requires_grad_(False)
    assert (parts_of(_closing(cached)), parts_of(loss)) == (before, first)
    compiled = torch.compile(_by_global, backend="eager")
    assert parts_of(compiled) == parts_of(_by_global)


class Logging:
    """A loss that keeps a log, counts, and computes what it needs once."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls = 0
        self.log: list[float] = []
        self.notes: dict[str, Any] = {"calls": 0, "factor": 1.0}
        self.cache: dict[Any, int] = {}

    def set_factor(self, factor: float) -> None:
        """Another loss from now on."""
        self.factor = factor

    @functools.cached_property
    def gain(self) -> float:
        """Something slow."""
        return 1.0

    def __call__(self, model: Any, batch: Any) -> Any:
        """Log and scale."""
        self.calls += 1
        self.notes["calls"] += 1
        HISTORY.append(len(batch.rows))
        self.cache[batch.rows] = len(batch.rows)
        found = _by_global(model, batch) * self.factor * self.notes["factor"] * self.gain
        self.log.append(float(found.detach().sum()))
        return found


HISTORY: list[int] = []


def test_what_running_changes_is_state(tmp_path: Path) -> None:
    """Logs, counters and computed properties are not compared; what others set is, wherever it stands."""
    rows = models.rows(8)
    scope = fs.wrap(models.build(models.named("llama")))
    loss, out = Logging(), tmp_path / "run.fs"
    store = scope.collect({"a": rows[:4]}, out, objective=loss, quiet=True)
    assert {name for name in store.header.state if ".cache.(" not in name} == {
        "objective_parts.cache.*",
        "objective_parts.calls",
        "objective_parts.gain",
        "objective_parts.log",
        "objective_parts.notes.calls",
        "objective_parts.Logging.__call__.HISTORY",
    }
    scope.collect({"a": rows[:6]}, out, objective=loss, quiet=True)
    scope.collect({"a": rows[:7]}, out, objective=Logging(), quiet=True)
    assert scope.gradients(store, ["a_1"], objective=loss)
    loss.set_factor(1.0 + 1e-9)  # no probe would see that
    for call in (
        lambda: scope.collect({"a": rows}, out, objective=loss, quiet=True),
        lambda: scope.gradients(store, ["a_1"], objective=loss),
    ):
        with pytest.raises(FingerprintError, match=r"objective_parts\.factor: '1\.0' in the store, '1\.000"):
            call()
    loss.set_factor(1.0)
    loss.notes["factor"] = 1.0 - 1e-9
    with pytest.raises(FingerprintError, match=r"objective_parts\.notes\.factor"):
        scope.collect({"a": rows}, out, objective=loss, quiet=True)
    # a store that was begun with what had run already
    other = Logging()
    other(scope.model, _batch_of(rows[0]))
    scope.collect({"a": rows[:4]}, tmp_path / "other.fs", objective=other, quiet=True)
    scope.collect({"a": rows[:6]}, tmp_path / "other.fs", objective=Logging(), quiet=True)


def _batch_of(row: dict[str, Any]) -> Any:
    ids = torch.tensor([row["input_ids"]], dtype=torch.int64, device="cpu")
    places = torch.arange(ids.shape[1], dtype=torch.int64, device="cpu").unsqueeze(0)
    return types.SimpleNamespace(
        rows=(0,), input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places, labels=ids
    )


def test_a_compiled_objective(tmp_path: Path) -> None:
    """It is the function that was compiled, and can be run again."""
    rows = models.rows(5)
    scope = fs.wrap(models.build(models.named("llama")))
    compiled = torch.compile(_by_global, backend="eager")
    scope.collect({"a": rows[:3]}, tmp_path / "run.fs", objective=compiled, quiet=True)
    scope.collect({"a": rows}, tmp_path / "run.fs", objective=compiled, quiet=True)


def test_cycles_and_self_reference_end() -> None:
    """An object that holds itself, and a function that calls itself."""
    loop: list[Any] = [1]
    loop.append(loop)

    def recursive(model: Any, batch: Any) -> Any:
        return recursive(model, batch) if loop else None

    assert parts_of(recursive) == parts_of(recursive)


def test_the_probe_sees_what_the_identity_does_not(tmp_path: Path) -> None:
    """What the code writes itself is state, and still no other loss is let pass."""

    class Sneaky:
        def __call__(self, model: Any, batch: Any) -> Any:
            self.t = getattr(self, "t", 1.0)
            return _by_global(model, batch) * self.t

    first, second = Sneaky(), Sneaky()
    second.t = 5.0
    rows = models.rows(6)
    scope = fs.wrap(models.build(models.named("llama")))
    store = scope.collect({"a": rows[:4]}, tmp_path / "run.fs", objective=first, quiet=True)
    with pytest.raises(FingerprintError, match="computes something else"):
        scope.collect({"a": rows}, tmp_path / "run.fs", objective=second, quiet=True)
    with pytest.raises(FingerprintError, match="computes something else"):
        scope.gradients(store, ["a_1"], objective=second)
    scope.collect({"a": rows}, tmp_path / "run.fs", objective=first, quiet=True)


@pytest.mark.filterwarnings("ignore:going on by force")
def test_a_loss_that_does_not_repeat_rests_on_digests(tmp_path: Path) -> None:
    """It is not refused by its own chance, and the store says what its identity rests on."""
    source = np.random.default_rng(0)

    def drawn(model: Any, batch: Any) -> Any:
        return _by_global(model, batch) * (1 + 1e-4 * source.random())

    rows = models.rows(6)
    scope = fs.wrap(models.build(models.named("llama")))
    scope.collect({"a": rows[:4]}, tmp_path / "run.fs", objective=drawn, quiet=True, force=True)
    store = fs.open_store(tmp_path / "run.fs")
    assert store.evidence("probe")[0]["repeats"] is False
    store = scope.collect({"a": rows}, tmp_path / "run.fs", objective=drawn, quiet=True, force=True)
    assert "digests decide" in store.evidence("compared")[-1]["because"]
