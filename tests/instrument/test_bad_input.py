"""Bad input: each a clear error that names the thing and the next step, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fisherscope as fs
from fisherscope.errors import (
    AdapterError,
    CoupledSamplesError,
    CoverageError,
    DataError,
    FingerprintError,
    FisherscopeError,
    NonFiniteError,
    StoreFormatError,
    StoreFullError,
    UsageError,
)
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import CAUSAL_LM
from tests import models

SETTING = next(s for s in models.SETTINGS if s.name == "qwen2")


@pytest.fixture
def model() -> torch.nn.Module:
    return models.build(SETTING)


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """An output directory that must not exist after the test."""
    path = tmp_path / "run.fs"
    yield path
    assert not path.exists()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "no tasks"),
        ({"a": []}, "'a'.*(empty|no rows|no samples)"),
        ({"a": [{"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}]}, "a_0|'a'"),
        ({"a": [{"input_ids": [3, 4, models.VOCABULARY]}]}, "vocabulary"),
        ({"a": [{"input_ids": [3, -4, 5]}]}, "-4"),
        ({"a": [{"input_ids": [3, 4, 5], "labels": [3, 4]}]}, "label"),
        ({"a": [{"question": "x"}]}, "question"),
        ({"a": ["text without a tokenizer"]}, "tokenizer"),
        ({"a b": [{"input_ids": [3, 4]}]}, "not a task name"),
    ],
)
def test_data(model: torch.nn.Module, out: Path, tasks: dict[str, Any], message: str) -> None:
    """Each malformed task is named before anything is written."""
    with pytest.raises(DataError, match=message):
        fs.wrap(model).collect(tasks, out, quiet=True)


def test_a_bad_line_of_a_jsonl_file(model: torch.nn.Module, out: Path, tmp_path: Path) -> None:
    """File and line number."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"input_ids": [3, 4, 5]}) + "\n{oops\n")
    with pytest.raises(DataError, match=r"rows\.jsonl.*2"):
        fs.wrap(model).collect({"a": file}, out, quiet=True)


def test_a_row_longer_than_the_learned_positions(out: Path) -> None:
    """GPT-2 has 64 positions here: the row is named, and nothing is run."""
    gpt2 = models.build(models.named("gpt2"))
    with pytest.raises(DataError, match=r"a_0.*64"):
        fs.wrap(gpt2).collect({"a": [{"input_ids": [5] * 65}]}, out, quiet=True)


def test_non_finite_weights(model: torch.nn.Module, out: Path) -> None:
    """The parameter is named."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        fs.wrap(model).collect({"a": models.rows(3)}, out, quiet=True)


def test_non_finite_loss_names_sample_and_layer(model: torch.nn.Module, out: Path) -> None:
    """A token whose embedding overflows the model is traced to its sample and to the first bad module."""
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = 3e38
        model.model.layers[0].input_layernorm.weight.fill_(3e38)
    good = [{"input_ids": [3, 4, 5, 6]}]
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.fill_(1.0)
    rows = [*good, {"input_ids": [3, 7, 5, 6]}]
    with pytest.raises(NonFiniteError, match=r"a_1.*model\.layers\.0"):
        fs.wrap(model).collect({"a": rows}, out, quiet=True)


def test_a_single_sample_warns(model: torch.nn.Module, tmp_path: Path) -> None:
    """Variance is undefined for one sample: a warning, not an error."""
    with pytest.warns(UserWarning, match="'a' has a single sample.*variance"):
        store = fs.wrap(model).collect({"a": models.rows(1)}, tmp_path / "run.fs", quiet=True)
    assert store.n("a") == 1


def test_a_store_of_another_format_version(model: torch.nn.Module, tmp_path: Path) -> None:
    """Refused for reading and for writing."""
    path = tmp_path / "run.fs"
    fs.wrap(model).collect({"a": models.rows(3)}, path, quiet=True)
    header = json.loads((path / "store.json").read_text())
    header["format_version"] = 99
    (path / "store.json").write_text(json.dumps(header))
    with pytest.raises(StoreFormatError, match="99"):
        fs.open_store(path)
    with pytest.raises(StoreFormatError, match="99"):
        fs.wrap(model).collect({"a": models.rows(3)}, path, quiet=True)


def test_a_disk_that_is_too_small(model: torch.nn.Module, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is compared with what is free before anything is written."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10, used=9, free=1))
    with pytest.raises(StoreFullError, match=r"1 are free.*groups"):
        fs.wrap(model).collect({"a": models.rows(3)}, out, quiet=True)


def test_patterns_that_match_nothing(model: torch.nn.Module) -> None:
    """The error says where the names are listed."""
    with pytest.raises(CoverageError, match="coverage"):
        fs.wrap(model, parameters=["nothing.*"])
    model.model.norm = Mixing(32)
    with pytest.raises(CoverageError, match="no rule for Mixing"):
        fs.wrap(model, parameters=["model.norm.*"])
    with pytest.raises(ValueError, match="'linaer'"):
        fs.wrap(model, parameters="linaer")


class Mixing(torch.nn.Module):
    """A layer that gives each sample something of the others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x - x.mean(0, keepdim=True))


