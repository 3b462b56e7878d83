# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on (row's seed, position, token) alone: the same in every batch, order and device.

With 64-bit integers that wrap around, and ``mix`` the finaliser of SplitMix64 (Steele, Lea and Flood 2014),

    key  = mix(mix(seed + stream * 0x9E3779B97F4A7C15) + position * 0xD1342543DE82EF95)
    bits = mix(key + (token + 1) * 0x9E3779B97F4A7C15)
    u    = (bits >> 12 + 0.5) / 2^52,   Gumbel noise = -log(-log u)

Streams separate the uses of one position: 0 draws tokens and couples drafts with them; 1 and 2 accept drafts and draw
replacements in rejection sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOKEN_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0, 1, 2


def _signed(value: int) -> int:
    """A number modulo 2^64 as the int64 with the same bits."""
    value %= 1 << 64
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _POSITION = _signed(0x9E3779B97F4A7C15), _signed(0xD1342543DE82EF95)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _xor_shift_(x: Tensor, shift: int) -> Tensor:
    # int64's right shift extends the sign: mask its copies out.
    return x.bitwise_xor_((x >> shift).bitwise_and_((1 << (64 - shift)) - 1))


def _mix_(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, in place."""
    x = _xor_shift_(x, 30).mul_(_FIRST)
    x = _xor_shift_(x, 27).mul_(_SECOND)
    return _xor_shift_(x, 31)


def noise_keys(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """The key of each position, [B, N] int64, from the rows' seeds [B] and absolute positions without padding [B, N]."""
    rows = _mix_(seeds + _signed(stream * _GOLDEN))
    return _mix_(rows[:, None] + positions * _POSITION)


def _uniform(bits: Tensor) -> Tensor:
    # 52 bits and a half are 53: exact in float64, never 0 or 1.
    return (bits >> 12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)


def uniform_noise(keys: Tensor) -> Tensor:
    """One number in (0, 1) a key, float64."""
    return _uniform(_mix_(keys + _GOLDEN))


def gumbel_noise(keys: Tensor, tokens: int | Tensor) -> Tensor:
    """Gumbel noise [..., V or N] float64 of keys [...], for V tokens or for token ids [..., N]."""
    ids = torch.arange(tokens, device=keys.device) if isinstance(tokens, int) else tokens
    return _uniform(_mix_(keys[..., None] + (ids + 1) * _GOLDEN)).log_().neg_().log_().neg_()


def row_seeds(seed: int | Sequence[int] | None, num_rows: int, first: int = 0) -> list[int]:
    """The seed of each row of a batch: row 0 has the seed itself, row r one made from (seed, r).

    Several seeds are used as they are; None: one is drawn from torch's default generator. ``first`` is the number of the
    first row, if the batch is a part of a longer list.
    """
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()).item())
    if isinstance(seed, int):
        numbers = torch.arange(first, first + num_rows)
        derived = _mix_(_mix_(torch.tensor(_signed(seed))) + numbers * _POSITION).tolist()
        return [_signed(seed) if row == 0 else each for row, each in enumerate(derived, first)]
    return [_signed(each) for each in seed]
