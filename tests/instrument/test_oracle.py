"""Everything that a collection stores, against the literal loop over samples, on real models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fisherscope as fs
from tests import models

TOLERANCE = 1e-5
EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))


class PaddedBatches:
    """What a DataLoader yields: dicts of padded two-dimensional tensors."""

    def __init__(self, data: list[dict[str, list[int]]], side: str, size: int = 3) -> None:
        self._data, self._side, self._size = data, side, size

    def __iter__(self) -> Any:
        for start in range(0, len(self._data), self._size):
            chosen = self._data[start : start + self._size]
            width = max(len(row["input_ids"]) for row in chosen)
            batch = {
                "input_ids": torch.zeros(len(chosen), width, dtype=torch.long),
                "labels": torch.full((len(chosen), width), -100),
                "attention_mask": torch.zeros(len(chosen), width, dtype=torch.long),
            }
            for i, row in enumerate(chosen):
                n = len(row["input_ids"])
                span = slice(0, n) if self._side == "right" else slice(width - n, width)
                batch["input_ids"][i, span] = torch.tensor(row["input_ids"])
                batch["labels"][i, span] = torch.tensor(row["labels"])
                batch["attention_mask"][i, span] = 1
            yield batch


@dataclass(frozen=True)
class Oracle:
    """A model with its rows, and what the loop finds of each."""

    name: str
    model: torch.nn.Module
    data: list[dict[str, list[int]]]
    expected: list[dict[str, torch.Tensor]]

    @property
    def counts(self) -> torch.Tensor:
        """T of each row."""
        return torch.tensor([models.tokens(row) for row in self.data])

    def collect(
        self, out: Path, tokenizer: Any = None, *, parameters: Any = None, **options: Any
    ) -> Collected:
        """What a collection of batches with padding stores."""
        named = {} if parameters is None else {"parameters": parameters}
        scope = fs.wrap(self.model, tokenizer, **named)
        store = scope.collect({"a": self.data}, out / "run.fs", batch_size=4, quiet=True, **options)
        return Collected(scope, store)


@dataclass(frozen=True)
class Collected:
    """A collection and the scope that it was made with."""

    scope: fs.Scope
    store: fs.ContributionStore


@pytest.fixture(scope="module", params=models.SETTINGS, ids=lambda s: s.name)
def oracle(request: pytest.FixtureRequest) -> Oracle:
    """Built once for all tests of a setting, which only look at it."""
    model, data = models.build(request.param), models.rows(7)
    return Oracle(request.param.name, model, data, models.loop(model, data))


@pytest.fixture(scope="module")
def everything(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Gradients of every parameter, padded on the right."""
    if oracle.name == "qwen3_next":
        models.skip_where_old("its linear attention gives a sample something else beside padding")
    out = tmp_path_factory.mktemp("everything")
    return oracle.collect(out, parameters="all", extensions=EXACT)


