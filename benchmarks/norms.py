"""Whether the cost model of group norms chooses the cheaper route; ratios from one run.

For each shape the norms of 8 slices are computed from a Gram matrix over positions and from the gradients
themselves; printed is the time of the first as a multiple of the second, and what the cost model chooses.

    python benchmarks/norms.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fisherscope.layout import Partition
from fisherscope.linalg import Factored, cost

SHAPES = [
    (n, t, width) for n, t in ((32, 16), (32, 64), (32, 256), (128, 32)) for width in (128, 256, 512, 1024)
]


def seconds(function: Callable[[], object]) -> float:
    """Duration of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print("samples  positions  width   Gram / material  model chooses  right")
    for n, positions, width in SHAPES:
        torch.manual_seed(0)
        gradient = Factored(torch.randn(n, positions, width), torch.randn(n, positions, width))
        heads = Partition.regular("w", (width, width), 0, 8, width // 8)
        ratios = []
        for repeat in range(repeats + 1):
            gram = seconds(lambda g=gradient, p=heads: p.sums(g._marginal_squares(0)))
            dense = seconds(lambda g=gradient, p=heads: g.accumulate(partitions=[p]))
            if repeat:
                ratios.append(gram / dense)
        ratio = statistics.median(ratios)
        chosen = cost.gram_is_cheaper(positions, (width, width), 0)
        # within a quarter of each other either choice is right
        right = "yes" if chosen == (ratio < 1) or 0.8 < ratio < 1.25 else "no"
        choice = "Gram" if chosen else "material"
        print(f"{n:7} {positions:10} {width:6} {ratio:20.2f}  {choice:<13}  {right}")


if __name__ == "__main__":
    main()
