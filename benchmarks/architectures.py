"""What fisherscope makes of each architecture of the installed transformers: a sweep over tiny random models.

A model is built from each config class of the causal language models, runs a plain forward, and goes through
``resolve`` with every attention layer probed. The verdicts:

    confirmed         the probe confirmed every head of every attention layer that a plain forward calls
    module-level      usable by module and by row; heads are missing, and the reason says which
    refused           no layout
    not instantiated  the tiny model could not be built or does not run

Nothing is downloaded.

    python benchmarks/architectures.py [--all] [--only llama,gpt2] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

import tiny
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fisherscope.adapters import resolve
from fisherscope.errors import AdapterError
from fisherscope.layout import ModelLayout

SECONDS = 60
VERDICTS = ("confirmed", "module-level", "refused", "not instantiated")


@dataclass(frozen=True)
class Task:
    """One of transformers' mappings from config classes to model classes, and how its models are called.

    Attributes:
        inputs: of a plain forward, by config.
        selection: model types, with spaces between them; all of the mapping where it is empty.
    """

    title: str
    mapping: str
    inputs: Callable[[Any], dict[str, Any]]
    selection: str = ""
    causal: bool = False


CAUSAL = Task(
    "causal language models",
    "CAUSAL_LM",
    lambda config: tiny.text(config) | {"use_cache": False},
    causal=True,
)
MASKED = Task(
    "masked language models",
    "MASKED_LM",
    tiny.text,
    """albert bert camembert data2vec-text deberta deberta-v2 distilbert electra ernie esm eurobert longformer
    mobilebert modernbert mpnet nomic_bert rembert roberta roberta-prelayernorm roformer xlm-roberta
    xlm-roberta-xl xmod""",
)
SEQUENCES = Task(
    "sequence to sequence",
    "SEQ_TO_SEQ_CAUSAL_LM",
    lambda config: tiny.text(config) | {"decoder_input_ids": tiny.text(config)["input_ids"]},
    """bart bigbird_pegasus blenderbot led longt5 m2m_100 marian mbart mt5 pegasus plbart prophetnet
    switch_transformers t5 t5gemma umt5""",
)
IMAGES = Task(
    "image classification",
    "IMAGE_CLASSIFICATION",
    tiny.image,
    "beit data2vec-vision deit dinov2 dinov2_with_registers ijepa swin swinv2 vit vit_msn",
)


@dataclass(frozen=True)
class Row:
    """What became of one model type.

    Attributes:
        confirmed: attention layers whose heads the probe confirmed.
        present: attention modules that the plain forward calls, by the names of their classes.
        adapter: "registered", "detected", or "" where there are no heads.
    """

    task: str
    model_type: str
    model_class: str
    verdict: str
    confirmed: int = 0
    present: int = 0
    adapter: str = ""
    reason: str = ""


class TimeLimitError(BaseException):
    """A model took too long; no handler of ``Exception`` on the way may take it for its own."""


def classify(
    layout: ModelLayout | None, said: Sequence[str], error: BaseException | None, present: int
) -> tuple[str, str]:
    """Verdict and reason.

    Args:
        layout: what ``resolve`` returned.
        said: the texts of its warnings.
        error: what it raised instead.
        present: attention modules that the model calls.
    """
    if isinstance(error, AdapterError):
        return "refused", str(error)
    if error is not None or layout is None:
        return "refused", f"{type(error).__name__} instead of an AdapterError: {error}"
    if said:
        return "module-level", said[0]
    found = len(layout.attention)
    if not found or found < present:
        return "module-level", f"heads in {found} of {present} attention modules, and no warning says so"
    return "confirmed", f"{found - present} more than are called attention" if found > present else ""


def examine(task: Task, model_type: str) -> Row:
    """Build one model, run it, resolve it; every exception becomes part of the row."""
    name = _class_name(task, model_type)
    try:
        with _time_limit(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, present = _running(task, model_type, getattr(transformers, name))
    except (Exception, TimeLimitError) as error:
        reason = f"{type(error).__name__}: {error}"
        return Row(task.title, model_type, name, "not instantiated", reason=reason)
    layout, said, raised = _resolved(model)
    verdict, reason = classify(layout, said, raised, present)
    confirmed = len(layout.attention) if layout is not None else 0
    return Row(
        task.title,
        model_type,
        name,
        verdict,
        confirmed=confirmed,
        present=present,
        adapter=layout.source if layout is not None and confirmed else "",
        reason=reason,
    )


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The innermost modules whose class is called attention and that have parameters."""
    called = re.compile("attention|attn|mla$", re.IGNORECASE)
    found = {
        path: module
        for path, module in model.named_modules()
        if called.search(type(module).__name__) and list(module.parameters())
    }
    return [m for path, m in found.items() if not any(other.startswith(f"{path}.") for other in found)]


