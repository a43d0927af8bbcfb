"""The version of this package and of everything it stands on."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "scipy",
    "statsmodels",
    "pandas",
    "xarray",
    "h5py",
    "h5netcdf",
    "typer",
    "rich",
    "plotly",
    "datasets",
    "peft",
    "backpack-for-pytorch",
    "torchvision",
)


def installed(package: str) -> str | None:
    """The version of an installed distribution, None where it is absent; nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


__version__ = installed("fisherscope") or "0+unknown"


def show_versions(*, as_dict: bool = False) -> dict[str, str | None] | None:
    """Print the versions that a bug report needs.

    Args:
        as_dict: return them instead of printing.

    Returns:
        With ``as_dict``, name -> version, in the order of printing; None stands for what is not installed.
        torchvision is listed because it is not needed, and often drags another build of torch in.
    """
    versions = {
        "fisherscope": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": str(os.cpu_count()),
        **{package: installed(package) for package in _PACKAGES},
        "device": _device(),
    }
    if as_dict:
        return versions
    width = max(map(len, versions))
    lines = [f"{name:<{width}}  {'not installed' if v is None else v}\n" for name, v in versions.items()]
    sys.stdout.write("".join(lines))
    return None


def _device() -> str:
    try:
        import torch
    except ImportError:
        return "unknown: torch cannot be imported"
    if torch.cuda.is_available():
        return f"cuda {torch.version.cuda}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"
