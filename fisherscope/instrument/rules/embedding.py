"""``nn.Embedding`` and its subclasses: rows of a table, looked up, and perhaps scaled."""

from __future__ import annotations

from torch import Tensor, nn

from fisherscope.instrument.rules.registry import LayerCall, register_rule
from fisherscope.linalg import PerSampleGradient, Rows


def _is_plain(module: nn.Module) -> bool:
    """Whether its gradient is that of the loss: some options change weights or gradients on the way."""
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq


@register_rule(nn.Embedding, handles=("weight",), applies=_is_plain, looks_up=True)
def embedding(module: nn.Module, call: LayerCall, wanted: frozenset[str]) -> dict[str, PerSampleGradient]:
    """``g_W[v] = sum over positions t with token v of d_t``, without ever forming ``[n, V, E]``."""
    del wanted
    ids, weight = call.inputs, module.weight
    assert isinstance(weight, Tensor)
    if isinstance(padding := getattr(module, "padding_idx", None), int):
        ids = ids.masked_fill(ids == padding, -1)  # autograd gives that row no gradient either
    return {"weight": Rows.of_tokens(ids, call.output_gradient, weight.shape[0])}
