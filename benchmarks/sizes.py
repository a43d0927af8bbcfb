"""Memory, disk and compute of a collection for models of known shape; no weights are needed.

Compute is that of a plain forward and backward pass, 6 x parameters x tokens; ``benchmarks/collect.py``
measures which multiple of it a collection takes.

python benchmarks/sizes.py [--samples 1000] [--tokens 128]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from fisherscope.adapters import resolve
from fisherscope.instrument.data import Sample
from fisherscope.instrument.estimate import Estimate, estimate_bytes
from fisherscope.instrument.extensions import SampleGradients
from fisherscope.instrument.targets import select_targets


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


def estimates(config: PretrainedConfig, samples: int, tokens: int) -> dict[str, Estimate]:
    """Three presets: group values only, full-shape Fisher, and Fisher with attention gradients."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layout = resolve(model, verify=False)
    parameters = select_targets(model, layout, "linear").parameters
    ids = tuple(range(3, 3 + tokens))
    rows = {"task": [Sample(ids, ids, None)] * samples}
    attention = SampleGradients().chosen(layout, parameters)
    presets = {"minimal": (False, ()), "standard": (True, ()), "full": (True, attention)}
    return {
        name: estimate_bytes(
            layout,
            parameters,
            stored,
            gradient_dtype="bfloat16",
            full_fisher=full,
            samples=rows,
            store_text=False,
        )
        for name, (full, stored) in presets.items()
    }


def parameters(config: PretrainedConfig) -> int:
    """Number of parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def show(size: int) -> str:
    """Bytes in a unit that fits."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1000:.3g} kB"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    print(f"One task of {arguments.samples} samples of {arguments.tokens} tokens.\n")
    tokens = arguments.samples * arguments.tokens
    columns = [
        "accumulators (memory)",
        "group values",
        "+ full-shape Fisher",
        "+ attention gradients",
        "compute",
    ]
    print(f"| model | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for name, config in shapes():
        found = estimates(config, arguments.samples, arguments.tokens)
        cells = [show(found["standard"].accumulator_bytes)]
        cells += [show(found[preset].disk_bytes) for preset in ("minimal", "standard", "full")]
        cells.append(f"{6 * parameters(config) * tokens / 1e15:.2g} PFLOP")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