@pytest.fixture(scope="module")
def padded_on_the_left(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """Gradients of the parameters that are taken by default, padded on the left."""
    return oracle.collect(tmp_path_factory.mktemp("left"), models.PadsOnTheLeft(), extensions=EXACT)


@pytest.fixture(scope="module")
def reduced(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    """F and group values alone, for which no gradient is formed where its factors do."""
    return oracle.collect(tmp_path_factory.mktemp("reduced"), extensions=("fisher",))


def test_every_parameter_equals_the_loop(oracle: Oracle, everything: Collected) -> None:
    """Embeddings (tied, scaled, of positions), norms (of heads, too), experts, routers and sinks, too."""
    model, expected, counts = oracle.model, oracle.expected, oracle.counts
    scope, store = everything.scope, everything.store
    assert scope.coverage()["covered"].all()
    largest = max(float(g.abs().max()) for sample in expected for g in sample.values())
    for name in scope.parameters:
        zero = torch.zeros(model.get_parameter(name).shape)
        g = torch.stack([sample.get(name, zero) for sample in expected])
        floor = max(_rounding(model, name, expected, ""), 1e-4 * largest)
        # decays of linear attention are exponentials of sums over padded chunks: autograd is no better
        tolerance = 10 * TOLERANCE if "linear_attn" in name else TOLERANCE
        assert models.relative_error(store.gradients("a", name), g, floor=floor) <= tolerance, name
        h = g / counts.view(-1, *(1,) * (g.dim() - 1)).sqrt()
        error = models.relative_error(store.fisher("a", name), h.square().mean(0), floor=floor**2)
        assert error <= tolerance, name


@pytest.mark.parametrize("side", ["right", "left"])
def test_gradients_and_fisher_equal_the_loop(
    oracle: Oracle, side: str, everything: Collected, padded_on_the_left: Collected
) -> None:
    """Per-sample gradients, F and mean h of what is taken by default, padded on either side."""
    expected, counts = oracle.expected, oracle.counts
    store = (padded_on_the_left if side == "left" else everything).store
    assert list(store.samples("a")["tokens"]) == counts.tolist()
    for name in padded_on_the_left.scope.parameters:
        g = torch.stack([sample[name] for sample in expected])
        h = g * counts.rsqrt().view(-1, *(1,) * (g.dim() - 1))
        floor = _rounding(oracle.model, name, expected)
        assert models.relative_error(store.gradients("a", name), g, floor=floor) <= TOLERANCE, name
        fisher = h.square().mean(0)
        assert models.relative_error(store.fisher("a", name), fisher, floor=floor**2) <= TOLERANCE, name
        assert models.relative_error(store.mean("a", name), h.mean(0), floor=floor) <= TOLERANCE, name


def _rounding(
    model: torch.nn.Module, name: str, gradients: list[dict[str, torch.Tensor]], block: str = ""
) -> float:
    """What an error is compared with where the true gradient is zero, else 0.

    Without rotary positions a key's bias adds one number to all scores of a query, which the softmax
    does not see: its gradient is rounding, and is measured against that of the key's weight.
    """
    vanishes = name.endswith("k_proj.bias") or (block == "K" and name.endswith(".bias"))
    if not vanishes or model.config.model_type not in {"gpt2", "opt", "bloom"}:
        return 0.0
    weight = name.removesuffix("bias") + "weight"
    return max(float(sample[weight].abs().max()) for sample in gradients)


def test_head_slices_equal_slices_by_hand(oracle: Oracle, everything: Collected) -> None:
    """Every head's Q, K, V and O slice, weight and bias, against the loop's gradients cut by hand."""
    model, expected, store = oracle.model, oracle.expected, everything.store
    layers = [0, 2] if oracle.name == "qwen3_next" else [0, 1]
    for layer in layers:
        for block, heads in _heads_by_hand(model, oracle.name, layer).items():
            for head, cuts in enumerate(heads):
                for part, (name, axis, start, stop) in cuts.items():
                    g = torch.stack([sample[name] for sample in expected])
                    by_hand = g.narrow(axis + 1, start, stop - start).flatten(1)
                    found = store.slice("a", layer=layer, block=block, head=head, part=part)
                    error = models.relative_error(
                        found, by_hand, floor=_rounding(model, name, expected, block)
                    )
                    assert error <= TOLERANCE, (layer, block, head, part)


# where each family keeps its projections: layers, fused or separate projections, output
_PLACES = {
    "gpt2": ("transformer.h", "attn.c_attn", "attn.c_proj"),
    "gpt_neo": ("transformer.h", "attn.attention.{q,k,v}_proj", "attn.attention.out_proj"),
    "gptj": ("transformer.h", "attn.{q,k,v}_proj", "attn.out_proj"),
    "opt": ("model.decoder.layers", "self_attn.{q,k,v}_proj", "self_attn.out_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.query_key_value", "attention.dense"),
    "bloom": ("transformer.h", "self_attention.query_key_value", "self_attention.dense"),
    "falcon": ("transformer.h", "self_attention.query_key_value", "self_attention.dense"),
    "mpt": ("transformer.blocks", "attn.Wqkv", "attn.out_proj"),
    "codegen": ("transformer.h", "attn.qkv_proj", "attn.out_proj"),
    "phi": ("model.layers", "self_attn.{q,k,v}_proj", "self_attn.dense"),
    "phi3": ("model.layers", "self_attn.qkv_proj", "self_attn.o_proj"),
}
_ELSEWHERE = ("model.layers", "self_attn.{q,k,v}_proj", "self_attn.o_proj")

# the rows of a fused projection in units of one head, written out for the tiny models of tests/models.py
_FUSED_ROWS = {
    "gpt2": "q0 q1 q2 q3 k0 k1 k2 k3 v0 v1 v2 v3",
    "mpt": "q0 q1 q2 q3 k0 k1 k2 k3 v0 v1 v2 v3",
    "phi3": "q0 q1 q2 q3 k0 k1 v0 v1",
    "gpt_neox": "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3",
    "bloom": "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3",
    "falcon-mqa": "q0 q1 q2 q3 k0 v0",
    "falcon-mha-alibi": "q0 k0 v0 q1 k1 v1 q2 k2 v2 q3 k3 v3",
    "falcon-new-decoder": "q0 q1 k0 v0 q2 q3 k1 v1",
    "codegen": "q0 q1 v0 v1 k0 k1 q2 q3 v2 v3 k2 k3 q4 q5 v4 v5 k4 k5 q6 q7 v6 v7 k6 k7",
}
_KV_HEADS = {"qwen2-tied-mqa": 1, "gpt_neo": 4, "gptj": 4, "opt": 4}

# heads that lie apart: block -> projection, heads, first row of head 0, rows of a head, rows to the next head
_LATENT = {"K": ("kv_b_proj", 4, 0, 6, 16), "V": ("kv_b_proj", 4, 6, 10, 16)}
_APART = {
    "qwen3_next": {
        "Q": ("q_proj", 4, 0, 8, 16),
        "gate": ("q_proj", 4, 8, 8, 16),
        "K": ("k_proj", 2, 0, 8, 8),
        "V": ("v_proj", 2, 0, 8, 8),
    },
    "deepseek_v3": {"Q": ("q_b_proj", 4, 0, 10, 10), **_LATENT},
    "deepseek_v3-direct-queries": {"Q": ("q_proj", 4, 0, 10, 10), **_LATENT},
}


def _heads_by_hand(
    model: torch.nn.Module, setting: str, layer: int
) -> dict[str, list[dict[str, tuple[str, int, int, int]]]]:
    """Block -> head -> part -> (parameter, axis, start, stop), written down without any adapter."""
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layers, projections, output = _PLACES.get(model.config.model_type, _ELSEWHERE)
    transposed = int(model.config.model_type == "gpt2")
    heads = 8 if setting == "codegen" else 4
    kv_heads = _KV_HEADS.get(setting, 2)  # of separate projections
    blocks: dict[str, list[dict[str, tuple[str, int, int, int]]]] = {}
    for block, (projection, count, first, width, step) in _APART.get(setting, {}).items():
        name = f"{layers}.{layer}.self_attn.{projection}.weight"
        starts = range(first, first + count * step, step)
        blocks[block] = [{"weight": (name, 0, start, start + width)} for start in starts]
    for block, count in () if blocks else (("Q", heads), ("K", kv_heads), ("V", kv_heads)):
        where = f"{layers}.{layer}.{projections.replace('{q,k,v}', block.lower())}"
        if setting in _FUSED_ROWS:
            rows = _FUSED_ROWS[setting].split()
            order = [i for _, i in sorted((row, i) for i, row in enumerate(rows) if row[0] == block.lower())]
            d = names[f"{where}.weight"][transposed] // len(rows)
        else:
            order = list(range(count))
            d = names[f"{where}.weight"][0] // count
        blocks[block] = [{"weight": (f"{where}.weight", transposed, k * d, k * d + d)} for k in order]
        if f"{where}.bias" in names:
            for cuts, k in zip(blocks[block], order, strict=True):
                cuts["bias"] = (f"{where}.bias", 0, k * d, k * d + d)
    weight = f"{layers}.{layer}.{output}.weight"
    d = names[weight][1 - transposed] // heads
    blocks["O"] = [{"weight": (weight, 1 - transposed, k * d, k * d + d)} for k in range(heads)]
    return blocks


def test_group_values_equal_sums_over_gradients(oracle: Oracle, reduced: Collected) -> None:
    """sum g^2 and <g, theta> per sample and group: heads, channels, rows and whole parameters."""
    model, expected, scope, store = oracle.model, oracle.expected, reduced.scope, reduced.store
    values = store.group_values("a")
    theta = {name: p.detach() for name, p in model.named_parameters()}
    groups = store.groups("a")
    for column, group in groups[groups["kind"] != "channel"].iterrows():
        name = group["parameter"]
        g = torch.stack([sample[name] for sample in expected])
        weights = theta[name]
        floor = _rounding(model, name, expected, group["block"])
        if group["kind"] == "head":
            piece = scope.layout.slice(group["layer"], group["block"], group["index"], part=group["part"])
            g, weights = piece.take(g), piece.take(weights)
        elif group["kind"] == "row":
            row = slice(group["index"], group["index"] + 1)
            # a single row may carry next to nothing of its parameter's gradient
            floor = 1e-2 * float(g.flatten(1).norm(dim=1).max())
            g, weights = g[:, row], weights[row]
        square = g.flatten(1).square().sum(1)
        dot = (g * weights).flatten(1).sum(1)
        found = torch.tensor(values["square"].values[:, column])
        assert models.relative_error(found, square, floor=floor**2) <= TOLERANCE
        # relative to |g| |theta|: the product itself vanishes where a norm makes the weight's scale idle
        scale = square.sqrt().clamp_min(floor) * weights.norm()
        error = (torch.tensor(values["dot"].values[:, column]) - dot).abs() / scale
        assert float(error.max()) <= TOLERANCE
    if not scope.layout.mlps:
        return
    mlp = scope.layout.mlps[-1]
    channels = groups[
        (groups["kind"] == "channel") & (groups["layer"] == mlp.layer) & (groups["part"] == "weight")
    ]
    for column, group in channels.iterrows():
        pieces = [
            p[group["index"]].take(torch.stack([s[p.parameter] for s in expected])) for p in mlp.weights
        ]
        square = sum(piece.flatten(1).square().sum(1) for piece in pieces)
        assert models.relative_error(torch.tensor(values["square"].values[:, column]), square) <= TOLERANCE


def test_losses_are_sums_of_token_losses(oracle: Oracle, reduced: Collected) -> None:
    """L_i is the sum of the sample's token losses, in nats."""
    for row, loss in zip(oracle.data, reduced.store.samples("a")["loss"], strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = oracle.model(input_ids=ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"])[1:], ignore_index=-100, reduction="sum"
        )
        assert loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_a_dataloader(side: str, tmp_path: Path) -> None:
    """Tensors padded on either side give what the unpadded rows give."""
    model = models.build(models.named("qwen2"))
    data = models.rows(7)
    scope = fs.wrap(model)
    plain = scope.collect({"a": data}, tmp_path / "plain.fs", extensions=EXACT, quiet=True)
    padded = scope.collect(
        {"a": PaddedBatches(data, side)}, tmp_path / "padded.fs", extensions=EXACT, quiet=True
    )
    assert list(plain.samples("a")["key"]) == list(padded.samples("a")["key"])
    for name in scope.parameters:
        assert torch.equal(plain.gradients("a", name), padded.gradients("a", name))


def test_fisher_is_the_mean_square_and_not_the_squared_mean(tmp_path: Path) -> None:
    """F - (E h)^2 is exactly the population variance of h, and it is not zero."""
    model = models.build(models.named("qwen2"))
    scope = fs.wrap(model, parameters="attention")
    store = scope.collect({"a": models.rows(9)}, tmp_path / "run.fs", extensions=EXACT, quiet=True)
    counts = torch.tensor(store.samples("a")["tokens"].to_numpy())
    for name in scope.parameters:
        g = store.gradients("a", name).double()
        h = g * counts.double().rsqrt().view(-1, *(1,) * (g.dim() - 1))
        fisher, signal = store.fisher("a", name).double(), store.mean("a", name).double().square()
        noise = h.var(0, correction=0)
        assert models.relative_error(fisher - signal, noise) <= 1e-5
        assert float(noise.sum()) > 0.05 * float(fisher.sum())


@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_results_do_not_depend_on_the_batch(batch_size: int, tmp_path: Path) -> None:
    """Another batch size changes nothing beyond rounding."""
    model = models.build(models.named("llama"))
    data = models.rows(9)
    scope = fs.wrap(model)
    one = scope.collect({"a": data}, tmp_path / "auto.fs", extensions=EXACT, quiet=True)
    other = scope.collect(
        {"a": data}, tmp_path / "other.fs", extensions=EXACT, batch_size=batch_size, quiet=True
    )
    for name in scope.parameters:
        assert models.relative_error(other.gradients("a", name), one.gradients("a", name)) <= TOLERANCE
        assert models.relative_error(other.fisher("a", name), one.fisher("a", name)) <= TOLERANCE


def test_results_do_not_depend_on_the_order(tmp_path: Path) -> None:
    """Rows in reverse order give the same gradients in reverse order, and the same F."""
    model = models.build(models.named("gpt2"))
    data = models.rows(8)
    scope = fs.wrap(model)
    forth = scope.collect({"a": data}, tmp_path / "forth.fs", extensions=EXACT, batch_size=3, quiet=True)
    back = scope.collect({"a": data[::-1]}, tmp_path / "back.fs", extensions=EXACT, batch_size=3, quiet=True)
    for name in scope.parameters:
        assert (
            models.relative_error(back.gradients("a", name).flip(0), forth.gradients("a", name)) <= TOLERANCE
        )
        assert models.relative_error(back.fisher("a", name), forth.fisher("a", name)) <= TOLERANCE


@pytest.mark.parametrize("normalization", ["none", "mean"])
def test_normalizations(normalization: str, tmp_path: Path) -> None:
    """h is g, or g / T."""
    model = models.build(models.named("qwen2"))
    data = models.rows(6)
    scope = fs.wrap(model, parameters="attention")
    extensions = (fs.Fisher(normalization=normalization), fs.SampleGradients(dtype="float32"))
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=extensions, quiet=True)
    counts = torch.tensor([models.tokens(row) for row in data]).float()
    for name in scope.parameters:
        g = store.gradients("a", name)
        h = g if normalization == "none" else g / counts.view(-1, *(1,) * (g.dim() - 1))
        assert models.relative_error(store.fisher("a", name), h.square().mean(0)) <= TOLERANCE


def test_a_module_called_twice_adds_its_uses_before_squaring(tmp_path: Path) -> None:
    """The gradient of a parameter that is used twice is the sum over both uses."""
    model = models.build(models.named("llama"))
    down = model.model.layers[0].mlp.down_proj
    scope = fs.wrap(model, parameters=["model.layers.0.mlp.down_proj.weight"])
    # calling the same module object twice: its forward calls itself on half of the input
    calls = {"inner": False}

    class Reentrant(type(down)):  # type: ignore[misc]
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            if calls["inner"]:
                return super().__call__(x)
            calls["inner"] = True
            try:
                return super().__call__(x) + super().__call__(0.5 * x).tanh()
            finally:
                calls["inner"] = False

    down.__class__ = Reentrant
    data = models.rows(5)
    store = scope.collect(
        {"a": data},
        tmp_path / "run.fs",
        extensions=(fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32")),
        quiet=True,
    )
    name = "model.layers.0.mlp.down_proj.weight"
    g = torch.stack([sample[name] for sample in models.loop(model, data)])
    assert models.relative_error(store.gradients("a", name), g) <= TOLERANCE
