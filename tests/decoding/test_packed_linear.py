# SPDX-License-Identifier: Apache-2.0
"""Packed products are the plain ones up to rounding, for any rows and strides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.decoding import packed_linear
from mtp_lightning.decoding.packed_linear import PackedLinear, few_rows_differ, packed_dtypes

DTYPES = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Tolerance by dtype, relative and absolute, for sums of 48 products of standard normal numbers, up to about 25: the last
bit of float64 and float32 there is 4e-15 and 2e-6, and other orders of summing differ by some dozen; bfloat16 has 8 bits."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_products(dtype: torch.dtype) -> None:
    weight, close = randn(40, 48, dtype=dtype), {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
    for bias, pack in ((None, True), (randn(40, seed=1, dtype=dtype), True), (randn(40, seed=1, dtype=dtype), False)):
        linear = PackedLinear(weight, bias, pack)
        assert (linear.packed is not None) == (pack and dtype in packed_dtypes())
        for shape in ((1, 48), (1, 1, 48), (7, 48), (1, 5, 48), (3, 4, 48), (2, 81, 48)):
            x = randn(*shape, seed=2, dtype=dtype)
            torch.testing.assert_close(linear(x), F.linear(x, weight, bias), **close)
        part = randn(2, 9, 60, seed=3, dtype=dtype)[:, 4:, 7:55]  # strided
        torch.testing.assert_close(linear(part), F.linear(part, weight, bias), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_filled_up_row_is_the_product(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "few_rows_differ", lambda dtype: True)
    monkeypatch.setattr(packed_linear, "WHOLE_COLUMNS", 40)
    weight, bias = randn(40, 48, dtype=dtype), randn(40, seed=1, dtype=dtype)
    linear = PackedLinear(weight, bias)
    assert linear.pads
    for shape in ((48,), (1, 48), (1, 1, 48)):
        x, close = randn(*shape, seed=2, dtype=dtype), {"rtol": DTYPES[dtype], "atol": DTYPES[dtype]}
        torch.testing.assert_close(linear(x), F.linear(x, weight, bias), **close)


@pytest.mark.skipif(not few_rows_differ(torch.bfloat16), reason="tried on an AMD EPYC with AVX-512 alone")
@pytest.mark.parametrize("columns", [576, 1024, 1056, 1536, 4096])
@torch.inference_mode()
def test_bits_do_not_depend_on_the_other_rows(columns: int) -> None:
    linear, x = PackedLinear(randn(96, columns, dtype=torch.bfloat16)), randn(1, 128, columns, seed=1, dtype=torch.bfloat16)
    whole = linear(x)
    for size in (1, 2, 3, 4, 9, 25, 33, 81):
        for at in range(0, 128 - size, size):
            assert torch.equal(linear(x[:, at : at + size]), whole[:, at : at + size]), size
