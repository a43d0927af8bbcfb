"""The Fisher under labels of other sources, against enumeration and the loop over tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import FisherscopeError, NotStoredError
from fisherscope.instrument.objectives import CAUSAL_LM
from tests import models
from tests.instrument.test_objectives import CASES, SMALL, make

PARAMETER = "classifier.weight"


def collect(model: nn.Module, rows: Any, out: Path, *extensions: Any, **options: Any) -> fs.ContributionStore:
    return fs.wrap(model, parameters="all").collect(
        {"a": rows}, out, extensions=extensions, quiet=True, **options
    )


def gradient(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for (n, p), g in zip(parameters.items(), found, strict=True)
    }


def compare(store: fs.ContributionStore, labels: str, expected: dict[str, Tensor], tolerance: float) -> None:
    """Full shape, and the groups of whole parameters."""
    floor = 1e-6 * max(float(value.max()) for value in expected.values())
    for name in store.parameters:
        found = store.fisher("a", name, labels=labels)
        assert models.relative_error(found, expected[name], floor=floor) <= tolerance, name
    table = store.groups("a", labels=labels).query("kind == 'parameter'").set_index("parameter")
    for name, row in table.iterrows():
        assert row["mean"] == pytest.approx(float(expected[name].mean()), rel=10 * tolerance, abs=floor)


@pytest.mark.parametrize("case", ["bert-class", "vit"])
def test_the_exact_fisher_is_the_expectation_over_classes(case: str, tmp_path: Path) -> None:
    """``sum_c p_c (grad log p_c) ** 2`` of each sample, averaged; and that of the data stays as it was."""
    _, build, make_rows = CASES[case]
    model, rows = build(), make_rows(4)
    store = collect(model, rows, tmp_path / "run.fs", fs.Fisher(labels=("data", "exact")), batch_size=3)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row in rows:
        inputs = {k: torch.as_tensor(v).unsqueeze(0) for k, v in row.items() if k != "label"}
        log_p = model(**inputs).logits[0].log_softmax(-1)
        for c in range(len(log_p)):
            for name, g in gradient(log_p[c], model).items():
                expected[name] += float(log_p[c].detach().exp()) * g.square() / len(rows)
    compare(store, "exact", {n: v.detach() for n, v in expected.items()}, 1e-4)
    only = collect(model, rows, tmp_path / "only.fs", fs.Fisher(), batch_size=3)
    assert torch.equal(store.fisher("a", PARAMETER), only.fisher("a", PARAMETER))


@pytest.mark.filterwarnings("ignore:task .a. has a single sample")
def test_the_exact_fisher_of_several_labels_enumerates_them_jointly(tmp_path: Path) -> None:
    """The sum over labels of expected squares is the expected square of the sum, over all joint labels."""
    model = make("BertForTokenClassification", "BertConfig", **(SMALL | {"num_labels": 3}))()
    row = {"input_ids": [5, 9, 30, 4], "labels": [0, 2, 1, -100]}
    store = collect(model, [row], tmp_path / "run.fs", fs.Fisher(labels="exact", normalization="none"))
    log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :3].log_softmax(-1)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for labels in itertools.product(range(3), repeat=3):
        value = torch.stack([log_p[t, c] for t, c in enumerate(labels)]).sum()
        for name, g in gradient(value, model).items():
            expected[name] += float(value.detach().exp()) * g.square()
    compare(store, "exact", {n: v.detach() for n, v in expected.items()}, 1e-4)


def test_the_sampled_fisher_approaches_the_exact_one(tmp_path: Path) -> None:
    """With 400 draws the trace is within 15 %, and closer than that of the data's labels."""
    _, build, make_rows = CASES["bert-class"]
    model, rows = build(), make_rows(4)
    fisher = fs.Fisher(shape="groups", labels=("data", "sampled", "exact"), draws=400)
    store = collect(model, rows, tmp_path / "run.fs", fisher, batch_size=4)
    total = {labels: store.groups("a", labels=labels).query("kind == 'parameter'")["sum"].sum() for labels in
             ("data", "sampled", "exact")}  # fmt: skip
    assert total["sampled"] == pytest.approx(total["exact"], rel=0.15)
    assert abs(total["data"] - total["exact"]) > abs(total["sampled"] - total["exact"])


