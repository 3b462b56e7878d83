# SPDX-License-Identifier: Apache-2.0
"""A conversation: messages, and the cache that is kept from turn to turn. No input, no printing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mtp_lightning.data.chat import end_of_turn
from mtp_lightning.decoding.limits import end_tokens
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt, render_messages
from mtp_lightning.text.stream import GeneratedText, TextStream

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% else %}"
    "{{ 'User' if m.role == 'user' else 'Assistant' }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""A template for bases that have none: names before lines."""
PLAIN_STOP = "\nUser:"


class Conversation:
    """Messages and answers. The keys and values of what was said stay in the cache, so that a turn feeds what is new.

    Args:
        model: the model, with a tokenizer that has a chat template.
        options: how to decode.
        stops: texts that end an answer.
        system: what the system message says; None: there is none.

    Attributes:
        messages: what was said so far.
        dropped: messages that no longer fit the context and were forgotten in the last turn.
    """

    def __init__(
        self, model: MTPNetwork, options: DecodingOptions, stops: Sequence[str] = (), system: str | None = None
    ) -> None:
        self.model, self.stops, self.system = model, list(stops), system
        self.messages: list[dict[str, str]] = []
        self.dropped = 0
        self.cache = RowCache(model.base, 1)
        ends = end_tokens(model, options) | {model.tokenizer.eos_token_id} | {end_of_turn_token(model.tokenizer)}
        self.options = replace(options, eos_token_id=sorted(token for token in ends if token is not None))
        self.generated: GeneratedText | None = None

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self.messages = []

    def undo(self) -> bool:
        """Forget the last message and its answer; whether there was one."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is not None:
            del self.messages[last:]
        return last is not None

    def say(self, text: str) -> Iterator[str]:
        """Say something and get the answer, piece by piece. An answer that is cut off is kept as far as it came.

        Args:
            text: the user's message.

        Yields:
            Pieces of the answer.

        Raises:
            UsageError: the message alone does not fit the context. It is not kept.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._fitting()
        except Exception:  # also what the template raises: the conversation goes on without this message
            self.messages.pop()
            raise
        pieces = TextStream(self.model, prompt, self.options, self.stops, self.cache)
        self.generated = pieces.generated
        try:
            yield from pieces
        finally:
            if pieces.token_ids:
                self.messages.append({"role": "assistant", "content": pieces.text.strip()})
            else:  # cut off before it began
                self.messages.pop()

    def _fitting(self) -> Prompt:
        """The conversation as a prompt, less the oldest turns where they leave too little room for an answer."""
        context, tokenizer = self.model.context, self.model.tokenizer
        room = min(self.options.max_new_tokens, context // 4)
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        for first in turns:
            prompt = render_messages(system + self.messages[first:], tokenizer)
            if len(prompt.input_ids) + room <= context:
                break
        if len(prompt.input_ids) >= context:
            raise UsageError(
                f"the message makes a prompt of {len(prompt.input_ids)} tokens and the model's context is {context}:"
                " say it shorter."
            )
        self.dropped = first
        del self.messages[:first]
        return prompt


def end_of_turn_token(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an answer; a base's own end tokens need not have it.

    Args:
        tokenizer: the base's tokenizer, with a chat template.

    Returns:
        The token, or None if the template writes plain text there, or no answer as it is.
    """
    try:
        ids = end_of_turn([{"role": "user", "content": "question"}], tokenizer)
    except RunError:
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ids[0] if ids and ids[0] in special | set(tokenizer.all_special_ids) else None
