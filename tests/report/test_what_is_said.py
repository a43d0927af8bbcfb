"""What the report says of a store: encodings, shared modules, places outside the layers, single things."""

import dataclasses
import re

import pandas as pd
import pytest
import transformers

import fisherscope as fs
from fisherscope.analyses import MasksConfig
from fisherscope.report.cells import table
from fisherscope.report.facts import facts_of
from fisherscope.report.figures import figures_of
from fisherscope.store.encodings import Encodings
from tests import models
from tests.analyses.synthetic import make_task, write_store
from tests.report.conftest import QUICK, Saved
from tests.report.test_page import Reader


@pytest.fixture(scope="module")
def scope():
    return fs.wrap(models.build(models.named("llama")), parameters="all")


def collected(scope, path, *extensions, tasks=None):
    rows = tasks or {"math": models.rows(4), "code": models.rows(3, seed=5)}
    return scope.collect(rows, path / "run.fs", extensions=("fisher", *extensions), quiet=True)


def page_of(store, path, **options):
    report = fs.analyze(store, config=dataclasses.replace(QUICK, **options), quiet=True)
    assert not report.failed
    return Reader(Saved(report, report.save(path / "report")).page)


@pytest.mark.parametrize(
    ("extension", "words"),
    [
        (fs.SampleGradients(parameters="attention", encoding="dense"), "8 parameters in bfloat16"),
        (
            fs.SampleGradients(parameters="attention", encoding="factored", dtype="float32"),
            "8 parameters as float32 factors",
        ),
        (
            fs.SampleGradients(parameters="attention", encoding="lowrank", rank=2, dtype="float32"),
            "8 parameters as float32 factors of rank 2",
        ),
        (
            fs.SampleGradients(parameters="all", encoding="factored", dtype="float32"),
            "15 parameters as float32 factors, 6 in float32",
        ),
        (fs.SampleGradients(parameters=["*0.self_attn.q_proj.weight"]), "1 parameter in bfloat16"),
        (None, "none"),
    ],
)  # fmt: skip
def test_what_is_stored_is_said(scope, tmp_path, extension, words):
    """In the report and in ``repr``: dense, factors, low rank, mixed ones, none."""
    store = collected(scope, tmp_path, *([extension] if extension else []))
    assert f"gradients: {words}>" in repr(store)
    assert f"gradients: {words}</p>" in store._repr_html_()
    facts = facts_of(store)
    assert facts.gradients == words
    assert sum(facts.encodings.values()) == len(store.gradient_parameters)
    reader = page_of(store, tmp_path, tasks=("math",))
    assert f"gradients stored {words} Fisher" in reader.words


def test_encodings_in_words():
    """Parameters without an entry are dense; one is no plural."""
    mixed = Encodings({"a": "factored", "b": "lowrank"}, {"a": "a"}, rank=4, dtype="float16")
    names = ("a", "b", "c", "d")
    assert mixed.in_words("float32", names) == (
        "1 parameter as float16 factors, 1 as float16 factors of rank 4, 2 in float32"
    )
    assert Encodings().in_words("bfloat16", ()) == "none"


def test_a_shared_layer_is_said(tmp_path):
    """ALBERT: one layer that runs three times. The report and the coverage say so."""
    config = transformers.AlbertConfig(
        hidden_size=32, embedding_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        vocab_size=models.VOCABULARY, max_position_embeddings=64,
    )  # fmt: skip
    scope = fs.wrap(transformers.AlbertForMaskedLM(config).eval())
    coverage = scope.coverage()
    assert set(coverage[coverage["layer"] >= 0]["runs"]) == {3}
    assert set(coverage[coverage["layer"] < 0]["runs"]) == {1}
    store = collected(scope, tmp_path)
    assert fs.open_store(store.path).layout.shared == scope.layout.shared
    facts = facts_of(store)
    assert facts.shared == (("albert.encoder.albert_layer_groups.0", 3),)
    assert facts.to_json()["coverage"]["shared"] == [{"module": facts.shared[0][0], "runs": 3}]
    words = page_of(store, tmp_path, tasks=("math",)).words
    assert "albert.encoder.albert_layer_groups.0 runs 3 times" in words


