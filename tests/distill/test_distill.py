# SPDX-License-Identifier: Apache-2.0
"""``mtp distill``: its rows and what training makes of them, a torn file, shards, mistakes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from command_line import error_of, mtp, save_base, write_rows
from distill_rows import questions, read
from saved import hub_snapshot
from tiny import greedy_text
from toy_tokenizers import CHATML, word_tokenizer
from transformers import AutoModelForCausalLM

from mtp_lightning.commands import distill
from mtp_lightning.commands.distill import base_of, chosen_shard, shard_path
from mtp_lightning.data.chat import encode_chat_prompt
from mtp_lightning.data.preparing import prepare
from mtp_lightning.distill.options import AnswerOptions
from mtp_lightning.errors import RunError, UsageError
from mtp_lightning.text.detokenizer import decode_behind


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    # END is the end of a turn and of a text, as in models made for chat.
    save_base(folder, "llama", word_tokenizer(bos=False), torch.float64, eos_token_id=4, seed=1)
    return str(folder)


def test_rows_hold_prompt_answer_and_their_tokens(tmp_path: Path, base: str, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", questions(6))
    output = tmp_path / "a.jsonl"
    assert mtp("distill", base, "--prompts", tmp_path / "q.jsonl", "--output", output, "--max_new_tokens", 6) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "distill: 6 of 6 rows, " in shown.err and f"{output}: 6 new" in shown.err
    rows = {row["id"]: row for row in read(output)}
    assert set(rows) == {0, "q1", 2, "q3", 4, "q5"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base, dtype="auto"), word_tokenizer(bos=False)
    for question in questions(6):
        row = rows[question["id"]]
        if "messages" in question:
            prompt = encode_chat_prompt(question["messages"], tokenizer)
            assert row["messages"] == [*question["messages"], {"role": "assistant", "content": row["completion"]}]
            assert (
                row["prompt"] == f"<|im_start|>user\n{question['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            )
        else:
            prompt = tokenizer(question["prompt"])["input_ids"]
            assert row["prompt"] == question["prompt"] and "messages" not in row
        expected = greedy_text(model, torch.tensor(prompt), 6, eos_token_id=[2, 4])
        assert (row["prompt_ids"], row["completion_ids"]) == (prompt, expected)
        assert row["completion"] == decode_behind(tokenizer, prompt, expected)
        assert row["finish_reason"] == ("stop" if expected[-1] in (2, 4) else "length")
        assert row.get("domain") == question.get("domain") and row["seed"] is None


def test_progress_within_a_batch(tmp_path: Path, base: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the work is said first, and the first lines come before the first batch is done."""
    monkeypatch.setattr("mtp_lightning.commands.progress.SECONDS_BETWEEN_LINES", 0.0)
    write_rows(tmp_path / "q.jsonl", questions(4))
    words = ["--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--max_new_tokens", 6, "--batch_size", 3]
    assert mtp("distill", base, *words, "--temperature", 0.7) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "prompts" in line]
    assert lines.pop(0) == f"{tmp_path / 'q.jsonl'}: prompts from 'messages', 'prompt'"
    assert lines[0] == "distill: 4 prompts, at most 6 new tokens each (--max_new_tokens), in batches of 3"
    assert re.fullmatch(r"\[ +\d+ s\] prompts: 0 of 4, batch of 3 at token 1 of 6, 0:\d\d:\d\d left", lines[1])
    assert re.fullmatch(r"\[ +\d+ s\] prompts: 0 of 4, batch of 3 at token 5 of 6, 0:\d\d:\d\d left", lines[5])
    assert re.fullmatch(r"\[ +\d+ s\] prompts: 3 of 4, batch of 1 at token 1 of 6, 0:\d\d:\d\d left", lines[7])


