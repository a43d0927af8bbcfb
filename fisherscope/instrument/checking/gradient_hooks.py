"""Other people's hooks that change gradients, and whether they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from typing_extensions import override

from fisherscope.errors import CoverageError

_SHOWN = 5
_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_backward_hooks", "_global_backward_pre_hooks")


class ChangedGradients:
    """Which hooks have given autograd another gradient than they were given.

    Attributes:
        found: such hooks, in words, in the order in which they did.
    """

    def __init__(self) -> None:
        """None so far."""
        self.found: dict[str, None] = {}

    def refuse(self) -> None:
        """Refuse hooks that give autograd other gradients than those of the loss.

        Raises:
            CoverageError: there are some.
        """
        if self.found:
            names = list(self.found)
            more = f", ... ({len(names)} hooks)" if len(names) > _SHOWN else ""
            raise CoverageError(
                f"hooks change gradients in the backward pass: {', '.join(names[:_SHOWN])}{more}. What is "
                "collected are gradients of the loss, so remove these hooks (the handles that registering "
                "them returned) first"
            )

    def watched(self, hook: Callable[..., Any], where: str, given: int) -> Callable[..., Any]:
        """The same hook, with an eye on what it returns.

        Args:
            hook: somebody's.
            where: what it hangs on.
            given: which of its arguments is the gradient that its result replaces.
        """

        def observed(*args: Any, **kwargs: Any) -> Any:
            before = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), args[given])
            result = hook(*args, **kwargs)
            after = args[given] if result is None else result
            if not _same(before, after):
                self.found.setdefault(f"{getattr(hook, '__qualname__', type(hook).__qualname__)} on {where}")
            return result

        return observed


@contextmanager
def watching_gradient_hooks(model: nn.Module, *, tensors: bool) -> Iterator[ChangedGradients]:
    """Look at what backward hooks of modules do in the passes inside of this context.

    Hooks that only look pass. What is looked at are the hooks of every module, those of all modules, and,
    where it is asked for or somebody's forward hooks may set some, those of tensors.

    Args:
        model: the model.
        tensors: also hooks that are set on tensors in a forward pass, whoever sets them; that costs a little
            for each operation.
    """
    changed = ChangedGradients()
    with ExitStack() as stack:
        for hooks, where in _hooks_of(model):
            stack.callback(_put_back, hooks, dict(hooks))
            for key, hook in list(hooks.items()):
                # of a full hook (module, grad_input, grad_output) and of a pre-hook (module, grad_output)
                hooks[key] = changed.watched(hook, where, 1)
        if tensors or has_forward_hooks(model):
            stack.enter_context(_TensorHooks(changed))
        yield changed


def has_forward_hooks(model: nn.Module) -> bool:
    """Whether somebody has hooked a forward pass, of one module or of all."""
    if any(getattr(torch_modules, f"_global{kind}") for kind in _FORWARD_HOOKS):
        return True
    hooks = (hook for m in model.modules() for kind in _FORWARD_HOOKS for hook in getattr(m, kind).values())
    return not all(map(_is_ours, hooks))


def _is_ours(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    """Each hook in place of its watched one, less those that were removed in the meantime."""
    hooks.update({key: before[key] for key in hooks.keys() & before.keys()})


def _hooks_of(model: nn.Module) -> Iterable[tuple[dict[int, Any], str]]:
    for path, module in model.named_modules():
        for kind in _MODULE_HOOKS:
            if hooks := getattr(module, kind):
                yield hooks, path or type(module).__name__
    for kind in _GLOBAL_HOOKS:
        if hooks := getattr(torch_modules, kind):
            yield hooks, "all modules"


class _TensorHooks(TorchFunctionMode):
    """Looks at hooks that are set on tensors."""

    def __init__(self, changed: ChangedGradients) -> None:
        super().__init__()
        self._changed = changed

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        if func is Tensor.register_hook and not _is_ours(args[1]):
            where = f"a tensor of shape {tuple(args[0].shape)}"
            args = (args[0], self._changed.watched(args[1], where, 0))
        return func(*args, **(kwargs or {}))


def _same(before: Any, after: Any) -> bool:
    first, second = _leaves(before), _leaves(after)
    return len(first) == len(second) and all(
        a is None and b is None
        if a is None or b is None
        else a.shape == b.shape and torch.equal(a.to(b.dtype), b)
        for a, b in zip(first, second, strict=True)
    )


def _leaves(gradients: Any) -> list[Tensor | None]:
    if gradients is None or isinstance(gradients, Tensor):
        return [gradients]
    return list(gradients)