def test_nothing_is_shared_elsewhere(saved):
    """No word of it where nothing is."""
    assert "run several times" not in Reader(saved.page).words


def test_no_layer_minus_one(scope, tmp_path):
    """Embeddings and the last norm lie outside the layers, in words and tables."""
    report = fs.analyze(collected(scope, tmp_path), ["fisher", "masks", "overlap"], QUICK, quiet=True)
    layers = report["masks"].frame.query("level == 'layer'")["layer"]
    assert -1 in set(layers)
    page = Reader(Saved(report, report.save(tmp_path / "report")).page)
    everything = f"{page.words} {report.summary()}"
    assert not re.search(r"(?i)layer -1|layer \N{MINUS SIGN}1|L-1", everything)
    assert "in the parameters outside the layers" in report["masks"].summary()
    assert "outside the layers" in page.words
    frame = pd.DataFrame(
        {"stack": ["decoder"], "layer": [-1], "block": [""], "index": [-1], "parameter": ["wte"]}
    )
    assert ">wte<" in table(frame, "x", ["where"])
    assert ">outside the layers<" in table(frame.assign(parameter=""), "x", ["where"])


def test_one_layer_has_nothing_to_compare(tmp_path):
    """The same share in every layer is no news where there is one."""
    config = models.named("llama").config()
    config.num_hidden_layers = 1
    scope = fs.wrap(transformers.AutoModelForCausalLM.from_config(config).eval(), parameters="attention")
    one = fs.analyze(collected(scope, tmp_path), ["masks"], QUICK, quiet=True)
    assert "layer" not in one["masks"].summary()
    assert "stay" in one["masks"].summary()


WRONG = (
    r"(?<![\d,.])1 (samples|pairs|slices|parameters|heads|layers|tables|rows|findings|batches|weights|"
    r"sentences)\b"
)


def test_one_is_no_plural_anywhere(layout, tmp_path):
    """A store of single samples: neither the page nor the summaries nor the warnings say "1 samples"."""
    tasks = {name: make_task(layout, name, 1, seed) for seed, name in enumerate(("math", "code"))}
    store = write_store(tmp_path / "run.fs", layout, tasks).store
    report = fs.analyze(store, config=QUICK, quiet=True)
    page = Reader(Saved(report, report.save(tmp_path / "report")).page)
    notes = " ".join(note for result in report.values() for note in result.warnings)
    for text in (page.words, report.summary(), notes, repr(store), " ".join(map(repr, report.values()))):
        assert not re.search(WRONG, text), re.search(WRONG, text)
    assert "math 1 sample " in page.words
    assert "math: 1 of 1 sample," in repr(store)


def test_levels_that_round_alike_are_told_apart(saved):
    """Sparsities of 99.5% and 99.9% are two rows of the figure, and neither is called 100%."""
    config = dataclasses.replace(QUICK, masks=MasksConfig(sparsities=(0.9, 0.995, 0.999)))
    report = fs.analyze(saved.report.store_path, ["masks", "overlap"], config, quiet=True)
    names = [
        trace["y"] for trace in figures_of(report["overlap"])[0].plot["data"] if trace["mode"] == "markers"
    ]
    assert len(set(names[0])) == len(names[0]) == 9
    assert "at 99.9% sparsity" in report["masks"].summary()
    assert "100% sparsity" not in report.summary()


def test_intervals_of_f_do_not_go_below_zero(layout, tmp_path):
    """Few samples of very different size: Student's interval of F would reach below 0, which F cannot."""
    tasks = {name: make_task(layout, name, 3, seed) for seed, name in enumerate(("math", "code"))}
    for gradients in tasks["math"].gradients.values():
        gradients[1:] *= 1e-3
    report = fs.analyze(write_store(tmp_path / "run.fs", layout, tasks).store, ["fisher"], QUICK, quiet=True)
    frame = report["fisher"].frame
    assert (frame["ci_low"] == 0).any()
    assert (frame["ci_low"].dropna() >= 0).all()
    assert (frame["ci_low"] <= frame["mean"]).all()
    assert "(0 to " in report["fisher"].summary()
