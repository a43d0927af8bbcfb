"""Collections through whatever may be around a model equal the literal loop over the model inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from torch import Tensor, distributed, nn

import fisherscope as fs
from fisherscope.errors import AdapterError
from tests import models

TOLERANCE = 1e-5
EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))
# PEFT calls something in transformers by its former name; the last one is dynamo's
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield
    distributed.destroy_process_group()


def llama() -> Any:
    return models.build(models.named("llama"))


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=3, init_lora_weights=False))


def distributed_data_parallel(model: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model)


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    torch._dynamo.reset()
    model.compile(backend="eager")
    model(input_ids=torch.arange(3, 12)[None])
    return model


def dispatched(model: Any) -> Any:
    """A device map that puts the parts of a model in several places, all of which are the CPU here."""
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    hooked = [m for m in model.modules() if hasattr(m, "_hf_hook")]
    assert len(hooked) >= len(places)
    return model


WRAPPINGS: dict[str, list[Callable[[Any], Any]]] = {
    "DataParallel": [nn.DataParallel],
    "DDP": [distributed_data_parallel],
    "compiled": [compiled],
    "compiled in place": [compiled_in_place],
    "compiled in DDP": [compiled, distributed_data_parallel],
    "DDP, compiled": [distributed_data_parallel, compiled],
    "device map": [dispatched],
    "device map, DDP": [dispatched, distributed_data_parallel],
    "LoRA": [with_lora],
    "LoRA in DDP": [with_lora, distributed_data_parallel],
    "LoRA, compiled, in DDP": [with_lora, compiled, distributed_data_parallel],
    "LoRA on a device map": [dispatched, with_lora],
    "LoRA around a compiled model": [compiled, with_lora],
}


def loop(model: nn.Module, data: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Gradients of each sample by itself, ``[n, *shape]``, of a copy with nothing around it."""
    alone = copy.deepcopy(model).requires_grad_(True)
    found = models.loop(alone, data)
    return {name: torch.stack([sample[name] for sample in found]) for name in found[0]}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_is_collected_equals_the_loop(wrapping: str, tmp_path: Path) -> None:
    """Every parameter by "all", and heads of every block; the model is left as it was."""
    data = models.rows(5)
    plain = with_lora(llama()).get_base_model() if "LoRA" in wrapping else llama()
    expected = loop(plain.eval(), data)
    held = llama()
    for wrapper in WRAPPINGS[wrapping]:
        held = wrapper(held)
    held.train()
    before = {name: (p.requires_grad, p.grad) for name, p in held.named_parameters()}
    scope = fs.wrap(held, parameters="all")
    store = scope.collect(
        {"a": data}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, durability="none", quiet=True
    )
    assert type(scope.model) is transformers.LlamaForCausalLM
    assert set(scope.parameters) == set(expected)
    for name in scope.parameters:
        assert models.relative_error(store.gradients("a", name), expected[name]) <= TOLERANCE, name
    blocks = {block.name for block in store.layout.attention[1].blocks}
    assert blocks == {"Q", "K", "V", "O"} | (
        {"Q.default", "V.default", "O.default"} if "LoRA" in wrapping else set()
    )
    groups = store.groups("a")
    squares = torch.from_numpy(store.group_values("a")["square"].to_numpy()).float()
    places = ["kind", "layer", "block", "index", "part"]
    of_group = {tuple(row): i for i, row in enumerate(groups[places].itertuples(index=False))}
    for attention, block in store.layout.head_blocks():
        for head, piece in enumerate(block.weight):
            by_hand = piece.take(expected[piece.parameter]).flatten(1).square().sum(1)
            found = squares[:, of_group["head", attention.layer, block.name, head, "weight"]]
            assert models.relative_error(found, by_hand) <= 1e-4
    assert all(module.training for module in held.modules())
    assert {name: (p.requires_grad, p.grad) for name, p in held.named_parameters()} == before


@pytest.mark.usefixtures("process_group")
def test_a_wrapped_model_trains_afterwards(tmp_path: Path) -> None:
    """DDP's and PEFT's own backward pass finds the gradients that it trains, and no others."""
    held = distributed_data_parallel(with_lora(llama()))
    fs.wrap(held).collect({"a": models.rows(3)}, tmp_path / "run.fs", quiet=True, batch_size=3)
    held(input_ids=torch.arange(3, 12)[None]).logits.sum().backward()
    for name, parameter in held.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)


# ---- what is refused


def _on_disk(model: Any, folder: Path) -> Any:
    places = {"model": "cpu", "lm_head": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def _on_meta(model: Any, _folder: Path) -> Any:
    return model.to("meta")


def _a_layer_on_meta(model: Any, _folder: Path) -> Any:
    model.model.layers[1].to("meta")
    return model


def _brought_in(model: Any, _folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def _adapter_offloaded(model: Any, folder: Path) -> Any:
    return with_lora(_on_disk(model, folder))


def _sharded(model: Any, _folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    return model


def _adapter_sharded(model: Any, folder: Path) -> Any:
    return with_lora(_sharded(model, folder))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_on_disk, r"lm_head is offloaded: accelerate.*load it whole"),
        (_on_meta, r"parameters or buffers have no data \(.*was never loaded; load it whole"),
        (_a_layer_on_meta, r"have no data \(model\.layers\.1\."),
        (_brought_in, r"offloaded: accelerate brings its weights only while it runs"),
        (_adapter_offloaded, r"offloaded: accelerate"),
        (_sharded, r"model\.layers\.0 is sharded by FSDP \(FSDPModule\).*get_model_state_dict"),
        (_adapter_sharded, r"sharded by FSDP"),
    ],
)
def test_models_without_whole_weights_are_refused(
    make: Callable[[Any, Path], Any], message: str, tmp_path: Path
) -> None:
    """On disk, on meta, or sharded, also with LoRA inside: the error names the part and the way out."""
    held = make(llama(), tmp_path)
    with pytest.raises(AdapterError, match=message):
        fs.wrap(held)
