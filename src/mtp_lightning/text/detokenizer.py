# SPDX-License-Identifier: Apache-2.0
"""From tokens to text, one token at a time and behind a prompt, so that spaces and characters at the border are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

_INCOMPLETE = "\ufffd"
"""What decoders give for bytes that are not a whole character."""
_REAL = (_INCOMPLETE, "ï¿½", "<0xEF><0xBF><0xBD>")
"""The tokens of U+FFFD itself: a piece of its own, as bytes of byte-level BPE, and as bytes of SentencePiece."""
_CONTEXT = 8
"""Tokens of the text so far that the tail of a text is decoded behind."""


class Detokenizer:
    """The text of new tokens, as it continues a prompt.

    Decoders of the Llama 2 kind drop the space before the first token they are given: behind the prompt it is kept.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.skip_special_tokens = skip_special_tokens
        self._before = list(prompt_ids)  # tokens whose text was given
        self._held: list[int] = []  # tokens whose text was not
        self._stream: DecodeStream | None = None
        if tokenizer.is_fast:
            # The stream would take a U+FFFD at the prompt's end for the first bytes of a character.
            incomplete = self._decode(self._before).endswith(_INCOMPLETE)
            if not (incomplete and self._is_real(self._before)):
                self._stream = DecodeStream([] if incomplete else self._before, skip_special_tokens)

    def add(self, token: int) -> str:
        """The text that a token completes; empty while the last character lacks bytes."""
        self._held.append(token)
        if self._stream is not None:
            try:
                piece = self._stream.step(self.tokenizer.backend_tokenizer, token) or ""
            except Exception:  # a decoder that changes earlier text: tokenizers has no class for it
                self._stream, piece = None, self._tail()
        else:
            piece = self._tail()
        if not piece or (self._stream is None and piece.endswith(_INCOMPLETE)):
            return ""
        self._before = (self._before + self._held)[-_CONTEXT:]
        self._held = []
        return piece

    def rest(self) -> str:
        """The text that was held back, without a last character that lacks bytes."""
        piece = self._tail()
        if not piece.endswith(_INCOMPLETE):
            return piece
        through_real = next((end for end in range(len(self._held), 0, -1) if self._is_real(self._held[:end])), 0)
        return max(piece.rstrip(_INCOMPLETE), self._tail(through_real), key=len)

    def _is_real(self, token_ids: list[int]) -> bool:
        """True if the tokens end with U+FFFD itself."""
        tokens = self.tokenizer.convert_ids_to_tokens(token_ids[-3:])
        return "".join(token or "" for token in tokens).endswith(_REAL)  # None: a row that pads the base's vocabulary

    def _tail(self, end: int | None = None) -> str:
        """The text of the tokens held back, or of those before ``end``."""
        before = self._before[-_CONTEXT:]
        return self._decode(before + self._held[:end])[len(self._decode(before)) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )


def decode_behind(tokenizer: Any, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of tokens as it continues a prompt, without special tokens and without a last character that lacks bytes."""
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    return "".join(map(detokenizer.add, token_ids)) + detokenizer.rest()


class StoppableText:
    """The text of tokens up to the first stop string, which may contain special tokens (``<|im_end|>``) and is cut off.

    ``text`` is what can be shown: without an end that could become a stop string. ``stopped`` is True once one was found.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self.stops = [stop for stop in stops if stop]
        self.text = ""
        self.stopped = False
        self._detokenizer = Detokenizer(tokenizer, prompt_ids)
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special if any(name in stop for name in special.values() for stop in self.stops) else {}
        self._searched = ""  # the text, with the special tokens where stop strings name some
        self._hidden: list[tuple[int, int]] = []  # place and length of each special token in it

    def add(self, token: int) -> bool:
        """Add a token; True if it completes a stop string."""
        if (name := self._special.get(token)) is not None:
            self._hidden.append((len(self._searched), len(name)))
        return self._append(self._detokenizer.add(token) if name is None else name)

    def finish(self) -> None:
        """Show what was held back: no more tokens come."""
        if not self.stopped:
            if not self._append(self._detokenizer.rest()):
                self.text = self._shown(len(self._searched))

    def _append(self, piece: str) -> bool:
        begin = max(0, len(self._searched) - max(map(len, self.stops), default=0))
        self._searched += piece
        positions = [place for stop in self.stops if (place := self._searched.find(stop, begin)) >= 0]
        self.stopped = bool(positions)
        held_back = max((partial_stop_length(self._searched, stop) for stop in self.stops), default=0)
        self.text = self._shown(min(positions) if positions else len(self._searched) - held_back)
        return self.stopped

    def _shown(self, end: int) -> str:
        """The text before a place of the searched text, without special tokens."""
        text = self._searched[:end]
        for place, length in reversed(self._hidden):
            text = text[:place] + text[place + length :]
        return text


def partial_stop_length(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that could be the beginning of ``stop``: ``"one t", "two" -> 1``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
