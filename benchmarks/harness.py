"""What the benchmarks share: models, a batch, one instrumented pass, interleaved timing.

``Instrumented`` is the only place that knows the package's internals.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import fisherscope as fs
from fisherscope.instrument.batch import make_batch
from fisherscope.instrument.data import Sample
from fisherscope.instrument.emission import Emission
from fisherscope.instrument.extensions.base import Collector, Context
from fisherscope.instrument.extensions.group_values import GroupValues
from fisherscope.instrument.objectives import resolve_objective
from fisherscope.instrument.passes import BatchPass
from fisherscope.instrument.prepared import prepared
from fisherscope.layout import GroupTable
from fisherscope.linalg import Dense, Factored, RunningSum

VOCABULARY = 512


def qwen2(hidden: int, layers: int = 4, **changes: Any) -> PreTrainedModel:
    """A Qwen2 of random weights with grouped-query attention, in evaluation mode."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Qwen2ForCausalLM(Qwen2Config(**config | changes)).eval()


def gpt2(hidden: int, layers: int = 4, **changes: Any) -> PreTrainedModel:
    """A GPT-2 of random weights, in evaluation mode: Conv1D, learned positions, tied embeddings."""
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": hidden // 32,
        "n_positions": 256,
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(**config | changes)).eval()


def token_ids(n: int, length: int, *, vocabulary: int = VOCABULARY, seed: int = 1) -> list[list[int]]:
    """Random samples of equal length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (n, length), generator=generator).tolist()


def sample_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """The sum of each sample's token losses, ``[n]``."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return (
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        .view(len(ids), -1)
        .sum(1)
    )


def plain(model: nn.Module, ids: Tensor) -> None:
    """What training does: one batched forward and backward with weight gradients."""
    model.zero_grad(set_to_none=True)
    sample_losses(model, ids).sum().backward()


class Nothing(Collector):
    """Forward and activation gradients only."""

    def update(self, emission: Emission, segment: object, start: int) -> None:
        """Drop the factors."""
        del emission, segment, start


class Products(Collector):
    """The floor of anything exact: per-sample products are formed, and nothing is done with them."""

    def update(self, emission: Emission, segment: object, start: int) -> None:
        """Form every tile and drop it."""
        del segment, start
        if not isinstance(emission.gradient, Dense):
            for _ in emission.gradient.tiles():
                pass


class Squares(Collector):
    """F in the shape of the parameters, and nothing else; with ``mean``, the mean of h beside it."""

    def __init__(self, context: Context, *, mean: bool = False) -> None:
        self.square, self.total = (
            {n: RunningSum.zeros(*p.shape, device=p.device) for n, p in context.parameters.items() if wanted}
            for wanted in (True, mean)
        )

    def update(self, emission: Emission, segment: object, start: int) -> None:
        """Add up, in one pass over the gradients."""
        del segment, start
        name = emission.parameter
        emission.gradient.scaled(emission.factors).accumulate(
            square=self.square[name], total=self.total.get(name)
        )


class HeadNorms(Collector):
    """Sums of squares per sample and head, of the weights that have heads."""

    def update(self, emission: Emission, segment: object, start: int) -> None:
        """Reduce, and drop the result."""
        del segment, start
        partitions = [member.partition for member in emission.members if member.partition is not None]
        if isinstance(emission.gradient, Factored) and partitions:
            emission.gradient.scaled(emission.factors).norms(partitions)


class Instrumented:
    """A wrapped model and one batch.

    Attributes:
        scope: what ``fisherscope.wrap`` gave.
        context: what collectors may know.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Sequence[Sequence[int]],
        *,
        parameters: Any = "linear",
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.scope = fs.wrap(model, parameters=parameters)
        device = next(model.parameters()).device
        self._model = model
        chosen = set(self.scope.parameters)
        self.context = Context(
            layout=self.scope.layout,
            parameters={k: v for k, v in model.named_parameters() if k in chosen},
            groups=GroupTable.build(self.scope.layout, self.scope.parameters),
            normalization="per_token",
            device=device,
        )
        samples = [Sample(tuple(row), tuple(row), None) for row in ids]
        self._batch = make_batch("a", range(len(ids)), samples, pad_id=0, side="right", device=device)
        objective = resolve_objective("causal_lm", model)
        self._pass = BatchPass(model, self.scope._targets, objective, self.context, compute_dtype)

    def run(self, *collectors: Collector) -> None:
        """Feed the collectors from one pass over the batch."""
        with prepared(self._model):
            self._pass.run(self._batch, collectors)

    def collectors(self, *, full: bool) -> list[Collector]:
        """What ``scope.collect`` runs: group values always, F and the mean of h where ``full``."""
        groups = GroupValues(self.context)
        return [fs.Fisher().collector(self.context), groups] if full else [groups]


@dataclass(frozen=True)
class Ratio:
    """One variant of one setting, as a multiple of the plain pass.

    Attributes:
        ratio, low, high: median and quartiles of the ratios, each of two times of one repetition.
        best: the shortest time over the shortest plain time.
        seconds: median of the time itself.
    """

    setting: str
    variant: str
    ratio: float
    low: float
    high: float
    best: float
    seconds: float


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, in turn: a busy machine slows all alike. The first round is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begun = clock()
            function()
            if repeat:
                seconds[name].append(clock() - begun)
    return seconds


def ratios(
    setting: str, seconds: Mapping[str, list[float]], base: str, parts: Mapping[str, int] | None = None
) -> list[Ratio]:
    """Each variant's times over those of ``base``; ``parts`` says of how many batches a variant consists."""
    found = []
    for name, times in seconds.items():
        share = [t / (parts or {}).get(name, 1) for t in times]
        each = [t / b for t, b in zip(share, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        best = min(share) / min(seconds[base])
        found.append(Ratio(setting, name, middle, low, high, best, statistics.median(share)))
    return found


def show(rows: Sequence[Ratio]) -> None:
    """Print one setting."""
    print(f"\n{rows[0].setting}; {torch.get_num_threads()} threads; multiples of plain")
    print(f"  {'':<62} median  (quartiles)  best/best")
    for row in rows:
        spread = f"({row.low:.2f}-{row.high:.2f})"
        print(f"  {row.variant:<62} {row.ratio:6.2f}  {spread:<11}  {row.best:.2f}", flush=True)


def write(path: Path, rows: Sequence[Any], **facts: Any) -> None:
    """Results as JSON, with what they depend on."""
    about = {"threads": torch.get_num_threads(), "torch": torch.__version__, **facts}
    path.write_text(
        json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1), encoding="utf-8"
    )
