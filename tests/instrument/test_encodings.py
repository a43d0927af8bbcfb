"""Encodings of collected gradients, against one backward pass per sample, on every kind of model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.demo import model_path, task_files
from fisherscope.errors import CoverageError, Interrupted, NotStoredError, StoreFullError
from fisherscope.instrument.extensions.factors import FactorWriter
from fisherscope.instrument.guards import refuse_if_disk_is_small
from fisherscope.linalg import LowRank
from fisherscope.store import ContributionStore
from fisherscope.store.encodings import Encodings
from tests import models
from tests.instrument import by_hand
from tests.instrument.interrupting import interrupted_after

# relative to the largest entry of a parameter's gradients
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}

CASES = [
    ("gpt2", "right"),
    ("gpt2", "left"),
    ("llama", "right"),
    ("llama-biases", "left"),
    ("opt", "right"),
    ("bert", "right"),
    ("t5", "right"),
    ("vit", "right"),
]
KINDS = [("dense", "float16"), ("factored", "float32"), ("lowrank", "float16"), ("auto", "bfloat16")]
MORE_KINDS = [("factored", "float16"), ("factored", "bfloat16"), ("lowrank", "float32")]


def data_of(name: str) -> tuple[list[dict[str, Any]], Callable[[Any, Any], Tensor]]:
    """Rows of a model and the loss of one of them."""
    if name != "vit":
        return by_hand.data_of(name)  # type: ignore[return-value]
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": image, "label": i} for i, image in enumerate(images)], _of_image


def _of_image(model: Any, row: dict[str, Any]) -> Tensor:
    logits = model(pixel_values=row["pixel_values"][None]).logits
    return F.cross_entropy(logits, torch.tensor([row["label"]]), reduction="sum")


def by_loop(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Per parameter the gradients of all rows, one backward pass each."""
    data, loss = data_of(name)
    found: dict[str, list[Tensor]] = {key: [] for key, _ in model.named_parameters()}
    for row in data:
        model.zero_grad(set_to_none=True)
        loss(model, row).backward()
        for key, parameter in model.named_parameters():
            found[key].append(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            )
    model.zero_grad(set_to_none=True)
    return {key: torch.stack(rows) for key, rows in found.items()}


def collected(
    name: str, side: str, out: Path, *extensions: Any, layers: int | None = None, **options: Any
) -> ContributionStore:
    """All linear maps of a model's layers, in batches with padding."""
    model = models.build(models.named(name), layers=layers)
    scope = fs.wrap(model, models.PadsOnTheLeft() if side == "left" else None)
    options = {"batch_size": 3, "quiet": True} | options
    return scope.collect({"a": data_of(name)[0]}, out, extensions=extensions or ("fisher",), **options)


@pytest.mark.parametrize(
    ("name", "side", "kinds"),
    [
        *(pytest.param(*case, KINDS, id="-".join(case)) for case in CASES),
        pytest.param("llama", "right", MORE_KINDS, id="llama-right-more"),
        *(
            pytest.param(*case, MORE_KINDS, id="-".join((*case, "more")), marks=pytest.mark.slow)
            for case in CASES
            if case != ("llama", "right")
        ),
    ],
)
def test_every_encoding_gives_the_gradients_of_the_loop(
    name: str, side: str, kinds: list[tuple[str, str]], tmp_path: Path
) -> None:
    """Whole parameters and head slices, in every type; approximations are as far off as they say.

    Group values do not depend on what is stored.
    """
    expected = by_loop(models.build(models.named(name), layers=1), name)
    reference = collected(name, side, tmp_path / "groups.fs", layers=1).group_values("a")
    scale = max(float(g.abs().max()) for g in expected.values())
    for encoding, dtype in kinds:
        made = fs.SampleGradients("all", encoding, dtype, rank=2)  # type: ignore[arg-type]
        store = collected(name, side, tmp_path / f"{encoding}-{dtype}.fs", "fisher", made, layers=1)
        found_kinds = set(store.header.gradient_encodings.values())
        assert {encoding if encoding != "auto" else "factored"} <= found_kinds
        assert found_kinds <= {encoding, "dense", *(["factored"] if encoding == "auto" else [])}
        tolerance = TOLERANCE["float32" if encoding == "auto" else dtype]
        errors = store.encoding_errors("a")
        for parameter in store.gradient_parameters:
            found, exact = store.gradients("a", parameter), expected[parameter]
            if store.encoding(parameter) == "lowrank":
                distance, norm = (found - exact).flatten(1).norm(dim=1), exact.flatten(1).norm(dim=1)
                recorded = torch.tensor(errors[parameter].to_numpy())
                slack = 1e-4 * scale * exact[0].numel() ** 0.5
                assert (distance <= recorded * norm * 1.001 + slack).all(), parameter
                assert isinstance(store.per_sample("a", parameter), LowRank)
            else:
                # dense vectors of "auto" are bfloat16
                is_coarse = dtype == "bfloat16" and store.encoding(parameter) == "dense"
                worst = TOLERANCE["bfloat16"] if is_coarse else tolerance
                error = models.relative_error(found, exact, floor=1e-3 * scale)
                assert error <= worst, (encoding, dtype, parameter)
        _assert_slices(store)
        for quantity in ("square", "dot"):
            values = torch.tensor(store.group_values("a")[quantity].values)
            before = torch.tensor(reference[quantity].values)
            assert models.relative_error(values, before) <= 1e-5


