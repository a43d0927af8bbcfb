"""A store knows its model by what it computes: what changes numbers is refused, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import FingerprintError
from fisherscope.instrument.batch import Batch
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

ROWS = models.rows(8)
OPTIONS: dict[str, Any] = {"quiet": True, "extensions": ["fisher"], "batch_size": 3}


def llama(**changes: Any) -> Any:
    model: Any = models.build(models.named("llama")).eval()
    for name, value in changes.items():
        setattr(model.config, name, value)
    return model


def with_adapters() -> Any:
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(llama(), settings)
    model.add_adapter("other", settings)
    return model.eval()


def scaled_up(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling = {name: value * 1.05 for name, value in module.scaling.items()}


def one_head(model: Any) -> None:
    def louder(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., :8] *= 1.02
        return output

    model.model.layers[1].self_attn.v_proj.register_forward_hook(louder)


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 1.01


def config_of_numbers(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.01


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "LoRA scale x 1.05": (with_adapters, scaled_up, "adapter scaling"),
    "set_adapter": (with_adapters, lambda model: model.set_adapter("other"), "active adapters"),
    "adapters disabled": (
        with_adapters,
        lambda m: m.base_model.disable_adapter_layers(),
        "adapters disabled",
    ),
    "a hook on one head": (llama, one_head, "forward hooks of model.layers.1.self_attn.v_proj"),
    "a buffer that is not saved": (llama, buffer, "buffers"),
    "a number that a layer keeps": (llama, config_of_numbers, "Usual causes"),
}
PARAMETERS = ["*layers.1.self_attn.v_proj*", "*layers.0.self_attn.q_proj*"]


def scope_of(model: Any) -> fs.Scope:
    """The model's own weights, whatever adapters are active."""
    names = [name for name, _ in model.named_parameters() if "lora" not in name and "self_attn" in name]
    inner = [name.removeprefix("base_model.model.") for name in names]
    return fs.wrap(model, parameters=inner)


@pytest.mark.filterwarnings("ignore:.*chosen parameters are not instrumented")
@pytest.mark.parametrize("what", REFUSED)
def test_what_changes_numbers_is_refused(tmp_path: Path, what: str) -> None:
    """On resume, on growth and where gradients are computed again; what is different is said."""
    make, change, said = REFUSED[what]
    model, out = make(), tmp_path / "run.fs"
    store = scope_of(model).collect({"a": ROWS[:4]}, out, **OPTIONS)
    before = sorted(path.name for path in out.rglob("*"))
    change(model)
    for again in (
        lambda: scope_of(model).collect({"a": ROWS}, out, **OPTIONS),
        lambda: scope_of(model).collect({"b": ROWS}, out, **OPTIONS),
        lambda: scope_of(model).gradients(store, ["a_1"]),
        lambda: scope_of(model).factors(store, ["a_1"]),
    ):
        with pytest.raises(FingerprintError, match=said):
            again()
    assert sorted(path.name for path in out.rglob("*")) == before
    assert fs.open_store(out).n("a") == 4


def test_the_same_scope_is_asked_again(tmp_path: Path) -> None:
    """A model that is changed after its scope has collected is found out."""
    model = llama()
    scope = scope_of(model)
    store = scope.collect({"a": ROWS[:4]}, tmp_path / "run.fs", **OPTIONS)
    scope.gradients(store, ["a_1"])
    buffer(model)
    with pytest.raises(FingerprintError, match="computes something else"):
        scope.gradients(store, ["a_1"])


