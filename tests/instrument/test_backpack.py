"""BackPACK's quantities on transformers models, and its extensions in a collection, against the loop."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fisherscope as fs
from fisherscope.errors import CoverageError, FisherscopeError, NotStoredError
from fisherscope.linalg import Dense
from tests import models
from tests.instrument.torch_states import STATES

pytest.importorskip("backpack")

import backpack as bp
from backpack.extensions import BatchGrad, BatchL2Grad, DiagGGNExact, SumGradSquared, Variance
from backpack.extensions.firstorder.base import FirstOrderBackpropExtension, FirstOrderModuleExtension

from fisherscope.instrument.backpack import FromBackpack, extend, register, restore

ROOT = Path(__file__).resolve().parent.parent.parent
TOLERANCE = 1e-5
SAVED = ("grad_batch", "sum_grad_squared", "batch_l2", "variance")
Loss = Callable[..., Tensor]


def four() -> list[Any]:
    """BackPACK's first-order extensions."""
    return [BatchGrad(), SumGradSquared(), BatchL2Grad(), Variance()]


def next_tokens(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Summed loss of the next tokens, ``[n]``."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return F.cross_entropy(logits.mT, labels[:, 1:], ignore_index=-100, reduction="none").sum(1)


def masked_tokens(model: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Summed loss of the labelled tokens of an encoder, ``[n]``."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    return F.cross_entropy(logits.mT, labels, ignore_index=-100, reduction="none").sum(1)


def batch(rows: list[dict[str, list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows padded on the right: ids, labels, mask."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
    labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return torch.tensor(ids), torch.tensor(labels), torch.tensor(mask)


def by_loop(model: nn.Module, data: list[dict[str, list[int]]], loss: Loss) -> dict[str, Tensor]:
    """Per-sample gradients, one unpadded sample and one backward pass at a time, ``[n, *shape]``."""
    found: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for row in data:
        model.zero_grad()
        loss(model, *batch([row])).sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            found[name].append(parameter.grad.clone())
    model.zero_grad()
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def quantities(gradients: Tensor) -> dict[str, Tensor]:
    """The four quantities as they are defined."""
    return {
        "grad_batch": gradients,
        "sum_grad_squared": gradients.square().sum(0),
        "batch_l2": gradients.square().flatten(1).sum(1),
        "variance": gradients.var(0, unbiased=False),
    }


def assert_equal_the_loop(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Every parameter has the four quantities of these per-sample gradients."""
    # a key bias moves all scores of a query alike: its gradient is rounding
    floor = 1e-3 * max(float(gradients.abs().max()) for gradients in expected.values())
    for name, parameter in model.named_parameters():
        for saved, values in quantities(expected[name]).items():
            found = getattr(parameter, saved)
            power = 1 if saved == "grad_batch" else 2
            assert found.shape == values.shape, (name, saved)
            assert models.relative_error(found, values, floor=floor**power) <= TOLERANCE, (name, saved)


def run(model: nn.Module, data: Any, loss: Loss = next_tokens, *extensions: Any, **options: Any) -> None:
    """One backward pass of the summed loss with extensions; all four by default."""
    total = loss(model, *batch(data)).sum()
    with bp.backpack(*(extensions or four()), **options):
        total.backward()


def tiny() -> nn.Module:
    """GPT-2: tied tokens, positions that all samples share, Conv1D, LayerNorm."""
    return models.build(models.named("gpt2"), layers=1)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("gpt2", next_tokens),
        ("llama-biases", next_tokens),
        ("qwen2-tied-mqa", next_tokens),
        ("qwen3-head-dim", next_tokens),
        ("gemma", next_tokens),
        ("opt", next_tokens),
        ("cohere", next_tokens),
        ("bert", masked_tokens),
    ],
)
def test_quantities_equal_the_loop(name: str, loss: Loss) -> None:
    """All four of every parameter: padded batch, tied tables, norms of heads, flattened layers; and .grad."""
    model, data = models.build(models.named(name), layers=1), models.rows(5)
    expected = by_loop(model, data, loss)
    assert extend(model) is model
    run(model, data, loss)
    assert_equal_the_loop(model, expected)
    floor = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        whole = expected[parameter_name].sum(0)
        assert models.relative_error(parameter.grad, whole, floor=floor) <= TOLERANCE, parameter_name


@pytest.mark.parametrize("state", ["float16", "bfloat16", "float64"])
def test_quantities_under_a_default_dtype(state: str) -> None:
    """In a training loop of the user's own, too, torch's default dtype decides nothing."""
    model, data = tiny(), models.rows(4)
    expected = by_loop(model, data, next_tokens)
    extend(model)
    with STATES[state]():
        run(model, data)
    assert_equal_the_loop(model, expected)


def test_a_mean_loss_gives_a_fraction() -> None:
    """As in BackPACK, quantities are those of the loss as it is given: a mean over N divides g_i by N."""
    model, data = extend(tiny()), models.rows(4)
    run(model, data)
    whole = {name: p.grad_batch.clone() for name, p in model.named_parameters()}
    with bp.backpack(BatchGrad()):
        next_tokens(model, *batch(data)).mean().backward()
    for name, parameter in model.named_parameters():
        assert models.relative_error(4 * parameter.grad_batch, whole[name]) <= TOLERANCE, name


def test_subsampling_chooses_samples() -> None:
    """``BatchGrad(subsampling=...)`` keeps the gradients of the samples it names, in that order."""
    model, data = extend(tiny()), models.rows(4)
    run(model, data)
    whole = {name: p.grad_batch.clone() for name, p in model.named_parameters()}
    run(model, data, next_tokens, BatchGrad(subsampling=[2, 0]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad_batch, whole[name][[2, 0]])


def plain_net(*shape: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    # BackPACK's own hooks make torch warn where no input requires a gradient
    return net, torch.randn(6, *shape, 5).requires_grad_()


@pytest.mark.parametrize("shape", [(), (4,)])
def test_plain_nets_give_what_backpack_gives(shape: tuple[int, ...]) -> None:
    """On linear layers both agree, and BackPACK's own results are what they were after ours have run."""

    def saved(net: nn.Module, extensions: list[Any]) -> list[Tensor]:
        total = net(x).square().sum()
        with bp.backpack(*extensions):
            total.backward()
        return [getattr(p, name).clone() for p in net.parameters() for name in SAVED]

    net, x = plain_net(*shape)
    own, extensions = bp.extend(copy.deepcopy(net)), four()
    before = saved(own, four())
    ours = saved(extend(net), extensions)
    for first, second in zip(before, ours, strict=True):
        torch.testing.assert_close(second, first)
    assert all(torch.equal(a, b) for a, b in zip(before, saved(own, four()), strict=True))
    for first, second in zip(before, saved(own, extensions), strict=True):
        torch.testing.assert_close(second, first)  # the same instances, under BackPACK's own hooks


def test_rules_under_backpacks_own_hooks() -> None:
    """An extension that rules are registered with serves BackPACK's ``extend``, where layers are plain."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(6, 5), nn.LayerNorm(6), nn.Linear(6, 2))
    nn.init.normal_(net[1].weight)
    x = torch.randn(4, 3, 5).requires_grad_()
    extension = BatchGrad()
    register(extension, Conv1D, nn.LayerNorm)
    total = bp.extend(net)(x).square().sum()
    with bp.backpack(extension):
        total.backward()
    for i in range(len(x)):
        expected = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert models.relative_error(parameter.grad_batch[i], gradient) <= TOLERANCE


def test_nothing_else_changes() -> None:
    """Outputs are bit for bit the same, and after ``restore`` nothing is left on modules or parameters."""
    model, data = tiny(), models.rows(4)
    inputs = batch(data)
    loss = next_tokens(model, *inputs).detach()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    attributes = {name: set(vars(p)) for name, p in model.named_parameters()}
    extend(model)
    assert extend(model) is model
    assert torch.equal(next_tokens(model, *inputs).detach(), loss)
    run(model, data)
    assert restore(model) is model
    assert restore(model) is model
    assert torch.equal(next_tokens(model, *inputs).detach(), loss)
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
    for name, parameter in model.named_parameters():
        assert set(vars(parameter)) == attributes[name]
        assert not parameter._backward_hooks
    model.zero_grad()
    next_tokens(model, *inputs).sum().backward()
    assert not hasattr(model.get_input_embeddings().weight, "grad_batch")  # type: ignore[operator]
    run(extend(model), data)
    assert hasattr(model.get_input_embeddings().weight, "grad_batch")  # type: ignore[operator]


def test_training_mode_with_dropout() -> None:
    """The gradients of samples are those of the dropout that was drawn: they add up to ``.grad``."""
    model = extend(tiny()).train()
    torch.manual_seed(3)
    run(model, models.rows(5))
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        floor = 1e-3 if "c_attn.bias" in name else 0.0
        assert models.relative_error(parameter.grad_batch.sum(0), parameter.grad, floor=floor) <= TOLERANCE


def test_frozen_parameters_are_left_out() -> None:
    """As in BackPACK, what needs no gradient gets no quantity; what is thawed later does."""
    model, data = tiny(), models.rows(4)
    expected = by_loop(model, data, next_tokens)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("c_attn" in name)
    extend(model)
    run(model, data)
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "grad_batch") == ("c_attn" in name)
        parameter.requires_grad_(True)
    run(model, data)
    assert_equal_the_loop(model, expected)


class Twice(nn.Module):
    """One layer called twice, and a table that is also a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.layer(self.table(ids)))
        return self.head(self.layer(x))  # type: ignore[no-any-return]


def test_layers_called_twice_and_tied() -> None:
    """The pieces of a parameter are added before anything is squared, in each of several backward passes."""
    torch.manual_seed(0)
    model, ids = extend(Twice()), torch.randint(9, (5, 4))
    total = model(ids).square().sum()
    expected: dict[str, list[Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for i in range(5):
        with bp.disable():
            gradients = torch.autograd.grad(model(ids[i : i + 1]).square().sum(), list(model.parameters()))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name].append(gradient)
    stacked = {name: torch.stack(gradients) for name, gradients in expected.items()}
    with bp.backpack(*four(), retain_graph=True):
        # a pass that stops before the parameters leaves nothing behind
        torch.autograd.grad(total, model.layer.bias, retain_graph=True)
        for _ in range(2):
            total.backward(retain_graph=True)
            assert_equal_the_loop(model, stacked)


def test_a_copy_is_on_its_own() -> None:
    """A deep copy of an extended model has hooks of its own, and results of its own."""
    model, data = extend(tiny()), models.rows(3)
    twin = copy.deepcopy(model)
    run(model, data)
    assert not any(hasattr(p, "grad_batch") for p in twin.parameters())
    run(twin, data)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad_batch, theirs.grad_batch)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool) -> None:
    """Layers that run again in the backward pass are counted once."""
    model, data = tiny(), models.rows(4)
    expected = by_loop(model, data, next_tokens)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})  # type: ignore[operator]
    extend(model)
    calls: list[nn.Module] = []
    layer: Any = model.get_submodule("transformer.h.0.attn.c_attn")
    layer.register_forward_hook(lambda module, *_: calls.append(module))
    run(model, data)
    assert len(calls) == 2
    assert_equal_the_loop(model, expected)


class Shared(nn.Module):
    """One layer in two checkpointed parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return x


def test_parts_of_a_gradient_that_come_apart_are_refused() -> None:
    """Reentrant checkpointing finishes a shared parameter several times: an error, not the last part."""
    model = extend(Shared())
    total = model(torch.randn(3, 4)).square().sum()
    with bp.backpack(SumGradSquared()), pytest.raises(FisherscopeError, match=r"layer\.\w+ comes in several"):
        total.backward()


def test_the_extension_hook_sees_complete_modules() -> None:
    """BackPACK's hook is called once per module with parameters, when all of these have their quantities."""
    model, seen = extend(tiny()), []

    def hook(module: nn.Module) -> None:
        assert all(hasattr(p, "grad_batch") for p in module.parameters(recurse=False))
        seen.append(module)

    run(model, models.rows(4), next_tokens, BatchGrad(), extension_hook=hook)
    holders = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert len(seen) == len(holders)
    assert set(seen) == set(holders)


class _ClippedLinear(FirstOrderModuleExtension):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(params=["weight", "bias"])

    def weight(self, _ext: Any, module: Any, _g_inp: Any, g_out: Any, _quantities: Any) -> Tensor:
        d = g_out[0].reshape(len(g_out[0]), -1, g_out[0].shape[-1])
        a = module.input0.reshape(len(d), -1, module.input0.shape[-1])
        return torch.bmm(d.mT, a).abs().clamp_max(0.1).sum(0)

    def bias(self, _ext: Any, _module: Any, _g_inp: Any, g_out: Any, _quantities: Any) -> Tensor:
        return g_out[0].reshape(len(g_out[0]), -1, g_out[0].shape[-1]).sum(1).abs().clamp_max(0.1).sum(0)


class Clipped(FirstOrderBackpropExtension):  # type: ignore[misc]
    """A first-order extension of somebody's own: the sum of |g|, at most 0.1 each."""

    def __init__(self, **options: Any) -> None:
        super().__init__("clipped", {nn.Linear: _ClippedLinear()}, **options)


@pytest.mark.filterwarnings("ignore:Extension saving to clipped .*Embedding")
def test_an_extension_of_ones_own() -> None:
    """It runs as under BackPACK itself, beside the four, and warns where it knows no layer."""
    model, data = models.build(models.named("llama-biases"), layers=1), models.rows(4)
    expected = by_loop(model, data, next_tokens)
    extend(model)
    with pytest.warns(UserWarning, match="LlamaRMSNorm"):
        run(model, data, next_tokens, BatchGrad(), Clipped())
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    clipped = expected["model.layers.0.mlp.up_proj.weight"].abs().clamp_max(0.1).sum(0)
    assert models.relative_error(weight.clipped, clipped) <= TOLERANCE  # type: ignore[arg-type]
    assert hasattr(weight, "grad_batch")
    assert not any(hasattr(module, "input0") or hasattr(module, "output") for module in model.modules())
    restore(model)
    assert not hasattr(weight, "clipped")
    again = extend(Twice())
    total = again(torch.randint(9, (5, 4))).square().sum()
    with (
        bp.backpack(Clipped(fail_mode="SILENT")),
        pytest.raises(FisherscopeError, match="used several times"),
    ):
        total.backward()


class Gain(nn.Module):
    """A layer that nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x


def test_a_layer_without_a_rule_and_with_one() -> None:
    """BackPACK says in its way that it does not know a layer; a registered rule serves it."""

    class Known(Gain):
        pass

    @fs.register_rule(Known, handles=("gain",))
    def known(module: Any, call: Any, wanted: Any) -> Any:
        product = call.inputs * call.output_gradient
        return {"gain": Dense(product.reshape(len(product), -1, product.shape[-1]).sum(1))}

    torch.manual_seed(0)
    x = torch.randn(4, 3, 5)
    net = extend(nn.Sequential(nn.Linear(5, 5), Gain(5)))
    with bp.backpack(BatchGrad()), pytest.warns(UserWarning, match="does not have an extension .*Gain"):
        net(x).square().sum().backward()
    assert not hasattr(net[1].gain, "grad_batch")
    net = extend(nn.Sequential(nn.Linear(5, 5), Known(5)))
    with bp.backpack(BatchGrad()):
        net(x).square().sum().backward()
    for i in range(4):
        (expected,) = torch.autograd.grad(net(x[i : i + 1]).square().sum(), net[1].gain)
        assert models.relative_error(net[1].gain.grad_batch[i], expected) <= TOLERANCE


def test_layers_that_only_backpack_knows() -> None:
    """Where there is no rule, BackPACK's own module extension runs: here of a one-dimensional convolution."""
    torch.manual_seed(0)
    net = extend(nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)))
    x = torch.randn(6, 3, 5)
    with bp.backpack(BatchGrad()):
        net(x).square().sum().backward()
    for i in range(6):
        (expected,) = torch.autograd.grad(net(x[i : i + 1]).square().sum(), net[0].weight)
        assert models.relative_error(net[0].weight.grad_batch[i], expected) <= TOLERANCE


