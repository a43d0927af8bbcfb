"""From what users hold to the model inside it: wrappers, PEFT, compiled models, and what is refused."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn

import fisherscope as fs
from fisherscope.adapters.injected import plain_layer, projection
from fisherscope.adapters.unwrap import uncompiled, unwrap, unwrap_pipeline
from fisherscope.errors import AdapterError
from tests import models

TOLERANCE = 1e-5
EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
# PEFT calls something in transformers by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUERY = "model.layers.0.self_attn.q_proj"


def llama() -> nn.Module:
    return models.build(models.named("llama"))


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, models.VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def replaced(path: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    """A model with one module changed for another."""
    model = llama()
    model.set_submodule(path, make(model.get_submodule(path)))
    return model


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def distributed_data_parallel(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


# ---- wrappers


@pytest.mark.parametrize("setting", models.SETTINGS, ids=lambda s: s.name)
def test_a_plain_model_is_itself(setting: models.Setting) -> None:
    """A model with nothing around it comes back, in whatever floating-point dtype, and none is refused."""
    model = models.build(setting)
    assert unwrap(model) is model
    assert unwrap(model.to(torch.bfloat16)) is model
    assert unwrap(model.to(torch.float16)) is model


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrappers",
    [
        [nn.DataParallel],
        [distributed_data_parallel],
        [compiled],
        [compiled, distributed_data_parallel],
        [distributed_data_parallel, compiled],
        [compiled, nn.DataParallel, compiled, distributed_data_parallel],
    ],
)
def test_wrappers_are_taken_off_in_any_order(wrappers: list[Callable[[Any], Any]]) -> None:
    """Under compiled and data-parallel wrappers lies the very model that was wrapped."""
    model = wrapped = llama()
    for wrapper in wrappers:
        wrapped = wrapper(wrapped)
    assert wrapped is not model
    assert unwrap(wrapped) is model


@pytest.mark.usefixtures("process_group")
def test_a_distributed_model_is_collected_and_still_trains(tmp_path: Path) -> None:
    """What is collected through DDP equals the model's own, and DDP's backward pass works afterwards."""
    model, data = llama(), models.rows(4)
    plain = fs.wrap(model).collect({"a": data}, tmp_path / "plain.fs", extensions=EXACT, quiet=True)
    wrapped = distributed_data_parallel(model)
    scope = fs.wrap(wrapped)
    store = scope.collect({"a": data}, tmp_path / "ddp.fs", extensions=EXACT, quiet=True)
    assert scope.model is model
    for name in scope.parameters:
        assert torch.equal(store.gradients("a", name), plain.gradients("a", name))
    wrapped(input_ids=torch.tensor([data[0]["input_ids"]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def deepspeed_engine(model: nn.Module) -> nn.Module:
    """DeepSpeed cannot run here: a module of its engine's name that holds the model as the engine does."""
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = model
    return engine


def test_an_engine_of_deepspeed_holds_the_model() -> None:
    """Up to stage 2 the module in the engine has whole weights; stage 3 marks its parameters."""
    model = llama()
    engine = deepspeed_engine(model)
    assert unwrap(engine) is model
    next(model.parameters()).ds_id = 0
    with pytest.raises(AdapterError, match=r"embed_tokens.*ZeRO-3"):
        unwrap(engine)


def test_optional_libraries_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a user may not have is imported to look at a model."""
    for name in ("peft", "deepspeed", "accelerate", "torchao", "bitsandbytes", "torch._dynamo"):
        monkeypatch.setitem(sys.modules, name, None)
    model = llama()
    assert unwrap(nn.DataParallel(model)) is model
    with uncompiled(model):
        logits(model)


# ---- compiled models


class Counting:
    """A compiler that runs the graph as it is and counts the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Any, _inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return run


def compile_whole(model: nn.Module, backend: Counting) -> None:
    model.compile(backend=backend)


def compile_layers(model: nn.Module, backend: Counting) -> None:
    for layer in model.model.layers:
        layer.compile(backend=backend)


def compile_forward(model: nn.Module, backend: Counting) -> None:
    model.forward = torch.compile(model.forward, backend=backend)


IN_PLACE = [compile_whole, compile_layers, compile_forward]


