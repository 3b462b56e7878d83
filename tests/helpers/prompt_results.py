# SPDX-License-Identifier: Apache-2.0
"""Results of decoding a prompt, written by hand. A helper of the acceptance tests, no tests."""

from __future__ import annotations

from typing import Any

from mtp_lightning.evaluation.acceptance import PromptResult


def result(index: int, domain: str = "", accepted: tuple[int, ...] = (0, 1), **options: Any) -> PromptResult:
    """A result whose every step but the first had a draft of two tokens."""
    fields: dict[str, Any] = {"repeated_8grams": 0.0, "lossless": None, "seconds": 1.0, **options}
    drafted = [0] + [2] * (len(accepted) - 1)
    return PromptResult(index, domain, sum(accepted) + len(accepted), len(accepted), list(accepted), drafted, **fields)
