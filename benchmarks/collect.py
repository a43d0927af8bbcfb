"""Collection against a plain forward+backward, the loop over samples, and the floor; ratios from one run.

Each setting is a 4-layer Qwen2 model of random weights. All variants of a setting run interleaved, so that a
busy machine slows them alike; printed are medians (and the interquartile range) as multiples of a plain
batched forward and backward pass with weight gradients.

    python benchmarks/collect.py [--repeats 7] [--setting 256,32,64] [--json results.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

import fisherscope as fs
from fisherscope.instrument.batch import Batch, make_batch
from fisherscope.instrument.data import Sample
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.hooks import prepared
from fisherscope.instrument.objectives import causal_lm
from fisherscope.instrument.passes import BatchPass
from fisherscope.layout import GroupTable
from fisherscope.linalg import Factored

SETTINGS = [(256, 32, 64), (256, 128, 32), (512, 32, 64)]
VOCABULARY = 512
BATCHES = 4
COLLECT = f"collect() of {BATCHES} batches to disk, fisher full"


def build(hidden: int) -> Qwen2ForCausalLM:
    """A 4-layer Qwen2 of random weights with grouped-query attention."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen2ForCausalLM(config).eval()


class Products(Collector):
    """The floor of anything exact: per-sample products are formed, and nothing is done with them."""

    def update(self, emission: Emission, segment: object, start: int) -> None:
        """Form every tile and drop it."""
        del segment, start
        gradient = emission.gradient
        if isinstance(gradient, Factored):
            for _ in gradient.tiles():
                pass


class Nothing(Collector):
    """Forward and activation gradients only."""

    def update(self, emission: Emission, segment: object, start: int) -> None:
        """Drop the factors."""
        del emission, segment, start


def plain(model: nn.Module, batch: Batch) -> None:
    """What training does: one batched forward and backward with weight gradients."""
    model.zero_grad(set_to_none=True)
    causal_lm(model, batch).sum().backward()


def loop(model: nn.Module, batch: Batch, names: list[str]) -> None:
    """One sample at a time, squares added up."""
    parameters = dict(model.named_parameters())
    squares = {name: torch.zeros_like(parameters[name]) for name in names}
    for i in range(len(batch)):
        model.zero_grad(set_to_none=True)
        logits = model(input_ids=batch.input_ids[i : i + 1], use_cache=False).logits[0, :-1]
        F.cross_entropy(logits.float(), batch.labels[i, 1:], reduction="sum").backward()
        for name in names:
            gradient = parameters[name].grad
            squares[name].addcmul_(gradient, gradient, value=1 / (logits.shape[0]))


def variants(hidden: int, n: int, length: int, scratch: Path) -> dict[str, Callable[[], None]]:
    """The timed functions of one setting, by name."""
    model = build(hidden)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (n, length), generator=generator).tolist()
    samples = [Sample(tuple(row), tuple(row), None) for row in ids]
    scope = fs.wrap(model)
    batch = make_batch("a", range(n), samples, pad_id=0, side="right", device=torch.device("cpu"))
    context = Context(
        layout=scope.layout,
        parameters={k: v for k, v in model.named_parameters() if k in set(scope.parameters)},
        groups=GroupTable.build(scope.layout, scope.parameters),
        normalization="per_token",
        device=torch.device("cpu"),
    )
    full = [fs.Fisher().collector(context), GroupValues(context)]
    groups = [GroupValues(context)]
    engine = BatchPass(model, scope._targets, causal_lm, context, torch.float32)
    more = torch.randint(3, VOCABULARY, (BATCHES * n, length), generator=generator).tolist()
    rows = [{"input_ids": row} for row in more]
    count = iter(range(10**6))

    def instrumented(collectors: list[Collector]) -> None:
        with prepared(model):
            engine.run(batch, collectors)

    def collect(extensions: tuple[str | fs.Fisher, ...]) -> None:
        out = scratch / f"{next(count)}.fs"
        scope.collect({"a": rows}, out, extensions=extensions, batch_size=n, durability="none", quiet=True)

    return {
        "plain": lambda: plain(model, batch),
        "loop": lambda: loop(model, batch, list(scope.parameters)),
        "forward + activation gradients": lambda: instrumented([Nothing()]),
        "floor: + per-sample products": lambda: instrumented([Products()]),
        "fisher full + group values": lambda: instrumented(full),
        "group values only": lambda: instrumented(groups),
        COLLECT: lambda: collect(("fisher",)),
        f"{COLLECT}, attention gradients": lambda: collect(("fisher", "sample_gradients")),
    }


def measure(functions: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, interleaved; one warm-up round is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if repeat:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--setting", action="append", help="hidden,N,T; may be given several times")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = [tuple(map(int, s.split(","))) for s in arguments.setting or []] or SETTINGS
    results = []
    for hidden, n, length in settings:
        with tempfile.TemporaryDirectory() as scratch:
            seconds = measure(variants(hidden, n, length, Path(scratch)), arguments.repeats)
        print(
            f"\nhidden {hidden}, {n} samples of {length} tokens, {torch.get_num_threads()} threads; x plain"
        )
        for name, times in seconds.items():
            batches = BATCHES if name.startswith("collect") else 1
            ratios = [t / p / batches for t, p in zip(times, seconds["plain"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            print(f"  {name:<62} {middle:5.2f}  ({low:.2f}-{high:.2f})")
            results.append(
                {
                    "hidden": hidden,
                    "n": n,
                    "T": length,
                    "variant": name,
                    "ratio": middle,
                    "low": low,
                    "high": high,
                }
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
