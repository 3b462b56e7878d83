# SPDX-License-Identifier: Apache-2.0
"""Text while it is generated: what was generated for a prompt so far, and an iterator over pieces of text. No printing."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtp_lightning.decoding.generation import Generation, generate
from mtp_lightning.decoding.limits import resolve_num_masks, with_text_ends
from mtp_lightning.decoding.loop import decode_rows
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.decoding.planner import calibrate
from mtp_lightning.decoding.row_cache import RowCache
from mtp_lightning.decoding.state import StepTokens
from mtp_lightning.errors import UsageError
from mtp_lightning.text.detokenizer import StoppableText, decode_behind
from mtp_lightning.text.prompts import Prompt, encode_prompt, render_messages

if TYPE_CHECKING:
    from mtp_lightning.modeling.network import MTPNetwork


class GeneratedText:
    """The text generated for one prompt so far; stop strings are cut off.

    ``token_ids`` go up to the one that completes a stop string, ``text`` is what was emitted so far, ``pieces`` the same by
    step, ``steps`` what each step gained and verified, ``seconds`` is the time of decoding. ``finish_reason`` is ``stop``
    after a stop string or an end token, else ``length``; None while more may come.
    """

    def __init__(self, model: MTPNetwork, prompt: Prompt, options: DecodingOptions, stops: Sequence[str] = ()) -> None:
        self.model, self.prompt, self.options = model, prompt, options
        self.token_ids: list[int] = []
        self.accepted_per_step: list[int] = []
        self.steps: list[StepTokens] = []
        self.pieces: list[str] = []
        self.text = ""
        self.seconds = 0.0
        self.finish_reason: str | None = None
        self._decoded = StoppableText(model.tokenizer, prompt.input_ids, stops)

    @property
    def stopped(self) -> bool:
        """True once a stop string was found."""
        return self._decoded.stopped

    def add(self, step: StepTokens) -> None:
        """Add a step's tokens, up to the one that completes a stop string, and the text that can be emitted now."""
        num_before = len(self.token_ids)
        for token in step.tokens:
            self.token_ids.append(token)
            if self._decoded.add(token):
                break
        self.accepted_per_step.append(len(self.token_ids) - num_before - 1)
        self.steps.append(step._replace(tokens=self.token_ids[num_before:]))
        self.pieces.append("")
        self._emit()

    def finish(self, reason: str | None) -> None:
        """Add the text that was held back, for no more tokens come; the reason is that of ``RowStep``."""
        self._decoded.finish()
        self._emit()
        self.finish_reason = "stop" if self.stopped else reason

    def _emit(self) -> None:
        new = self._decoded.text[len(self.text) :]
        self.text += new
        self.pieces[-1] += new

    def record(self) -> dict[str, Any]:
        """The fields of the JSON line."""
        num_tokens, num_steps = len(self.token_ids), len(self.accepted_per_step)
        return {
            "prompt": self.prompt.text,
            "text": self.text,
            "token_ids": self.token_ids,
            "num_steps": num_steps,
            "acceptance_length": num_tokens / num_steps,
            "accepted_per_step": self.accepted_per_step,
            "seconds": self.seconds,
            "tokens_per_second": num_tokens / self.seconds,
            "decoding": self.options.decoding,
            "num_masks": resolve_num_masks(self.model, self.options),
            "exact": self.options.exact,
            "finish_reason": self.finish_reason,
        }

    def summary(self, near_ties: bool = True) -> str:
        """The counts in one line, with what low precision can change unless ``near_ties`` is False."""
        tokens, steps = len(self.token_ids), len(self.accepted_per_step)
        words = f"{tokens} token{'s' * (tokens != 1)} in {steps} step{'s' * (steps != 1)}"
        low = {torch.bfloat16: "bfloat16", torch.float16: "float16"}.get(self.model.base.dtype)
        same = low is None or self.options.decoding == "autoregressive" or self.options.exact
        ties = "" if same or not near_ties else f"; {low}: near ties may differ from plain decoding, see --exact"
        return f"[{words}, acceptance length {tokens / steps:.2f}, {tokens / self.seconds:.1f} tokens/s{ties}]"