def test_an_interrupt_keeps_the_rows_and_names_the_file(
    tmp_path: Path, base: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = distill.base_answers

    def interrupted(*args):
        yield next(answers(*args))
        raise KeyboardInterrupt

    write_rows(tmp_path / "q.jsonl", questions(6))
    output = tmp_path / "a.jsonl"
    words = ["distill", base, "--prompts", tmp_path / "q.jsonl", "--output", output]
    words += ["--max_new_tokens", 6, "--batch_size", 2]
    with monkeypatch.context() as patch:
        patch.setattr(distill, "base_answers", interrupted)
        assert mtp(*words) == 130
    assert f"{output}: 2 of 6 rows" in capsys.readouterr().err and len(read(output)) == 2
    assert mtp(*words) == 0 and len(read(output)) == 6


def test_a_file_that_a_kill_left_is_completed(tmp_path: Path, base: str) -> None:
    """Its last line is torn: at the end the same rows, none twice."""
    write_rows(tmp_path / "q.jsonl", questions(12))
    words = ["distill", base, "--prompts", tmp_path / "q.jsonl", "--max_new_tokens", 6, "--temperature", 1]
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    assert mtp(*words, "--batch_size", 3, "--output", whole) == 0
    shutil.copy(f"{whole}.settings", f"{killed}.settings")
    lines = whole.read_bytes().splitlines(keepends=True)
    killed.write_bytes(b"".join(lines[:5]) + lines[5][:30])
    assert mtp(*words, "--batch_size", 3, "--output", killed) == 0
    assert len(read(killed)) == len(read(whole)) and {row["id"]: row for row in read(killed)} == {
        row["id"]: row for row in read(whole)
    }
    # Training reads exactly those tokens, with a loss on the answer.
    rows = prepare(str(whole), word_tokenizer(bos=False), max_length=64)[0].rows
    for number, row in enumerate(read(whole)):
        found = rows.row(number)
        assert found.input_ids.tolist() == row["prompt_ids"] + row["completion_ids"]
        assert found.labels.tolist() == [-100] * len(row["prompt_ids"]) + row["completion_ids"]
        assert row["seed"] == AnswerOptions().row_seed(row["id"])


def test_shards_share_the_prompts(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "q.jsonl", questions(9))
    words = ["distill", base, "--prompts", tmp_path / "q.jsonl", "--max_new_tokens", 5, "--temperature", 0.7]
    assert mtp(*words, "--output", tmp_path / "whole.jsonl") == 0
    assert mtp(*words, "--output", tmp_path / "a.jsonl", "--shard", "0/2") == 0
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert mtp(*words, "--output", tmp_path / "a.jsonl") == 0
    shards = [read(tmp_path / f"a-0000{shard}-of-00002.jsonl") for shard in range(2)]
    assert [len(rows) for rows in shards] == [5, 4]
    both = {row["id"]: row for rows in shards for row in rows}
    assert both == {row["id"]: row for row in read(tmp_path / "whole.jsonl")}
    merged = prepare(f"{tmp_path}/a-*.jsonl", word_tokenizer(bos=False), max_length=64)[0]  # as the docs merge them
    assert merged.report.rows_read == 9


def test_more_prompts_may_follow_but_none_may_change(tmp_path: Path, base: str, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", questions(4))
    words = ["distill", base, "--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--max_new_tokens", 3]
    assert mtp(*words) == 0
    first = read(tmp_path / "a.jsonl")
    write_rows(tmp_path / "q.jsonl", questions(7))
    assert mtp(*words) == 0
    assert read(tmp_path / "a.jsonl")[:4] == first and len(read(tmp_path / "a.jsonl")) == 7
    changed = questions(7)
    changed[3]["prompt"] = "six"
    write_rows(tmp_path / "q.jsonl", changed)
    assert "row 'q3' answers another prompt than --prompts has" in error_of(capsys, 2, *words)


def test_messages_are_compared_and_not_their_rendering(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dated = tmp_path / "dated"
    shutil.copytree(base, dated)
    words = ["distill", dated, "--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl", "--max_new_tokens", 3]
    for day, rows in (("one", 3), ("two", 5)):
        (dated / "chat_template.jinja").write_text(f"{day}\n{CHATML}")
        write_rows(tmp_path / "q.jsonl", questions(rows))
        assert mtp(*words) == 0
    prompts = {row["id"]: row["prompt"] for row in read(tmp_path / "a.jsonl")}
    assert len(prompts) == 5 and prompts[0].startswith("one\n") and prompts[4].startswith("two\n")


def test_empty_answers_are_left_out_and_counted(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    save_base(tmp_path / "base", "llama", word_tokenizer(bos=False), torch.float64, eos_token_id=4)
    write_rows(tmp_path / "q.jsonl", questions(6))
    words = ["distill", tmp_path / "base", "--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"]
    for _ in range(2):  # the second time nothing is asked
        assert mtp(*words, "--max_new_tokens", 6) == 0
        rows = read(tmp_path / "a.jsonl")
        assert len(rows) == 3 and all(row["completion"].strip() for row in rows)
        assert "3 rows left out: 3 empty" in capsys.readouterr().err
        monkeypatch.setattr(distill, "load_base", None)


def test_prompts_without_room_are_counted(tmp_path: Path, base: str, capsys) -> None:
    rows = [{"prompt": " ".join(["one"] * length), "raw": True} for length in (3, 62, 64, 80)]
    write_rows(tmp_path / "q.jsonl", rows)
    words = ["distill", base, "--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"]
    assert mtp(*words) == 0
    assert "2 of 2 rows" in (shown := capsys.readouterr().err) and "2 without room in the context of 64" in shown
    assert max(len(row["completion_ids"]) for row in read(tmp_path / "a.jsonl") if row["id"] == 2) <= 2
    write_rows(tmp_path / "q.jsonl", rows[2:])
    message = error_of(capsys, 1, *words[:4], "--output", tmp_path / "b.jsonl")
    assert "context of 64" in message
    assert not (tmp_path / "b.jsonl").exists()


def test_rows_without_a_prompt_are_left_out_and_counted(tmp_path: Path, base: str, capsys) -> None:
    empty = [{"prompt": None}, {"prompt": ""}, {"messages": []}, {"messages": [{"role": "assistant", "content": "one"}]}]
    empty += [{"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": "system", "content": "one"}]}]
    write_rows(tmp_path / "q.jsonl", [*questions(2), *({"id": f"e{n}"} | row for n, row in enumerate(empty))])
    assert mtp("distill", base, "--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl") == 0
    assert {row["id"] for row in read(tmp_path / "a.jsonl")} == {0, "q1"}
    shown = capsys.readouterr().err
    assert "6 without a usable prompt" in shown and "line 5: " in shown and "line 6: " not in shown


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (["--shard", "2/2"], 2, "shard"),
        (["--output", "a.txt"], 2, "output"),
        (["--max_new_tokens", "0"], 2, "max_new_tokens"),
        (["--batch_size", "0"], 2, "batch_size"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--temperature", "1", "--top_k", "0"], 2, "top_k"),
        (["--prompts", "none.txt"], 1, "none.txt"),
    ],
)
def test_mistakes(tmp_path: Path, base: str, capsys, words: list[str], code: int, name: str) -> None:
    write_rows(tmp_path / "q.jsonl", questions(2))
    usual = ["--prompts", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    assert name in error_of(capsys, code, "distill", base, *usual, *words)
    assert list(tmp_path.iterdir()) == [tmp_path / "q.jsonl"]  # nothing half-written


def test_ids_must_differ(tmp_path: Path, base: str, capsys) -> None:
    write_rows(tmp_path / "q.jsonl", [{"id": "a", "prompt": "one"}, {"id": "a", "prompt": "two"}])
    words = ["distill", base, "--prompts", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"]
    assert "line 2: id 'a' is that of" in error_of(capsys, 1, *words)
    write_rows(tmp_path / "q.jsonl", [{"id": ["a"], "prompt": "one"}])
    assert "line 1: expected id" in error_of(capsys, 1, *words)


def test_base_of_a_checkpoint_and_of_a_saved_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"base_model": "owner/base", "revision": "r", "base": {}, "num_masks": 2, "lora": {}, "sampler_head": None}
    torch.save({"mtp_settings": settings, "state_dict": {}}, tmp_path / "a.ckpt")
    assert base_of(str(tmp_path / "a.ckpt")) == ("owner/base", "r")
    assert base_of(str(tmp_path / "a.ckpt"), "moved", "s") == ("moved", "s")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "a.ckpt", tmp_path / "run/checkpoints/best.ckpt")
    assert base_of(str(tmp_path / "run")) == ("owner/base", "r")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base", "revision": null}')
    assert base_of(str(tmp_path)) == (str(tmp_path), None)  # PEFT's adapter alone: a part of the base
    (tmp_path / "mtp_config.json").write_text("{}")
    assert base_of(str(tmp_path)) == ("owner/base", None)
    assert base_of("owner/base") == ("owner/base", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hub_snapshot(tmp_path / "hub", "owner/saved", tmp_path)
    assert base_of("owner/saved") == ("owner/base", None)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(RunError, match="adapter_config.json does not name a base_model_name_or_path"):
        base_of(str(tmp_path))
    assert base_of(str(tmp_path), "moved") == ("moved", None)
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads/mtp_config.json").write_text("{}")
    hub_snapshot(tmp_path / "hub", "owner/heads", tmp_path / "heads")
    with pytest.raises(RunError, match="owner/heads"):
        base_of("owner/heads")


def test_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (chosen_shard(None), chosen_shard("3/8")) == ((0, 1), (3, 8))
    assert shard_path("x/a.jsonl", 0, 1) == Path("x/a.jsonl")
    assert shard_path("x/a.jsonl", 3, 8) == Path("x/a-00003-of-00008.jsonl")
    for wrong in ("1", "1/1"):
        with pytest.raises(UsageError, match="shard must be i/n"):
            chosen_shard(wrong)
