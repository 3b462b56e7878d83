# SPDX-License-Identifier: Apache-2.0
"""Time of a product of few rows with a plain weight and with one that was packed beforehand (``packed_linear.py``).

``python benchmarks/packed_linear.py`` prints microseconds by rows, for float32 and bfloat16 on one thread, alternating over
enough copies of each weight that a core's caches do not hold them; the minimum of a few rounds.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.packed_linear import PackedLinear, packed_dtypes

SHAPES = ((256, 256), (608, 256), (1344, 256), (2048, 256), (3072, 1024))
ROWS = (1, 2, 3, 5, 9, 17, 33, 81)


def fastest(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Microseconds of a product of the rows, alternating over the copies of the weight."""
    number, seconds = max(len(products), 40), float("inf")
    for _ in range(6):
        begin = time.perf_counter()
        for product in itertools.islice(itertools.cycle(products), number):
            product(x)
        seconds = min(seconds, (time.perf_counter() - begin) / number)
    return 1e6 * seconds


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print(f"| dtype | weight | product | {' | '.join(f'{rows} rows' for rows in ROWS)} |\n|---|---|---|{'---|' * len(ROWS)}")
    for dtype in (torch.float32, torch.bfloat16):
        if dtype not in packed_dtypes():
            continue
        for N, D in SHAPES:
            weights = [torch.randn(N, D).to(dtype) for _ in range(max(2, 8_000_000 // (N * D * 4)))]
            kinds = {
                "plain": [functools.partial(F.linear, weight=weight) for weight in weights],
                "packed": [PackedLinear(weight, single=False) for weight in weights],
            }
            inputs = [torch.randn(1, rows, D).to(dtype) for rows in ROWS]
            for name, products in kinds.items():
                figures = " | ".join(f"{fastest(products, x):.0f}" for x in inputs)
                print(f"| {dtype} | {N} x {D} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
