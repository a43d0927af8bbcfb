"""BackPACK both ways: its first-order quantities on transformers models, and its extensions in a collection.

BackPACK is optional. Its metadata require torchvision, which it does not need and which breaks transformers
beside another build of torch, so it is best installed without its dependencies.
"""

try:
    import backpack as _backpack  # noqa: F401 - tells early, and in words, that it is missing
except ImportError as error:
    raise ImportError(
        "fisherscope.instrument.backpack needs BackPACK (the extra fisherscope[backpack]), which is not "
        "installed: install it with `pip install --no-deps backpack-for-pytorch einops unfoldNd`, because "
        "with its dependencies it brings torchvision, and that may not match this build of torch"
    ) from error

from fisherscope.instrument.backpack.extend import extend, restore
from fisherscope.instrument.backpack.from_backpack import FromBackpack
from fisherscope.instrument.backpack.module_extension import RuleModuleExtension, register

__all__ = ["FromBackpack", "RuleModuleExtension", "extend", "register", "restore"]