class TextStream(GeneratedText):
    """An iterator over pieces of text, each emitted as soon as its tokens are verified.

    It may be abandoned at any time: its attributes keep what was emitted so far. The cache is a ``RowCache(model.base, 1)``
    to continue from.
    """

    def __init__(
        self,
        model: MTPNetwork,
        prompt: Prompt,
        options: DecodingOptions,
        stops: Sequence[str] = (),
        cache: RowCache | None = None,
    ) -> None:
        super().__init__(model, prompt, options, stops)
        self._iterator = self._run(cache)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._iterator)

    def close(self) -> None:
        """Free the keys and values of a text that is not read to its end at once, not at Python's next collection."""
        self._iterator.close()

    def _run(self, cache: RowCache | None) -> Generator[str, None, None]:
        calibrate(self.model, self.options)
        for _ in decode_texts([self], cache):
            if self.pieces[-1]:
                yield self.pieces[-1]


def decode_texts(texts: Sequence[GeneratedText], cache: RowCache | None = None) -> Iterator[None]:
    """Decode texts of one model together, each to its end; yields after each step of the first one.

    The seeds of all are in the options of the first.
    """
    finished: set[int] = set()
    prompts = [torch.tensor(text.prompt.input_ids) for text in texts]
    steps = decode_rows(texts[0].model, prompts, texts[0].options, cache, finished)
    seconds = 0.0
    while len(finished) < len(texts):
        # Only decoding is timed: neither making text of tokens nor what the reader does with it.
        begin = time.perf_counter()
        results = next(steps)
        seconds += time.perf_counter() - begin
        for row, step, reason in results:
            text = texts[row]
            text.add(step)
            text.seconds = seconds
            if reason is not None or text.stopped:
                text.finish(reason)
                finished.add(row)
            if row == 0:
                yield


def stream_text(
    model: MTPNetwork,
    prompt: str | Sequence[int] | Tensor | Sequence[dict[str, Any]],
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    **options: Any,
) -> TextStream:
    """Generate for one prompt as an iterator over pieces of text; see ``MTPModel.stream``."""
    if model.tokenizer is None:
        raise UsageError("streaming text needs a tokenizer, and the model has none: set model.tokenizer.")
    encoded = _encode(prompt, model.tokenizer, raw)
    settings = with_text_ends(model, DecodingOptions.from_kwargs(options))
    resolve_num_masks(model, settings)  # so that a wrong option raises now, not at the first piece
    return TextStream(model, encoded, settings, [stop] if isinstance(stop, str) else stop or ())


def _encode(prompt: str | Sequence[int] | Tensor | Sequence[dict[str, Any]], tokenizer: Any, raw: bool) -> Prompt:
    """A prompt of any of the forms that ``stream_text`` takes."""
    if isinstance(prompt, str):
        return encode_prompt(prompt, tokenizer, raw)
    if not isinstance(prompt, Tensor) and len(prompt) and isinstance(prompt[0], dict):
        return render_messages(list(prompt), tokenizer)
    if isinstance(prompt, Tensor) and (prompt.ndim == 0 or prompt.numel() != prompt.shape[-1]):
        raise UsageError(f"expected the ids of one prompt, got {list(prompt.shape)}: give the rows one by one.")
    ids: list[Any] = prompt.reshape(-1).tolist() if isinstance(prompt, Tensor) else list(prompt)
    return Prompt(tokenizer.decode(ids), ids, "")


def generate_texts(model: MTPNetwork, prompts: str | Sequence[Any], raw: bool = False, **options: Any) -> Generation:
    """``generate`` for a text, a conversation, or several of either; the result has ``texts`` too."""
    if model.tokenizer is None:
        raise UsageError("a prompt of text needs a tokenizer, and the model has none: set model.tokenizer.")
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    encoded = [_encode(prompt, model.tokenizer, raw) for prompt in ([prompts] if is_one else prompts)]
    rows = [torch.tensor(prompt.input_ids) for prompt in encoded]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0, dtype=torch.long)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True) if rows else None
    streamer = options.pop("streamer", None)
    settings = with_text_ends(model, DecodingOptions.from_kwargs(options))
    generation = generate(model, ids, mask, streamer, **{**options, "eos_token_id": settings.eos_token_id})
    generation.texts = []
    for row, accepted, prompt in zip(generation.sequences, generation.accepted_per_step, encoded, strict=True):
        begin, new = len(prompt.input_ids), sum(accepted) + len(accepted)
        generation.texts.append(decode_behind(model.tokenizer, prompt.input_ids, row[begin : begin + new].tolist()))
    return generation