@pytest.mark.parametrize("compile_in_place", IN_PLACE)
def test_hooks_fire_while_uncompiled(compile_in_place: Callable[[nn.Module, Counting], None]) -> None:
    """Compiled code runs past new hooks; inside ``uncompiled`` they fire; afterwards it is used again."""
    torch._dynamo.reset()
    model, backend = llama(), Counting()
    expected = logits(model)
    compile_in_place(model, backend)
    logits(model)
    made = backend.calls
    assert made > 0
    fired = []
    handle = model.get_submodule(QUERY).register_forward_hook(lambda *_: fired.append(1))
    with uncompiled(unwrap(model)):
        found = logits(model)
    assert len(fired) == 1
    assert backend.calls == made
    assert torch.equal(found, expected)
    logits(model)
    assert backend.calls == 2 * made
    assert len(fired) == 1, "hooks that compiled code calls would need no help"
    handle.remove()


def test_uncompiled_ends_with_an_error() -> None:
    """After an exception compiled code runs again."""
    torch._dynamo.reset()
    model, backend = llama(), Counting()
    compile_whole(model, backend)
    with pytest.raises(KeyError), uncompiled(model):
        raise KeyError
    logits(model)
    assert backend.calls > 0


def test_functions_compiled_for_themselves_stay_compiled() -> None:
    """Where no module is compiled, ``uncompiled`` leaves alone what a forward pass calls."""
    torch._dynamo.reset()
    backend = Counting()
    double = torch.compile(lambda x: 2 * x, backend=backend)
    with uncompiled(llama()):
        double(torch.ones(2))
    assert backend.calls == 1


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # of dynamo
@pytest.mark.parametrize("compile_in_place", IN_PLACE)
def test_a_model_compiled_in_place_is_collected(
    compile_in_place: Callable[[nn.Module, Counting], None], tmp_path: Path
) -> None:
    """Also after its compiled code has run: the gradients are those of the model before."""
    torch._dynamo.reset()
    model, data, backend = llama(), models.rows(4), Counting()
    plain = fs.wrap(model).collect({"a": data}, tmp_path / "plain.fs", extensions=EXACT, quiet=True)
    compile_in_place(model, backend)
    model(input_ids=torch.tensor([data[0]["input_ids"]] * 2), use_cache=False)
    made = backend.calls
    scope = fs.wrap(model)
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, quiet=True)
    assert backend.calls == made
    for name in scope.parameters:
        assert torch.equal(store.gradients("a", name), plain.gradients("a", name))


def test_a_part_replaced_by_a_compiled_one_is_refused() -> None:
    """``model.layers[0] = torch.compile(...)`` renames parameters; the message names the module."""
    with pytest.raises(AdapterError, match=r"model\.layers\.0 has been replaced.*\.compile\(\)"):
        unwrap(replaced("model.layers.0", compiled))


# ---- PEFT


def lora(**changes: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"target_modules": LINEAR, "r": 3, "init_lora_weights": False} | changes))


def _tuner(name: str, **changes: Any) -> Callable[[], peft.PeftConfig]:
    def make() -> peft.PeftConfig:
        kind = getattr(peft, name)
        known = inspect.signature(kind).parameters
        options = {"target_modules": LINEAR, "r": 4, "init_weights": False} | changes
        return kind(**{option: value for option, value in options.items() if option in known})

    return make


TUNERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "adalora": lambda: peft.AdaLoraConfig(target_modules=LINEAR, init_r=4, total_step=10),
    "c3a": _tuner("C3AConfig", block_size=8),
    "delora": _tuner("DeloraConfig"),
    "dora": lambda: lora(use_dora=True),
    "fourierft": _tuner("FourierFTConfig", n_frequency=10),
    "gralora": _tuner("GraloraConfig"),
    "ia3": _tuner("IA3Config", feedforward_modules=["o_proj", "down_proj"]),
    "ln_tuning": _tuner("LNTuningConfig", target_modules=["input_layernorm"]),
    "loha": _tuner("LoHaConfig"),
    "lokr": _tuner("LoKrConfig"),
    "lora": lora,
    "miss": _tuner("MissConfig"),
    "oft": _tuner("OFTConfig", r=0, oft_block_size=4),
    "rslora": lambda: lora(use_rslora=True),
    "vblora": _tuner("VBLoRAConfig", num_vectors=8, vector_length=4),
    "vera": _tuner("VeraConfig"),
    "waveft": _tuner("WaveFTConfig", n_frequency=10),
}


def adapted(config: peft.PeftConfig) -> peft.PeftModel:
    """A model with an adapter that changes what it computes."""
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return model


