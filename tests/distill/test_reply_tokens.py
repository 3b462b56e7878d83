# SPDX-License-Identifier: Apache-2.0
"""Token ids of a server's text behind its prompt."""

from __future__ import annotations

import pytest
from toy_tokenizers import llama_tokenizer

from mtp_lightning.distill.endpoint import Reply
from mtp_lightning.distill.reply_tokens import reply_tokens
from mtp_lightning.distill.tasks import Task
from mtp_lightning.text.prompts import PromptRow, encode_prompt_row

X, SPACE, FIVE, EQUALS, TWICE, END = 5, 262, 263, 264, 265, 2


@pytest.mark.parametrize(
    ("prompt", "text", "prompt_ids", "answer"),
    [
        ("x=", "5", [SPACE, X, EQUALS], [FIVE, END]),
        ("x=", " 5", [SPACE, X, EQUALS], [SPACE, FIVE, END]),
        ("x=", "5</s>", [SPACE, X, EQUALS], [FIVE, END]),
        ("x=", "=5", [SPACE, X], [TWICE, FIVE, END]),  # a token spans the border
    ],
)
def test_no_space_is_put_before_an_answer(prompt: str, text: str, prompt_ids: list[int], answer: list[int]) -> None:
    tokenizer = llama_tokenizer()
    row = PromptRow("here", prompt, "", 1)
    task = Task(row, encode_prompt_row(row, tokenizer))
    found = reply_tokens(Reply(1, text, True, None, None), task, tokenizer, len(tokenizer))
    assert found == (prompt_ids, answer)
