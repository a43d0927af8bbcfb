"""Bytes of a store: per sample and encoding for models of known shape, and presets; no weights are needed.

The sizes are those of the estimator. ``--demo`` checks it: it collects the embedded demo in every encoding
and prints what was written over what was estimated.

python benchmarks/sizes.py [--samples 1000] [--tokens 64 256] [--demo] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

import fisherscope as fs
from fisherscope import demo
from fisherscope.adapters import resolve
from fisherscope.adapters.modules import output_axis
from fisherscope.instrument.extensions import SampleGradients
from fisherscope.instrument.targets import select_targets
from fisherscope.layout import ModelLayout
from fisherscope.store.encodings import Encodings
from fisherscope.store.size import bytes_per_sample, snapshot_bytes

RANK = SampleGradients().rank
# encoding and dtype; what "auto" takes is the smallest of the first and the last
ENCODINGS = (
    ("dense", "bfloat16"),
    ("factored", "bfloat16"),
    ("factored", "float32"),
    ("lowrank", "bfloat16"),
    ("groups", ""),
)


def shapes() -> Iterator[tuple[str, PretrainedConfig]]:
    """Well-known models, by config."""
    yield "GPT-2 (124 M)", GPT2Config()
    yield (
        "Qwen2.5-1.5B",
        Qwen2Config(
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
    )
    yield (
        "Llama-3.1-8B",
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    )


class Shape:
    """A model without weights, and what its stores hold per sample."""

    def __init__(self, config: PretrainedConfig) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.layout: ModelLayout = resolve(model, verify=False)
        self.parameters = select_targets(model, self.layout, "linear").parameters
        modules = dict(model.named_modules())
        self.axes = {
            name: output_axis(modules[name.rpartition(".")[0]])
            for name in self.parameters
            if len(self.layout.parameter(name).shape) == 2
        }

    def stored(self, parameters: str) -> tuple[str, ...]:
        """Parameters of which gradients are stored."""
        return SampleGradients(parameters=parameters).chosen(self.layout, self.parameters)

    def encodings(self, stored: Sequence[str], encoding: str, dtype: str) -> Encodings:
        """One encoding for all matrices; Q, K and V share an input, and so do gate and up."""
        matrices = [name for name in stored if name in self.axes]
        if encoding == "lowrank":
            return Encodings(dict.fromkeys(matrices, "lowrank"), rank=RANK, dtype=dtype)
        inputs = {name: self._first_with_the_same_input(name, matrices) for name in matrices}
        transposed = tuple(name for name in matrices if self.axes[name] == 1)
        return Encodings(dict.fromkeys(matrices, "factored"), inputs, transposed, dtype=dtype)

    def _first_with_the_same_input(self, name: str, matrices: Sequence[str]) -> str:
        for together in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            module = name.split(".")[-2]
            if module in together:
                first = next(n for n in together if name.replace(module, n) in matrices)
                return name.replace(module, first)
        return name

    def bytes_per_sample(self, parameters: str, encoding: str, dtype: str, tokens: int) -> dict[str, float]:
        """Of one sample without text."""
        stored = () if encoding == "groups" else self.stored(parameters)
        kept = None if encoding in {"dense", "groups"} else self.encodings(stored, encoding, dtype)
        return bytes_per_sample(self.layout, self.parameters, stored, mean_tokens=tokens, encodings=kept)

    def presets(self, samples: int, tokens: int) -> dict[str, float]:
        """Minimal, standard and full stores of one task."""

        def smallest(parameters: str) -> float:
            kinds = [("dense", "bfloat16"), ("factored", "float32")]
            return min(self.bytes_per_sample(parameters, *kind, tokens)["total"] for kind in kinds)

        full = snapshot_bytes(self.layout, self.parameters)["total"]
        moments = snapshot_bytes(self.layout, self.parameters, fisher_shape="groups")["total"]
        minimal = self.bytes_per_sample("attention", "groups", "", tokens)["total"]
        return {
            "accumulators": full,
            "minimal": samples * minimal + moments,
            "standard": samples * smallest("attention") + full,
            "full": samples * smallest("all") + full,
        }


def show(size: float) -> str:
    """Bytes in a unit that fits."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1000:.3g} kB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print Markdown."""
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print()


def encodings_table(models: Mapping[str, Shape], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Bytes per sample by model, parameters, tokens and encoding."""
    found = []
    for parameters in ("attention", "all"):
        rows = []
        for name, shape in models.items():
            for t in tokens:
                sizes = [shape.bytes_per_sample(parameters, *kind, t)["total"] for kind in ENCODINGS]
                rows.append([name, str(t), *map(show, sizes)])
                found.extend(
                    {
                        "model": name,
                        "parameters": parameters,
                        "tokens": t,
                        "encoding": " ".join(kind).strip(),
                        "bytes": size,
                    }
                    for kind, size in zip(ENCODINGS, sizes, strict=True)
                )
        print(
            f"One sample, gradients of {'attention' if parameters == 'attention' else 'all linear maps'}.\n"
        )
        heads = [f"{encoding} {dtype}".strip() for encoding, dtype in ENCODINGS]
        heads[3] = f"lowrank {RANK}, bfloat16"
        table(["model", "tokens", *heads], rows)
    return found


def presets_table(models: Mapping[str, Shape], samples: int, tokens: int) -> None:
    """What the presets of the documentation take."""
    rows = [[name, *map(show, shape.presets(samples, tokens).values())] for name, shape in models.items()]
    print(f"One task of {samples} samples of {tokens} tokens.\n")
    table(["model", "accumulators (memory)", "minimal", "standard", "full"], rows)


def demo_table() -> list[dict[str, Any]]:
    """Written over estimated bytes per sample, for the demo in every encoding."""
    model = AutoModelForCausalLM.from_pretrained(demo.model_path())
    scope = fs.wrap(model, AutoTokenizer.from_pretrained(demo.model_path()))
    found, rows = [], []
    for encoding, dtype in (*ENCODINGS, ("dense", "float16"), ("factored", "float16"), ("auto", "bfloat16")):
        options = {"encoding": encoding} | ({"dtype": dtype} if dtype else {})
        extensions = ("fisher", SampleGradients(**options))
        estimate = scope.estimate(demo.task_files(), extensions=extensions, measure=False)
        with tempfile.TemporaryDirectory() as scratch:
            store = scope.collect(
                demo.task_files(),
                Path(scratch) / "run.fs",
                extensions=extensions,
                quiet=True,
                durability="none",
            )
            shards = [
                segment.shard
                for ledger in store.ledgers
                for segments in ledger.segments.values()
                for segment in segments.values()
            ]
            data = sum(dataset.spec.nbytes for shard in shards for dataset in shard.datasets)
        expected = estimate.samples * estimate.bytes_per_sample
        ratios = {"data": data / expected, "files": sum(shard.nbytes for shard in shards) / expected}
        name = f"{encoding} {dtype}".strip()
        found.append({"encoding": name, **ratios})
        rows.append([name, show(estimate.bytes_per_sample), *(f"{ratio:.4f}" for ratio in ratios.values())])
    print("The demo, written: bytes over those estimated.\n")
    table(["encoding", "estimated per sample", "data / estimate", "files / estimate"], rows)
    return found


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--demo", action="store_true", help="write the demo in every encoding and compare")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    models = {name: Shape(config) for name, config in shapes()}
    result: dict[str, Any] = {"bytes": encodings_table(models, arguments.tokens)}
    presets_table(models, arguments.samples, 128)
    if arguments.demo:
        result["demo"] = demo_table()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