@pytest.mark.filterwarnings("ignore:Unsupported layer type .*RMSNorm:UserWarning")  # of LN tuning
@pytest.mark.parametrize("tuner", TUNERS)
def test_an_adapter_calls_the_layer_it_wraps(tuner: str) -> None:
    """The model inside computes what PEFT's does, and a layer's whole gradient passes through its calls."""
    peft_model = adapted(TUNERS[tuner]())
    model = unwrap(peft_model)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert torch.equal(logits(model), logits(peft_model))
    assert float((logits(model) - logits(llama())).abs().max()) > 1e-4
    layers = [plain_layer(m) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    layers = [layer for layer in layers if isinstance(layer, nn.Linear)]
    through_calls = {layer: torch.zeros_like(layer.weight) for layer in layers}

    def watch(layer: nn.Module, args: Any, output: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            through_calls[layer] += gradient.flatten(0, -2).T @ args[0].detach().flatten(0, -2)

        output.register_hook(add)

    handles = [layer.register_forward_hook(watch) for layer in layers]
    model.requires_grad_(True)
    model(input_ids=torch.arange(3, 17).view(2, 7)).logits.square().sum().backward()
    for handle in handles:
        handle.remove()
    assert len(layers) == (0 if tuner == "ln_tuning" else 2 * len(LINEAR))
    for layer in layers:
        assert models.relative_error(through_calls[layer], layer.weight.grad) <= TOLERANCE


def _two_adapters() -> nn.Module:
    model = adapted(lora())
    model.add_adapter("other", lora(r=2, target_modules=["q_proj", "down_proj"]))
    return model


def _both_active() -> nn.Module:
    model = _two_adapters()
    model.base_model.set_adapter(["default", "other"])
    return model


def _merged() -> nn.Module:
    model = adapted(lora())
    model.merge_adapter()
    return model


def _disabled() -> nn.Module:
    model = adapted(lora())
    model.base_model.disable_adapter_layers()
    return model


def _mixed() -> nn.Module:
    model = peft.get_peft_model(llama(), TUNERS["loha"](), mixed=True)
    model.add_adapter("other", TUNERS["lokr"]())
    model.set_adapter(["default", "other"])
    return model


def _injected() -> nn.Module:
    model = llama()
    try:
        model.add_adapter(lora())
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} takes no peft {peft.__version__}: {error}")
    return model


STATES: dict[str, Callable[[], nn.Module]] = {
    "one adapter": lambda: adapted(lora()),
    "for a task": lambda: adapted(lora(task_type="CAUSAL_LM")),
    "two adapters": _two_adapters,
    "both active": _both_active,
    "merged": _merged,
    "disabled": _disabled,
    "mixed": _mixed,
    "injected by transformers": _injected,
    "compiled": lambda: compiled(adapted(lora())),
    "around a compiled model": lambda: peft.get_peft_model(compiled(llama()), lora()),
    "with copies": lambda: adapted(lora(target_modules=["q_proj"], modules_to_save=["mlp", "embed_tokens"])),
}


@pytest.mark.parametrize("state", STATES)
def test_the_model_under_peft_computes_the_same(state: str) -> None:
    """In every state; and the path of a projection names a plain layer of the model, which is called."""
    held = STATES[state]().eval()
    model = unwrap(held)
    assert type(model) is transformers.LlamaForCausalLM
    names = dict(model.named_parameters())
    paths = [f"model.layers.1.{'self_attn' if i < 4 else 'mlp'}.{name}" for i, name in enumerate(LINEAR)]
    called = set()
    for path in paths:
        found, layer = projection(model.get_submodule, path)
        assert type(layer) is nn.Linear
        assert names[f"{found}.weight"] is layer.weight
        assert plain_layer(model.get_submodule(path)) is layer
        layer.register_forward_hook(lambda *_, path=path: called.add(path))
    assert torch.equal(logits(model), logits(held))
    assert called == set(paths)


def test_paths_of_projections() -> None:
    """The plain layer behind one adapter or two, in the copy that is in use, and where there is no PEFT."""
    query, mlp = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp"
    paths = {
        "one adapter": {query: f"{query}.base_layer"},
        "mixed": {query: f"{query}.base_layer.base_layer"},
        "with copies": {
            query: f"{query}.base_layer",
            f"{mlp}.up_proj": f"{mlp}.modules_to_save.default.up_proj",
            "model.embed_tokens": "model.embed_tokens.modules_to_save.default",
        },
    }
    for state, expected in paths.items():
        model = unwrap(STATES[state]())
        assert {path: projection(model.get_submodule, path)[0] for path in expected} == expected
    held = STATES["with copies"]()
    held.base_model.disable_adapter_layers()
    found, layer = projection(unwrap(held).get_submodule, f"{mlp}.up_proj")
    assert found == f"{mlp}.original_module.up_proj"
    assert layer is unwrap(held).get_submodule(found)
    assert projection(llama().get_submodule, query)[0] == query


def test_the_embedding_behind_an_adapter() -> None:
    """``plain_layer`` gives the embedding itself where PEFT has wrapped it."""
    model = unwrap(adapted(lora(target_modules=["embed_tokens", "q_proj"])))
    wrapped = model.get_input_embeddings()
    assert not hasattr(wrapped, "num_embeddings")
    assert plain_layer(wrapped).num_embeddings == models.VOCABULARY


@pytest.mark.parametrize("state", ["one adapter", "both active", "merged", "with copies"])
def test_a_lora_model_is_collected(state: str, tmp_path: Path) -> None:
    """Per-sample gradients of the adapters' matrices and of the frozen weights, against the loop.

    In float64: behind random adapters the loop in float32 itself is 1e-5 off, more or less by the processor.
    """
    held, data = STATES[state]().double(), models.rows(5)
    frozen = {name: parameter.requires_grad for name, parameter in held.named_parameters()}
    scope = fs.wrap(held, parameters="all")
    store = scope.collect({"a": data}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, quiet=True)
    assert {name: parameter.requires_grad for name, parameter in held.named_parameters()} == frozen
    model = unwrap(held)
    assert scope.model is model
    model.requires_grad_(True)
    expected = models.loop(model, data)
    found = {name.removeprefix(QUERY) for name in scope.parameters if name.startswith(QUERY)}
    matrices = {".lora_A.default.weight", ".lora_B.default.weight"}
    assert found >= {".base_layer.weight"} | (matrices if state != "merged" else set())
    for name in scope.parameters:
        gradients = torch.stack([sample[name] for sample in expected])
        assert models.relative_error(store.gradients("a", name), gradients) <= TOLERANCE, name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("PromptEncoderConfig", {"num_virtual_tokens": 3}),
    ],
)
def test_virtual_tokens_are_refused(name: str, options: dict[str, Any]) -> None:
    """They live in PEFT's forward: the model inside computes something else, as the test sees."""
    config = getattr(peft, name)(task_type="CAUSAL_LM", **options)
    held = peft.get_peft_model(llama(), config).eval()
    if name != "PrefixTuningConfig":
        assert logits(held).shape != logits(held.get_base_model()).shape
    with pytest.raises(AdapterError, match=r"'default'.*virtual tokens.*get_base_model"):
        unwrap(held)
    assert isinstance(unwrap(held.get_base_model()), transformers.LlamaForCausalLM)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdaptionPromptConfig", {"adapter_layers": 1, "adapter_len": 3}),
        ("HiraConfig", {"target_modules": ["q_proj"]}),
        ("ShiraConfig", {"target_modules": ["q_proj"], "r": 2}),
        ("TrainableTokensConfig", {"token_indices": [3]}),
        ("XLoraConfig", {"hidden_size": 32, "adapters": {}}),
    ],
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # X-LoRA of no adapters
def test_adapters_that_use_weights_otherwise_are_refused(name: str, options: dict[str, Any]) -> None:
    """Where a weight's gradient does not pass through its layer's call, or PEFT's forward is needed."""
    model = llama()
    model.config.use_cache = False
    held = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **options))
    with pytest.raises(
        AdapterError, match=r"'default' is of type .*gradients would be lost.*merge_and_unload"
    ):
        unwrap(held)


