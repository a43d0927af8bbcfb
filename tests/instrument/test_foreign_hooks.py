"""Other people's hooks: numbers are those of the model with them; changed gradients are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

import fisherscope as fs
from fisherscope.errors import AdapterError, CoverageError
from tests import models

LAYER = "model.layers.0."
EXACT = (fs.Fisher(), fs.SampleGradients(parameters="all", dtype="float32"))


@pytest.fixture
def model() -> Any:
    return models.build(models.named("llama-biases"), layers=1)


def damp_late_positions(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    output = output.clone()
    output[:, 3:] *= 0.1
    return output


def in_place(_module: nn.Module, _args: Any, output: Tensor) -> None:
    output[:, 2:] *= 0.5


def steer(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output + torch.linspace(-2, 2, output.shape[-1])


def look_at_tensor(_module: nn.Module, _args: Any, output: Tensor) -> None:
    if output.requires_grad:
        output.register_hook(lambda _gradient: None)


def replace_by_constant(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return torch.ones_like(output)


SITES = (
    "self_attn.q_proj",
    "self_attn.o_proj",
    "mlp.down_proj",
    "input_layernorm",
)
HOOKS = (damp_late_positions, in_place, steer)


def assert_is_the_loop(model: nn.Module, out: Path, **options: Any) -> None:
    """Every gradient and every <g, theta> equals the loop over samples of the model with its hooks."""
    rows = models.rows(6)
    store = fs.wrap(model, parameters="all", **options).collect(
        {"a": rows}, out, extensions=EXACT, batch_size=3, quiet=True
    )
    expected = models.loop(model, rows)
    values = store.group_values("a")
    whole = {
        name: k
        for k, (name, kind) in enumerate(zip(values.parameter.values, values.kind.values, strict=True))
        if kind == "parameter"
    }
    largest = max(float(g.abs().max()) for sample in expected for g in sample.values())
    for name in store.parameters:
        theta = model.get_parameter(name).detach()
        g = torch.stack([sample.get(name, torch.zeros_like(theta)) for sample in expected])
        found = store.gradients("a", name)
        assert float((found - g).abs().max()) < 1e-5 * max(float(g.abs().max()), 1e-2 * largest), name
        dots = torch.as_tensor(values["dot"].values[:, whole[name]]).double()
        scale = float(g.flatten(1).norm(dim=1).max() * theta.norm()) + 1e-3 * largest
        assert float((dots - (g * theta).flatten(1).sum(1).double()).abs().max()) < 1e-5 * scale, name


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("site", SITES)
def test_a_forward_hook_is_part_of_the_model(
    model: Any, tmp_path: Path, site: str, hook: Callable[..., Any]
) -> None:
    """What a layer computes and what others make of it are told apart, at some positions or at all."""
    model.get_submodule(LAYER + site).register_forward_hook(hook)
    assert_is_the_loop(model, tmp_path / "run.fs")


@pytest.mark.parametrize("prepend", [False, True])
def test_hooks_registered_at_any_place(model: Any, tmp_path: Path, *, prepend: bool) -> None:
    """Before the scope is made, after it, first or last: ours stand inside of all of them."""
    layer = model.get_submodule(LAYER + "self_attn.v_proj")
    layer.register_forward_hook(damp_late_positions, prepend=prepend)
    layer.register_forward_hook(steer, prepend=prepend)
    layer.register_forward_pre_hook(lambda _module, args: (args[0] * 1.5,), prepend=prepend)
    assert_is_the_loop(model, tmp_path / "run.fs")


def test_a_hook_of_all_modules(model: Any, tmp_path: Path) -> None:
    """torch calls those before the module's own: ours must not stand behind them."""

    def halve(module: nn.Module, _args: Any, output: Any) -> Any:
        return 0.5 * output if isinstance(module, nn.Linear) else None

    handle = torch_modules.register_module_forward_hook(halve)
    try:
        assert_is_the_loop(model, tmp_path / "run.fs")
    finally:
        handle.remove()


def test_a_hook_on_the_embedding_and_one_that_cuts_the_graph(model: Any, tmp_path: Path) -> None:
    """An embedding whose output is changed; a layer whose output is replaced has no gradient."""
    model.model.embed_tokens.register_forward_hook(damp_late_positions)
    model.get_submodule(LAYER + "self_attn.v_proj").register_forward_hook(replace_by_constant)
    assert_is_the_loop(model, tmp_path / "run.fs")


def test_a_hook_in_a_module_that_is_run_again(tmp_path: Path) -> None:
    """A mixture of experts has no batched rule: hooks inside and on it are part of it, or it is refused."""
    model: Any = models.build(models.named("mixtral"))
    model.model.layers[0].mlp.experts.register_forward_hook(lambda _module, _args, output: 0.3 * output)
    model.model.layers[1].mlp.register_forward_hook(lambda _module, _args, output: 0.3 * output)
    rows = models.rows(5)
    store = fs.wrap(model, parameters="all").collect(
        {"a": rows}, tmp_path / "run.fs", extensions=EXACT, batch_size=3, quiet=True
    )
    expected = models.loop(model, rows)
    largest = max(float(g.abs().max()) for sample in expected for g in sample.values())
    for name in store.parameters:
        shape = model.get_parameter(name).shape
        g = torch.stack([sample.get(name, torch.zeros(shape)) for sample in expected])
        off = float((store.gradients("a", name) - g).abs().max())
        assert off < 1e-5 * max(float(g.abs().max()), 1e-2 * largest), name


