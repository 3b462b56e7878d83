# SPDX-License-Identifier: Apache-2.0
"""A conversation: its messages, and the key-value cache that is kept between turns. No input, no printing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtp_lightning.decoding.limits import with_text_ends
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.errors import UsageError
from mtp_lightning.modeling.network import MTPNetwork
from mtp_lightning.text.prompts import Prompt, render_messages
from mtp_lightning.text.stream import GeneratedText, TextStream

PLAIN_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% else %}"
    "{{ 'User' if m.role == 'user' else 'Assistant' }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""A chat template for bases without one: each line begins with the speaker's name."""
PLAIN_STOP = "\nUser:"
"""The stop string of ``PLAIN_TEMPLATE``."""


class Conversation:
    """Messages and answers; a turn feeds only what is new, because the cache keeps the keys and values of earlier turns.

    ``messages`` are those so far, without the system message; ``dropped`` counts those dropped in the last turn because they
    no longer fit the context; ``generated`` is the last answer with its counts, or None.
    """

    def __init__(
        self, model: MTPNetwork, options: DecodingOptions, stops: Sequence[str] = (), system: str | None = None
    ) -> None:
        self.model, self.stops, self.system = model, list(stops), system
        self.messages: list[dict[str, str]] = []
        self.dropped = 0
        self.generated: GeneratedText | None = None
        self.cache = RowCache(model.base, 1)
        self.options = with_text_ends(model, options)

    def reset(self) -> None:
        """Forget all messages but the system message."""
        self.messages = []

    def undo(self) -> bool:
        """Forget the last user message and its answer; False if there is none."""
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "user"), default=None)
        if last is not None:
            del self.messages[last:]
        return last is not None

    def say(self, text: str) -> Iterator[str]:
        """Send a user message and yield the answer in pieces; an interrupted answer is kept up to that point.

        Raises a UsageError if the message alone does not fit the context; it is not kept then.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self._prompt()
        except BaseException:  # whatever the template raises, or Ctrl-C: the conversation continues without this message
            self.messages.pop()
            raise
        stream = TextStream(self.model, prompt, self.options, self.stops, self.cache)
        self.generated = stream
        try:
            yield from stream
        finally:
            if stream.token_ids:
                self.messages.append({"role": "assistant", "content": stream.text.strip()})
            else:  # interrupted before the first token
                self.messages.pop()

    def _prompt(self) -> Prompt:
        """The conversation as a prompt; the oldest turns are dropped where they leave too little space for an answer."""
        context, tokenizer = self.model.context, self.model.tokenizer
        answer_space = min(self.options.max_new_tokens, context // 4)
        system = [{"role": "system", "content": self.system}] if self.system else []
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        for first in turns:
            prompt = render_messages(system + self.messages[first:], tokenizer)
            if len(prompt.input_ids) + answer_space <= context:
                break
        if len(prompt.input_ids) >= context:
            raise UsageError(
                f"the prompt has {len(prompt.input_ids)} tokens, and the context is {context}: shorten the message."
            )
        self.dropped = first
        del self.messages[:first]
        return prompt