def _injected_hira() -> nn.Module:
    return peft.inject_adapter_in_model(peft.HiraConfig(target_modules=["q_proj"]), llama())


def _adapter_of_experts() -> nn.Module:
    model = models.build(models.named("mixtral"))
    return peft.get_peft_model(
        model, lora(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    )


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (_injected_hira, "HiraLayer|hira.layer.Linear"),
        (_adapter_of_experts, "ParamWrapper"),
        (lambda: adapted(lora(task_type="CAUSAL_LM", alora_invocation_tokens=[3])), "ALora"),
        (lambda: adapted(lora(trainable_token_indices=[3])), "TrainableTokensLayer"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*target_parameters.*")
def test_layers_that_use_weights_otherwise_are_refused(make: Callable[[], nn.Module], kind: str) -> None:
    """Also where nothing but the layers tells: injected ones, LoRA of stacked experts, LoRA's variants."""
    with pytest.raises(AdapterError, match=rf"^model\..* an adapter of type .*({kind}).*merge_and_unload"):
        unwrap(make())


def test_a_layer_of_another_package_is_refused() -> None:
    """A layer type that somebody derived from PEFT's may do anything."""

    class Own(nn.Module, BaseTunerLayer):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    with pytest.raises(AdapterError, match=rf"^{QUERY} has an adapter of type .*Own"):
        unwrap(replaced(QUERY, Own))


def test_an_adapter_that_is_merged_for_good_is_no_matter() -> None:
    """The next step that the messages name works."""
    held = adapted(_tuner("HiraConfig")())
    expected = logits(held)
    merged = held.merge_and_unload()
    assert models.relative_error(logits(unwrap(merged)), expected) <= TOLERANCE


# ---- sharded models


def _fsdp(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def _fsdp_of_a_layer(model: nn.Module) -> nn.Module:
    model.model.layers[1] = _fsdp(model.model.layers[1])
    return model


def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))


def _fully_shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=_mesh())
    return model


