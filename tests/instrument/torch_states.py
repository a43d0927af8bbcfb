"""States that torch, numpy and the process may be in, and what is collected and analysed under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fisherscope as fs
from fisherscope.analyses import ConflictConfig, FisherConfig, ImportanceConfig
from tests import models

CPU_PRODUCTS: Any = getattr(torch.backends.mkldnn, "matmul", None)  # from torch 2.9 on
EXTENSIONS = (
    fs.Fisher(labels=("data", "sampled")),
    fs.SampleGradients(parameters=["*"]),
    "kronecker",
    fs.Positions(),
    fs.ExactPerToken(),
)


QUICK = fs.AnalyzeConfig(
    fisher=FisherConfig(bootstrap=20),
    importance=ImportanceConfig(bootstrap=20),
    conflict=ConflictConfig(calibration_splits=4),
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
    CPU_PRODUCTS.fp32_precision = "bf16"
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
    **({"mkldnn-bfloat16": _mkldnn_in_bfloat16} if CPU_PRODUCTS else {}),
    "flush-denormal": lambda: _set(torch.set_flush_denormal, True, False),
    "function-mode": Watching,
    "dispatch-mode": Dispatching,
    "print-options": lambda: _set(
        lambda k: torch.set_printoptions(precision=k, sci_mode=None, edgeitems=k), 1, 4
    ),
    "numpy-raises": lambda: np.errstate(all="raise"),
}


# those under which analyses would compute something else, or not at all
OF_ANALYSES = {"float16", "bfloat16", "float64", "inference-mode", "matmul-medium", "numpy-raises"}


def tasks() -> dict[str, list[dict[str, list[int]]]]:
    return {"a": models.rows(6), "b": models.rows(6, seed=5)}


def classifier() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    config = transformers.BertConfig(**sizes, vocab_size=models.VOCABULARY, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def classified() -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"], "label": i % 3} for i, row in enumerate(models.rows(6))]


def observed() -> dict[str, Any]:
    """What torch and numpy can be asked about their states."""
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "inference": torch.is_inference_mode_enabled(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "keeps denormals": float(torch.full((1,), 1e-40, dtype=torch.float32, device="cpu") * 1.0) > 0,
        "cpu products": getattr(CPU_PRODUCTS, "fp32_precision", None),
        "cuda products": torch.backends.cuda.matmul.allow_tf32,
        "numpy": np.geterr(),
    }


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
    report = fs.analyze(store, config=QUICK)
    assert not report.failed
    return {name: result.to_json() for name, result in report.items()}


def collected(
    model: Any, rows: dict[str, Any], out: Path, state: AbstractContextManager[Any], **options: Any
) -> dict[str, Any]:
    """Wrap, collect, read and compute again under a state."""
    with state:
        before = observed()
        scope = fs.wrap(model, parameters="all")
        store = scope.collect(rows, out, quiet=True, **options)
        found = everything(store)
        task = store.tasks[0]
        again = scope.gradients(store, [f"{task}_3", f"{task}_1"])
        found["again"] = {name: values.numpy().tobytes() for name, values in again.items()}
        factors = scope.factors(store, [f"{task}_3"], parameters=["*layer*.[qkv]*.weight"])[f"{task}_3"]
        found["factors"] = {k: [side.numpy().tobytes() for side in pair] for k, pair in factors.items()}
        assert observed() == before
    return found


def run(out: Path, state: str | None = None) -> dict[str, Any]:
    """Everything of a language model under a state."""
    model = models.build(models.named("llama-biases"), layers=1)
    entered = STATES[state] if state else nullcontext
    found = collected(model, tasks(), out, entered(), extensions=EXTENSIONS)
    if state is None or state in OF_ANALYSES:
        with entered():
            found["analysed"] = analysed(fs.open_store(out))
    return found
