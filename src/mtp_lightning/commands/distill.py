# SPDX-License-Identifier: Apache-2.0
"""``mtp distill``: the base model's own answers to prompts, one JSON line each, ready to train on."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from mtp_lightning.commands.parser import CommandParser
from mtp_lightning.data.chat import end_of_turn
from mtp_lightning.distill.answer_file import AnswerFile, checksum
from mtp_lightning.distill.base_answers import AnswerOptions, NamedPrompt, base_answers
from mtp_lightning.distill.endpoint import Endpoint, EndpointOptions, Question, Reply
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer, parse_dtype
from mtp_lightning.modeling.decoder import context_length
from mtp_lightning.paths import PACKAGE, resolve
from mtp_lightning.saving.checkpoint import SETTINGS, named_base, read_checkpoint
from mtp_lightning.saving.load import check_device
from mtp_lightning.text.prompts import Prompt, PromptRow, drop_final_answer, encode_prompt_row, read_prompt_rows


class Task(NamedTuple):
    """A prompt of this process.

    Attributes:
        row: as it stands in its file.
        prompt: as tokens.
    """

    row: PromptRow
    prompt: Prompt


class Progress:
    """Counts, and says where it is on standard error: at every step in a terminal, else every half minute.

    Args:
        total: rows in the file when all is done.
        done: rows in it already.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total = total
        self.done = done
        self.begin = self.shown = time.monotonic()
        self.new = self.tokens = 0

    def add(self, rows: int, tokens: int) -> None:
        """Count rows that were written, and show it where it is time."""
        self.new, self.tokens = self.new + rows, self.tokens + tokens
        now = time.monotonic()
        if sys.stderr.isatty():
            print(f"\r{self}", end="", file=sys.stderr, flush=True)
        elif now - self.shown >= 30:
            self.shown = now
            print(self, file=sys.stderr, flush=True)

    def __str__(self) -> str:
        rate = self.tokens / max(time.monotonic() - self.begin, 1e-9)
        return f"distill: {self.done + self.new:,} of {self.total:,} rows, {self.tokens:,} tokens, {rate:,.0f} tokens/s"


def run_distill(args: list[str]) -> None:
    """``mtp distill MODEL --prompts F --output G.jsonl``.

    Args:
        args: options.

    Raises:
        UsageError: an option is wrong, or the file was begun with other ones.
    """
    parser = CommandParser(
        prog="mtp distill",
        description="Writes the base model's own answers to prompts, one JSON line each: training data that matches what"
        " will be verified. The same command run again goes on where it ended.",
    )
    parser.add_argument("model", type=str, help="the base (folder or hub id), or a checkpoint or saved folder made for it")
    parser.add_argument("--prompts", type=str, required=True, help=".txt or .jsonl file of prompts; - standard input")
    parser.add_argument("--output", type=str, required=True, help="the .jsonl file to write, or to go on with")
    parser.add_argument(
        "--shard",
        type=str,
        default=None,
        help="i/n: every n-th prompt from number i, 0 to n - 1. Not given: RANK/WORLD_SIZE",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="prompts that are answered together")
    parser.add_argument("--dtype", type=str, default="auto", help="dtype of the base; auto: the one it was saved in")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, ..; not given: cuda where there is one")
    parser.add_argument("--revision", type=str | None, default=None, help="hub revision of the base")
    parser.add_argument("--base_model", type=str | None, default=None, help="where the base lies now, if it moved")
    parser.add_class_arguments(AnswerOptions, None)
    parser.add_class_arguments(EndpointOptions, None)
    config = parser.parse_args(args)
    if config.batch_size < 1:
        raise UsageError(f"batch_size must be 1 or more, got {config.batch_size}. Change --batch_size.")
    parse_dtype(config.dtype)  # what is wrong shows before a file is begun
    answers = AnswerOptions(**{field.name: config[field.name] for field in fields(AnswerOptions)})
    endpoint = EndpointOptions(**{field.name: config[field.name] for field in fields(EndpointOptions)})
    shard, shards = chosen_shard(config.shard)
    output = shard_path(config.output, shard, shards)
    base_model, revision = base_of(config.model, config.base_model, config.revision)
    device = config.device or _device()
    if endpoint.endpoint is None:
        check_device(device)
    rows = read_prompt_rows(config.prompts)
    context = context_length(load_config(base_model, revision).get_text_config(decoder=True))
    tokenizer = load_tokenizer(base_model, revision)
    tasks, too_long = _tasks(rows, tokenizer, context, shard, shards)
    settings = {"model": base_model, "revision": revision, "shard": f"{shard}/{shards}", **answers.as_dict()}
    settings |= {"decoded_by": endpoint.endpoint or "transformers"}
    settings |= {} if endpoint.endpoint else {"batch_size": config.batch_size, "dtype": config.dtype}
    with AnswerFile(output, settings) as file:
        _check_prompts(file, tasks)
        progress = Progress(len(tasks), len(file.done))
        by_name = {task.row.row_id: task for task in tasks}
        if endpoint.endpoint is not None:
            server = Endpoint(endpoint, endpoint.endpoint_model or base_model, answers)
            made = _from_server(server, by_name, file, tokenizer, answers, context)
        else:
            base = None if len(file.done) == len(tasks) else load_base(base_model, revision, config.dtype, device=device)
            made = _from_base(base, by_name, file, tokenizer, answers, config.batch_size)
        for written in made:
            file.append(written)
            progress.add(len(written), sum(len(row["completion_ids"]) for row in written))
    left_out = f", {too_long:,} prompts left out: no room in the context of {context}" if too_long else ""
    end = "\n" if sys.stderr.isatty() else ""
    print(f"{end}{progress}; {output}: {progress.new:,} new{left_out}", file=sys.stderr, flush=True)


