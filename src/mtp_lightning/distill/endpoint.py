# SPDX-License-Identifier: Apache-2.0
"""Answers from an OpenAI-compatible server (vLLM, SGLang, ``transformers serve``). Standard library only.

Messages go to ``chat/completions``, a text to ``completions``. Transient failures (connection refused or lost, a timeout,
status 408, 409, 425, 429 or 5xx, an answer that is not JSON) are retried with exponential backoff.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from queue import SimpleQueue
from typing import Any, NamedTuple

from mtp_lightning.distill.base_answers import AnswerOptions
from mtp_lightning.errors import RunError, UsageError, one_line

API_KEY_VARIABLE = "MTP_API_KEY"
"""The environment variable with the server's API key, if it requires one."""

MAX_BACKOFF = 60.0
"""Seconds between two attempts, at most."""
_TRANSIENT_STATUS = {408, 409, 425, 429}


@dataclass(frozen=True)
class EndpointOptions:
    """Which server answers, and how requests are made.

    Args:
        endpoint: address of an OpenAI-compatible server, as http://localhost:8000/v1. Default: MODEL itself answers.
        endpoint_model: the model's name on the server. Default: MODEL.
        concurrency: number of concurrent requests.
        retries: how often a request is retried before the command gives up.
        timeout: seconds to wait for an answer.
        token_ids: ask the server for token ids (vLLM: return_token_ids). Default: tokenize its text.
    """

    endpoint: str | None = None
    endpoint_model: str | None = None
    concurrency: int = 16
    retries: int = 8
    timeout: float = 600.0
    token_ids: bool = False

    def __post_init__(self) -> None:
        if self.endpoint is not None:
            parts = urllib.parse.urlsplit(self.endpoint)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise UsageError(f"endpoint must be an address like http://localhost:8000/v1, got {self.endpoint!r}.")
        for name, minimum in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < minimum:
                raise UsageError(f"{name} must be {minimum} or more, got {getattr(self, name)}.")
        if not self.timeout > 0:
            raise UsageError(f"timeout must be above 0, got {self.timeout}.")


class Question(NamedTuple):
    """The prompt of a row, text or messages."""

    row_id: str | int
    content: str | list[Any]
    max_tokens: int


class Reply(NamedTuple):
    """The server's answer to the prompt of a row."""

    row_id: str | int  # id of the row
    text: str  # the answer
    ended: bool  # True if the model ended it, False if it was cut at the limit
    token_ids: list[int] | None  # the answer's tokens, if the server returned them
    prompt_ids: list[int] | None  # the prompt's tokens, if the server returned them


class _Transient(Exception):
    """A request failed in a way that may pass; the server may ask to wait ``retry_after`` seconds."""

    def __init__(self, reason: str, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class Endpoint:
    """A server that answers prompts; ``model`` is the model's name there."""

    def __init__(self, options: EndpointOptions, model: str, answers: AnswerOptions) -> None:
        assert options.endpoint is not None
        self.options = options
        self.url = options.endpoint.rstrip("/")
        self.model = model
        self.answers = answers
        self._stopped = threading.Event()

    def replies(self, questions: Iterable[Question]) -> Iterator[Reply]:
        """Send all questions, at most ``concurrency`` at once, and yield replies as they come.

        If the server refuses a question, or does not answer it after all retries, what was answered by then is yielded,
        and RunError is raised.
        """
        waiting = iter(questions)
        finished: SimpleQueue[Reply | BaseException] = SimpleQueue()

        def answer(question: Question) -> None:
            try:
                finished.put(self.ask(question))
            except BaseException as error:
                finished.put(error)

        running = 0
        try:
            while True:
                for question in islice(waiting, self.options.concurrency - running):
                    # A daemon: after an error or Ctrl-C the process ends without waiting for its pending requests.
                    threading.Thread(target=answer, args=(question,), daemon=True).start()
                    running += 1
                if not running:
                    return
                reply = finished.get()
                running -= 1
                if isinstance(reply, BaseException):
                    while not finished.empty():
                        if isinstance(other := finished.get(), Reply):
                            yield other
                    raise reply
                yield reply
        finally:
            self._stopped.set()  # no thread retries any more

    def ask(self, question: Question) -> Reply:
        """Send one question, with retries; RunError if the server refuses it or does not answer."""
        for attempt in range(self.options.retries + 1):
            try:
                return self._ask_once(question)
            except _Transient as error:
                if attempt == self.options.retries or self._stopped.is_set():
                    failed = f"no answer to row {question.row_id!r} after {attempt + 1} attempts: {error}"
                    raise RunError(f"{self.url}: {failed}. Run the command again to resume.") from error
                # Random, so that requests that failed together are not retried together.
                pause = min(MAX_BACKOFF, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                self._stopped.wait(max(pause, min(error.retry_after or 0.0, MAX_BACKOFF)))
        raise AssertionError("the last attempt returns or raises")

    def _ask_once(self, question: Question) -> Reply:
        chat = not isinstance(question.content, str)
        path = "chat/completions" if chat else "completions"
        body: dict[str, Any] = {
            "model": self.model,
            "messages" if chat else "prompt": question.content,
            "max_tokens": question.max_tokens,
            "temperature": self.answers.temperature,
            "stream": False,
        }
        if self.answers.temperature > 0:
            # Without a top_p a server uses that of the model's generation config. top_k is not a field of OpenAI's.
            body |= {"seed": self.answers.row_seed(question.row_id), "top_p": self.answers.top_p or 1.0}
        if self.answers.top_k is not None:
            body["top_k"] = self.answers.top_k
        if self.options.token_ids:
            body["return_token_ids"] = True
        answer = self._post(path, body, question)
        try:
            choice = answer["choices"][0]
            text = choice["message"]["content"] if chat else choice["text"]
            reason = choice["finish_reason"]
        except (KeyError, IndexError, TypeError) as error:
            raise RunError(
                f"{self.url}/{path}: expected choices with finish_reason, got {json.dumps(answer)[:200]}."
            ) from error
        prompt_ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        return Reply(question.row_id, text or "", reason != "length", choice.get("token_ids"), prompt_ids)

    def _post(self, path: str, body: dict[str, Any], question: Question) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(API_KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[API_KEY_VARIABLE]}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            reason = one_line(_error_body(error), 200)
            if error.code in _TRANSIENT_STATUS or error.code >= 500:
                raise _Transient(f"status {error.code}: {reason}", _retry_after(error.headers.get("Retry-After"))) from error
            raise RunError(
                f"{self.url}/{path}: the server refuses row {question.row_id!r} with status {error.code}: {reason}."
                f" Check --endpoint, --endpoint_model ({self.model}), {API_KEY_VARIABLE} and the prompt."
            ) from error
        except TimeoutError as error:
            raise _Transient(f"no answer in {self.options.timeout:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:  # connection refused or lost
            raise _Transient(one_line(error, 200)) from error
        except ValueError as error:
            raise _Transient(f"the answer is not JSON: {one_line(error, 100)}") from error
        if not isinstance(answer, dict):
            raise _Transient(f"expected a JSON object, got {type(answer).__name__}")
        return answer


def _error_body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace") or error.reason
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _retry_after(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:  # a date: the backoff will do
        return None
