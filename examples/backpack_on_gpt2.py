"""BackPACK on GPT-2, both ways: its quantities on the model, and one of its extensions in a collection.

    python examples/backpack_on_gpt2.py [directory of the store]

The model is tiny and random: a few seconds, and nothing is downloaded.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from backpack import backpack
from backpack.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance
from transformers import GPT2Config, GPT2LMHeadModel

import fisherscope as fs
from fisherscope.instrument.backpack import FromBackpack, extend, restore


def tiny_gpt2() -> GPT2LMHeadModel:
    """A random GPT-2 of two layers."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def backpack_on_the_model(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """Sum over samples of g ** 2 for the attention's first projection, as BackPACK saves it."""
    extend(model)
    logits = model(input_ids=ids).logits[:, :-1]
    # a sum: a mean over the batch would give g_i / N
    loss = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="sum")
    with backpack(BatchGrad(), SumGradSquared(), BatchL2Grad(), Variance()):
        loss.backward()
    for name in ("transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.attn.c_attn.weight"):
        parameter = model.get_parameter(name)
        for saved in ("grad_batch", "sum_grad_squared", "batch_l2", "variance"):
            print(f"{name}.{saved}: {tuple(getattr(parameter, saved).shape)}")
    found = model.get_parameter("transformer.h.0.attn.c_attn.weight").sum_grad_squared
    restore(model)
    return found


def backpack_in_a_collection(model: GPT2LMHeadModel, ids: torch.Tensor, out: Path) -> torch.Tensor:
    """The same from a store, where it was collected in batches of 3."""
    squares = FromBackpack(SumGradSquared())
    scope = fs.wrap(model, parameters="attention")
    rows = [{"input_ids": row} for row in ids.tolist()]
    store = scope.collect({"random": rows}, out, extensions=("fisher", squares), batch_size=3, quiet=True)
    return squares.result(store, "random", "transformer.h.0.attn.c_attn.weight")


def main() -> None:
    """Both ways, and the difference between them."""
    model, ids = tiny_gpt2(), torch.randint(3, 100, (8, 16), generator=torch.Generator().manual_seed(1))
    on_model = backpack_on_the_model(model, ids)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        in_store = backpack_in_a_collection(model, ids, folder / "run.fs")
    difference = float((on_model - in_store).abs().max() / in_store.max())
    print(f"SumGradSquared on the model and in the store: largest relative difference {difference:.1e}")


if __name__ == "__main__":
    main()