def test_layers_of_one_type_with_a_rule_and_without() -> None:
    """A grouped convolution, which no rule serves, keeps BackPACK's own beside one that a rule serves."""
    torch.manual_seed(0)
    net = extend(nn.Sequential(nn.Conv2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 1)))
    x = torch.randn(5, 4, 3, 3)
    with bp.backpack(BatchGrad()):
        net(x).square().sum().backward()
    for i in range(5):
        expected = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert models.relative_error(parameter.grad_batch[i], gradient) <= TOLERANCE


class Named(nn.Module):
    """A layer without a rule, whose submodule has the name under which BackPACK shows what came out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.output = nn.Parameter(torch.randn(5)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.gain * x)  # type: ignore[no-any-return]


class _GainGrad(FirstOrderModuleExtension):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(params=["gain"])

    def gain(self, _ext: Any, module: Any, _g_inp: Any, g_out: Any, _quantities: Any) -> Tensor:
        assert module.output.shape == g_out[0].shape
        return (g_out[0] @ module._modules["output"].weight) * module.input0


def test_a_module_extension_of_ones_own() -> None:
    """BackPACK's way to support a layer works for one without a rule, and its submodules keep their names."""
    torch.manual_seed(0)
    net, x, extension = extend(Named()), torch.randn(4, 5), BatchGrad()
    extension.set_module_extension(Named, _GainGrad())
    with bp.backpack(extension):
        net(x).square().sum().backward()
    assert isinstance(net.output, nn.Linear)
    for i in range(4):
        expected = torch.autograd.grad(net(x[i : i + 1]).square().sum(), list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert models.relative_error(parameter.grad_batch[i], gradient) <= TOLERANCE


class Aside(nn.Module):
    """A weight that is used without its layer, only or besides."""

    def __init__(self, *, also_called: bool) -> None:
        super().__init__()
        self.layer, self.also_called = nn.Linear(4, 4), also_called

    def forward(self, x: Tensor) -> Tensor:
        if self.also_called:
            x = self.layer(x)
        return F.linear(x, self.layer.weight)


def test_weights_used_without_their_layer() -> None:
    """Never silently: an error where no call was seen, a warning where the calls are not all."""
    x = torch.randn(3, 2, 4)
    with bp.backpack(BatchGrad()), pytest.raises(CoverageError, match=r"layer\.weight .*none of its layers"):
        extend(Aside(also_called=False))(x).square().sum().backward()
    model = extend(Aside(also_called=True))
    with bp.backpack(BatchGrad()), pytest.warns(UserWarning, match=r"layer\.weight do not add up"):
        model(x).square().sum().backward()


def test_tables_that_mix_samples_with_positions() -> None:
    """T5's position biases are refused, also with as many samples as positions; frozen they pass."""
    model, ids = (
        extend(models.build(models.named("t5"), layers=1)),
        torch.randint(3, models.VOCABULARY, (4, 4)),
    )
    with bp.backpack(BatchGrad()), pytest.raises(CoverageError, match="relative_attention_bias"):
        model(input_ids=ids, decoder_input_ids=ids).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("relative_attention_bias" not in name)
    with bp.backpack(BatchGrad()):
        model(input_ids=ids, decoder_input_ids=ids).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "grad_batch") != ("relative_attention_bias" in name)


