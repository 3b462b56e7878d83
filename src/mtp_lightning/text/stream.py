# SPDX-License-Identifier: Apache-2.0
"""Text while it is generated: pieces that can be shown, stop texts, and an iterator over them. No printing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_lightning.decoding.limits import end_tokens, resolve_num_masks
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.errors import UsageError
from mtp_lightning.text.prompts import Prompt, encode_prompt, render_messages

if TYPE_CHECKING:
    from mtp_lightning.modeling.network import MTPNetwork


def decode_complete(tokenizer: Any, tokens: list[int]) -> str:
    """The text of tokens, less a character that is not complete yet."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text.rstrip("\ufffd")


def partial_stop_length(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of the stop text: not to be shown yet.

    ``"one t", "two" -> 1``
    """
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def stop_token_index(tokenizer: Any, before: list[int], tokens: list[int], stops: Sequence[str]) -> int | None:
    """Which of a step's tokens completes a stop text, or None; the same token however the text is cut into steps."""
    texts = (decode_complete(tokenizer, before + tokens[: i + 1]) for i in range(len(tokens) if stops else 0))
    return next((i for i, text in enumerate(texts) if any(stop in text for stop in stops)), None)


class GeneratedText:
    """The text of one prompt while it is generated.

    Args:
        model: the model.
        prompt: the prompt.
        options: how it is decoded.
        stops: texts that end it; they are cut off.

    Attributes:
        tokens: tokens generated so far, up to the one that completes a stop text.
        accepted: draft tokens kept in each step.
        shown: the text that was given out.
        stopped: whether a stop text came.
        seconds: time of decoding.
    """

    def __init__(self, model: MTPNetwork, prompt: Prompt, options: DecodingOptions, stops: Sequence[str] = ()) -> None:
        self.model, self.prompt, self.options = model, prompt, options
        self.stops = [stop for stop in stops if stop]
        self.tokens: list[int] = []
        self.accepted: list[int] = []
        self.shown = ""
        self.stopped = False
        self.seconds = 0.0

    def add(self, tokens: list[int]) -> str:
        """Take a step's tokens, up to the one that completes a stop text; gives the text that can be shown now."""
        if (end := stop_token_index(self.model.tokenizer, self.tokens, tokens, self.stops)) is not None:
            tokens = tokens[: end + 1]
        self.tokens += tokens
        self.accepted.append(len(tokens) - 1)
        now = decode_complete(self.model.tokenizer, self.tokens)
        found = [now.index(stop) for stop in self.stops if stop in now]
        if found:
            now, self.stopped = now[: min(found)], True
        held = 0 if self.stopped else max((partial_stop_length(now, stop) for stop in self.stops), default=0)
        return self._show(now[: len(now) - held])

    def _show(self, text: str) -> str:
        new = text[len(self.shown) :]
        self.shown += new
        return new

    def flush(self) -> str:
        """What was held back, once no more tokens come."""
        return "" if self.stopped else self._show(decode_complete(self.model.tokenizer, self.tokens))

    @property
    def finish_reason(self) -> str:
        """``stop`` after a stop text or an end token, else ``length``."""
        ended = self.stopped or self.tokens[-1] in end_tokens(self.model, self.options)
        return "stop" if ended else "length"

    def record(self) -> dict[str, Any]:
        """The fields of the JSON line."""
        return {
            "prompt": self.prompt.text,
            "text": self.shown,
            "token_ids": self.tokens,
            "num_steps": len(self.accepted),
            "acceptance_length": len(self.tokens) / len(self.accepted),
            "accepted_per_step": self.accepted,
            "seconds": self.seconds,
            "tokens_per_second": len(self.tokens) / self.seconds,
            "decoding": self.options.decoding,
            "num_masks": resolve_num_masks(self.model, self.options),
            "finish_reason": self.finish_reason,
        }

    def summary(self) -> str:
        """The counts in a line, for people."""
        tokens, steps = len(self.tokens), len(self.accepted)
        words = f"{tokens} token{'s' * (tokens != 1)} in {steps} step{'s' * (steps != 1)}"
        return f"[{words}, acceptance length {tokens / steps:.2f}, {tokens / self.seconds:.1f} tokens/s]"


class TextStream:
    """An iterator over pieces of text, each given as soon as its tokens are verified.

    It can be left at any time: what was given so far stays in its attributes.

    Args:
        model: the model, with a tokenizer.
        prompt: the prompt.
        options: how to decode.
        stops: texts that end the text; they are cut off.
        cache: ``RowCache(model.base, 1)`` to go on from, or None.

    Attributes:
        growing: the text so far, with its tokens and counts.
        finish_reason: ``stop`` or ``length``; None: more may come.
    """

    def __init__(
        self,
        model: MTPNetwork,
        prompt: Prompt,
        options: DecodingOptions,
        stops: Sequence[str] = (),
        cache: RowCache | None = None,
    ) -> None:
        self.generated = GeneratedText(model, prompt, options, stops)
        self.finish_reason: str | None = None
        self._pieces = self._run(decode(model, torch.tensor(prompt.input_ids), options, cache))

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def text(self) -> str:
        """The text that was given so far."""
        return self.generated.shown

    @property
    def token_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.generated.tokens

    @property
    def accepted_per_step(self) -> list[int]:
        """Draft tokens kept in each step so far."""
        return self.generated.accepted

    def _run(self, steps: Iterator[Any]) -> Iterator[str]:
        text = self.generated
        calibrate(text.model, text.options)
        while True:
            # Decoding alone is timed, not the text made of it nor what the reader does with it.
            begin = time.perf_counter()
            step = next(steps, None)
            text.seconds += time.perf_counter() - begin
            if step is not None and (piece := text.add(step.tokens)):
                yield piece
            if step is None or text.stopped:
                break
        if piece := text.flush():
            yield piece
        self.finish_reason = text.finish_reason


def stream_text(
    model: MTPNetwork,
    prompt: str | Sequence[int] | Tensor | Sequence[dict[str, Any]],
    stop: str | Sequence[str] | None = None,
    **options: Any,
) -> TextStream:
    """Generate for one prompt as an iterator over pieces of text.

    Args:
        model: the model.
        prompt: text, token ids, or messages for the base's chat template.
        stop: a text that ends the generation, or several; it is cut off.
        **options: see ``DecodingOptions``.

    Returns:
        The iterator.

    Raises:
        UsageError: there is no tokenizer, or a wrong option.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UsageError(
            "streaming text needs a tokenizer: set model.tokenizer, or load the model from a folder that has one."
        )
    if isinstance(prompt, str):
        given = Prompt(prompt, encode_prompt(prompt, tokenizer), "")
    elif not isinstance(prompt, Tensor) and len(prompt) and isinstance(prompt[0], dict):
        given = render_messages(list(prompt), tokenizer)
    else:
        ids: list[Any] = prompt.reshape(-1).tolist() if isinstance(prompt, Tensor) else list(prompt)
        given = Prompt(tokenizer.decode(ids), ids, "")
    settings = DecodingOptions.from_kwargs(options)
    resolve_num_masks(model, settings)  # what is wrong shows now, not at the first piece
    return TextStream(model, given, settings, [stop] if isinstance(stop, str) else stop or ())
