"""``fisherscope adapters``: what is known, and what is found in a model."""

import json

import pytest
import torch
import transformers

from fisherscope.adapters import known_model_types
from fisherscope.cli import app


def test_the_table_names_every_model_type(run):
    result = run("adapters", "--json")
    listed = [name for entry in json.loads(result.stdout) for name in entry["model_types"]]
    assert sorted(listed) == known_model_types()
    assert all(entry["layout"].endswith(".") and entry["adapter"] for entry in json.loads(result.stdout))
    assert "fisherscope adapters check MODEL" in run("adapters").output


def test_check_shows_layout_coverage_and_verdict(run, model_dir):
    result = run("adapters", "check", str(model_dir), "--parameters")
    assert result.exit_code == 0, result.output
    assert "Q+ K+ V+ O" in result.output
    assert (
        "confirmed: every head (8) of 2 attention layers, described by a registered adapter" in result.output
    )
    assert "per_group" in result.output
    facts = json.loads(run("adapters", "check", str(model_dir), "--json").stdout)
    assert facts["layout"]["attention"][0]["n_kv_heads"] == 2
    assert {row["kind"] for row in facts["coverage"]} >= {"attention", "mlp", "norm"}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """An encoder with a decoder, an encoder that nobody registered, and a model without heads."""
    out = {}
    torch.manual_seed(0)
    tokens = {"vocab_size": 40, "pad_token_id": 0}
    for name, config, auto in (
        (
            "t5",
            transformers.T5Config(d_model=16, d_kv=4, num_layers=1, num_heads=4, d_ff=24, **tokens),
            "Seq2SeqLM",
        ),
        (
            "distilbert",
            transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24, **tokens),
            "MaskedLM",
        ),
        (
            "bitnet",
            transformers.BitNetConfig(
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=24,
                **tokens,
            ),
            "CausalLM",
        ),
    ):
        path = tmp_path_factory.mktemp(name)
        getattr(transformers, f"AutoModelFor{auto}").from_config(config).save_pretrained(path)
        out[name] = str(path)
    return out


def test_check_takes_models_of_any_task(run, others):
    result = run("adapters", "check", others["t5"])
    assert result.exit_code == 0, result.output
    assert all(stack in result.output for stack in ("encoder", "decoder", "cross"))
    result = run("adapters", "check", others["distilbert"])
    assert "confirmed: every head (2) of 1 attention layer, found from the structure" in result.output


@pytest.mark.filterwarnings("default::UserWarning")
def test_check_says_what_is_missing(run, others):
    result = run("adapters", "check", others["bitnet"])
    assert result.exit_code == 0
    assert "no heads: modules and rows only" in result.output
    assert "register an adapter" in result.output or "fisherscope.adapters.register" in result.output
    strict = run("adapters", "check", others["bitnet"], "--strict")
    assert strict.exit_code == 1
    assert "no heads could be confirmed" in strict.output


def test_check_with_a_wrong_adapter(run, model_dir):
    result = run("adapters", "check", str(model_dir), "--adapter", "gpt2")
    assert result.exit_code == 1
    assert "no module" in result.output
    result = run("adapters", "check", str(model_dir / "nowhere"))
    assert result.exit_code == 1
    assert app.info.name == "fisherscope"