def chosen_shard(text: str | None) -> tuple[int, int]:
    """Number of this process and how many there are, from ``--shard`` or from what torchrun and SLURM launchers set.

    Args:
        text: ``i/n`` or None.

    Returns:
        i and n.

    Raises:
        UsageError: it has another form.
    """
    given = text or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if not found or not int(found[1]) < int(found[2]):
        where = "--shard" if text else "RANK and WORLD_SIZE"
        raise UsageError(f"shard must be i/n with i from 0 to n - 1, got {given!r}. Change {where}.")
    return int(found[1]), int(found[2])


def shard_path(output: str, shard: int, shards: int) -> Path:
    """The file that a shard writes: ``G.jsonl``, or ``G-00002-of-00008.jsonl`` where there are several.

    Args:
        output: what ``--output`` names.
        shard: number of this shard.
        shards: how many there are.

    Returns:
        The path.

    Raises:
        UsageError: it is no ``.jsonl`` file.
    """
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise UsageError(f"output must be a .jsonl file, got {output!r}. Change --output.")
    return path if shards == 1 else path.with_name(f"{path.stem}-{shard:05d}-of-{shards:05d}.jsonl")


def base_of(model: str, base_model: str | None = None, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the base that a checkpoint or saved folder is made for; of any other name, the name itself.

    Args:
        model: a base, a ``.ckpt`` file, or a saved folder, here or on the hub.
        base_model: where the base lies now, if it moved.
        revision: hub revision, if it is not the one named there.

    Returns:
        The base and its revision.

    Raises:
        RunError: the file or folder can't be read.
    """
    path = Path(resolve(model))
    if path.suffix == ".ckpt":
        settings = read_checkpoint(path)[SETTINGS]
        return base_model or named_base(settings), revision or settings["revision"]
    if (adapter := _adapter_config(path, model)) is not None:
        try:
            found = json.loads(adapter.read_text(encoding="utf-8"))
            return base_model or found["base_model_name_or_path"], revision or found.get("revision")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{adapter}: expected base_model_name_or_path, found none. Give --base_model.") from error
    return base_model or model, revision


def _adapter_config(path: Path, name: str) -> Path | None:
    """PEFT's file that every saved folder has, on the hub too; None where a name is that of a base."""
    from transformers.utils import find_adapter_config_file

    if path.is_dir():
        return path / "adapter_config.json" if (path / "adapter_config.json").is_file() else None
    try:
        found = None if name.startswith(PACKAGE) else find_adapter_config_file(name)
    except OSError:  # no hub id, or out of reach: loading the base says so
        return None
    return None if found is None else Path(found)


def _device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _tasks(rows: list[PromptRow], tokenizer: Any, context: int, shard: int, shards: int) -> tuple[list[Task], int]:
    """This process's prompts as tokens, and how many do not leave room for a token in the context."""
    places: dict[str | int, str] = {}
    for row in rows:
        if row.row_id in places:
            raise RunError(f"{row.location}: id {row.row_id!r} is that of {places[row.row_id]} too.")
        places[row.row_id] = row.location
    tasks = [Task(row, encode_prompt_row(row, tokenizer)) for row in rows[shard::shards]]
    kept = [task for task in tasks if len(task.prompt.input_ids) < context]
    if tasks and not kept:
        count = "the one prompt is" if len(tasks) == 1 else f"all {len(tasks)} prompts are"
        raise RunError(f"{count} as long as the base's context of {context} or longer. Shorten what --prompts has.")
    return kept, len(tasks) - len(kept)


def _check_prompts(file: AnswerFile, tasks: list[Task]) -> None:
    here = {task.row.row_id: checksum(task.prompt.text) for task in tasks}
    for name, found in file.done.items():
        if here.get(name) != found:
            raise UsageError(
                f"{file.path}: row {name!r} answers another prompt than --prompts has now. Give the prompts that"
                " it was begun with (more may follow them), or another --output."
            )


def _from_base(
    base: Any, tasks: dict[str | int, Task], file: AnswerFile, tokenizer: Any, options: AnswerOptions, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    if base is None:
        return
    prompts = [NamedPrompt(name, task.prompt) for name, task in tasks.items()]
    for answers in base_answers(base, prompts, options, batch_size, file.done):
        yield [
            _row(
                tasks[answer.name],
                tokenizer.decode(answer.token_ids, skip_special_tokens=True),
                tasks[answer.name].prompt.input_ids,
                answer.token_ids,
                answer.ended,
                options,
            )
            for answer in answers
        ]


def _from_server(
    server: Endpoint, tasks: dict[str | int, Task], file: AnswerFile, tokenizer: Any, options: AnswerOptions, context: int
) -> Iterator[list[dict[str, Any]]]:
    def questions() -> Iterator[Question]:
        for name, task in tasks.items():
            if name not in file.done:
                room = min(options.max_new_tokens, context - len(task.prompt.input_ids))
                content = task.row.content
                yield Question(name, content if isinstance(content, str) else drop_final_answer(content), room)

    for reply in server.replies(questions()):
        task = tasks[reply.name]
        prompt_ids = reply.prompt_ids or task.prompt.input_ids
        token_ids = reply.token_ids if reply.token_ids is not None else _ids_of(reply, task, tokenizer)
        yield [_row(task, reply.text, prompt_ids, token_ids, reply.ended, options)]


def _ids_of(reply: Reply, task: Task, tokenizer: Any) -> list[int]:
    """An answer's tokens where the server gave its text alone: the text's, then what ends a turn or a text."""
    ids = list(tokenizer(reply.text, add_special_tokens=False)["input_ids"])
    if not reply.ended:
        return ids
    if not isinstance(task.row.content, str):
        return ids + end_of_turn(drop_final_answer(task.row.content), tokenizer)
    return ids if tokenizer.eos_token_id is None else [*ids, tokenizer.eos_token_id]


def _row(
    task: Task, text: str, prompt_ids: list[int], token_ids: list[int], ended: bool, options: AnswerOptions
) -> dict[str, Any]:
    row: dict[str, Any] = {"id": task.row.row_id}
    row |= {"domain": task.row.domain} if task.row.domain else {}
    row["prompt"] = task.prompt.text
    messages = [] if isinstance(task.row.content, str) else drop_final_answer(task.row.content)
    if messages and all(set(m) == {"role", "content"} and isinstance(m["content"], str) for m in messages):
        row["messages"] = [*messages, {"role": "assistant", "content": text}]
    return row | {
        "completion": text,
        "prompt_ids": list(prompt_ids),
        "completion_ids": list(token_ids),
        "finish_reason": "stop" if ended else "length",
        "seed": options.row_seed(task.row.row_id) if options.temperature > 0 else None,
    }
