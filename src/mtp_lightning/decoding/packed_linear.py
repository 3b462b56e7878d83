# SPDX-License-Identifier: Apache-2.0
"""PackedLinear: a linear layer for few rows at a time, its weight packed beforehand into the layout of the CPU's kernels.

A matrix product of two to about twenty rows spends much of its time on packing the weight. oneDNN accepts a weight that is
packed already (compiled models do that); then a few positions cost about as much as one, which is what drafting relies on.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TYPICAL_ROWS = 16
"""Rows that the layout is chosen for. Measured from 1 to 81 rows: the best for 16 is the best for all, or nearly."""

MIN_ROWS = 4
"""Rows from which on products and attention round alike, whatever their number, where ``few_rows_differ``."""
WHOLE_COLUMNS = 1024
"""Columns up to which a product of a single row does so too."""

_ids = itertools.count()
_by_id: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()
_as_operators = False


@contextlib.contextmanager
def as_operators() -> Iterator[None]:
    """Within the ``with`` block packed products are opaque operators: compilers can't trace packed weights."""
    global _as_operators
    before, _as_operators = _as_operators, True
    try:
        yield
    finally:
        _as_operators = before


_library = torch.library.Library("mtp_lightning", "DEF")
_library.define("packed_linear(Tensor x, int id, int width) -> Tensor")
_library.impl("packed_linear", lambda x, id, width: _by_id[id].product(x), "CPU")
_library.impl("packed_linear", lambda x, id, width: x.new_empty(*x.shape[:-1], width), "Meta")


def is_autocast(device: torch.device) -> bool:
    """True under autocast, where products have another dtype than what they are added to."""
    return torch.is_autocast_enabled(device.type)


def has_bfloat16_products() -> bool:
    """True if this CPU multiplies bfloat16 matrices as fast as float32 ones; others take about four times as long."""
    return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())


def has_matrix_units() -> bool:
    """True if this CPU has AMX: in bfloat16 a few rows then cost little more than one, with the same bits."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


@functools.cache
def few_rows_differ(dtype: torch.dtype) -> bool:
    """True if a product of one row, and attention of one to three queries, sums in another order than one of more.

    All those of ``MIN_ROWS`` or more are alike. So it is in bfloat16 on a CPU with AVX-512 instructions for it but no AMX
    (tried on an AMD EPYC).
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return dtype == torch.bfloat16 and has_avx512 and has_bfloat16_products() and not has_matrix_units()


@functools.cache
def packed_dtypes() -> frozenset[torch.dtype]:
    """The dtypes in which packing is known to pay on this CPU; in others products are plain ones."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return frozenset()
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return frozenset()
    return frozenset({torch.float32, torch.bfloat16} if has_bfloat16_products() else {torch.float32})


def can_pack(weight: Tensor) -> bool:
    """True if products with this weight are faster packed."""
    return weight.device.type == "cpu" and weight.dtype in packed_dtypes()


class PackedLinear:
    """A linear layer of weight [N, D] and bias [N], without gradients.

    On other devices, in other dtypes and without ``pack`` the product is a plain one, and nothing is copied.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: bool = True) -> None:
        self.width, self.bias = len(weight), bias
        self.weight: Tensor | None = weight.detach()
        self.packed: Tensor | None = None
        if pack and can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), TYPICAL_ROWS)
            if weight.dtype != torch.float32:
                self.weight = None  # never read again
        self.pads = weight.shape[1] > WHOLE_COLUMNS and few_rows_differ(weight.dtype)
        self.id = next(_ids)
        _by_id[self.id] = self

    def __call__(self, x: Tensor) -> Tensor:
        """The products [..., N] of rows [..., D]."""
        is_single = x.numel() == x.shape[-1]
        if self.weight is not None and (self.packed is None or is_single):  # packing gains nothing for a vector of float32
            return F.linear(x, self.weight, self.bias)
        if _as_operators:
            return torch.ops.mtp_lightning.packed_linear(x, self.id, self.width)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The products with the packed weight; a single row is computed as several are."""
        if self.pads and x.numel() == x.shape[-1]:
            rows = x.reshape(1, -1).expand(MIN_ROWS, -1)
            return self.product(rows)[:1].view(*x.shape[:-1], self.width)
        return torch.ops.mkldnn._linear_pointwise.default(x, self.packed, self.bias, "none", [], "")