class Folds(nn.Module):
    """Folds samples and positions into one axis, in an order that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1))  # type: ignore[no-any-return]


def test_misuse_is_named() -> None:
    """Folded samples, a run in between, a part called alone, second order, models extended before."""
    x = torch.randn(3, 2, 4)
    total = extend(Folds())(x).sum()
    with (
        bp.backpack(BatchGrad()),
        pytest.raises(FisherscopeError, match="layer sees 6 rows for a batch of 3"),
    ):
        total.backward()
    net, x = plain_net()
    extend(net)
    total = net(x).sum()
    net(x)
    with bp.backpack(BatchGrad()), pytest.raises(FisherscopeError, match="run again"):
        total.backward()
    with bp.backpack(DiagGGNExact()), pytest.raises(NotImplementedError, match="first-order"):
        net(x).sum().backward()
    with pytest.raises(FisherscopeError, match="extended before"):
        extend(nn.Sequential(net))
    with pytest.raises(FisherscopeError, match="extended before"):
        extend(bp.extend(plain_net()[0]))
    for runs_before in (False, True):
        net = extend(plain_net()[0])
        if runs_before:
            net(x)
        total = net[0](x).sum()
        with bp.backpack(BatchGrad()), pytest.raises(FisherscopeError, match="outside of the model"):
            total.backward()


EXACT = (fs.Fisher(normalization="none"), fs.SampleGradients(parameters="all", dtype="float32"))


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[FromBackpack]]:
    """A store with our own quantities and those of BackPACK's extensions, from batches of unequal size."""
    adapters = [FromBackpack(e) for e in four()] + [FromBackpack(Clipped(), reduction="sum")]
    scope = fs.wrap(models.build(models.named("gpt2"), layers=1), parameters="all")
    state = torch.get_rng_state()
    store = scope.collect(
        {"a": models.rows(7)},
        tmp_path_factory.mktemp("backpack") / "run.fs",
        extensions=(*EXACT, *adapters),
        batch_size=3,
        quiet=True,
    )
    assert torch.equal(torch.get_rng_state(), state)
    return store, adapters