def test_a_forward_that_somebody_has_replaced(model: Any, tmp_path: Path) -> None:
    """A projection that is no linear map any more is not taken for one; one that still is, is."""
    scaled = model.get_submodule(LAYER + "mlp.up_proj")
    own = scaled.forward
    scaled.forward = lambda x: torch.tanh(own(x)) * 2
    same = model.get_submodule(LAYER + "mlp.gate_proj")
    other = same.forward
    same.forward = lambda x: other(x) + 0.0
    with pytest.raises(AdapterError, match=r"up_proj is not the linear map of its weight"):
        fs.wrap(model)
    assert_is_the_loop(model, tmp_path / "run.fs", verify=False)
    assert "forward" in vars(scaled)
    assert "forward" not in vars(model.get_submodule(LAYER + "mlp.down_proj"))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
class TestBackwardHooks:
    """What hooks do to gradients decides, not that they are there."""

    def change(self, _module: Any, grad_input: Any, _grad_output: Any) -> Any:
        return tuple(None if g is None else 10 * g for g in grad_input)

    def look(self, _module: Any, _grad_input: Any, _grad_output: Any) -> None:
        self.seen = getattr(self, "seen", 0) + 1

    def test_one_that_changes_the_input_gradient(self, model: Any, tmp_path: Path) -> None:
        """Refused, with its name and the module's."""
        model.get_submodule(LAYER + "mlp.down_proj").register_full_backward_hook(self.change)
        with pytest.raises(CoverageError, match=r"change on model\.layers\.0\.mlp\.down_proj.*remove"):
            collect(model, tmp_path / "run.fs")
        assert not (tmp_path / "run.fs").exists()

    def test_one_that_changes_the_output_gradient(self, model: Any, tmp_path: Path) -> None:
        """Refused likewise."""
        layer = model.get_submodule(LAYER + "self_attn.v_proj")
        layer.register_full_backward_pre_hook(
            lambda _module, grads: tuple(g.clamp(-1e-4, 1e-4) for g in grads)
        )
        with pytest.raises(CoverageError, match=r"on model\.layers\.0\.self_attn\.v_proj"):
            collect(model, tmp_path / "run.fs")

    def test_one_that_changes_a_gradient_in_place(self, model: Any, tmp_path: Path) -> None:
        """Without returning anything."""

        def zero(_module: Any, _grad_input: Any, grad_output: Any) -> None:
            _grad_input[0].zero_()

        model.get_submodule(LAYER + "mlp.down_proj").register_full_backward_hook(zero)
        with pytest.raises(CoverageError, match="zero on"):
            collect(model, tmp_path / "run.fs")

    def test_one_that_a_forward_hook_sets_on_a_tensor(self, model: Any, tmp_path: Path) -> None:
        """No module has that hook."""

        def set_hook(_module: Any, _args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: 3 * gradient)

        model.get_submodule(LAYER + "mlp").register_forward_hook(set_hook)
        with pytest.raises(CoverageError, match="a tensor of shape"):
            collect(model, tmp_path / "run.fs")

    def test_one_of_all_modules(self, model: Any, tmp_path: Path) -> None:
        """Registered once for every module."""
        handle = torch_modules.register_module_full_backward_hook(self.change)
        try:
            with pytest.raises(CoverageError, match="change on all modules"):
                collect(model, tmp_path / "run.fs")
        finally:
            handle.remove()

    def test_one_that_only_sometimes_changes_gradients(self, model: Any, tmp_path: Path) -> None:
        """The batch in which it does is refused, proved or not."""

        calls = [0]

        def sometimes(_module: Any, grad_input: Any, _grad_output: Any) -> Any:
            calls[0] += 1
            return tuple(2 * g for g in grad_input) if calls[0] == 12 else None

        model.get_submodule(LAYER + "mlp.down_proj").register_full_backward_hook(sometimes)
        with pytest.raises(CoverageError, match="sometimes on"):
            fs.wrap(model).collect(
                {"a": models.rows(24)},
                tmp_path / "run.fs",
                batch_size=2,
                quiet=True,
                check="first",
                extensions=["fisher"],
            )

    def test_those_that_only_look_pass(self, model: Any, tmp_path: Path) -> None:
        """And the numbers are the same; they are called as before, and stay where they are."""
        plain = collect(model, tmp_path / "plain.fs")
        layer = model.get_submodule(LAYER + "mlp.down_proj")
        layer.register_full_backward_hook(self.look)
        layer.register_full_backward_pre_hook(lambda *_: None)
        layer.register_forward_hook(look_at_tensor)
        hooked = collect(model, tmp_path / "run.fs")
        name = LAYER + "self_attn.q_proj.weight"
        assert torch.equal(
            torch.as_tensor(plain.fisher("a", name)), torch.as_tensor(hooked.fisher("a", name))
        )
        assert self.seen
        assert list(layer._backward_hooks.values()) == [self.look]


def collect(model: nn.Module, out: Path, **options: Any) -> fs.store.ContributionStore:
    return fs.wrap(model).collect({"a": models.rows(5)}, out, batch_size=2, quiet=True, **options)
