# SPDX-License-Identifier: Apache-2.0
"""``mtp distill``: the base model's own answers to prompts, one JSON line each, ready to train on."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from mtp_lightning.commands.progress import counted
from mtp_lightning.distill.answer_file import AnswerFile, prompt_checksum
from mtp_lightning.distill.base_answers import NamedPrompt, base_answers
from mtp_lightning.distill.endpoint import EMPTY, Endpoint, Question, Unanswered
from mtp_lightning.distill.options import AnswerOptions, EndpointOptions
from mtp_lightning.distill.reply_tokens import reply_tokens
from mtp_lightning.distill.tasks import LeftOut, Task, check_ids, tasks_of
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.evaluation.reporting import note
from mtp_lightning.modeling.base import load_base, load_config, load_tokenizer, parse_dtype
from mtp_lightning.modeling.base_source import hub_file
from mtp_lightning.modeling.decoder import context_length
from mtp_lightning.paths import check_exists, resolve
from mtp_lightning.saving.checkpoint import named_base, read_checkpoint
from mtp_lightning.saving.checkpoint_files import SETTINGS
from mtp_lightning.saving.load import check_device, run_checkpoint
from mtp_lightning.text.detokenizer import decode_behind
from mtp_lightning.text.prompts import fields_line, read_prompt_rows


class Job(NamedTuple):
    """What one process is to answer, and how."""

    tasks: dict[str | int, Task]  # the prompts by their row's id
    left_out: LeftOut  # prompts that get no answer
    context: int  # number of positions that the base was made for
    vocab_size: int  # number of tokens that have an embedding in the base
    tokenizer: Any  # the base's
    base_model: str  # name of the base
    revision: str | None  # its hub revision
    answers: AnswerOptions  # how answers are drawn
    endpoint: EndpointOptions  # the server that answers, if any


def run_distill(config: Any) -> None:
    """``mtp distill MODEL --prompts F --output G.jsonl``."""
    parse_dtype(config.dtype)
    shard, num_shards = chosen_shard(config.shard)
    output = shard_path(config.output, shard, num_shards)
    job = _read_job(config, shard, num_shards)
    server = job.endpoint.endpoint
    settings = {"model": job.base_model, "revision": job.revision, "shard": f"{shard}/{num_shards}", **asdict(job.answers)}
    settings["decoded_by"] = server or "transformers"
    settings |= {} if server else {"batch_size": config.batch_size, "dtype": config.dtype}
    with AnswerFile(output, settings) as file:
        _check_prompts(file, job)
        num_done = len(file.done)
        for row_id in file.empty:
            job.left_out.add(EMPTY, row_id)
        try:
            summary = _write(job, file, config)
        except KeyboardInterrupt:
            note(f"{output}: {len(file.done):,} of {len(job.tasks):,} rows; the same command continues there")
            raise
        if job.left_out.counts and not file.done:
            raise RunError(f"no row was answered; {job.left_out}.")
    left_out = f"; {job.left_out}" if job.left_out.counts else ""
    print(f"{summary}; {output}: {len(file.done) - num_done:,} new{left_out}", file=sys.stderr, flush=True)


def _read_job(config: Any, shard: int, num_shards: int) -> Job:
    """Check the options, and read the prompts and the base's tokenizer; no weights are loaded."""
    answers = AnswerOptions(**{field.name: config[field.name] for field in fields(AnswerOptions)})
    endpoint = EndpointOptions(**{field.name: config[field.name] for field in fields(EndpointOptions)})
    base_model, revision = base_of(config.model, config.base_model, config.revision)
    if endpoint.endpoint is None:
        check_device(config.device)
    rows = read_prompt_rows(config.prompts, config.raw)
    check_ids(rows)
    if line := fields_line(rows):
        note(f"{config.prompts}: {line}")
    base_config = load_config(base_model, revision).get_text_config(decoder=True)
    context = context_length(base_config)
    tokenizer = load_tokenizer(base_model, revision)
    left_out = LeftOut()
    tasks = tasks_of(rows[shard::num_shards], tokenizer, context, left_out)
    for task in tasks.values():
        if (largest := max(task.prompt.input_ids)) >= base_config.vocab_size:
            raise RunError(f"{task.row.location}: token {largest} of the tokenizer has no embedding in the base.")
    return Job(tasks, left_out, context, base_config.vocab_size, tokenizer, base_model, revision, answers, endpoint)