def sweep(tasks: Sequence[Task], only: Sequence[str]) -> Iterator[Row]:
    """One row per model type, in the order of the mappings."""
    for task in tasks:
        mapping = _mapping(task)
        for model_type in task.selection.split() or mapping:
            if model_type in mapping and (not only or model_type in only):
                yield examine(task, model_type)


def _running(task: Task, model_type: str, model_class: type[nn.Module]) -> tuple[nn.Module, int]:
    """A tiny model whose plain forward gives finite logits, and how many attention modules that calls."""
    config = tiny.tiny_config(CONFIG_MAPPING[model_type], causal=task.causal)
    model = tiny.random_model(model_class, config)
    inputs = task.inputs(model.config)
    called: set[nn.Module] = set()
    with torch.no_grad(), ExitStack() as stack:
        if not model(**inputs).logits.isfinite().all():
            raise FloatingPointError("the logits of a plain forward are not finite")
        # counted in a second forward: a first one may exchange modules that do not suit short inputs
        for module in attention_modules(model):
            handle = module.register_forward_pre_hook(lambda this, _: called.add(this))
            stack.callback(handle.remove)
        model(**inputs)
    return model, len(called)


def _resolved(model: nn.Module) -> tuple[ModelLayout | None, list[str], BaseException | None]:
    """Layout, warnings of fisherscope's own, and exception of ``resolve``."""
    layout: ModelLayout | None = None
    raised: BaseException | None = None
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            with _time_limit(SECONDS):
                layout = resolve(model, verify="all")
        except (Exception, TimeLimitError) as error:
            raised = error
    foreign = {"torch", "transformers"}
    said = [str(w.message) for w in record if not foreign & set(Path(w.filename).parts)]
    return layout, said, raised


def _mapping(task: Task) -> dict[str, Any]:
    names: dict[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{task.mapping}_MAPPING_NAMES")
    return names


def _class_name(task: Task, model_type: str) -> str:
    name: str | tuple[str, ...] = _mapping(task)[model_type]
    return name if isinstance(name, str) else name[0]


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expired(_signal: int, _frame: FrameType | None) -> None:
        raise TimeLimitError(f"took more than {seconds} s")

    handler = signal.signal(signal.SIGALRM, expired)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)  # that of a test runner, for instance


def line(row: Row) -> str:
    """One line of the table."""
    layers = f"{row.confirmed}/{row.present}"
    how = f"{row.verdict} ({row.adapter})" if row.adapter else row.verdict
    reason = " ".join(row.reason.split())[:160]
    return f"{row.model_type:<26} {row.model_class:<38} {layers:>6}  {how:<25} {reason}".rstrip()


def main() -> None:
    """Sweep and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="encoders, encoder-decoders and image models, too")
    parser.add_argument("--only", default="", help="model types, with commas between them")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tasks = (CAUSAL, MASKED, SEQUENCES, IMAGES) if arguments.all else (CAUSAL,)
    only = [name for name in arguments.only.split(",") if name]
    unknown = set(only).difference(*map(_mapping, tasks))
    if unknown:
        parser.error(f"no such model type in transformers: {', '.join(sorted(unknown))}")
    transformers.logging.set_verbosity_error()
    versions = {name: version(name) for name in ("transformers", "torch", "fisherscope")}
    print(", ".join(f"{name} {number}" for name, number in versions.items()))
    rows: list[Row] = []
    for row in sweep(tasks, only):
        if not rows or rows[-1].task != row.task:
            print(f"\n{row.task}\n{'model type':<26} {'class':<38} layers  {'verdict':<25} reason")
        print(line(row), flush=True)
        rows.append(row)
    totals = Counter(row.verdict for row in rows)
    print(f"\n{len(rows)} model types: " + ", ".join(f"{totals[name]} {name}" for name in VERDICTS))
    if arguments.json:
        found = {"versions": versions, "totals": totals, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
