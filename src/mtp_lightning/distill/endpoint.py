# SPDX-License-Identifier: Apache-2.0
"""Answers from an OpenAI-compatible server (vLLM, SGLang, ``transformers serve``), asked through the ``openai`` package.

Messages go to ``chat/completions``, a text to ``completions``. The package retries what is passing: connection refused or
lost, a timeout, status 408, 409, 429 or 5xx, after the time that the server asks for in Retry-After.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
import urllib.parse
from collections.abc import Iterable, Iterator
from itertools import islice
from queue import SimpleQueue
from typing import Any, NamedTuple

from mtp_lightning.data.tokenizing import is_utf8
from mtp_lightning.distill.options import AnswerOptions, EndpointOptions
from mtp_lightning.errors import RunError, UsageError, one_line

API_KEY_VARIABLE = "MTP_API_KEY"
"""The environment variable with the server's API key, if it requires one."""

NO_ANSWER = "no answer"
"""The reason of rows without a response from the server."""
EMPTY = "empty"
"""The reason of rows whose answer has no text."""
MAX_UNANSWERED = 3
"""Successive questions without an answer, after all retries, from which on the server is taken to be down."""
MAX_REFUSED = 100
"""Questions that a server may refuse before it has answered any."""


class Question(NamedTuple):
    """The prompt of a row."""

    row_id: str | int
    content: str | list[Any]  # text, or messages
    max_tokens: int
    tools: list[Any] | None = None  # functions that the assistant may call


class Reply(NamedTuple):
    """The server's answer to the prompt of a row."""

    row_id: str | int  # id of the row
    text: str  # the answer
    ended: bool  # True if the model ended it, False if it was cut at the limit
    token_ids: list[Any] | None  # the answer's tokens as the server returned them, not checked; None or empty: it did not
    prompt_ids: list[Any] | None  # the prompt's, likewise
    has_reasoning: bool = False  # True if the server took the reasoning out of the text


class Unanswered(NamedTuple):
    """A row that has no usable answer."""

    row_id: str | int  # id of the row
    reason: str  # in a word or two, to be counted
    detail: str = ""  # what the server said


class Endpoint:
    """A server that answers prompts; ``model`` is the model's name there. UsageError without the ``openai`` package."""

    def __init__(self, options: EndpointOptions, model: str, answers: AnswerOptions) -> None:
        assert options.endpoint is not None
        self.options = options
        self.url = options.endpoint.rstrip("/")
        self.model = model
        self.answers = answers
        self._client = client(self.url, options)

    def replies(self, questions: Iterable[Question]) -> Iterator[Reply | Unanswered]:
        """Send all questions, at most ``concurrency`` at once, and yield replies as they come.

        RunError, after what was answered by then, if the server does not know the model, the key or the path, is down, or
        refuses everything.
        """
        waiting = iter(questions)
        finished: SimpleQueue[Reply | Unanswered | BaseException] = SimpleQueue()

        def answer(question: Question) -> None:
            try:
                finished.put(self.ask(question))
            except BaseException as error:
                finished.put(error)

        running = answered = refused = unanswered = 0
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
            has_failed = isinstance(reply, Unanswered) and reply.reason == NO_ANSWER
            unanswered = unanswered + 1 if has_failed else 0
            answered += isinstance(reply, Reply)
            refused += isinstance(reply, Unanswered)
            if isinstance(reply, Unanswered) and (unanswered == MAX_UNANSWERED or refused >= MAX_REFUSED and not answered):
                rows = f"{MAX_UNANSWERED} successive rows" if has_failed else f"the first {refused} rows"
                raise RunError(f"{self.url}: no answer to {rows}; row {reply.row_id!r}: {reply.detail or reply.reason}.")

    def ask(self, question: Question) -> Reply | Unanswered:
        """Send one question, with retries; RunError if the server does not know the model, the key or the path."""
        import openai

        try:
            response = self._send(question)
        except (openai.AuthenticationError, openai.NotFoundError) as error:
            raise RunError(
                f"{self.url}: the server refuses row {question.row_id!r} with status {error.status_code}: {_said(error)}."
                f" Check --endpoint, --endpoint_model ({self.model}) and {API_KEY_VARIABLE}."
            ) from error
        except openai.APIStatusError as error:
            is_passing = error.status_code in (408, 409, 429) or error.status_code >= 500
            detail = f"status {error.status_code}: {_said(error)}"
            return Unanswered(question.row_id, NO_ANSWER if is_passing else "refused", detail)
        except openai.APIConnectionError as error:  # a timeout too
            detail = one_line(str(error.__cause__ or error) or type(error.__cause__ or error).__name__, 200)
            return Unanswered(question.row_id, NO_ANSWER, detail)
        except UnicodeEncodeError:  # in a field of a message or a tool that the template does not write
            return Unanswered(question.row_id, "not UTF-8", "the prompt contains an unpaired surrogate")
        return _parse(question, response)

    def _send(self, question: Question) -> bytes:
        """The server's response to a question, undecoded; openai's exceptions if it gives none."""
        options: dict[str, Any] = {
            "model": self.model,
            "max_tokens": question.max_tokens,
            "temperature": self.answers.temperature,
            "stream": False,
        }
        extra: dict[str, Any] = {}
        if self.answers.temperature > 0:
            # Without a top_p a server uses that of the model's generation config. top_k is not a field of OpenAI's.
            options["seed"] = self.answers.row_seed(question.row_id)
            options["top_p"] = 1.0 if self.answers.top_p is None else self.answers.top_p
        if self.answers.top_k is not None:
            extra["top_k"] = self.answers.top_k
        if self.options.token_ids:
            extra["return_token_ids"] = True
        if isinstance(question.content, str):
            ask, options["prompt"] = self._client.completions, question.content
        else:
            ask, options["messages"] = self._client.chat.completions, question.content
            options |= {"tools": question.tools} if question.tools else {}
        response: bytes = ask.with_raw_response.create(**options, extra_body=extra).content
        return response


