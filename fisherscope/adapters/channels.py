"""The numeric check of MLP channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fisherscope.adapters.capture import beyond_rounding, capture_input, projection_of
from fisherscope.adapters.places import check_channel_places
from fisherscope.errors import AdapterError
from fisherscope.layout import MlpLayout, Partition

_CHANNEL_DRAWS = 32  # a rectified gate hides half of the channels in each


def verify_channels(model: nn.Module, mlp: MlpLayout) -> None:
    """Confirm every channel of one MLP: an entry of an expanding projection moves one input of the other.

    Channels are changed many at a time: in row b those whose number has the binary digit b. Each input of the
    contracting projection then tells by the rows in which it moved which channel it belongs to.

    Raises:
        AdapterError: another channel moved than the layout says.
    """
    check_channel_places(model, mlp)
    *expand, contract = mlp.weights
    numbers = torch.arange(1, mlp.channels + 1, dtype=torch.int64, device="cpu")
    digits = [numbers.bitwise_right_shift(b).bitwise_and(1).bool() for b in range(mlp.channels.bit_length())]
    rows = [(partition, chosen) for partition in expand for chosen in digits]
    inputs_of = torch.tensor(contract.starts, dtype=torch.int64, device="cpu")
    expected = torch.zeros(len(rows), contract.shape[contract.axis], dtype=torch.bool, device="cpu")
    for row, (_, chosen) in enumerate(rows):
        expected[row, inputs_of[chosen]] = True
    reached = torch.zeros_like(expected)
    for draw in range(_CHANNEL_DRAWS):
        inputs = _channel_inputs(model, contract.module, rows, seed=draw)
        reached |= beyond_rounding(inputs[1:], inputs[:1].expand(len(rows), -1, -1)).any(1).cpu()
        if (reached & ~expected).any() or torch.equal(reached, expected):
            break
    for (partition, _), found, wanted in zip(rows, reached, expected, strict=True):
        wrong = (found != wanted).nonzero().flatten().tolist()
        if wrong:
            moved = (
                "moves with channels that are not its own"
                if found[wrong[0]]
                else "does not move with its channel"
            )
            raise AdapterError(f"input {wrong[0]} of {contract.module} {moved} in {partition.module}")


def _channel_inputs(
    model: nn.Module, contract: str, rows: Sequence[tuple[Partition, Tensor]], seed: int
) -> Tensor:
    """Inputs of the contracting projection: of a plain row, then with some channels perturbed in each."""
    generator = torch.Generator().manual_seed(seed)

    def change(path: str) -> Callable[[Tensor], None]:
        def apply(out: Tensor) -> None:
            for row, (partition, chosen) in enumerate(rows, start=1):
                if projection_of(partition) == path:
                    # both ways by turns: half of a rectifier's inputs hide a change in one direction
                    out[row, 0, torch.tensor(partition.starts, dtype=torch.int64, device="cpu")[chosen]] += (
                        -4.0 if seed % 2 else 4.0
                    )

        return apply

    changes = {path: change(path) for path in dict.fromkeys(projection_of(p) for p, _ in rows)}
    return capture_input(model, contract, changes, 1 + len(rows), generator, "the contracting projection")
