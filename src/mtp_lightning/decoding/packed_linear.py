# SPDX-License-Identifier: Apache-2.0
"""PackedLinear: a linear layer for few rows at a time, its weight packed beforehand into the layout of the CPU's kernels.

A matrix product of two to about twenty rows spends much of its time on packing the weight. oneDNN accepts a weight that is
packed already (compiled models do that); then a few positions cost about as much as one, which is what drafting relies on.
``benchmarks/packed_linear.py`` measures it.
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
SMALL = 1 << 19
"""Elements of a float32 weight below which a single row is faster with a plain product, whose call costs less."""

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


@functools.cache
def packed_dtypes() -> frozenset[torch.dtype]:
    """The dtypes in which packing is known to pay on this CPU; in others products are plain ones."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return frozenset()
    if not all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        return frozenset()
    has_bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)()
    return frozenset({torch.float32, torch.bfloat16} if has_bf16 else {torch.float32})


class PackedLinear:
    """A linear layer without gradients. On other devices and in other dtypes the product is a plain one.

    Args:
        weight: [N, D].
        bias: [N], or None.
        single: False if products of single rows will not be needed: then a packed weight is the only copy.

    Attributes:
        plain_single: True if the product of a single row is a plain one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, single: bool = True) -> None:
        self.bias = bias
        self.packed: Tensor | None = None
        weight = weight.detach()
        if weight.device.type == "cpu" and weight.dtype in packed_dtypes():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_ROWS)
        self.width = len(weight)
        self.id = next(_ids)
        _by_id[self.id] = self
        self.plain_single = self.packed is None or (weight.dtype == torch.float32 and weight.numel() < SMALL)
        self.plain = weight if self.packed is None or (self.plain_single and single) else None

    def _is_plain(self, rows: int) -> bool:
        return self.packed is None or (rows == 1 and self.plain is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """The products [..., N] of rows [..., D]."""
        if self._is_plain(x.numel() // x.shape[-1]):
            assert self.plain is not None
            return F.linear(x, self.plain, self.bias)
        if _as_operators:
            return torch.ops.mtp_lightning.packed_linear(x, self.id, self.width)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The products with the packed weight."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")

    def plus(self, base: Tensor, x: Tensor) -> Tensor:
        """``base`` [B, N] plus the products of rows [B, D]; for a layer without bias."""
        if self._is_plain(len(x)):
            assert self.plain is not None
            return torch.addmm(base, x, self.plain.t())
        return self(x).add_(base)

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the products of rows [B, m, D] to ``out`` [B, m, N] in place; for a layer without bias."""
        if self.packed is None or (self.plain is not None and len(x) == 1):  # then the product can add in the same call
            assert self.plain is not None
            if len(out) == 1:
                out[0].addmm_(x[0], self.plain.t())
            else:
                out += F.linear(x, self.plain)
        else:
            out += self(x)
