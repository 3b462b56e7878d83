# SPDX-License-Identifier: Apache-2.0
"""Tasks: the prompts that are to be answered, and a count of the rows that are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from mtp_lightning.data.chat import RefusedByTemplate
from mtp_lightning.errors import RunError
from mtp_lightning.text.prompts import Prompt, PromptRow, UnusablePrompt, as_turn, encode_prompt_row


class Task(NamedTuple):
    """A prompt of this process, as in its file and as tokens."""

    row: PromptRow
    prompt: Prompt

    def fields(self, answer: str) -> dict[str, Any]:
        """The fields of the output that name the prompt; of messages with the answer."""
        fields: dict[str, Any] = {"prompt": self.prompt.text}
        if not isinstance(self.row.content, str):
            fields["messages"] = [*self.row.content, {"role": "assistant", "content": answer}]
        return fields | ({"tools": self.row.tools} if self.row.tools else {})


class LeftOut:
    """Rows without an answer: how many for each reason, and what was said of the first three."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.details: list[str] = []

    def add(self, reason: str, row_id: str | int, detail: str = "") -> None:
        """Count a row."""
        self.counts[reason] += 1
        if len(self.details) < 3:
            self.details.append(f"row {row_id!r}: {detail or reason}")

    def __str__(self) -> str:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        return f"{self.counts.total():,} rows left out: {reasons} ({'; '.join(self.details)})"


def check_ids(rows: Sequence[PromptRow]) -> None:
    """Refuse prompts with the same id."""
    locations: dict[str | int, str] = {}
    for row in rows:
        if row.row_id in locations:
            other = locations[row.row_id]
            raise RunError(
                f"{row.location}: id {row.row_id!r} is that of {other} too; a row without an id has its line number."
            )
        locations[row.row_id] = row.location


def tasks_of(rows: Sequence[PromptRow], tokenizer: Any, context: int, left_out: LeftOut) -> dict[str | int, Task]:
    """The tasks by their row's id, without prompts that can't be answered.

    Those are prompts that are empty or not UTF-8, prompts that leave no token of the context for an answer, and what the
    template refuses.
    """
    tasks = {}
    for row in rows:
        try:
            task = Task(as_turn(row, tokenizer), encode_prompt_row(row, tokenizer))
        except UnusablePrompt as error:
            left_out.add("without a usable prompt", row.row_id, str(error))
        except RefusedByTemplate as error:
            left_out.add("refused by the chat template", row.row_id, str(error))
        else:
            if len(task.prompt.input_ids) < context:
                tasks[row.row_id] = task
            else:
                left_out.add(f"without room in the context of {context}", row.row_id)
    if rows and not tasks:
        raise RunError(f"no prompt can be answered; {left_out}.")
    return tasks
