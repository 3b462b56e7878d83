# SPDX-License-Identifier: Apache-2.0
"""Packed products are the plain ones up to rounding, whatever the rows and strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding.packed_linear import SMALL, PackedLinear, packed_dtypes

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Tolerance by dtype, relative and absolute, for sums of 48 products of standard normal numbers, up to about 25: the last
bit of float64 and float32 there is 4e-15 and 2e-6, and other orders of summing differ by some dozen; bfloat16 has 8 bits."""


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_products(dtype: torch.dtype, with_bias: bool, single: bool) -> None:
    weight = numbers(40, 48, dtype=dtype)
    bias = numbers(40, seed=1, dtype=dtype) if with_bias else None
    linear, close = PackedLinear(weight, bias, single), {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    assert (linear.packed is not None) == (dtype in packed_dtypes())
    assert (linear.plain is None) == (linear.packed is not None and not (single and linear.plain_single))
    for shape in ((1, 48), (1, 1, 48), (7, 48), (1, 5, 48), (3, 4, 48), (2, 81, 48)):
        x = numbers(*shape, seed=2, dtype=dtype)
        torch.testing.assert_close(linear(x), F.linear(x, weight, bias), **close)
    tail = numbers(2, 9, 60, seed=3, dtype=dtype)[:, 4:, 7:55]  # a part of something larger
    torch.testing.assert_close(linear(tail), F.linear(tail, weight, bias), **close)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_sums(dtype: torch.dtype, rows: int) -> None:
    weight, close = numbers(40, 48, dtype=dtype), {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    linear = PackedLinear(weight)
    base, x = numbers(rows, 40, seed=1, dtype=dtype), numbers(rows, 48, seed=2, dtype=dtype)
    torch.testing.assert_close(linear.plus(base, x), base + F.linear(x, weight), **close)
    wide = numbers(rows, 6, 100, seed=3, dtype=dtype)
    expected = wide.clone()
    expected[:, 2:, 5:45] += F.linear(expected[:, 2:, 50:98], weight)
    linear.add_to(wide[:, 2:, 5:45], wide[:, 2:, 50:98])
    torch.testing.assert_close(wide, expected, **close)


@torch.inference_mode()
def test_a_large_weight_keeps_no_plain_copy() -> None:
    weight = numbers(SMALL // 64, 64, dtype=torch.float32)
    linear = PackedLinear(weight)
    assert (linear.plain is None) == (torch.float32 in packed_dtypes())
    x = numbers(1, 64, seed=1, dtype=torch.float32)
    torch.testing.assert_close(linear(x), F.linear(x, weight), rtol=1e-4, atol=1e-4)
