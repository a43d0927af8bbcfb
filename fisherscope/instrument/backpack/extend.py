"""A model made ready for BackPACK's first-order extensions, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fisherscope.adapters.usable import refuse_unusable
from fisherscope.errors import FisherscopeError
from fisherscope.instrument.backpack.tap import MARK, BackpackTap

Model = TypeVar("Model", bound=nn.Module)

_TAP = "_fisherscope_backpack_tap"


def extend(model: Model) -> Model:
    """Make a model ready for ``backpack(...)``, as BackPACK's ``extend`` does for layers that it knows.

    In ``with backpack(BatchGrad()): loss.backward()`` every parameter that is not frozen then gets its
    ``grad_batch``; likewise ``sum_grad_squared``, ``batch_l2`` and ``variance`` with ``SumGradSquared``,
    ``BatchL2Grad`` and ``Variance``. Values are float32. They come from fisherscope's layer rules, so that
    ``Conv1D``, norms, embeddings and layers with a rule of the user's own are known, and the pieces of tied
    parameters and of layers that are called several times are added before anything is squared. Other
    first-order extensions run as under BackPACK itself, one call of a layer at a time.

    What the model computes does not change, in training and in evaluation mode. An embedding that one row of
    positions serves for all samples returns a row for each sample.

    Args:
        model: the module that will be called, for instance a transformers model. The number of samples is the
            length of the first axis of its main input.

    Returns:
        The same model. :func:`restore` takes the hooks away again.

    Raises:
        FisherscopeError: a part of it was extended before.
        AdapterError: it is sharded, offloaded, quantised or compiled.
    """
    if _TAP in vars(model):
        return model
    refuse_unusable(model)
    for path, module in model.named_modules():
        if getattr(module, MARK, False):
            raise FisherscopeError(
                f"{path or 'the model'} was extended before, by BackPACK itself or as part of another model: "
                "extend a model once, as a whole, with fisherscope.instrument.backpack.extend"
            )
    vars(model)[_TAP] = BackpackTap(model)
    return model


def restore(model: Model) -> Model:
    """Take away what :func:`extend` has put into a model, and what the extensions have saved on parameters.

    Returns:
        The same model, as it was; also where it was never extended.
    """
    tap = vars(model).pop(_TAP, None)
    if isinstance(tap, BackpackTap):
        tap.remove()
    return model