def client(url: str, options: EndpointOptions) -> Any:
    """A client of the ``openai`` package."""
    try:
        import openai
    except ImportError as error:
        raise UsageError("--endpoint needs the openai package: pip install 'mtp-lightning[endpoint]'.") from error
    # A proxy of the environment can't reach what is on this machine.
    http_client = openai.DefaultHttpxClient(trust_env=False) if _is_local(url) else None
    return openai.OpenAI(
        base_url=url,
        api_key=os.environ.get(API_KEY_VARIABLE) or "none",
        max_retries=options.retries,
        timeout=options.timeout,
        http_client=http_client,
    )


def _is_local(url: str) -> bool:
    """True for an address of this machine."""
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _parse(question: Question, response: bytes) -> Reply | Unanswered:
    """The answer in a response with status 200. Only ``stop`` ends an answer, and ``length`` cuts it."""
    try:
        answer = json.loads(response)
        choice = answer["choices"][0]
        message = choice if isinstance(question.content, str) else choice["message"]
        text, reason = message["text" if message is choice else "content"], choice["finish_reason"]
    except (ValueError, KeyError, IndexError, TypeError):
        said = response[:200].decode("utf-8", "replace").strip()
        return Unanswered(question.row_id, "no choices", one_line(said, 200) if said else "an empty response")
    if message.get("tool_calls"):
        return Unanswered(question.row_id, "tool_calls")
    if reason not in ("stop", "length"):
        return Unanswered(question.row_id, "no finish_reason" if reason is None else str(reason))
    if not isinstance(text, str) or not text.strip():
        return Unanswered(question.row_id, EMPTY)
    if not is_utf8(text):  # an emoji cut in half
        return Unanswered(question.row_id, "not UTF-8")
    token_ids, prompt_ids = choice.get("token_ids"), choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    if not isinstance(token_ids, list | None) or not isinstance(prompt_ids, list | None):
        return Unanswered(question.row_id, "with unknown token ids")
    has_reasoning = bool(message.get("reasoning_content") or message.get("reasoning"))
    return Reply(question.row_id, text, reason == "stop", token_ids, prompt_ids, has_reasoning)


def _said(error: Any) -> str:
    """What the server said in a response that is an error."""
    return one_line(error.response.text.strip() or str(error), 200)
