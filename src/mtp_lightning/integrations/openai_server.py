# SPDX-License-Identifier: Apache-2.0
"""A running OpenAI-compatible server (vLLM, SGLang) as a system of ``mtp benchmark``.

Prompts are sent as token ids, so that they are the same for every server and in-process. Acceptance is read from vLLM's
counters, if the server has them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.distill.endpoint import client
from mtp_lightning.distill.options import EndpointOptions
from mtp_lightning.errors import RunError, one_line
from mtp_lightning.evaluation.benchmark import Batch, System, prompt_seeds
from mtp_lightning.evaluation.decoded_text import DecodedText
from mtp_lightning.integrations.server_metrics import counter_total
from mtp_lightning.text.prompts import Prompt

ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
"""vLLM's counter of accepted draft tokens."""


def served_model(url: str) -> str:
    """The name of the model that a server has. RunError if it can't be reached."""
    connection = client(url, EndpointOptions(endpoint=url, retries=1))
    import openai

    try:
        return str(connection.models.list().data[0].id)
    except (openai.OpenAIError, AttributeError, IndexError, TypeError) as error:
        raise RunError(f"{url}: no model to measure: {one_line(error, 200)}. Is it an OpenAI-compatible server?") from error


def server_system(url: str, model: str, prompts: Sequence[Prompt], options: DecodingOptions, stop: str | None) -> System:
    """A server; the prompts of a batch are sent at once."""
    connection = client(url, EndpointOptions(endpoint=url))
    shared: dict[str, Any] = {"model": model, "temperature": options.temperature, "stop": stop}
    shared |= {"top_p": options.top_p} if options.top_p is not None else {}
    extra = {"return_token_ids": True} | ({"top_k": options.top_k} if options.top_k is not None else {})

    def ask(index: int, limit: int) -> list[int]:
        seeds = prompt_seeds(options, [index])
        seed = {} if seeds is None else {"seed": seeds[0] % 2**31}
        ids = prompts[index].input_ids
        answer = connection.completions.create(prompt=ids, max_tokens=limit, extra_body=extra, **shared, **seed)
        tokens = getattr(answer.choices[0], "token_ids", None)
        if not tokens:
            raise RunError(f"{url}: the answer has no token_ids: a server is measured that returns them (vLLM from 0.10.2).")
        return list(tokens)

    def decode(indices: Sequence[int], limit: int) -> Batch:
        import openai

        accepted = num_accepted(connection)
        try:
            with ThreadPoolExecutor(len(indices)) as pool:
                begin = time.perf_counter()
                texts = list(pool.map(ask, indices, [limit] * len(indices)))
                seconds = time.perf_counter() - begin
        except openai.OpenAIError as error:
            raise RunError(f"{url}: no answer: {one_line(error, 200)}.") from error
        after = num_accepted(connection)
        steps = None if accepted is None or after is None else sum(map(len, texts)) - round(after - accepted)
        return Batch([DecodedText(text, [], []) for text in texts], seconds, steps)

    return decode


def num_accepted(connection: Any) -> float | None:
    """Draft tokens that a server has accepted since it started, from its ``/metrics``; None: it does not tell."""
    import openai

    try:
        address = str(connection.base_url).rstrip("/").removesuffix("/v1") + "/metrics"
        text = connection.get(address, cast_to=str)
    except openai.OpenAIError:
        return None
    return counter_total(text, ACCEPTED)
