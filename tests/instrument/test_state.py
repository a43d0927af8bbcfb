"""A sample is the same whenever it is run: what draws, counts or remembers is refused and named."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

import fisherscope as fs
from fisherscope.errors import CoupledSamplesError, ModelBusyError
from fisherscope.instrument.batch import Batch
from fisherscope.instrument.objectives import CAUSAL_LM
from tests import models


def dynamic_rope() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def rows(*lengths: int) -> list[dict[str, list[int]]]:
    return [{"input_ids": [3 + (7 * k + j) % 50 for j in range(n)]} for k, n in enumerate(lengths)]


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_dynamic_rope_is_refused(tmp_path: Path, batch_size: Any) -> None:
    """Its frequencies stay those of the longest sample; batches of one row do not help, and are no advice."""
    models.skip_where_old("its frequencies stay as they are")
    with pytest.raises(CoupledSamplesError, match=r"a_1 gives .* after a_2, .*model\.rotary_emb") as error:
        fs.wrap(dynamic_rope()).collect(
            {"a": rows(10, 14, 20)}, tmp_path / "run.fs", batch_size=batch_size, quiet=True
        )
    assert "batch_size" not in str(error.value)
    assert not (tmp_path / "run.fs").exists()


def test_dynamic_rope_is_refused_where_a_longer_sample_came_before(tmp_path: Path) -> None:
    """What an earlier call has left in the model hides nothing."""
    models.skip_where_old("its frequencies stay as they are")
    model = dynamic_rope()
    model(input_ids=torch.tensor([rows(30)[0]["input_ids"]]))
    with pytest.raises(CoupledSamplesError, match="rotary_emb"):
        fs.wrap(model).collect({"a": rows(10, 14)}, tmp_path / "run.fs", quiet=True)


def test_dynamic_rope_is_no_matter_where_it_does_not_set_in(tmp_path: Path) -> None:
    """Samples within the trained length."""
    store = fs.wrap(dynamic_rope()).collect({"a": rows(4, 6, 8)}, tmp_path / "run.fs", quiet=True)
    assert store.is_complete("a")


def test_a_hook_that_counts_is_refused(tmp_path: Path) -> None:
    """Each pass another scale."""
    model: Any = models.build(models.named("llama"))
    calls = [0]

    def grow(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * (1 + 0.01 * calls[0])

    model.model.layers[1].mlp.register_forward_hook(grow)
    with pytest.raises(CoupledSamplesError, match=r"each time that it is run.*model\.layers\.1\.mlp"):
        fs.wrap(model).collect({"a": models.rows(4)}, tmp_path / "run.fs", quiet=True)


def test_randomness_in_evaluation_mode_is_refused(tmp_path: Path) -> None:
    """Dropout that is on whatever the mode; forced, it goes on and warns."""
    model: Any = models.build(models.named("llama"))
    model.model.layers[0].mlp.register_forward_hook(
        lambda _module, _args, output: F.dropout(output, 0.5, training=True)
    )
    scope = fs.wrap(model)
    with pytest.raises(CoupledSamplesError, match=r"random numbers are drawn.*model\.layers\.0\.mlp"):
        scope.collect({"a": models.rows(4)}, tmp_path / "run.fs", quiet=True)
    with pytest.warns(UserWarning, match="going on by force"):
        scope.collect({"a": models.rows(4)}, tmp_path / "forced.fs", force=True, quiet=True)


class Beside(nn.Module):
    """Something that a model computes beside what its loss depends on."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Count, draw, or keep the longest."""
        self.calls: Tensor
        if self.kind == "counter":
            return self.calls.add_(1)
        if self.kind == "noise":
            return torch.randn_like(hidden)
        self.calls.clamp_(min=hidden.shape[1])
        return self.calls


def beside(kind: str) -> Any:
    model: Any = models.build(models.named("llama"))
    model.model.layers[0].beside = Beside(kind)

    def hook(layer: Any, args: Any, _output: Any) -> None:
        layer.beside(args[0])

    model.model.layers[0].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("kind", ["counter", "noise", "longest"])
