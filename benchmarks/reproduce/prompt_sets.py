# SPDX-License-Identifier: Apache-2.0
"""Public evaluation sets as prompts for ``mtp benchmark`` and ``mtp predict``.

    python benchmarks/reproduce/prompt_sets.py gsm8k humaneval --num_prompts 20 --output prompts.jsonl
    python benchmarks/reproduce/prompt_sets.py spec_bench=question.jsonl --output prompts.jsonl

A set is read from the hub, or from a local file in its original form: NAME=FILE (.jsonl, .jsonl.gz, .parquet). A question
becomes a user's message; ``--text`` writes plain text instead, for a base without a chat template.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset

Row = dict[str, Any]

CHAT_SETS = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
"""Spec-Bench's categories that are MT-bench's."""


def humaneval(row: Row) -> str:
    """The usual instruction around a function's head, as bigcode's evaluation harness gives it to chat models."""
    return f"Complete the following Python function.\n\n```python\n{row['prompt'].strip()}\n```"


def first_turn(row: Row) -> str:
    """The first question; a second would need the answer to the first."""
    turns: list[str] = row.get("turns") or row["prompt"]
    return turns[0]


class PromptSet(NamedTuple):
    """Where a set is, and what of its rows is the prompt."""

    hub: tuple[str, ...]  # arguments of load_dataset without the split; empty: not on the hub in its original form
    split: str
    domain: str  # of the paper's Table 1
    question: Callable[[Row], str]
    text: Callable[[Row], str]  # the same for a base without a chat template


SETS = {
    "gsm8k": PromptSet(
        ("openai/gsm8k", "main"), "test", "math", lambda r: r["question"], lambda r: f"Question: {r['question']}\nAnswer:"
    ),
    "humaneval": PromptSet(("openai/openai_humaneval",), "test", "coding", humaneval, lambda r: r["prompt"]),
    "mt_bench": PromptSet(("HuggingFaceH4/mt_bench_prompts",), "train", "chat", first_turn, first_turn),
    "ifeval": PromptSet(("google/IFEval",), "train", "chat", lambda r: r["prompt"], lambda r: r["prompt"]),
    "spec_bench": PromptSet((), "train", "", first_turn, first_turn),
}


def prompts_of(name: str, num_prompts: int | None, as_text: bool = False) -> Iterator[Row]:
    """Rows of a set, evenly spaced over it, as ``mtp benchmark --prompts`` reads them. ``name`` is NAME or NAME=FILE."""
    name, _, file = name.partition("=")
    if name not in SETS:
        raise SystemExit(f"{name!r} is none of {', '.join(SETS)}")
    chosen = SETS[name]
    if file:
        kind = "parquet" if file.endswith(".parquet") else "json"
        rows = load_dataset(kind, data_files=file, split="train")
    elif chosen.hub:
        rows = load_dataset(*chosen.hub, split=chosen.split)
    else:
        raise SystemExit(f"{name} is not on the hub in its original form: give its file, {name}=FILE")
    count = len(rows) if num_prompts is None else min(num_prompts, len(rows))
    for place in range(count):
        row = rows[place * len(rows) // count]
        content = chosen.text(row) if as_text else chosen.question(row)
        domain = name
        if name == "spec_bench":
            domain = "multi-turn" if row["category"] in CHAT_SETS else row["category"]
        prompt = {"prompt": content} if as_text else {"messages": [{"role": "user", "content": content}]}
        yield prompt | {"domain": domain}


def main() -> None:
    """Write a file of prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help=f"NAME or NAME=FILE, of {', '.join(SETS)}")
    parser.add_argument("--num_prompts", type=int, help="of each set; default: all")
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows = [row for name in args.sets for row in prompts_of(name, args.num_prompts, args.text)]
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts in {args.output}")


if __name__ == "__main__":
    main()
