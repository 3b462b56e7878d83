# SPDX-License-Identifier: Apache-2.0
"""Answers from a server that speaks OpenAI's protocol (vLLM, SGLang, ``transformers serve``). Standard library only.

A prompt of messages goes to ``chat/completions``, a text to ``completions``. What may pass by itself (no connection, a cut
one, a timeout, status 408, 409, 425, 429 or 5xx, an answer that is no JSON) is tried again, waiting twice as long each time.
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

KEY = "MTP_API_KEY"
"""The environment variable with the server's key, if it wants one."""

LONGEST_WAIT = 60.0
_AGAIN = {408, 409, 425, 429}


@dataclass(frozen=True)
class EndpointOptions:
    """Which server, and how it is asked.

    Args:
        endpoint: address of an OpenAI-compatible server, as http://localhost:8000/v1. Not given: MODEL itself answers.
        endpoint_model: the model's name on the server. Not given: MODEL.
        concurrency: requests under way at once.
        retries: how often a request is tried again before the command gives up.
        timeout: seconds to wait for an answer.
        token_ids: ask the server for token ids (vLLM: return_token_ids). Not asked, the base's tokenizer makes them.
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
                raise UsageError(
                    f"endpoint must be an address like http://localhost:8000/v1, got {self.endpoint!r}. Change --endpoint."
                )
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, got {getattr(self, name)}. Change --{name}.")
        if not self.timeout > 0:
            raise UsageError(f"timeout must be above 0, got {self.timeout}. Change --timeout.")


class Question(NamedTuple):
    """What is sent.

    Attributes:
        name: id of the row.
        content: text, or messages.
        room: most tokens in the answer.
    """

    name: str | int
    content: str | list[Any]
    room: int


class Reply(NamedTuple):
    """What came back.

    Attributes:
        name: id of the row.
        text: the answer.
        ended: the model ended it; else it was cut at the limit.
        token_ids: the answer's tokens, if the server gave them.
        prompt_ids: the prompt's tokens, if the server gave them.
    """

    name: str | int
    text: str
    ended: bool
    token_ids: list[int] | None
    prompt_ids: list[int] | None


class _Again(Exception):
    """A request that may go better next time; ``after``: seconds that the server asks for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Endpoint:
    """Asks a server.

    Args:
        options: which server.
        model: the model's name on it.
        answers: how answers are drawn.
    """

    def __init__(self, options: EndpointOptions, model: str, answers: AnswerOptions) -> None:
        assert options.endpoint is not None
        self.options = options
        self.url = options.endpoint.rstrip("/")
        self.model = model
        self.answers = answers
        self.num_retries = 0
        self._stopped = threading.Event()

    def replies(self, questions: Iterable[Question]) -> Iterator[Reply]:
        """Ask all questions, at most ``concurrency`` at once.

        Args:
            questions: what to ask.

        Yields:
            Replies in the order in which they come.

        Raises:
            RunError: the server refuses a question, or does not answer it after all retries; what was answered by then
                is yielded before.
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
                    # A daemon: the process ends without waiting for the requests under way, after an error and Ctrl-C.
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
            self._stopped.set()  # whoever waits for another try gives up

    def ask(self, question: Question) -> Reply:
        """Ask one question until it is answered.

        Args:
            question: what to ask.

        Returns:
            The reply.

        Raises:
            RunError: the server refuses it, or does not answer after all retries.
        """
        for attempt in range(self.options.retries + 1):
            try:
                return self._ask_once(question)
            except _Again as error:
                if attempt == self.options.retries or self._stopped.is_set():
                    raise RunError(
                        f"{self.url}: row {question.name!r} was not answered in {attempt + 1}"
                        f" {'try' if attempt == 0 else 'tries'}, at last: {error}."
                        " Look at the server, then run the same command again to go on."
                    ) from error
                self.num_retries += 1
                # Random, so that the requests that failed together do not come back together.
                pause = min(LONGEST_WAIT, 0.5 * 2**attempt) * random.uniform(0.5, 1.0)
                self._stopped.wait(max(pause, min(error.after or 0.0, LONGEST_WAIT)))
        raise AssertionError("the last try returns or raises")

    def _ask_once(self, question: Question) -> Reply:
        chat = not isinstance(question.content, str)
        path = "chat/completions" if chat else "completions"
        body: dict[str, Any] = {
            "model": self.model,
            "messages" if chat else "prompt": question.content,
            "max_tokens": question.room,
            "temperature": self.answers.temperature,
            "stream": False,
        }
        if self.answers.temperature > 0:
            # Where no top_p is sent, a server uses that of the model's own settings. top_k is no field of OpenAI's.
            body |= {"seed": self.answers.row_seed(question.name), "top_p": self.answers.top_p or 1.0}
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
                f"{self.url}/{path}: expected choices with text and finish_reason, got {json.dumps(answer)[:200]}."
                " Is it an OpenAI-compatible server?"
            ) from error
        prompt_ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
        return Reply(question.name, text or "", reason != "length", choice.get("token_ids"), prompt_ids)

    def _post(self, path: str, body: dict[str, Any], question: Question) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = one_line(Exception(_body(error)), 200)
            if error.code in _AGAIN or error.code >= 500:
                raise _Again(f"status {error.code}: {said}", _seconds(error.headers.get("Retry-After"))) from error
            raise RunError(
                f"{self.url}/{path}: the server refuses row {question.name!r} with status {error.code}: {said}."
                f" Check --endpoint, --endpoint_model ({self.model}), {KEY} and the prompt."
            ) from error
        except TimeoutError as error:
            raise _Again(f"no answer in {self.options.timeout:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:  # no connection, or one that was cut
            raise _Again(one_line(error, 200)) from error
        except ValueError as error:
            raise _Again(f"the answer is no JSON: {one_line(error, 100)}") from error
        if not isinstance(answer, dict):
            raise _Again(f"expected a JSON object, got {type(answer).__name__}")
        return answer


def _body(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace") or error.reason
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _seconds(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:  # a date: the growing pause serves too
        return None