def _write(job: Job, file: AnswerFile, config: Any) -> str:
    """Write rows as they come and report progress; returns the last report."""
    server, before, limit = job.endpoint.endpoint, len(file.done) + len(file.empty), job.answers.max_new_tokens
    total = len(job.tasks) - before
    together = f"{job.endpoint.concurrency} at once" if server else f"in batches of {config.batch_size}"
    note(f"distill: {total:,} prompts, at most {limit:,} new tokens each (--max_new_tokens), {together}")
    began, num_tokens = time.monotonic(), 0
    with counted("prompts") as progress:

        def in_batch(answers: int, limit: int, tokens: int) -> None:
            if tokens:
                done, part = len(file.done) + len(file.empty) - before, answers * tokens / limit
                progress(done, total, part, f"batch of {answers} at token {tokens} of {limit}")

        for rows in _server_answers(job, file) if server else _base_answers(job, file, config, in_batch):
            file.append(rows)
            num_tokens += sum(len(row["completion_ids"]) for row in rows)
            progress(len(file.done) + len(file.empty) - before, total)
    rate = num_tokens / max(time.monotonic() - began, 1e-9)
    return f"distill: {len(file.done):,} of {len(job.tasks):,} rows, {num_tokens:,} tokens, {rate:,.0f} tokens/s"


def chosen_shard(text: str | None) -> tuple[int, int]:
    """Number of this process and number of processes, from ``i/n`` or from what torchrun and SLURM launchers set."""
    value = text or f"{os.environ.get('RANK', '0')}/{os.environ.get('WORLD_SIZE', '1')}"
    match = re.fullmatch(r"(\d+)/(\d+)", value)
    if not match or not int(match[1]) < int(match[2]):
        source = "--shard" if text else "RANK/WORLD_SIZE"
        raise UsageError(f"{source}: shard must be i/n with i from 0 to n - 1, got {value!r}.")
    return int(match[1]), int(match[2])


def shard_path(output: str, shard: int, num_shards: int) -> Path:
    """The file that a shard writes: ``G.jsonl``, or ``G-00002-of-00008.jsonl`` if there are several."""
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise UsageError(f"output must be a .jsonl file, got {output!r}.")
    return path if num_shards == 1 else path.with_name(f"{path.stem}-{shard:05d}-of-{num_shards:05d}.jsonl")