def test_a_parameter_without_a_rule_is_listed_with_a_warning(model: torch.nn.Module) -> None:
    """Never dropped silently: nothing is known of a layer that cannot be run for one sample alone."""
    model.model.norm = Mixing(32)
    with pytest.warns(UserWarning, match="not instrumented"):
        scope = fs.wrap(model, parameters="all")
    coverage = scope.coverage().set_index("parameter")
    assert coverage.loc["model.norm.weight", "reason"] == "no rule for Mixing"
    assert coverage["covered"].sum() == len(coverage) - 1
    assert coverage.loc["model.layers.0.self_attn.q_proj.weight", "covered"]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": "many"},
        {"max_length": 0},
        {"max_samples": -1},
        {"compute_dtype": "float16"},
        {"durability": "eternal"},
        {"extensions": ("fisher", "fisher")},
        {"extensions": ("hessian",)},
        {"objective": "ranking"},
    ],
    ids=str,
)
def test_options_are_validated(model: torch.nn.Module, out: Path, options: dict[str, Any]) -> None:
    """Before anything is written."""
    with pytest.raises(ValueError, match=r"\w"):
        fs.wrap(model).collect({"a": models.rows(3)}, out, quiet=True, **options)


def test_extension_options_are_validated() -> None:
    """Each with the values that are possible."""
    with pytest.raises(ValueError, match="'full' or 'groups'"):
        fs.Fisher(shape="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="per_token"):
        fs.Fisher(normalization="tokens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bfloat16"):
        fs.SampleGradients(dtype="float64")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'auto', 'dense', 'factored', 'lowrank', 'groups'"):
        fs.SampleGradients(encoding="sparse")  # type: ignore[arg-type]
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match=r"rank=.*from 1 to"):
            fs.SampleGradients(rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positive number or None"):
        fs.SampleGradients(max_samples=0)
    with pytest.raises(ValueError, match="attention"):
        fs.SampleGradients(parameters="heads")


def test_an_objective_that_averages_over_the_batch(model: torch.nn.Module, out: Path) -> None:
    """One loss per sample is asked for."""

    def mean_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return CAUSAL_LM.losses(model, batch).mean()

    with pytest.raises(FisherscopeError, match="one loss per sample"):
        fs.wrap(model).collect({"a": models.rows(3)}, out, objective=mean_loss, quiet=True)


def test_samples_that_influence_each_other(model: torch.nn.Module, out: Path) -> None:
    """A loss that couples the samples of a batch is found and refused."""

    def coupled(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        losses = CAUSAL_LM.losses(model, batch)
        return losses * losses.mean()

    with pytest.raises(CoupledSamplesError, match="a_"):
        fs.wrap(model).collect({"a": models.rows(6)}, out, objective=coupled, quiet=True)


def test_an_offloaded_model_is_refused(model: torch.nn.Module) -> None:
    """Parameters without data have no gradients."""
    with pytest.raises(AdapterError, match="offloaded"):
        fs.wrap(model.to("meta"))


def test_the_model_is_left_as_it_was(model: torch.nn.Module, tmp_path: Path) -> None:
    """Modes, requires_grad, .grad, other people's hooks and the random state, also after an exception."""
    model.train()
    model.model.layers[0].mlp.eval()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    calls: list[int] = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()

    def explode(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        CAUSAL_LM.losses(model, batch)
        torch.randn(3)
        raise RuntimeError("the user's own")

    scope = fs.wrap(model)
    with pytest.raises(RuntimeError, match="the user's own"):
        scope.collect({"a": models.rows(3)}, tmp_path / "fails.fs", objective=explode, quiet=True)
    scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "lm_head.weight")
    assert all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert len(model.model.layers[0].self_attn.q_proj._forward_hooks) == 1
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1
    assert calls
    handle.remove()


def test_position_ids_that_ignore_padding_are_found(out: Path) -> None:
    """The check takes the batch with the most padding: left pads with positions from 0 couple samples."""
    model = models.build(models.named("gpt2"))

    def careless(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        positions = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
        return CAUSAL_LM.losses(model, replace(batch, position_ids=positions))

    data = [{"input_ids": list(range(3, 3 + n))} for n in (5, 5, 5, 5, 6, 9, 12, 20)]
    with pytest.raises(CoupledSamplesError, match="position ids"):
        fs.wrap(model, models.PadsOnTheLeft()).collect(
            {"a": data}, out, objective=careless, batch_size=4, quiet=True
        )


def test_an_objective_of_ones_own_is_known_by_its_code(model: torch.nn.Module, tmp_path: Path) -> None:
    """Another loss under the same name is another run; the same one resumes."""

    def scaled(factor: float) -> Any:
        return lambda model, batch: factor * CAUSAL_LM.losses(model, batch)

    scope, data = fs.wrap(model), {"a": models.rows(3)}
    scope.collect(data, tmp_path / "run.fs", objective=scaled(1.0), quiet=True)
    scope.collect(data, tmp_path / "run.fs", objective=scaled(1.0), quiet=True)
    with pytest.raises(FingerprintError, match="objective"):
        scope.collect(data, tmp_path / "run.fs", objective=scaled(100.0), quiet=True)


@pytest.mark.parametrize("compute", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "float16", "float64"])
def test_every_pair_of_dtypes(weights: str, compute: str, tmp_path: Path) -> None:
    """Gradients are those of the loop in float64, as far as the coarser of the two dtypes reaches."""
    model = models.build(SETTING).to(getattr(torch, weights))
    data = models.rows(4)
    store = fs.wrap(model, parameters="attention").collect(
        {"a": data},
        tmp_path / "run.fs",
        extensions=(fs.SampleGradients(dtype="float32"),),
        compute_dtype=compute,
        quiet=True,
    )
    expected = models.loop(model.double(), data)
    tolerance = 0.15 if {"bfloat16", "float16"} & {weights, compute} else 1e-5
    for name in store.gradient_parameters:
        g = torch.stack([sample[name] for sample in expected])
        error = (store.gradients("a", name).double() - g).norm() / g.norm()
        assert float(error) <= tolerance or float(g.norm()) < 1e-4, (name, float(error))


def test_inside_inference_mode(model: torch.nn.Module, tmp_path: Path) -> None:
    """A notebook cell under inference_mode collects like any other."""
    with torch.inference_mode():
        store = fs.wrap(model).collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)
    assert store.is_complete("a")


def test_a_weight_that_is_used_around_its_layer_is_found(model: torch.nn.Module, tmp_path: Path) -> None:
    """The hooks' gradients of one sample are compared with an ordinary backward pass first."""
    projection = model.model.layers[1].mlp.down_proj

    def around(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return CAUSAL_LM.losses(model, batch) + projection.weight.square().sum()

    out = tmp_path / "run.fs"
    with pytest.raises(CoverageError, match=r"model\.layers\.1\.mlp\.down_proj.*not what autograd finds"):
        fs.wrap(model, parameters="linear").collect({"a": models.rows(3)}, out, objective=around, quiet=True)
    assert not out.exists()
    chosen = fs.wrap(model, parameters="attention")
    chosen.collect({"a": models.rows(3)}, out, objective=around, quiet=True)


def test_an_objective_that_returns_nothing(tmp_path: Path) -> None:
    """It is named, with what it must return."""

    def forgetful(_model: Any, _batch: Any) -> None:
        return None

    scope = fs.wrap(models.build(models.named("llama")))
    with pytest.raises(FisherscopeError, match=r"forgetful' returned None: it must return .*\[n\]"):
        scope.collect({"a": models.rows(3)}, tmp_path / "run.fs", objective=forgetful, quiet=True)
    assert not (tmp_path / "run.fs").exists()


def test_true_and_false_are_no_ids(tmp_path: Path) -> None:
    """In ids and labels they are a mistake, in a mask they are not."""
    scope = fs.wrap(models.build(models.named("llama")))
    with pytest.raises(DataError, match=r"sample a_0 .*input_ids must be whole numbers, it holds True"):
        scope.collect({"a": [{"input_ids": [True, False, True]}]}, tmp_path / "run.fs", quiet=True)
    rows = [{**row, "attention_mask": [True] * len(row["input_ids"])} for row in models.rows(3)]
    assert scope.collect({"a": rows}, tmp_path / "run.fs", quiet=True).is_complete("a")


@pytest.mark.parametrize("asked", ["self_attn.q_proj", "layers.0.self_attn.q_proj.weight", "model.layers.0"])
def test_a_pattern_that_matches_nothing_has_one_beside_it_that_does(asked: str) -> None:
    """The message suggests a pattern, which works."""
    model = models.build(models.named("llama"))
    with pytest.raises(CoverageError, match=r"Did you mean '([^']+)'") as error:
        fs.wrap(model, parameters=[asked])
    suggested = str(error.value).partition("Did you mean '")[2].partition("'")[0]
    assert all("layers" in name for name in fs.wrap(model, parameters=[suggested]).parameters)


@pytest.mark.parametrize("encoding", ["dense", "factored"])
def test_overflow_in_half_precision_names_the_sample(tmp_path: Path, encoding: Any) -> None:
    """Also where it reaches the padding of a sample that is shorter than its batch."""

    def loud(model: Any, batch: Any) -> torch.Tensor:
        scale = torch.tensor([1e6 if row == 2 else 1.0 for row in batch.rows], dtype=torch.float32)
        return CAUSAL_LM.losses(model, batch) * scale

    rows = models.rows(4, longest=20)
    rows[2] = {key: values[:5] for key, values in rows[2].items()}
    kept = fs.SampleGradients(encoding=encoding)
    with pytest.raises(NonFiniteError, match=r"the gradient of a_2 .* is not finite.*half-precision"):
        fs.wrap(models.build(models.named("llama")).half()).collect(
            {"a": rows},
            tmp_path / "run.fs",
            objective=loud,
            batch_size=4,
            extensions=("fisher", kept),
            quiet=True,
        )


@pytest.mark.parametrize("seed", [10**30, -(10**30), 1.5, None, True])
def test_seeds_are_numbers_of_64_bits(tmp_path: Path, seed: Any) -> None:
    """What no generator takes is refused by name."""
    with pytest.raises(UsageError, match="seed must be a whole number of at most 64 bits"):
        fs.wrap(models.build(models.named("llama"))).collect(
            {"a": models.rows(3)}, tmp_path / "run.fs", seed=seed, quiet=True
        )