def _tensor_parallel(model: nn.Module) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallelize_module(model, _mesh(), {QUERY: ColwiseParallel()})
    return model


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
@pytest.mark.filterwarnings("ignore:When using ``NO_SHARD``")
@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (_fsdp, r"the model is sharded by FSDP"),
        (_fsdp_of_a_layer, r"model\.layers\.1 is sharded by FSDP"),
        (_fully_shard, r"the model is sharded by FSDP"),
        (_tensor_parallel, r"q_proj\.weight is a DTensor"),
    ],
)
def test_sharded_models_are_refused(shard: Callable[[nn.Module], nn.Module], message: str) -> None:
    """The message names what is sharded, and the next step that it names gives the whole model back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = llama()
    sharded = shard(copy.deepcopy(model))
    with pytest.raises(AdapterError, match=rf"{message}.*get_model_state_dict"):
        fs.wrap(sharded)
    weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    whole = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    whole.load_state_dict(weights)
    assert torch.equal(logits(unwrap(whole)), logits(model))


# ---- pipelines


def test_a_pipeline_brings_model_and_tokenizer() -> None:
    """Its own tokenizer is used unless another one is given."""
    model = fs_demo_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_path())
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    assert unwrap_pipeline(pipeline) == (model, tokenizer)
    other = models.PadsOnTheLeft()
    assert unwrap_pipeline(pipeline, other) == (model, other)
    assert unwrap_pipeline(model) == (model, None)
    scope = fs.wrap(pipeline)
    assert scope.model is model
    assert scope.tokenizer is tokenizer


def demo_path() -> Path:
    return Path(fs.__file__).parent / "demo" / "model"


def fs_demo_model() -> nn.Module:
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(demo_path())
    return model


# ---- quantised models


class Packed(Tensor):
    """A tensor that is made of others, as quantised weights of torchao and quanto are."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["codes"], self.scale

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].codes, args[0].scale)


