"""States that torch, numpy and the process may be in, and one collection with its analyses to try under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fisherscope as fs
from tests import models

EXTENSIONS = (
    fs.Fisher(labels=("data", "sampled")),
    fs.SampleGradients(parameters=["*"]),
    "kronecker",
    fs.Positions(),
    fs.ExactPerToken(),
)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def _set(change: Callable[[Any], Any], value: Any, back: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(back)


@contextmanager
def _mkldnn_in_bfloat16() -> Iterator[None]:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float16": lambda: _set(torch.set_default_dtype, torch.float16, torch.float32),
    "bfloat16": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "float64": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "default-device-meta": lambda: _set(torch.set_default_device, "meta", None),
    "default-device-cpu": lambda: _set(torch.set_default_device, "cpu", None),
    "inside-device-meta": lambda: torch.device("meta"),
    "inference-mode": torch.inference_mode,
    "no-grad": torch.no_grad,
    "grad-disabled": lambda: torch.set_grad_enabled(False),
    "deterministic": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "save-on-cpu": save_on_cpu,
    "matmul-medium": lambda: _set(torch.set_float32_matmul_precision, "medium", "highest"),
    "matmul-high": lambda: _set(torch.set_float32_matmul_precision, "high", "highest"),
    "mkldnn-bfloat16": _mkldnn_in_bfloat16,
    "flush-denormal": lambda: _set(torch.set_flush_denormal, True, False),
    "function-mode": Watching,
    "dispatch-mode": Dispatching,
    "print-options": lambda: _set(
        lambda k: torch.set_printoptions(precision=k, sci_mode=None, edgeitems=k), 1, 4
    ),
    "numpy-raises": lambda: np.errstate(all="raise"),
}


def tasks() -> dict[str, list[dict[str, list[int]]]]:
    return {"a": models.rows(7), "b": models.rows(7, seed=5)}


def classified(n: int = 6) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "label": i % 3} for i, row in enumerate(models.rows(n))]


def everything(store: fs.ContributionStore) -> dict[str, Any]:
    """Every number of a store, as bytes."""
    found: dict[str, Any] = {}
    for task in store.tasks:
        values = store.group_values(task)
        found |= {f"{task}/{name}": values[name].to_numpy().tobytes() for name in values.data_vars}
        found[f"{task}/groups"] = store.groups(task).to_csv()
        found[f"{task}/samples"] = store.samples(task).to_csv()
        for name in store.gradient_parameters:
            found[f"{task}/F/{name}"] = store.fisher(task, name).numpy().tobytes()
            found[f"{task}/mean/{name}"] = store.mean(task, name).numpy().tobytes()
            found[f"{task}/g/{name}"] = store.gradients(task, name).numpy().tobytes()
    found["fingerprint"] = dict(store.header.fingerprint)
    return found


def analysed(store: fs.ContributionStore) -> dict[str, Any]:
    """Results of all analyses, without what names the store's place."""
    report = fs.analyze(store)
    assert not report.failed
    return {name: result.to_json() for name, result in report.items()}


def run(out: Path, state: AbstractContextManager[Any] = nullcontext(), **options: Any) -> dict[str, Any]:  # noqa: B008
    """Collect, read, compute again and analyse under a state."""
    model, rows = models.build(models.named("llama-biases")), tasks()
    with state:
        scope = fs.wrap(model, parameters="all")
        store = scope.collect(rows, out, quiet=True, **({"extensions": EXTENSIONS} | options))
        found = everything(store)
        again = scope.gradients(store, ["a_3", "b_1"])
        found["again"] = {name: values.numpy().tobytes() for name, values in again.items()}
        factors = scope.factors(store, ["a_3"])["a_3"]
        found["factors"] = {k: [side.numpy().tobytes() for side in pair] for k, pair in factors.items()}
        found["analysed"] = analysed(store)
    return found
