"""Loading a model and its tokenizer from a directory or the hub, with errors that say what to do."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fisherscope.errors import FisherscopeError
from fisherscope.words import counted, several

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class ModelLoadError(FisherscopeError):
    """A model or its tokenizer cannot be loaded."""


def load_model(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attn: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model in eval mode, with the head that its checkpoint was saved with.

    A directory of PEFT's adapters is loaded with the model that they were trained on.

    Args:
        source: a directory, or the id of a model on the hub.
        device: "auto" (the first GPU, else the CPU) or a torch device.
        dtype: "auto" (that of the checkpoint), "float32", "bfloat16" or "float16".
        attn: attention implementation, such as "eager"; None leaves the choice to transformers.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelLoadError: it cannot be loaded; the message says why and what to do.
    """
    _check_source(source)
    if (base := adapters_of(source)) is not None:
        if adapters_of(base) is not None:
            raise ModelLoadError(f"{source}: its base model {base} is a directory of adapters itself")
        held = load_model(
            base,
            device=device,
            dtype=dtype,
            attn=attn,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return _with_adapters(held, source)
    target = _device(device)
    extra = {} if attn is None else {"attn_implementation": attn}
    with _quiet_transformers():
        try:
            kind = _class_of(source, revision, trust_remote_code=trust_remote_code)
            model, info = kind.from_pretrained(
                source,
                dtype=dtype,
                revision=revision or "main",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **extra,
            )
        except Exception as error:  # transformers raises OSError, ValueError, ImportError and others
            raise _explained(source, error) from error
    if missing := sorted(info["missing_keys"]):
        warnings.warn(
            f"{source} has no weights for {counted(len(missing), 'parameter')} "
            f"({missing[0]}{several(len(missing), '', ', ...')}): "
            f"{several(len(missing), 'it is', 'they are')} random",
            stacklevel=2,
        )
    return model.to(target).eval()


def adapters_of(source: str) -> str | None:
    """The base model of a directory of PEFT's adapters; None for any other model.

    Raises:
        ModelLoadError: it does not say which model that is.
    """
    directory = Path(source).expanduser()
    config = directory / "adapter_config.json"
    if not config.is_file() or (directory / "config.json").is_file():
        return None
    try:
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str) or not base:
        raise ModelLoadError(
            f"{source}: adapters of PEFT, and their adapter_config.json names no base_model_name_or_path: "
            "write there which model they belong to"
        )
    beside = directory / base
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base


def _with_adapters(model: Any, source: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise ModelLoadError(
            f"{source}: a directory of adapters, which PEFT loads: pip install 'fisherscope[peft]'"
        ) from error
    try:
        with warnings.catch_warnings():
            # between versions of PEFT and transformers; nothing that a user could mend
            warnings.simplefilter("ignore", FutureWarning)
            return peft.PeftModel.from_pretrained(model, str(Path(source).expanduser())).eval()
    except Exception as error:  # of PEFT, safetensors and torch
        raise ModelLoadError(
            f"{source}: the adapters cannot be loaded into their model ({_first_line(error)}) Save them "
            "again with model.save_pretrained"
        ) from error


def _class_of(source: str, revision: str | None, *, trust_remote_code: bool) -> Any:
    """The class that a checkpoint was saved from, as far as transformers has it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        source, revision=revision or "main", trust_remote_code=trust_remote_code
    )
    names = config.architectures or []
    found = (getattr(transformers, name, None) for name in names)
    return next((kind for kind in found if kind is not None), transformers.AutoModelForCausalLM)


def load_tokenizer(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that lies with a model; None where there is none.

    Raises:
        ModelLoadError: there is one, but it cannot be loaded.
    """
    _check_source(source)
    if not _has_tokenizer_files(source) and (base := adapters_of(source)) is not None:
        return load_tokenizer(base, revision=revision, trust_remote_code=trust_remote_code)
    with _quiet_transformers():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=revision or "main", trust_remote_code=trust_remote_code
            )
        except Exception as error:
            if not _has_tokenizer_files(source):
                return None
            raise ModelLoadError(
                f"{source}: the tokenizer cannot be loaded ({_first_line(error)}); "
                "save it again with tokenizer.save_pretrained, or name another with --tokenizer"
            ) from error
    # without files transformers makes a tokenizer with an empty vocabulary and says nothing
    real = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    return tokenizer if real else None


def require_tokenizer(tokenizer: Any, source: str, tasks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse tasks of text where there is no tokenizer.

    Raises:
        ModelLoadError: a row has no ``input_ids``; the message names its task.
    """
    if tokenizer is not None:
        return
    for name, rows in tasks.items():
        if any("input_ids" not in row for row in rows):
            raise ModelLoadError(
                f"{source}: no tokenizer lies with the model, and task {name!r} has rows of text; save it "
                "there with tokenizer.save_pretrained, name another with --tokenizer, or give rows of "
                '"input_ids"'
            )


def _check_source(source: str) -> None:
    path = Path(source).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise ModelLoadError(
                f"{source}: the directory has no config.json, so it holds no transformers model; "
                "give the directory that model.save_pretrained wrote"
            )
    elif path.exists():
        raise ModelLoadError(f"{source}: a file; give the directory that model.save_pretrained wrote")
    elif not _HUB_ID.fullmatch(source):
        raise ModelLoadError(f"{source}: no such directory, and not the id of a model on the hub")


def _has_tokenizer_files(source: str) -> bool:
    """Whether a directory has any file of a tokenizer; on the hub this cannot be seen."""
    path = Path(source).expanduser()
    patterns = ("tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json")
    return not path.is_dir() or any(next(path.glob(pattern), None) for pattern in patterns)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelLoadError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelLoadError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; "
            "use cpu, or install a CUDA build of torch"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError(f"--device {name}: not available here; use cpu")
    return device


def _explained(source: str, error: Exception) -> ModelLoadError:
    """The error with its cause in one sentence and the next step."""
    import transformers

    text = str(error)
    local = Path(source).expanduser().is_dir()
    if "trust_remote_code" in text:
        step = "the model brings code of its own: read it, then pass --trust-remote-code"
    elif match := re.search(r"model type `([^`]+)`", text):
        step = (
            f"unknown model type {match[1]!r} in transformers {transformers.__version__}; "
            "install a version that knows it"
        )
    elif "Unrecognized configuration class" in text:
        step = (
            'its config names no class ("architectures"), and it is not a causal language model: save it '
            "again with model.save_pretrained, or use fisherscope.wrap in Python"
        )
    elif isinstance(error, ImportError) or "attn_implementation" in text:
        step = f"{_first_line(error)} Choose another with --attn (eager and sdpa always work)"
    elif local:
        step = f"{_first_line(error)} Save the model again with model.save_pretrained"
    else:
        step = (
            f"no such directory, and it cannot be loaded from the hub ({_first_line(error)}) "
            "Check the name, --revision, the network and your access"
        )
    return ModelLoadError(f"{source}: {step}")


def _first_line(error: Exception) -> str:
    """The first sentence or line of an error, closed with a full stop."""
    line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
    return line if line.endswith(".") else f"{line}."


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence progress bars and notes of transformers; both are as before afterwards."""
    import transformers

    logging: Any = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            # an environment variable may forbid what was only transformers' own setting
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()