def _packed(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(Packed(torch.ones(layer.weight.shape, dtype=torch.int8), 0.5))
    return layer


def _float8(layer: nn.Linear) -> nn.Module:
    return layer.to(torch.float8_e4m3fn)


def _integer(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return layer


def _integer_buffers(layer: nn.Linear) -> nn.Module:
    """The form of GPTQ and AWQ: packed codes in buffers, and no parameter at all."""
    out = nn.Module()
    out.in_features, out.out_features = layer.in_features, layer.out_features
    out.register_buffer("qweight", torch.zeros(layer.in_features // 8, layer.out_features, dtype=torch.int32))
    return out


@pytest.mark.parametrize("quantise", [_packed, _float8, _integer, _integer_buffers])
def test_quantised_layers_are_refused(quantise: Callable[[nn.Linear], nn.Module]) -> None:
    """By the layer's class, the type of its weight, or packed codes; the message names the layer."""
    path = "model.layers.1.mlp.up_proj"
    with pytest.raises(AdapterError, match=rf"{path} .*quantised.*without quantization_config"):
        fs.wrap(replaced(path, quantise))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantised_models_are_refused() -> None:
    """``quantize_dynamic`` leaves no weight among the parameters."""
    model = torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(AdapterError, match=rf"{QUERY} is a torch.ao.nn.quantized.*quantised"):
        fs.wrap(model)


def test_the_weights_decide_whether_a_model_is_quantised(tmp_path: Path) -> None:
    """What came from GGUF, or was dequantised, keeps the marks of it, and is collected from all the same."""
    model = llama()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    assert unwrap(model) is model
    store = fs.wrap(model).collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True)
    assert store.proofs()["a"]["proved"] == 1


def test_packed_weights_of_any_layer_are_refused_where_the_model_says_so() -> None:
    """A layer of unknown class with a table of small integers is no plain one in a quantised model."""

    def codes(layer: nn.Linear) -> nn.Module:
        out = _integer_buffers(layer)
        del out.in_features, out.out_features
        return out

    path = "model.layers.1.mlp.up_proj"
    model = replaced(path, codes)
    model.is_quantized = True
    with pytest.raises(AdapterError, match=rf"{path} has a qweight .*quantised"):
        fs.wrap(model)


# ---- offloaded models


def _never_loaded() -> nn.Module:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(models.named("llama").config())


def _offloaded() -> nn.Module:
    return accelerate.cpu_offload(llama(), execution_device="cpu")


def _offloaded_layer() -> nn.Module:
    model = llama()
    accelerate.cpu_offload(model.model.layers[1], execution_device="cpu", offload_buffers=True)
    return model


def _moved_as_a_whole() -> nn.Module:
    model, _ = accelerate.cpu_offload_with_hook(llama(), execution_device="cpu")
    return model


def _meta_buffer() -> nn.Module:
    model = llama()
    model.model.rotary_emb.to("meta")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_never_loaded, r"parameters or buffers have no data \(model\.embed_tokens\.weight"),
        (_meta_buffer, r"parameters or buffers have no data \(model\.rotary_emb"),
        (_offloaded, r"is offloaded: accelerate"),
        (_offloaded_layer, r"model\.layers\.1\S* is offloaded: accelerate"),
        (_moved_as_a_whole, r"the model is offloaded: accelerate"),
    ],
)
def test_models_without_their_weights_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    """Never loaded, or brought in by accelerate while a layer runs."""
    with pytest.raises(AdapterError, match=rf"{message}.*load it whole"):
        fs.wrap(make())


def test_a_model_that_accelerate_only_dispatches_is_fine() -> None:
    """Hooks that move inputs between devices, and no weights, are no reason to refuse."""
    model = llama()
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(model.model.layers[0], hook)
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.SequentialHook(hook, hook))
    assert unwrap(model) is model


# ---- what is not a model


class Holder(nn.Module):
    """A training module with the model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.network = llama()


def _own_config() -> nn.Module:
    model = nn.Linear(2, 2)
    model.config = types.SimpleNamespace(n_layer=2)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "gpt2", r"'gpt2' is the name.*AutoModelForCausalLM\.from_pretrained\('gpt2'\)"),
        (lambda: Path("runs") / "last", r"from_pretrained\('runs.last'\)"),
        (lambda: models.named("llama").config(), r"LlamaConfig is a config.*from_config"),
        (
            lambda: transformers.AutoTokenizer.from_pretrained(demo_path()),
            r"is a tokenizer.*wrap\(model, tokenizer\)",
        ),
        (lambda: None, r"None is not a model: pass a transformers model"),
        (lambda: 3, r"3 is not a model: pass a transformers model"),
        (lambda: transformers.AutoModelForCausalLM, r"AutoModelForCausalLM is a class"),
        (lambda: llama().state_dict(), r"a OrderedDict is not a model.*load_state_dict"),
        (lambda: types.SimpleNamespace(model=llama()), r"SimpleNamespace is not a model.*pass its \.model"),
        (lambda: nn.Linear(2, 2), r"Linear has no HuggingFace config: pass a transformers model"),
        (_own_config, r"Linear has no HuggingFace config: pass a transformers model"),
        (
            Holder,
            r"Holder has no HuggingFace config, but holds a LlamaForCausalLM: .* model\.network",
        ),
    ],
)
def test_what_is_not_a_model_is_told_what_to_pass(make: Callable[[], Any], message: str) -> None:
    """Names, configs, tokenizers, classes, weights and modules of other kinds."""
    with pytest.raises(AdapterError, match=message):
        fs.wrap(make())