def _assert_slices(store: ContributionStore) -> None:
    """Slices are cuts of the whole, and their sums of squares add up to those of the block."""
    for attention, block in store.layout.head_blocks():
        where = {"layer": attention.layer, "block": block.name, "stack": attention.stack}
        whole = store.gradients("a", block.weight.parameter)
        every = store.slices("a", **where)  # type: ignore[arg-type]
        for head, piece in enumerate(block.weight):
            cut = piece.take(whole).flatten(1)
            assert models.relative_error(every[head], cut, floor=float(whole.abs().max())) <= 1e-6
        one = store.slice("a", head=1 % len(block.weight), samples=[2, 0], **where)  # type: ignore[arg-type]
        assert models.relative_error(one, every[1 % len(block.weight)][[2, 0]]) <= 1e-6
        squares = store.per_sample("a", block.weight.parameter).norms([block.weight])[0]
        assert models.relative_error(every.square().sum(2).T, squares) <= 1e-5


def test_layers_with_one_input_share_it(tmp_path: Path) -> None:
    """Q, K and V, gate and up, and the keys and values of all cross attentions: found, not assumed."""
    store = collected("llama", "right", tmp_path / "a.fs", fs.SampleGradients("all", "factored", "float32"))
    inputs = store.header.encodings.inputs
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        attention = {inputs[f"{prefix}self_attn.{n}_proj.weight"] for n in "qkv"}
        mlp = {inputs[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up")}
        assert (len(attention), len(mlp)) == (1, 1)
        assert (
            len(
                attention
                | mlp
                | {inputs[f"{prefix}{n}.weight"] for n in ("self_attn.o_proj", "mlp.down_proj")}
            )
            == 4
        )
    store = collected("t5", "right", tmp_path / "b.fs", fs.SampleGradients("all", "factored", "float32"))
    inputs = store.header.encodings.inputs
    cross = {inputs[n] for n in inputs if "EncDecAttention.k" in n or "EncDecAttention.v" in n}
    assert len(cross) == 1
    assert len(set(inputs.values())) == 2 * 4 + 2 * 6 + 1


def test_layers_whose_dtype_is_converted_share_it_too(tmp_path: Path) -> None:
    """A half-precision model's inputs are converted for each layer anew: they are the same all the same."""
    model = models.build(models.named("llama")).to(torch.bfloat16)
    store = fs.wrap(model, parameters="attention").collect(
        {"a": models.rows(4)},
        tmp_path / "run.fs",
        extensions=(fs.SampleGradients(encoding="factored", dtype="float32"),),
        batch_size=2,
        quiet=True,
    )
    assert len(set(store.header.encodings.inputs.values())) == 4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_models_share_inputs(reentrant: bool, tmp_path: Path) -> None:
    """Inputs are made again in the backward pass; they are still one."""
    expected = by_loop(models.build(models.named("llama")), "llama")
    model = models.build(models.named("llama"))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
    store = fs.wrap(model, parameters="attention").collect(
        {"a": data_of("llama")[0]},
        tmp_path / "run.fs",
        extensions=(fs.SampleGradients(encoding="factored", dtype="float32"),),
        batch_size=3,
        quiet=True,
    )
    assert len(set(store.header.encodings.inputs.values())) == 4
    for parameter in store.gradient_parameters:
        assert models.relative_error(store.gradients("a", parameter), expected[parameter]) <= 1e-5


def test_auto_takes_what_is_smaller(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Factors of short samples, gradients of long ones; the log and the store say why, with numbers."""
    scope = fs.wrap(models.build(models.named("llama")), parameters="attention")
    gradients = fs.SampleGradients(dtype="float32")

    def run(length: int) -> ContributionStore:
        data = [{"input_ids": list(range(3, 3 + length))} for _ in range(2)]
        return scope.collect(
            {"a": data}, tmp_path / f"{length}.fs", extensions=(gradients,), batch_size=2, quiet=True
        )

    def written(store: ContributionStore) -> int:
        names = ("gradients/", "factors/", "positions/")
        datasets = [d for s in store.task_index("a").segments for d in s.shard.datasets]
        return sum(d.spec.nbytes for d in datasets if d.name.startswith(names))

    with caplog.at_level(logging.INFO, "fisherscope"):
        short, long = run(5), run(40)
    assert set(short.header.gradient_encodings.values()) == {"factored"}
    assert set(long.header.gradient_encodings.values()) == {"dense"}
    # Q, K and V: 32 + 16 + 16 outputs and one input of 32; O: 32 and 32
    assert written(short) == pytest.approx(2 * 2 * 4 * 5 * (64 + 32 + 64), rel=0.02)
    assert written(long) == 2 * 2 * 4 * (32 * 32 * 2 + 2 * 16 * 32)
    for store, words in ((short, "8 of 8 parameters factored"), (long, "dense (40.0 attended positions")):
        reason = store.header.options["gradient_encodings"]
        assert words in reason
        assert "bytes a sample" in reason
        assert reason in caplog.text


def test_auto_by_parameter(tmp_path: Path) -> None:
    """Matrices of one model: factors pay for the wide ones, and for those that share their input."""
    longer = [{"input_ids": [3 + i % 50 for i in range(17)]} for _ in range(3)]
    scope = fs.wrap(models.build(models.named("llama")))
    store = scope.collect(
        {"a": longer}, tmp_path / "b.fs", extensions=(fs.SampleGradients("all", dtype="float32"),), quiet=True
    )
    kinds = store.header.gradient_encodings
    # o: 17 (32 + 32) > 32 x 32; down: 17 (40 + 32) < 40 x 32; gate and up share: 17 (32 + 80) < 2 x 32 x 40
    assert kinds["model.layers.0.self_attn.o_proj.weight"] == "dense"
    assert kinds["model.layers.0.mlp.down_proj.weight"] == "factored"
    assert kinds["model.layers.0.mlp.up_proj.weight"] == "factored"
    assert kinds["model.layers.0.self_attn.k_proj.weight"] == "factored"


def test_a_resumed_run_is_the_same_in_every_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a batch and gone on with: bit for bit what an uninterrupted run stores."""
    for encoding in ("auto", "factored", "lowrank"):
        made = fs.SampleGradients("all", encoding, rank=2)  # type: ignore[arg-type]
        whole = collected("llama", "left", tmp_path / f"{encoding}-whole.fs", "fisher", made, batch_size=2)
        out = tmp_path / f"{encoding}.fs"
        with interrupted_after(2, monkeypatch), pytest.raises(Interrupted):
            collected("llama", "left", out, "fisher", made, batch_size=2)
        store = collected("llama", "left", out, "fisher", made, batch_size=2)
        assert store.header.encodings == whole.header.encodings
        for parameter in store.gradient_parameters:
            assert torch.equal(store.gradients("a", parameter), whole.gradients("a", parameter))
            assert torch.equal(store.fisher("a", parameter), whole.fisher("a", parameter))
        assert store.group_values("a").equals(whole.group_values("a"))


def test_a_store_that_grows_keeps_its_encodings(tmp_path: Path) -> None:
    """Longer samples are added, with which "auto" alone would have chosen otherwise: nothing changes."""
    scope = fs.wrap(models.build(models.named("llama")), parameters="attention")
    options: dict[str, Any] = {"extensions": (fs.SampleGradients(dtype="float32"),), "batch_size": 2}
    short = [{"input_ids": list(range(3, 9))} for _ in range(3)]
    long = [{"input_ids": [3 + i % 50 for i in range(40 + k)]} for k in range(4)]
    first = scope.collect({"a": short}, tmp_path / "run.fs", quiet=True, **options)
    assert set(first.header.gradient_encodings.values()) == {"factored"}
    alone = scope.collect({"a": [*short, *long]}, tmp_path / "alone.fs", quiet=True, **options)
    assert set(alone.header.gradient_encodings.values()) == {"dense"}
    store = scope.collect({"a": [*short, *long]}, tmp_path / "run.fs", quiet=True, **options)
    assert store.header.encodings == first.header.encodings
    for parameter in store.gradient_parameters:
        found, expected = (s.gradients("a", parameter) for s in (store, alone))
        assert models.relative_error(found, expected) <= 1e-5


def test_squares_of_the_default_are_as_good_as_those_of_bfloat16(tmp_path: Path) -> None:
    """On the demo's gradients: median error of squares at most 0.5 %, of a head's energy at most 1e-3.

    And nothing that is not zero becomes zero: as it would, now and then, in the products of half-precision
    factors, which is why those that are chosen by themselves are float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path())
    scope = fs.wrap(model, AutoTokenizer.from_pretrained(model_path()), parameters="attention")
    tasks = {name: str(file) for name, file in task_files().items()}

    def run(name: str, made: fs.SampleGradients) -> ContributionStore:
        out = tmp_path / f"{name}.fs"
        return scope.collect(tasks, out, extensions=(made,), max_samples=8, quiet=True, durability="none")

    exact = run("exact", fs.SampleGradients(encoding="dense", dtype="float32"))
    for name, made in (
        ("default", fs.SampleGradients()),
        ("bfloat16", fs.SampleGradients(encoding="dense")),
        ("float16", fs.SampleGradients(encoding="dense", dtype="float16")),
    ):
        store = run(name, made)
        errors = []
        for task in store.tasks:
            for attention, block in store.layout.head_blocks():
                where = {"layer": attention.layer, "block": block.name}
                g = exact.slices(task, **where).double()  # type: ignore[arg-type]
                found = store.slices(task, **where).double()  # type: ignore[arg-type]
                assert not ((found == 0) & (g != 0)).any()
                errors.append((found.square() / g.square() - 1).abs()[g != 0])
                energy, stored = g.square().sum((1, 2)), found.square().sum((1, 2))
                assert float((stored / energy - 1).abs().max()) <= 1e-3
        assert float(torch.cat(errors).median()) <= 5e-3
    assert set(run("default", fs.SampleGradients()).header.gradient_encodings.values()) == {
        "factored",
        "dense",
    }


def test_groups_keep_no_gradients(tmp_path: Path) -> None:
    """Group values are there, gradients are not, and the model can still compute them."""
    store = collected("llama", "right", tmp_path / "run.fs", "fisher", fs.SampleGradients(encoding="groups"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert store.gradient_parameters == ()
    assert store.encoding(name) == "groups"
    assert store.header.options["gradient_encodings"] == "no gradients are stored"
    assert len(store.groups("a"))
    with pytest.raises(NotStoredError, match=r"scope\.gradients"):
        store.gradients("a", name)
    scope = fs.wrap(models.build(models.named("llama")))
    again = scope.gradients(store, ["a_2"], parameters=[name])[name]
    assert models.relative_error(again, by_loop(scope.model, "llama")[name][2:3]) <= 1e-5


def test_gradients_of_the_first_samples(tmp_path: Path) -> None:
    """Those of the first rows of each task, in every encoding; group values and F are of all."""
    for encoding in ("dense", "factored", "lowrank"):
        made = fs.SampleGradients(encoding=encoding, dtype="float32", max_samples=2)  # type: ignore[arg-type]
        store = collected("llama", "right", tmp_path / f"{encoding}.fs", "fisher", made, batch_size=2)
        name = store.gradient_parameters[0]
        assert len(store.gradients("a", name, slice(0, 2))) == 2
        with pytest.raises(NotStoredError, match=r"were not stored: collect again"):
            store.gradients("a", name)
        assert store.fisher_count("a") == store.n("a") == 7
        assert store.is_complete("a")


def test_a_layer_that_is_called_twice_stays_dense(tmp_path: Path) -> None:
    """Its gradient is no sum over the positions of one call: known before the run, named in the reason."""
    model = models.build(models.named("llama"))
    path = "model.layers.0.mlp.down_proj"
    by_hand.call_twice(model.get_submodule(path))
    store = fs.wrap(model).collect(
        {"a": models.rows(4)},
        tmp_path / "run.fs",
        extensions=(fs.SampleGradients("all", "factored", "float32"),),
        batch_size=2,
        quiet=True,
    )
    kinds = store.header.gradient_encodings
    assert kinds.pop(f"{path}.weight") == "dense"
    assert set(kinds.values()) == {"factored"}
    assert (
        f"{path}.weight is dense as its layer is called 2 times" in store.header.options["gradient_encodings"]
    )
    expected = torch.stack([row[f"{path}.weight"] for row in models.loop(model, models.rows(4))])
    assert models.relative_error(store.gradients("a", f"{path}.weight"), expected) <= 1e-5


def test_weights_that_the_loss_does_not_depend_on(tmp_path: Path) -> None:
    """Before the run they are seen to have no factors; in the middle of it their factors are zero."""
    model = models.build(models.named("llama"))
    handle = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_hook(
        lambda module, args, output: torch.zeros_like(output)
    )
    made = fs.SampleGradients("all", "factored", "float32")
    name = "model.layers.1.mlp.up_proj.weight"
    options: dict[str, Any] = {"extensions": (made,), "batch_size": 2, "quiet": True}
    store = fs.wrap(model).collect({"a": models.rows(3)}, tmp_path / "a.fs", **options)
    assert store.encoding(name) == "dense"
    assert not store.gradients("a", name).any()
    handle.remove()
    # cut off in batches of the run alone: those are larger than the one that is looked at
    model = models.build(models.named("llama"))
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda module, args: (args[0].detach(),) if len(args[0]) == 4 else None
    )
    data = models.rows(4)
    scope = fs.wrap(model, parameters=["*mlp*"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherscope.instrument.collection.check_samples", lambda *args: None)
        store = scope.collect({"a": data}, tmp_path / "b.fs", extensions=(made,), batch_size=4, quiet=True)
    assert store.encoding(name) == "factored"
    assert not store.gradients("a", name).any()
    assert store.gradients("a", name.replace("layers.1", "layers.0")).any()


def test_inputs_that_stop_being_one_are_refused(tmp_path: Path) -> None:
    """Two layers that had the same input when it was looked at have different ones later: an error."""
    model = models.build(models.named("llama"))
    value = model.get_submodule("model.layers.0.self_attn.v_proj")
    value.register_forward_pre_hook(lambda module, args: (args[0] * 2,) if len(args[0]) == 4 else None)
    scope = fs.wrap(model, parameters="attention")
    made = fs.SampleGradients(encoding="factored", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherscope.instrument.collection.check_samples", lambda *args: None)
        with pytest.raises(CoverageError, match=r'no longer given what that.*encoding="dense"'):
            scope.collect(
                {"a": models.rows(4)}, tmp_path / "run.fs", extensions=(made,), batch_size=4, quiet=True
            )


def test_padding_that_has_a_gradient_is_refused(tmp_path: Path) -> None:
    """Factors leave padding out, so it must have no part in them: seen before the run, they are not made."""
    model = models.build(models.named("llama"))

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits.square().sum((1, 2))  # padding included

    scope = fs.wrap(model, parameters="attention")
    made = fs.SampleGradients(encoding="factored", dtype="float32")
    options: dict[str, Any] = {"extensions": (made,), "objective": loss, "quiet": True, "force": True}
    with pytest.warns(UserWarning, match="by force"):
        store = scope.collect({"a": models.rows(4)}, tmp_path / "a.fs", batch_size=4, **options)
    # keys and values of padding are masked: only what queries and outputs do there counts
    kinds = store.header.gradient_encodings
    assert {kinds[n] for n in kinds if "q_proj" in n or "o_proj" in n} == {"dense"}
    assert "padding has a part in it" in store.header.options["gradient_encodings"]
    # padding that does not come before the run: three rows are of one length, the fourth is shorter
    even = [{"input_ids": [5, 6, 7, 8, 9, 10]} for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherscope.instrument.planning.two_short", lambda tasks: ("a", [0, 1]))
        patch.setattr("fisherscope.instrument.collection.check_samples", lambda *args: None)
        with pytest.raises(CoverageError, match=r'padding has a part in it.*encoding="dense"'):
            scope.collect(
                {"a": [*even, {"input_ids": [3, 4, 5]}]}, tmp_path / "b.fs", batch_size=4, **options
            )


def test_estimates_name_cheaper_encodings(tmp_path: Path) -> None:
    """What is estimated is written, within 5 %; cheaper encodings stand beside it, and in the refusal."""
    scope = fs.wrap(models.build(models.named("llama"), layers=1))
    tasks = {"a": models.rows(16)}
    for encoding in ("dense", "factored", "lowrank", "auto", "groups"):
        for dtype in ("bfloat16", "float16", "float32") if encoding != "groups" else ("bfloat16",):
            made = (fs.SampleGradients("all", encoding, dtype, rank=2),)  # type: ignore[arg-type]
            found = scope.estimate(tasks, extensions=made, measure=False, batch_size=4)
            out = tmp_path / f"{encoding}-{dtype}.fs"
            store = scope.collect(tasks, out, extensions=made, batch_size=4, quiet=True)
            datasets = [d for s in store.task_index("a").segments for d in s.shard.datasets]
            written = sum(dataset.spec.nbytes for dataset in datasets)
            assert found.bytes_per_sample * 16 == pytest.approx(written, rel=0.05), (encoding, dtype)
            words = " ".join(words for words, _ in found.cheaper)
            assert ("groups" in words) == (encoding != "groups")
            assert all(size < found.disk_bytes for _, size in found.cheaper)
            if encoding == "dense":
                assert "factored" in words
                assert "lowrank" in words
                assert any("lowrank" in quantity for quantity, _ in found.rows())
    few = scope.estimate(
        tasks, extensions=(fs.SampleGradients("all", "dense", max_samples=4),), measure=False, batch_size=4
    )
    whole = scope.estimate(
        tasks, extensions=(fs.SampleGradients("all", "dense"),), measure=False, batch_size=4
    )
    assert few.gradient_bytes_per_sample == pytest.approx(whole.gradient_bytes_per_sample / 4, rel=0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
        with pytest.raises(StoreFullError, match=r'SampleGradients\(encoding="lowrank", rank=8.*groups'):
            refuse_if_disk_is_small(whole, tmp_path / "new.fs")


def test_analyses_say_that_gradients_are_approximations(tmp_path: Path) -> None:
    """Phases that read gradients say how good they are; those that do not say nothing."""
    scope = fs.wrap(models.build(models.named("llama")), parameters="attention")
    tasks = {"a": models.rows(5), "b": models.rows(5, seed=1)}
    made = fs.SampleGradients(encoding="lowrank", rank=2)
    store = scope.collect(tasks, tmp_path / "run.fs", extensions=("fisher", made), quiet=True)
    report = fs.analyze(store, ["fisher", "conflict"])
    notes = [note for note in report["conflict"].warnings if "low rank" in note]
    errors = torch.cat([torch.tensor(store.encoding_errors(task).to_numpy()).flatten() for task in "ab"])
    assert len(notes) == 1
    worst, median = errors.max(), errors.quantile(0.5)
    assert f"relative error median {float(median):.2g}, worst {float(worst):.2g}" in notes[0]
    assert not any("low rank" in note for note in report["fisher"].warnings)


def test_nothing_is_looked_at_without_need(tmp_path: Path) -> None:
    """Only encodings that depend on what layers are given take a pass before the run."""
    scope = fs.wrap(models.build(models.named("llama")), parameters="attention")
    scope.estimate({"a": models.rows(3)}, measure=False)  # what forward takes is found out once
    calls: list[int] = []
    handle = scope.model.register_forward_hook(lambda *_: calls.append(1))
    for encoding, passes in (("dense", 0), ("lowrank", 0), ("groups", 0), ("factored", 1), ("auto", 1)):
        calls.clear()
        made = fs.SampleGradients(encoding=encoding)  # type: ignore[arg-type]
        scope.estimate({"a": models.rows(3)}, extensions=(made,), measure=False, batch_size=2)
        assert len(calls) == passes, encoding
    handle.remove()


def test_a_writer_of_factors_forgets_inputs() -> None:
    """Inputs are held for comparison only while a layer that shares them is still to come."""
    writer = FactorWriter(Encodings({"a": "factored"}, {"a": "a"}))
    writer.begin(3)
    assert not writer._inputs