def test_backpacks_extensions_equal_our_quantities(collected: tuple[Any, list[FromBackpack]]) -> None:
    """Each result is that of the whole task, whatever the batches: from our gradients and our Fisher."""
    store, (batch_grad, sum_grad_squared, batch_l2, variance, clipped) = collected
    for name in store.parameters:
        gradients = store.gradients("a", name)
        mean, fisher = store.mean("a", name), store.fisher("a", name)
        scale = float(gradients.abs().max())
        for found, expected, power in [
            (batch_grad, 7 * mean, 1),
            (sum_grad_squared, 7 * fisher, 2),
            (batch_l2, gradients.square().sum().reshape(1), 2),
            (variance, fisher - mean.square(), 2),
            (clipped, gradients.abs().clamp_max(0.1).sum(0), 1),
        ]:
            result = found.result(store, "a", name)
            assert result.shape == expected.shape
            assert models.relative_error(result, expected, floor=scale**power) <= TOLERANCE, (
                name,
                found.name,
            )


def test_what_was_not_collected_is_said(collected: tuple[Any, list[FromBackpack]]) -> None:
    """A result that the store does not hold is an error that says so."""

    class Other(Clipped):
        def __init__(self) -> None:
            super().__init__()
            self.savefield = "other"

    store, _ = collected
    with pytest.raises(NotStoredError, match="backpack/other/transformer"):
        FromBackpack(Other(), reduction="sum").result(store, "a", "transformer.wte.weight")


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was summed up before a stop is read back, and the end is bit for bit the same."""
    from fisherscope.instrument import collection

    model, adapters = (
        models.build(models.named("llama"), layers=1),
        [FromBackpack(SumGradSquared()), FromBackpack(Variance())],
    )

    def collect(name: str) -> Any:
        scope = fs.wrap(model, parameters=["*q_proj.weight", "*norm.weight"])
        extensions = ("fisher", *adapters)
        return scope.collect(
            {"a": models.rows(6)}, tmp_path / name, extensions=extensions, batch_size=2, quiet=True
        )

    whole = collect("whole.fs")
    run_batch, done = collection.Collection.run_batch, []

    def stop_after_two(self: collection.Collection, *args: Any) -> None:
        run_batch(self, *args)
        done.append(1)
        if len(done) == 2:
            self.stop.signal = 15

    with monkeypatch.context() as patched:
        patched.setattr(collection.Collection, "run_batch", stop_after_two)
        with pytest.raises(fs.errors.Interrupted):
            collect("stopped.fs")
    resumed = collect("stopped.fs")
    for name in whole.parameters:
        for adapter in adapters:
            assert torch.equal(adapter.result(resumed, "a", name), adapter.result(whole, "a", name))


class _Wrong(FirstOrderModuleExtension):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(params=["weight"])

    def weight(self, _ext: Any, _module: Any, _g_inp: Any, g_out: Any, _quantities: Any) -> Tensor:
        return g_out[0].new_zeros(len(g_out[0]), 2)


class Wrong(FirstOrderBackpropExtension):  # type: ignore[misc]
    """Saves something per sample."""

    def __init__(self) -> None:
        super().__init__("wrong", {nn.Linear: _Wrong()})


class Nothing(FirstOrderBackpropExtension):  # type: ignore[misc]
    """Knows no layer."""

    def __init__(self) -> None:
        super().__init__("nothing", {}, fail_mode="SILENT")


def test_extensions_that_cannot_be_collected(tmp_path: Path) -> None:
    """Each is refused with what to do: at once where it can be seen, else at the first batch."""
    with pytest.raises(TypeError, match="instance"):
        FromBackpack(SumGradSquared)
    with pytest.raises(TypeError, match="first-order"):
        FromBackpack(DiagGGNExact())
    with pytest.raises(ValueError, match="max_samples"):
        FromBackpack(BatchGrad(subsampling=[0]))
    with pytest.raises(ValueError, match="'sum', 'samples' or 'variance'"):
        FromBackpack(Clipped())
    scope = fs.wrap(models.build(models.named("llama"), layers=1), parameters=["*0*q_proj.weight"])
    for number, (adapter, message) in enumerate(
        [
            (
                FromBackpack(Wrong(), reduction="variance"),
                r"shape \(2, 2\) and not with the parameter's shape",
            ),
            (FromBackpack(Wrong(), reduction="sum"), r"shape \(1, 2\) and not with the shape \(2, 2\)"),
            (FromBackpack(Clipped(), reduction="samples"), r"a first axis of 2 samples"),
            (FromBackpack(Nothing(), reduction="sum"), r"saves no tensor 'nothing' for the weight of an nn"),
        ]
    ):
        with pytest.raises(FisherscopeError, match=message):
            scope.collect(
                {"a": models.rows(3)},
                tmp_path / f"{number}.fs",
                extensions=("fisher", adapter),
                batch_size=2,
                quiet=True,
            )


def test_without_backpack_the_import_says_how_to_install_it() -> None:
    """The package itself imports; this part of it says that it is an extra, and how to get it unharmed."""
    code = (
        "import sys; sys.modules['backpack'] = None\n"
        "import fisherscope, fisherscope.instrument.scope\n"
        "try:\n    import fisherscope.instrument.backpack\n"
        "except ImportError as error:\n    sys.exit(str(error))\n"
    )
    run_ = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run_.returncode == 1
    assert "fisherscope[backpack]" in run_.stderr
    assert "pip install --no-deps backpack-for-pytorch einops unfoldNd" in run_.stderr


def test_the_example_runs(tmp_path: Path) -> None:
    """``examples/backpack_on_gpt2.py`` as it stands, with warnings as errors."""
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / "backpack_on_gpt2.py"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "grad_batch" in done.stdout
    assert "largest relative difference" in done.stdout
