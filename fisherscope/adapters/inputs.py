"""A small input that any model takes: what the numeric checks of a layout run on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fisherscope.adapters.injected import plain_layer
from fisherscope.adapters.unwrap import uncompiled
from fisherscope.errors import AdapterError

POSITIONS = 6


def run_small(model: nn.Module, rows: int, seed: int) -> None:
    """One forward pass of the same random sample ``rows`` times, in evaluation mode and without gradients.

    Raises:
        AdapterError: the model takes neither token ids nor images, or does not run on them.
    """
    inputs = probe_inputs(model, rows, seed)
    with torch.no_grad():
        _run(model, inputs)


def first_output(model: nn.Module, inputs: dict[str, Any], *, exactly: bool = False) -> Tensor:
    """The first tensor that a model returns: logits or hidden states.

    Args:
        model: the model.
        inputs: keyword arguments of its forward pass.
        exactly: pass all of them; otherwise ``use_cache`` is left out for a model that does not take it.

    Raises:
        AdapterError: it does not run on these inputs, or returns no tensor of floating point.
    """
    output = _run(model, inputs, exactly=exactly)
    values = output.values() if isinstance(output, dict) else output
    for value in [values] if isinstance(values, Tensor) else values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise AdapterError(f"{type(model).__name__} returns no tensor")


def _run(model: nn.Module, inputs: dict[str, Any], *, exactly: bool = False) -> Any:
    """A forward pass in evaluation mode; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with uncompiled(model):
            try:
                return model(**inputs)
            except TypeError:
                # a forward of the user's own need not take it, whatever the config has
                if exactly or "use_cache" not in inputs:
                    raise
            return model(**{name: value for name, value in inputs.items() if name != "use_cache"})
    except AdapterError:
        raise
    except Exception as error:
        raise AdapterError(
            f"{type(model).__name__} does not run on a small random input: {type(error).__name__}: {error}"
        ) from error
    finally:
        for module, training in modes:
            module.training = training


def probe_inputs(model: nn.Module, rows: int, seed: int) -> dict[str, Any]:
    """Keyword arguments of one forward pass: the same random sample ``rows`` times.

    Raises:
        AdapterError: the model takes neither token ids nor images.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return {main: _image(model, config, generator).expand(rows, -1, -1, -1)}
    if main != "input_ids":
        raise AdapterError(
            f"{type(model).__name__} takes {main!r}: heads are checked on token ids or images only"
        )
    ids = _ids(model, config, generator).expand(rows, -1)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _ids(model, config, generator).expand(rows, -1)
    elif getattr(config, "add_cross_attention", False):
        # GPT-2 views it, so that rows need places of their own
        inputs["encoder_hidden_states"] = _encoded(model, config, generator).repeat(rows, 1, 1)
    if hasattr(config.get_text_config(), "use_cache"):
        inputs["use_cache"] = False
    return inputs


def _embeddings(model: nn.Module) -> nn.Embedding:
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    # CLIP as a whole, or no model of transformers
    except (NotImplementedError, AttributeError) as error:
        raise AdapterError(f"{type(model).__name__} names no table of token embeddings: {error}") from error
    plain = plain_layer(embeddings) if isinstance(embeddings, nn.Module) else embeddings
    if not isinstance(plain, nn.Embedding):
        raise AdapterError(f"{type(model).__name__} has no single table of token embeddings")
    return plain


def _ids(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    """Random token ids ``[1, positions]`` that stand for text: none that a config gives another meaning."""
    embeddings, text = _embeddings(model), config.get_text_config()
    special = set(_special_ids(config)) | set(_special_ids(text))
    limit = min(embeddings.num_embeddings, getattr(text, "vocab_size", None) or embeddings.num_embeddings)
    allowed = torch.tensor(
        [i for i in range(limit) if i not in special] or list(range(limit)), dtype=torch.int64, device="cpu"
    )
    chosen = allowed[
        torch.randint(0, len(allowed), (1, POSITIONS), generator=generator, dtype=torch.int64, device="cpu")
    ]
    return chosen.to(embeddings.weight.device)


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("token_id", "token_index")):
            yield from (i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def _encoded(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    """What an encoder that is not there would give to a decoder's cross attention."""
    weight = _embeddings(model).weight
    return torch.randn(
        1, POSITIONS, config.hidden_size, generator=generator, dtype=torch.float32, device="cpu"
    ).to(weight.device, weight.dtype)


def _image(model: nn.Module, config: Any, generator: torch.Generator) -> Tensor:
    for name in ("image_size", "num_channels"):
        if getattr(config, name, None) is None:
            raise AdapterError(
                f"{type(model).__name__} takes images, but its config has no {name}: heads cannot be checked"
            )
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = torch.randn(
        1, config.num_channels, height, width, generator=generator, dtype=torch.float32, device="cpu"
    )
    parameter = next(model.parameters())
    return image.to(parameter.device, parameter.dtype)
