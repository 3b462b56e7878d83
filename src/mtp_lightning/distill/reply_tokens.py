# SPDX-License-Identifier: Apache-2.0
"""The token ids of a server's answer: those that the server returned, or those of its text behind the prompt."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

from mtp_lightning.data.encoding import completion_end
from mtp_lightning.data.tokenizing import tokenize
from mtp_lightning.distill.endpoint import EMPTY, Reply, Unanswered
from mtp_lightning.distill.tasks import Task


def reply_tokens(reply: Reply, task: Task, tokenizer: Any, vocab_size: int) -> tuple[list[int], list[int]] | Unanswered:
    """Token ids of prompt and answer, the answer's with what ends a turn or a text if the model ended it.

    Unanswered if an id has no embedding (``vocab_size``) or the ids stand for no text.
    """
    prompt_ids = reply.prompt_ids or task.prompt.input_ids
    if reply.token_ids:
        token_ids = reply.token_ids
    else:
        prompt_ids, token_ids = _tokens_behind(prompt_ids, reply.text, task, tokenizer)
        end = completion_end(task.row.content, tokenizer) if reply.ended else []
        if end and token_ids[-len(end) :] != end:  # some servers leave the end in the text
            token_ids = [*token_ids, *end]
    wrong = [token for token in [*prompt_ids, *token_ids] if type(token) is not int or not 0 <= token < vocab_size]
    if wrong:
        return Unanswered(reply.row_id, "with unknown token ids", f"{wrong[0]!r} is not a token id below {vocab_size}")
    if not tokenizer.decode(token_ids, skip_special_tokens=True).strip():
        return Unanswered(reply.row_id, EMPTY)
    return prompt_ids, token_ids


def _tokens_behind(prompt_ids: list[Any], text: str, task: Task, tokenizer: Any) -> tuple[list[Any], list[int]]:
    """Token ids of a prompt and of the text that continues it.

    A text alone is what the model wrote behind the prompt's last token, except where the tokenizer puts a space before every
    text (Llama 2). There prompt and answer are encoded together; the answer begins with the first token that differs.
    """
    prompt, alone = task.prompt.input_ids, list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if _decode(prompt + alone, tokenizer) == (whole := _decode(prompt, tokenizer) + text):
        return prompt_ids, alone
    together = tokenize(task.prompt.text + text, tokenizer, add_first=isinstance(task.row.content, str))
    if _decode(together, tokenizer) != whole:  # no ids give back this text: its spaces are lost, perhaps
        return prompt_ids, alone
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prompt, together, strict=False))))
    return prompt_ids if shared == len(prompt) else together[:shared], together[shared:]


def _decode(token_ids: list[int], tokenizer: Any) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
