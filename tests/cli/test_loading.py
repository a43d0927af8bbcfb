"""Models that cannot be loaded: one clear message each."""

import json
import shutil
import warnings

import pytest

import fisherscope as fs
from fisherscope.cli.loading import ModelLoadError, load_model, load_tokenizer, require_tokenizer


@pytest.fixture
def copy(model_dir, tmp_path):
    """A copy of the model that may be spoilt."""
    return shutil.copytree(model_dir, tmp_path / "copy")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_directory(model_dir, capfd):
    """Loads in eval mode with its tokenizer, silently."""
    import torch

    model = load_model(str(model_dir), device="cpu", dtype="bfloat16", attn="eager")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert load_tokenizer(str(model_dir)).decode([65, 66]) != ""
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def adapters(model_dir, tmp_path):
    """A directory of adapters, as PEFT writes it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        held = peft.get_peft_model(
            load_model(str(model_dir), device="cpu"), peft.LoraConfig(r=2, target_modules=["q_proj"])
        )
    for name, parameter in held.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    held.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


def _base(adapters, value):
    path = adapters / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": value}))


def test_a_directory_of_adapters(adapters, model_dir, tasks, run, tmp_path):
    """It is loaded with its base model, whose tokenizer it takes, and its matrices are what is collected."""
    result = run("collect", "--model", adapters, *tasks, "--out", tmp_path / "run.fs", "--quiet")
    assert result.exit_code == 0, result.stderr
    names = fs.open_store(tmp_path / "run.fs").parameters
    assert names
    assert all(".lora_" in name for name in names)
    # a base beside the adapters, as in a directory that was moved as a whole
    shutil.copytree(model_dir, adapters / "base")
    _base(adapters, "base")
    assert load_tokenizer(str(adapters)) is not None
    assert type(load_model(str(adapters), device="cpu")).__name__ == "PeftModel"


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, r"adapters of PEFT.*names no base_model_name_or_path"),
        ("/nowhere/base", "/nowhere/base: no such directory"),
    ],
)
def test_adapters_without_their_model(adapters, base, message):
    """The message says which model is missing."""
    _base(adapters, base)
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(adapters), device="cpu")
    _base(adapters, str(adapters))
    with pytest.raises(ModelLoadError, match="a directory of adapters itself"):
        load_model(str(adapters), device="cpu")


def test_a_model_without_a_head(model_dir, tasks, run, tmp_path):
    """One message that says how to load it with one, exit code 2, and nothing is written."""
    from transformers import Qwen2Model

    Qwen2Model.from_pretrained(model_dir).save_pretrained(tmp_path / "base")
    shutil.copy(model_dir / "tokenizer.json", tmp_path / "base")
    result = run("collect", "--model", tmp_path / "base", *tasks, "--out", tmp_path / "run.fs", "--quiet")
    assert result.exit_code == 2
    assert "Qwen2Model has no head that says what it predicts" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run.fs").exists()


def test_no_such_directory():
    """A path is never taken for the name of a model on the hub."""
    for source in ("./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"):
        with pytest.raises(ModelLoadError, match="no such directory"):
            load_model(source)


def test_nothing_on_the_hub():
    """Without a network the message says so, and names --revision and access."""
    with pytest.raises(ModelLoadError, match=r"nobody/nothing: no such directory.*from the hub.*--revision"):
        load_model("nobody/nothing")


def test_not_a_model(tmp_path):
    """A directory without config.json, and a file."""
    with pytest.raises(ModelLoadError, match=r"no config\.json.*save_pretrained"):
        load_model(str(tmp_path))
    file = tmp_path / "model.bin"
    file.touch()
    with pytest.raises(ModelLoadError, match="a file; give the directory"):
        load_model(str(file))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "foo"}, r"unknown model type 'foo' in transformers \d.*install a version"),
        ({"model_type": "vit"}, "not a causal language model"),
        ({"model_type": "foo", "auto_map": {"AutoConfig": "c.C"}}, "pass --trust-remote-code"),
        ({"model_type": "qwen2"}, "no file named"),
    ],
)
def test_configurations(tmp_path, config, message):
    """Unknown, of another kind, with code of its own, without weights."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(tmp_path))


def test_damaged_files(copy):
    """Weights that are none, and a configuration that is no JSON."""
    (copy / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelLoadError, match=r"(?i)header ?too ?small.*Save the model again"):
        load_model(str(copy))
    (copy / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not a valid JSON"):
        load_model(str(copy))


def test_missing_weights_are_said(copy):
    """Random weights would give a meaningless report."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"no weights for 1 parameter \(model\.layers\.0[^,]*\): it is random"
    ):
        load_model(str(copy), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn": "bogus"}, "bogus.*Choose another with --attn"),
        ({"device": "bogus"}, "--device bogus: no such device"),
        ({"device": "cuda:99"}, "--device cuda:99: torch .* sees"),
    ],
)
def test_options(model_dir, options, message):
    """Options that this machine cannot do."""
    with pytest.raises(ModelLoadError, match=message):
        load_model(str(model_dir), **options)


def test_no_tokenizer(copy):
    """transformers would make an empty one; tasks of ids need none, tasks of text are refused."""
    for file in copy.glob("*token*"):
        file.unlink()
    assert load_tokenizer(str(copy)) is None
    require_tokenizer(None, "m", {"a": [{"input_ids": [1, 2]}]})
    with pytest.raises(ModelLoadError, match=r"m: no tokenizer.*task 'b' has rows of text.*--tokenizer"):
        require_tokenizer(None, "m", {"a": [{"input_ids": [1, 2]}], "b": [{"text": "x"}]})


def test_damaged_tokenizer(copy):
    """Files that are there but broken are an error, not an absence."""
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="the tokenizer cannot be loaded"):
        load_tokenizer(str(copy))