def test_sampled_labels_are_a_samples_own(tmp_path: Path) -> None:
    """The same labels are drawn in any batch, others with another seed."""
    model, rows = models.build(models.named("llama"), layers=1), models.rows(6)
    fisher = fs.Fisher(labels="sampled", draws=2)
    one = collect(model, rows, tmp_path / "1.fs", fisher, batch_size=1)
    three = collect(model, rows, tmp_path / "3.fs", fisher, batch_size=3)
    other = collect(model, rows, tmp_path / "o.fs", fisher, batch_size=3, seed=1)
    for name in one.parameters:
        found = one.fisher("a", name, labels="sampled")
        floor = 1e-6 * float(found.max())
        assert models.relative_error(three.fisher("a", name, labels="sampled"), found, floor=floor) <= 1e-4, (
            name
        )
        assert models.relative_error(other.fisher("a", name, labels="sampled"), found) > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_token_is_its_own_unit(name: str, tmp_path: Path) -> None:
    """``E_i[1/T_i sum_t g_it ** 2]`` against a loop over tokens."""
    model, rows = models.build(models.named(name), layers=1), models.rows(4)
    store = collect(model, rows, tmp_path / "run.fs", fs.ExactPerToken(), batch_size=3)
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        bearing = (labels != -100).nonzero().flatten().tolist()
        for t in bearing:
            for n, g in gradient(F.cross_entropy(logits[t], labels[t]), model).items():
                expected[n] += g.square() / len(bearing) / len(rows)
    compare(store, "exact_per_token", {n: v.detach() for n, v in expected.items()}, 1e-4)


def test_per_token_and_exact_per_token_agree_on_single_tokens(tmp_path: Path) -> None:
    """Samples with one label have one token gradient, so nothing can cohere."""
    model = models.build(models.named("llama"), layers=1)
    rows = [
        {**row, "labels": [-100] * (len(row["input_ids"]) - 1) + row["input_ids"][-1:]}
        for row in models.rows(4)
    ]
    store = collect(model, rows, tmp_path / "run.fs", "fisher", "exact_per_token", batch_size=4)
    for name in store.parameters:
        found, other = store.fisher("a", name), store.fisher("a", name, labels="exact_per_token")
        assert models.relative_error(found, other, floor=1e-12) <= 1e-5, name


@pytest.mark.filterwarnings("ignore:task .a. has a single sample")
def test_what_labels_need_is_said(tmp_path: Path) -> None:
    """Losses have no other labels, many classes are not enumerated, and what is missing is named."""
    model, rows = models.build(models.named("llama"), layers=1), models.rows(2)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return CAUSAL_LM.losses(model, batch)

    with pytest.raises(FisherscopeError, match="let the objective"):
        collect(model, rows, tmp_path / "a.fs", fs.Fisher(labels="sampled"), objective=loss)
    wide = make("BertForMaskedLM", "BertConfig", **(SMALL | {"vocab_size": 300}))()
    labelled = [{"input_ids": list(range(9)), "labels": list(range(9))}]
    with pytest.raises(FisherscopeError, match="use labels='sampled'"):
        collect(wide, labelled, tmp_path / "b.fs", fs.Fisher(labels="exact"))
    store = collect(model, rows, tmp_path / "c.fs", "fisher")
    with pytest.raises(NotStoredError, match=r"Fisher\(labels=\('data', 'exact'\)\)"):
        store.fisher("a", store.parameters[0], labels="exact")
    with pytest.raises(NotStoredError, match="ExactPerToken"):
        store.groups("a", labels="exact_per_token")
    with pytest.raises(ValueError, match="use 'data', 'sampled' or 'exact'"):
        fs.Fisher(labels="model")  # type: ignore[arg-type]
