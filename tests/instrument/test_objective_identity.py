"""What makes a function of the user's own another one, and what does not."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import FingerprintError
from fisherscope.instrument.objectives.identity import identity
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
    assert identity(first) != identity(second)
    assert identity(first) == identity(first)


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
    before = [identity(f) for f in functions]
    monkeypatch.setattr(sys.modules[__name__], "TEMPERATURE", 5.0)
    own.scale = 2.0  # type: ignore[attr-defined]
    assert all(a != b for a, b in zip(before, map(identity, functions), strict=True))
    monkeypatch.setattr(sys.modules[__name__], "TEMPERATURE", 1.0)
    own.scale = 1.0  # type: ignore[attr-defined]
    assert before == [identity(f) for f in functions]
    monkeypatch.setitem(TABLE["b"], "c", (2, 2.5))
    assert identity(_by_helper) != before[1]
    monkeypatch.setattr(Loss, "share", 0.25)
    assert identity(Loss()) != before[2]


def test_what_decides_nothing_is_no_part_of_it() -> None:
    """Lines, comments, addresses, the order of sets and dicts, what a cache remembers, a counter of calls."""
    plain = "def loss(model, batch):\n    return {1, 2, 3} and len('abc')\n"
    moved = f"\n\n# a comment\n{plain}"
    documented = plain.replace(":\n", ":\n    'What it does.'\n", 1)
    found = []
    for text in (plain, moved, documented):
        space: dict[str, Any] = {"__name__": "mine"}
        exec(compile(text, "elsewhere.py", "exec"), space)
        found.append(identity(space["loss"]))
    assert found[0] == found[1]
    assert identity(_closing({"a": 1, "b": 2})) == identity(_closing({"b": 2, "a": 1}))
    assert identity(_closing({"x", "y", "z"})) == identity(_closing({"z", "y", "x"}))
    assert identity(_closing(object())) == identity(_closing(object()))
    cached = functools.lru_cache(lambda x: x)
    before = identity(_closing(cached)), identity(_counting)
    cached(3)
    loss = Loss()
    first = identity(loss)
    loss.calls += 7
    globals()["CALLS"] += 3
    loss.eval().requires_grad_(False)
    assert (identity(_closing(cached)), identity(_counting), identity(loss)) == (*before, first)


def test_cycles_and_self_reference_end() -> None:
    """An object that holds itself, and a function that calls itself."""
    loop: list[Any] = [1]
    loop.append(loop)

    def recursive(model: Any, batch: Any) -> Any:
        return recursive(model, batch) if loop else None

    assert identity(recursive) == identity(recursive)


def test_the_probe_sees_what_the_identity_does_not(tmp_path: Path) -> None:
    """What the code writes itself is state, and still no other loss is let pass."""

    class Sneaky:
        def __call__(self, model: Any, batch: Any) -> Any:
            self.t = getattr(self, "t", 1.0)
            return _by_global(model, batch) * self.t

    first, second = Sneaky(), Sneaky()
    second.t = 5.0
    assert identity(first) == identity(second)
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