def test_what_reaches_no_loss_is_let_pass(tmp_path: Path, kind: str) -> None:
    """A counter, random numbers and a record of lengths, on which neither losses nor gradients depend."""
    data = {"a": models.rows(4)}
    expected = fs.wrap(models.build(models.named("llama"))).collect(data, tmp_path / "plain.fs", quiet=True)
    store = fs.wrap(beside(kind)).collect(data, tmp_path / "run.fs", quiet=True)
    name = store.parameters[0]
    assert torch.equal(store.fisher("a", name), expected.fisher("a", name))


def test_what_only_gradients_depend_on_is_refused(tmp_path: Path) -> None:
    """The forward pass gives the same each time, and the backward pass does not."""
    model: Any = models.build(models.named("llama"))
    calls = torch.zeros(())

    def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
        calls.add_(1)
        return output + 0.1 * calls * (output - output.detach())

    model.model.layers[0].beside = Beside("counter")
    model.model.layers[0].register_forward_hook(lambda layer, args, _output: layer.beside(args[0]) and None)
    model.model.layers[0].mlp.register_forward_hook(hook)
    with pytest.raises(CoupledSamplesError, match="each time that it is run"):
        fs.wrap(model).collect({"a": models.rows(4)}, tmp_path / "run.fs", quiet=True)


def test_an_objective_with_a_memory_is_refused(tmp_path: Path) -> None:
    """A running mean over the losses that came before, as a baseline."""
    mean = [0.0]

    def with_baseline(model: nn.Module, batch: Batch) -> Tensor:
        losses = CAUSAL_LM.losses(model, batch)
        mean[0] = 0.9 * mean[0] + 0.1 * float(losses.detach().mean())
        return losses * (1 + mean[0])

    with pytest.raises(CoupledSamplesError, match="The first to differ is the loss"):
        fs.wrap(models.build(models.named("llama"))).collect(
            {"a": models.rows(4)}, tmp_path / "run.fs", objective=with_baseline, quiet=True
        )


def test_a_second_caller_is_told_and_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    """Two threads on one scope, and two scopes on one model: one collects, the others are refused."""
    model = models.build(models.named("llama")).train()
    scopes = [fs.wrap(model), fs.wrap(model)]
    started, go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def slow(model: nn.Module, batch: Batch) -> Tensor:
        started.set()
        go_on.wait(60)
        return CAUSAL_LM.losses(model, batch)

    def first() -> None:
        try:
            scopes[0].collect({"a": models.rows(4)}, tmp_path / "a.fs", objective=slow, quiet=True)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    assert started.wait(60)
    for scope in scopes:
        with pytest.raises(ModelBusyError, match="another thread is collecting"):
            scope.collect({"a": models.rows(4)}, tmp_path / "b.fs", quiet=True)
    with pytest.raises(ModelBusyError):
        fs.wrap(model)
    go_on.set()
    thread.join()
    assert not errors
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "b.fs").exists()
    assert scopes[1].collect({"a": models.rows(4)}, tmp_path / "b.fs", quiet=True).is_complete("a")


def test_threads_with_models_of_their_own_do_not_meet(tmp_path: Path) -> None:
    """Each has what it would have alone."""
    alone = fs.wrap(models.build(models.named("llama"))).collect(
        {"a": models.rows(6)}, tmp_path / "alone.fs", quiet=True
    )
    found: dict[int, Any] = {}
    own = [models.build(models.named("llama")) for _ in range(2)]

    def work(k: int) -> None:
        found[k] = fs.wrap(own[k]).collect({"a": models.rows(6)}, tmp_path / f"{k}.fs", quiet=True)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    name = "model.layers.0.self_attn.q_proj.weight"
    for store in found.values():
        torch.testing.assert_close(
            torch.as_tensor(store.fisher("a", name)), torch.as_tensor(alone.fisher("a", name))
        )
    assert len(found) == 2