def test_autocast_switched_on_is_refused(tmp_path: Path) -> None:
    """By name on resume; by numbers where gradients are computed again."""
    scope = scope_of(llama())
    store = scope.collect({"a": ROWS[:4]}, tmp_path / "run.fs", **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(FingerprintError, match="autocast"):
            scope.collect({"a": ROWS}, tmp_path / "run.fs", **OPTIONS)
        with pytest.raises(FingerprintError, match="computes something else"):
            scope.gradients(store, ["a_1"])


def test_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    """Before anything is run."""
    store = scope_of(llama()).collect({"a": ROWS[:4]}, tmp_path / "run.fs", **OPTIONS)
    scope = scope_of(llama().to(torch.bfloat16))
    with pytest.raises(FingerprintError, match=r"dtype: 'float32' in the store, 'bfloat16' now"):
        scope.collect({"a": ROWS}, tmp_path / "run.fs", **OPTIONS)
    with pytest.raises(FingerprintError, match="in float32, and this one is in bfloat16"):
        scope.gradients(store, ["a_1"])


def saved(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path / "saved")
    return model


def reloaded(model: Any, tmp_path: Path) -> Any:
    model.save_pretrained(tmp_path / "saved")
    return type(model).from_pretrained(tmp_path / "saved").eval()


def set_config(**values: Any) -> Callable[[Any, Path], Any]:
    def change(model: Any, _tmp_path: Path) -> Any:
        for name, value in values.items():
            setattr(model.config, name, value)
        return model

    return change


def logging_hook(model: Any, _tmp_path: Path) -> Any:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    return model


def training(model: Any, _tmp_path: Path) -> Any:
    return model.train()


def frozen(model: Any, _tmp_path: Path) -> Any:
    return model.requires_grad_(False)


def eager(model: Any, _tmp_path: Path) -> Any:
    model.set_attn_implementation("eager")
    return model


def checkpointing(model: Any, _tmp_path: Path) -> Any:
    model.gradient_checkpointing_enable()
    return model


def threads(model: Any, _tmp_path: Path) -> Any:
    torch.set_num_threads(2 if torch.get_num_threads() == 1 else 1)
    return model


PASSES: dict[str, Callable[[Any, Path], Any]] = {
    "save_pretrained": saved,
    "loaded from disk": reloaded,
    "use_cache": set_config(use_cache=False),
    "architectures": set_config(architectures=["Other"]),
    "dtype of the config": set_config(dtype="bfloat16"),
    "name and version": set_config(_name_or_path="elsewhere", transformers_version="5.0.0"),
    "names of labels": set_config(id2label={0: "yes", 1: "no"}, label2id={"yes": 0, "no": 1}),
    "hidden states": set_config(output_hidden_states=True),
    "a hook that only looks": logging_hook,
    "training mode": training,
    "frozen": frozen,
    "another attention kernel": eager,
    "checkpointing": checkpointing,
    "another number of threads": threads,
}


@pytest.fixture
def _same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_same_threads")
@pytest.mark.parametrize("what", PASSES)
def test_what_changes_no_number_passes(tmp_path: Path, what: str) -> None:
    """The store grows, and gradients are had again."""
    scope_of(llama()).collect({"a": ROWS[:4]}, tmp_path / "run.fs", **OPTIONS)
    scope = scope_of(PASSES[what](llama(), tmp_path))
    store = scope.collect({"a": ROWS}, tmp_path / "run.fs", **OPTIONS)
    assert store.is_complete("a")
    assert scope.gradients(store, ["a_5"])
    noted = store.evidence("compared")
    assert bool(noted) == (what in {"another attention kernel", "another number of threads"})
    assert all(note["bit_identical"] is False for note in noted)


TEMPERATURE = 1.0
LIMITS = {"low": np.array([0.0]), "high": np.float32(1.0)}


def tempered(model: Any, batch: Batch, t: Any) -> Tensor:
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return F.cross_entropy(
        logits[:, :-1].mT / float(np.asarray(t).ravel()[0]), batch.labels[:, 1:], reduction="none"
    ).sum(1)


def closing(t: Any) -> Callable[..., Tensor]:
    return lambda model, batch: tempered(model, batch, t)


def by_global(model: Any, batch: Batch) -> Tensor:
    return tempered(model, batch, TEMPERATURE)


def through_another(model: Any, batch: Batch) -> Tensor:
    return by_global(model, batch)


def by_entry(model: Any, batch: Batch) -> Tensor:
    return tempered(model, batch, LIMITS["high"])


class Layer(nn.Module):
    def __init__(self, t: float, *, parameter: bool) -> None:
        super().__init__()
        self.t: Any = nn.Parameter(torch.tensor(t)) if parameter else t

    def forward(self, model: Any, batch: Batch) -> Tensor:
        return tempered(model, batch, self.t.detach() if isinstance(self.t, Tensor) else self.t)


class Holder:
    scale = 1.0

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return tempered(model, batch, self.scale)


OBJECTIVES: dict[str, tuple[Callable[[], Any], Callable[[pytest.MonkeyPatch], Any]]] = {
    "numpy scalar": (lambda: closing(np.float32(1)), lambda _m: closing(np.float32(5))),
    "numpy array": (lambda: closing(np.array([1.0])), lambda _m: closing(np.array([5.0]))),
    "tensor": (lambda: closing(torch.tensor(1.0)), lambda _m: closing(torch.tensor(5.0))),
    "attribute of a module": (
        lambda: Layer(1.0, parameter=False),
        lambda _m: Layer(5.0, parameter=False),
    ),
    "parameter of a module": (lambda: Layer(1.0, parameter=True), lambda _m: Layer(5.0, parameter=True)),
    "global": (lambda: by_global, lambda m: m.setitem(globals(), "TEMPERATURE", 5.0) or by_global),
    "global of another function": (
        lambda: through_another,
        lambda m: m.setitem(globals(), "TEMPERATURE", 5.0) or through_another,
    ),
    "entry of a global": (
        lambda: by_entry,
        lambda m: m.setitem(LIMITS, "high", np.float32(5)) or by_entry,
    ),
    "attribute of a class": (
        lambda: Holder().loss,
        lambda m: m.setattr(Holder, "scale", 5.0) or Holder().loss,
    ),
}


@pytest.mark.parametrize("what", OBJECTIVES)
def test_another_objective_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Numbers that a loss takes from anywhere; the very same loss, made again, goes on."""
    make, other = OBJECTIVES[what]
    scope = scope_of(llama())
    scope.collect({"a": ROWS[:4]}, tmp_path / "run.fs", objective=make(), **OPTIONS)
    scope.collect({"a": ROWS[:6]}, tmp_path / "run.fs", objective=make(), **OPTIONS)
    with pytest.raises(FingerprintError):
        scope.collect({"a": ROWS}, tmp_path / "run.fs", objective=other(monkeypatch), **OPTIONS)


def test_what_an_identity_cannot_see_the_probe_does(tmp_path: Path) -> None:
    """A loss that reads its temperature from a file."""
    file = tmp_path / "temperature"

    def from_file(model: Any, batch: Batch) -> Tensor:
        return tempered(model, batch, float(file.read_text()))

    file.write_text("1")
    scope = scope_of(llama())
    scope.collect({"a": ROWS[:4]}, tmp_path / "run.fs", objective=from_file, **OPTIONS)
    scope.collect({"a": ROWS[:6]}, tmp_path / "run.fs", objective=from_file, **OPTIONS)
    file.write_text("1.5")
    with pytest.raises(FingerprintError, match="computes something else"):
        scope.collect({"a": ROWS}, tmp_path / "run.fs", objective=from_file, **OPTIONS)


def test_odd_entries_of_a_state_dict(tmp_path: Path) -> None:
    """Masks of -inf, unused NaN, sparse and complex buffers, and state that is no tensor count and pass."""

    class Head(nn.Linear):
        calls = 3

        def get_extra_state(self) -> Any:
            return {"calls": self.calls}

        def set_extra_state(self, state: Any) -> None:
            pass

    def odd(calls: int = 3) -> Any:
        model = llama()
        model.model.register_buffer("causal", torch.full((4, 4), -torch.inf).triu(1))
        model.model.register_buffer("unused", torch.full((2,), torch.nan))
        model.model.register_buffer("turns", torch.polar(torch.ones(3), torch.arange(3.0)))
        model.model.register_buffer("sparse", torch.eye(3).to_sparse())
        head = Head(32, models.VOCABULARY, bias=False)
        head.weight, head.calls = model.lm_head.weight, calls
        model.lm_head = head
        return model

    scope_of(odd()).collect({"a": ROWS[:4]}, tmp_path / "run.fs", **OPTIONS)
    # what is no tensor may count calls: what it does, the probe tells
    assert scope_of(odd(4)).collect({"a": ROWS}, tmp_path / "run.fs", **OPTIONS).is_complete("a")


def test_what_a_store_knows_its_model_by_is_shown(tmp_path: Path) -> None:
    """Which samples, where, and how exactly; as strict JSON."""
    from fisherscope.store.inspect import describe

    store = scope_of(llama()).collect({"a": ROWS}, tmp_path / "run.fs", **OPTIONS)
    probe = json.loads(json.dumps(describe(store), allow_nan=False))["probe"]
    assert set(probe["samples"]) <= set(store.samples("a")["id"])
    assert probe["environment"]["torch"] == torch.__version__
    assert 0 <= probe["rounding"] < 1e-5 <= probe["tolerance_elsewhere"]
    assert probe["repeats"]


def test_growth_by_a_task_of_which_the_store_holds_no_data(tmp_path: Path) -> None:
    """Images are not stored: where the first task is not given again, the store says that digests decide."""
    model = models.build(models.named("vit"))
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 16, 16, generator=generator), "label": i % 5} for i in range(6)]
    scope = fs.wrap(model)
    scope.collect({"a": data[:4]}, tmp_path / "run.fs", **OPTIONS)
    store = scope.collect({"b": data[4:]}, tmp_path / "run.fs", **OPTIONS)
    (note,) = store.evidence("compared")
    assert note["compared"] is False
    assert "pass tasks=" in note["because"]
    store = scope.collect({"a": data}, tmp_path / "run.fs", **OPTIONS)
    assert len(store.evidence("compared")) == 1