def base_of(model: str, base_model: str | None = None, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of the base that a checkpoint, run or saved folder was trained on; any other name is a base itself.

    The given ones replace those that the file or folder names; RunError if it can't be read.
    """
    path = Path(resolve(model))
    path = run_checkpoint(path) or path
    if path.suffix == ".ckpt":
        settings = read_checkpoint(path)[SETTINGS]
        return base_model or named_base(settings), revision or settings["revision"]
    if not path.exists():
        check_exists(model)
    # Without mtp_config.json it is a base, or PEFT's adapter, which is a part of it.
    is_trained = (path / "mtp_config.json").is_file() if path.exists() else hub_file(model, "mtp_config.json") is not None
    if not is_trained:
        if base_model:
            reason = f"{model} is a base, or a PEFT adapter, whose base its adapter_config.json names"
            raise UsageError(f"--base_model is for trained models: {reason}.")
        return model, revision
    adapter = path / "adapter_config.json" if path.exists() else hub_file(model, "adapter_config.json")
    try:
        settings = json.loads((adapter or path).read_text(encoding="utf-8"))
        return base_model or settings["base_model_name_or_path"], revision or settings.get("revision")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if base_model:
            return base_model, revision
        where = adapter or f"{model} (no adapter_config.json)"
        raise RunError(f"{where} does not name a base_model_name_or_path. Give --base_model.") from error


def _default_device() -> str:
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def _check_prompts(file: AnswerFile, job: Job) -> None:
    """Refuse a file with answers to other prompts."""
    for row_id, checksum in {**file.done, **file.empty}.items():
        if row_id not in job.tasks or prompt_checksum(job.tasks[row_id].fields("")) != checksum:
            raise UsageError(
                f"{file.path}: row {row_id!r} answers another prompt than --prompts has. Give another --output."
            )


def _base_answers(
    job: Job, file: AnswerFile, config: Any, on_step: Callable[[int, int, int], None]
) -> Iterator[list[dict[str, Any]]]:
    """Rows answered by the base model, a batch at a time."""
    done = {*file.done, *file.empty}
    if job.tasks.keys() <= done:
        return
    base = load_base(job.base_model, job.revision, config.dtype, device=config.device or _default_device())
    prompts = [NamedPrompt(row_id, task.prompt) for row_id, task in job.tasks.items()]
    for answers in base_answers(base, job.tokenizer, prompts, job.answers, config.batch_size, done, on_step):
        rows, empty = [], []
        for answer in answers:
            task = job.tasks[answer.row_id]
            text = decode_behind(job.tokenizer, task.prompt.input_ids, answer.token_ids)
            if text.strip():
                rows.append(_row(task, text, task.prompt.input_ids, answer.token_ids, answer.ended, job.answers))
            else:
                empty.append(task)
        _leave_out(empty, job, file)
        yield rows


def _leave_out(tasks: list[Task], job: Job, file: AnswerFile) -> None:
    """Count prompts whose answer is empty, and remember them."""
    for task in tasks:
        job.left_out.add(EMPTY, task.row.row_id)
    file.leave_out({task.row.row_id: prompt_checksum(task.fields("")) for task in tasks})


def _server_answers(job: Job, file: AnswerFile) -> Iterator[list[dict[str, Any]]]:
    """Rows answered by a server, one at a time."""
    server = Endpoint(job.endpoint, job.endpoint.endpoint_model or job.base_model, job.answers)
    questions = (
        Question(
            row_id,
            task.row.content,
            min(job.answers.max_new_tokens, job.context - len(task.prompt.input_ids)),
            task.row.tools,
        )
        for row_id, task in job.tasks.items()
        if row_id not in file.done and row_id not in file.empty
    )
    for reply in server.replies(questions):
        task = job.tasks[reply.row_id]
        answered = reply if isinstance(reply, Unanswered) else reply_tokens(reply, task, job.tokenizer, job.vocab_size)
        if isinstance(reply, Unanswered) or isinstance(answered, Unanswered):
            assert isinstance(answered, Unanswered)
            if answered.reason == EMPTY:
                _leave_out([task], job, file)
            else:
                job.left_out.add(answered.reason, answered.row_id, answered.detail)
            continue
        if reply.has_reasoning and not reply.token_ids:
            warnings.warn(
                "the server returns the reasoning apart from the answer: the rows are without it, unless --token_ids true"
                " returns all tokens",
                stacklevel=1,
            )
        yield [_row(task, reply.text, *answered, reply.ended, job.answers)]


def _row(
    task: Task, text: str, prompt_ids: list[int], token_ids: list[int], ended: bool, options: AnswerOptions
) -> dict[str, Any]:
    """A line of the output."""
    row: dict[str, Any] = {"id": task.row.row_id}
    row |= {"domain": task.row.domain} if task.row.domain else {}
    row |= task.fields(text)
    return row | {
        "completion": text,
        "prompt_ids": list(prompt_ids),
        "completion_ids": list(token_ids),
        "finish_reason": "stop" if ended else "length",
        "seed": options.row_seed(task.row.row_id) if options.temperature > 0 else None,
    }
