"""Next-token prediction, summed per sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fisherscope.instrument.batch import IGNORE, Batch


def causal_lm(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of each sample's token losses, in nats.

    Token losses are taken from logits of float32 or wider, at the positions that bear loss only.

    Returns:
        ``[n]``, in the dtype of these logits.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if _takes_positions(type(model).forward):
        inputs["position_ids"] = batch.position_ids
    logits = model(**inputs, use_cache=False).logits
    targets = batch.labels[:, 1:].to(logits.device)
    bears_loss = targets != IGNORE
    chosen = logits[:, :-1][bears_loss]
    if chosen.dtype.itemsize < 4:
        chosen = chosen.float()
    token_losses = F.cross_entropy(chosen, targets[bears_loss], reduction="none")
    sample = bears_loss.nonzero()[:, 0]
    return token_losses.new_zeros(len(batch)).index_add(0, sample, token_losses)


@lru_cache(maxsize=64)
def _takes_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters
