"""What identifies a run: two runs with one fingerprint write the same store."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.errors import NonFiniteError

_CHUNK = 1 << 24


def digest(values: Iterable[str]) -> str:
    """Short hash of a sequence of strings."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(value.encode())
        sha.update(b"\0")
    return sha.hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """Hash of every parameter and buffer that the model saves: names, shapes, dtypes and bytes.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    sha = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        flat = tensor.detach().reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            piece = flat[start : start + _CHUNK]
            if piece.is_floating_point() and not torch.isfinite(piece).all():
                raise NonFiniteError(
                    f"weight {name!r} has NaN or infinite entries: no gradient of this model means anything; "
                    "load another checkpoint or find what broke this one"
                )
            sha.update(_bytes(piece))
    return sha.hexdigest()[:32]


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Hash of a tokenizer's vocabulary, special tokens and chat template; None for no tokenizer."""
    if tokenizer is None:
        return None
    if not hasattr(tokenizer, "get_vocab"):
        # an image processor has sizes and means in place of a vocabulary
        values = tokenizer.to_dict() if hasattr(tokenizer, "to_dict") else {}
        return digest([type(tokenizer).__name__, json.dumps(values, sort_keys=True, default=str)])
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return digest([type(tokenizer).__name__, vocabulary, special, str(tokenizer.chat_template)])


def config_digest(config: Any) -> str:
    """Hash of a model config, less what says where and with which version it was saved."""
    values: Mapping[str, Any] = config.to_dict()
    kept = {k: v for k, v in values.items() if k not in {"_name_or_path", "transformers_version"}}
    return digest([json.dumps(kept, sort_keys=True, default=str)])


def _bytes(piece: Tensor) -> bytes:
    return piece.cpu().contiguous().view(torch.uint8).numpy().tobytes()
