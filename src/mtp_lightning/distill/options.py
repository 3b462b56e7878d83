# SPDX-License-Identifier: Apache-2.0
"""The options of ``mtp distill``: how answers are drawn, and which server gives them. Imports no torch."""

from __future__ import annotations

import hashlib
import urllib.parse
from dataclasses import dataclass

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from mtp_lightning.decoding.options import MIN_TEMPERATURE
from mtp_lightning.errors import UsageError


@dataclass(frozen=True)
class AnswerOptions:
    """How answers are drawn.

    Args:
        max_new_tokens: maximum number of tokens in an answer.
        temperature: 0: greedy; above: sampled at this temperature.
        top_k: sample from the k most likely tokens only.
        top_p: sample from the smallest set of most likely tokens with this total probability.
        seed: each row's seed is derived from this one and the row's id.
    """

    max_new_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 0.0
    top_k: PositiveInt | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {self.top_p}.")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UsageError(f"temperature must be 0 or from {MIN_TEMPERATURE:g} on, got {self.temperature:g}.")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError("top_k and top_p need a temperature above 0: set --temperature 1.")

    def row_seed(self, row_id: str | int) -> int:
        """The seed of the row with an id, 0 to 2^31 - 1: what every server accepts."""
        digest = hashlib.sha256(f"{self.seed} {row_id!r}".encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class EndpointOptions:
    """Which server answers, and how requests are made.

    Args:
        endpoint: address of an OpenAI-compatible server, as http://localhost:8000/v1. Default: MODEL itself answers.
        endpoint_model: the model's name on the server. Default: MODEL.
        concurrency: number of concurrent requests.
        retries: how often a request is retried.
        timeout: seconds to wait for an answer.
        token_ids: ask the server for token ids (vLLM: return_token_ids). Default: tokenize its text.
    """

    endpoint: str | None = None
    endpoint_model: str | None = None
    concurrency: PositiveInt = 16
    retries: NonNegativeInt = 8
    timeout: PositiveFloat = 600.0
    token_ids: bool = False

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            parts = urllib.parse.urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UsageError(f"endpoint must be an address like http://localhost:8000/v1, got {self.endpoint!r}.")
