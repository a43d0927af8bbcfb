"""The header of a store: what identifies the run, and where it came from."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from fisherscope.instrument.choosing_encodings import ChosenEncodings
from fisherscope.instrument.extensions import Positions
from fisherscope.instrument.fingerprint import digest, tokenizer_digest, weights_digest
from fisherscope.instrument.limits import BatchLimits
from fisherscope.instrument.objectives import Objective
from fisherscope.instrument.objectives.content import is_dict, parts_of
from fisherscope.instrument.options import CollectOptions
from fisherscope.layout import ModelLayout
from fisherscope.store import StoreHeader

PARTS = "objective_parts"
"""Where in the fingerprint stands what an objective of the user's own consists of."""


def make_header(
    model: nn.Module,
    tokenizer: Any,
    layout: ModelLayout,
    parameters: tuple[str, ...],
    options: CollectOptions,
    *,
    objective: Objective,
    pad_side: str,
    limits: BatchLimits,
    device: torch.device,
    dtype: torch.dtype,
    chosen: ChosenEncodings | None = None,
) -> StoreHeader:
    """Describe a run; a store is resumed only by a run with the same identity.

    Args:
        model: the model; its weights are hashed.
        tokenizer: its tokenizer or None.
        layout: where heads live.
        parameters: the instrumented ones.
        options: of the collection.
        objective: the loss.
        pad_side: where batches are padded.
        limits: of batches.
        device, dtype: of the model's embeddings.
        chosen: how gradients are kept; all dense by default.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    gradients, fisher = options.sample_gradients, options.fisher
    positions, chosen = options.one_of(Positions), chosen or ChosenEncodings()
    identity = options.identity() | ({"seed": options.seed} if objective.is_drawn else {})
    fingerprint = {
        "weights": weights_digest(model),
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": tokenizer_digest(tokenizer),
        "objective": objective.name,
        **({PARTS: dict(objective.parts)} if objective.parts else {}),
        "parameters": digest(parameters),
        "pad_side": pad_side,
        "autocast": autocast_dtype(device),
        **identity,
    }
    return StoreHeader(
        fingerprint=fingerprint,
        layout=layout,
        parameters=parameters,
        gradient_parameters=gradients.chosen(layout, parameters) if gradients else (),
        gradient_dtype=gradients.dtype if gradients else "bfloat16",
        encodings=chosen.encodings,
        normalization="per_token" if fisher is None else fisher.normalization,
        fisher_shape="groups" if fisher is None else fisher.shape,
        position_parameters=positions.chosen(layout, parameters) if positions else (),
        squares="wide",
        state=tuple(f"{PARTS}.{name}" for name in state_of(objective)),
        options=identity
        | {"gradient_encodings": chosen.reason}
        | {"objective": objective.name, "max_samples": options.max_samples, "batch_size": options.batch_size}
        # whoever resumes makes the same batches
        | {"batch_positions": limits.positions, "batch_rows": limits.rows},
        provenance=_provenance(model, device, dtype),
    )


def state_of(objective: Objective) -> list[str]:
    """Names of those parts of an objective that running it has changed since it was handed over.

    Of a dict that has got or lost entries any other entry may come to be, too: "name.*".
    """
    now = parts_of(objective.predict) if objective.parts else {}
    before = objective.parts
    changed = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    held = {name.rpartition(".")[0] for name in changed if name not in before or name not in now}
    growing = {f"{path}.*" for path in held if is_dict(path, now)}
    return sorted(changed | growing)


def autocast_dtype(device: torch.device) -> str | None:
    """In what the user has the forward pass run, where that is not the model's own dtype."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _provenance(model: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    import transformers

    from fisherscope.versions import __version__

    return {
        "fisherscope": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "model_class": type(model).__name__,
        "model_name": str(getattr(model.config, "_name_or_path", "")),
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "model_dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
