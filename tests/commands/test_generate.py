# SPDX-License-Identifier: Apache-2.0
"""``mtp generate`` and ``mtp predict``: text, JSON lines, batches, seeds, stop texts."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from command_line import error_of, mtp, write_rows
from tiny_run import LAST
from trained_run import as_if_trained_here, json_lines, without_times

from mtp_lightning import MTPModel
from mtp_lightning.commands import generate
from mtp_lightning.commands.distill import base_of
from mtp_lightning.errors import UsageError
from mtp_lightning.saving.checkpoint import named_base
from mtp_lightning.text.detokenizer import decode_behind
from mtp_lightning.text.step_display import CLOSE, OPEN

FIELDS = "prompt text token_ids num_steps acceptance_length accepted_per_step seconds tokens_per_second decoding num_masks"
FIELDS = [*FIELDS.split(), "exact", "finish_reason"]


class Recorder(io.StringIO):
    """Standard output that remembers what was written at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_generate_streams_what_the_model_generates(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Recorder()
    monkeypatch.setattr(sys, "stdout", output)
    assert mtp("generate", LAST, "--prompt", "one two", "--raw", "--max_new_tokens", 16) == 0
    model = MTPModel.from_pretrained(LAST)
    ids = model.tokenizer("one two", return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=16, eos_token_id=[2, 4])
    text = decode_behind(model.tokenizer, ids[0].tolist(), expected.sequences[0, 3:].tolist())
    assert output.getvalue() == f"one two{text}\n"
    assert len([piece for piece in output.pieces if piece.strip()]) > 3  # in pieces, not at the end


def test_json_lines_of_generate_and_predict(run: Path, capsys) -> None:
    options = ["--max_new_tokens", 9, "--decoding", "linear", "--num_masks", 2, "--eos_token_id", "[]", "--raw"]
    assert mtp("generate", LAST, "--prompts", "prompts.jsonl", "--json", *options) == 0
    lines = json_lines(capsys)
    assert mtp("predict", "--config", "config.yaml", "--ckpt_path", LAST, "--data.test", "prompts.jsonl", *options) == 0
    assert without_times(json_lines(capsys)) == without_times(lines)
    assert mtp("predict", "--config", "config.yaml", "--ckpt_path", LAST, "--prompts", "prompts.jsonl", *options) == 0
    assert without_times(json_lines(capsys)) == without_times(lines)
    assert [line["prompt"] for line in lines] == ["one two", "six"]
    for line in lines:
        assert list(line) == FIELDS
        assert (line["decoding"], line["num_masks"], line["finish_reason"]) == ("linear", 2, "length")
        assert len(line["token_ids"]) == sum(line["accepted_per_step"]) + line["num_steps"] == 9
        assert line["num_steps"] == len(line["accepted_per_step"])
        assert line["acceptance_length"] == 9 / line["num_steps"]
        assert line["tokens_per_second"] == pytest.approx(9 / line["seconds"])


def test_all_decodings_write_the_same_text(run: Path, capsys) -> None:
    for options in (["quadratic"], ["linear"], ["autoregressive"], ["quadratic", "--sampler_head", "false"]):
        words = ["--prompt", "one two", "--max_new_tokens", 40, "--dtype", "float64", "--json", "--eos_token_id", "[]"]
        assert mtp("generate", LAST, *words, "--num_masks", 3, "--decoding", *options) == 0
    lines = json_lines(capsys)
    assert len(lines) == 4 and len(lines[0]["token_ids"]) == 40
    assert all(line["token_ids"] == lines[0]["token_ids"] and line["text"] == lines[0]["text"] for line in lines)
    assert (lines[2]["num_steps"], lines[2]["num_masks"]) == (40, 0)


def test_batches_and_seeds(run: Path, capsys) -> None:
    """A prompt's draws depend on the seed and its place in the file, not on what is decoded with it."""
    Path("many.txt").write_text("one two\nsix\nthree four five\none two\n")
    words = ["generate", LAST, "--prompts", "many.txt", "--max_new_tokens", 12, "--dtype", "float64", "--json"]
    for options in (["--temperature", 0.9, "--top_p", 0.95, "--top_k", 20, "--seed", 4], ["--stop", " "]):
        assert mtp(*words, *options, "--num_masks", 3) == 0
        alone = without_times(json_lines(capsys))
        assert mtp(*words, *options, "--batch_size", 3, "--num_masks", 2, "--decoding", "linear") == 0
        for line, expected in zip(without_times(json_lines(capsys)), alone, strict=True):
            assert (line["text"], line["finish_reason"]) == (expected["text"], expected["finish_reason"])
        if "--seed" in options:
            assert alone[0]["text"] != alone[3]["text"]  # the same prompt with another seed
    assert mtp(*words, "--num_masks", 2, "--temperature", 1, "--seed", 4, "--verification", "rejection") == 0
    assert len(json_lines(capsys)) == 4
    assert mtp(*words[:-1], "--num_masks", 2, "--batch_size", 4) == 0
    out = capsys.readouterr()
    assert out.err.count("acceptance length") == 4 and out.out.count("one two") == 2


def test_costs_of_all_batch_sizes_are_measured_before_decoding(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    monkeypatch.setattr(generate, "calibrate", lambda model, options, sizes, notify: found.append(sizes))
    for count, sizes in ((5, {3, 2}), (6, {3}), (2, {2})):
        Path("several.txt").write_text("one\n" * count)
        assert mtp("generate", LAST, "--prompts", "several.txt", "--max_new_tokens", 1, "--batch_size", 3) == 0
        assert found.pop() == sizes


def test_a_stop_text_ends_the_text_and_is_not_shown(run: Path, capsys) -> None:
    words = ["generate", LAST, "--prompt", "one two", "--raw", "--max_new_tokens", 30, "--num_masks", 2]
    assert mtp(*words, "--json") == 0
    whole = json_lines(capsys)[0]
    # A part of the text that begins within one token and ends within a later one.
    begin = len(whole["text"]) // 2
    stop = whole["text"][begin : begin + 12]
    cut = whole["text"][: whole["text"].index(stop)]
    assert mtp(*words, "--json", "--stop", stop) == 0
    line = json_lines(capsys)[0]
    assert (line["text"], line["finish_reason"]) == (cut, "stop")
    assert len(line["token_ids"]) < 30 and line["token_ids"] == whole["token_ids"][: len(line["token_ids"])]
    assert mtp(*words, "--stop", stop) == 0
    assert capsys.readouterr().out.rstrip("\n") == f"one two{cut}".rstrip("\n")
    assert mtp(*words, "--json", "--stop", "no such text") == 0
    assert without_times(json_lines(capsys)) == without_times([whole])


def test_generate_reads_standard_input(run: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert mtp("generate", LAST, "--prompts", "-", "--raw", "--json", "--max_steps", 2) == 0
    assert [(line["prompt"], line["num_steps"]) for line in json_lines(capsys)] == [("one", 2), ("two", 2)]


def test_a_run_folder_is_its_best_checkpoint(run: Path, capsys) -> None:
    words = ["--prompt", "one", "--max_new_tokens", 5, "--num_masks", 2, "--json"]
    assert mtp("generate", "run", *words) == mtp("generate", "run/checkpoints/best.ckpt", *words) == 0
    found, expected = without_times(json_lines(capsys))
    assert found == expected
    for path in Path("run/checkpoints").iterdir():
        path.unlink()
    assert "'run'" in error_of(capsys, 1, "generate", "run", *words)


def test_a_text_is_a_users_turn(run: Path, capsys) -> None:
    words = ["generate", LAST, "--max_new_tokens", 5, "--num_masks", 2]
    write_rows(Path("chat.jsonl"), [{"messages": [{"role": "user", "content": "one two"}]}])
    assert mtp(*words, "--json", "--prompt", "one two") == mtp(*words, "--json", "--prompts", "chat.jsonl") == 0
    text, chat = without_times(json_lines(capsys))
    assert text == chat and text["prompt"] != "one two"
    assert mtp(*words, "--prompt", "one two") == 0
    assert capsys.readouterr().out.rstrip("\n") == f"> one two\n{text['text']}".rstrip("\n")
    model = MTPModel.from_pretrained(LAST)
    options = {"max_new_tokens": 5, "num_masks": 2}
    for prompts in ("one two", [{"role": "user", "content": "one two"}], ["one two", "six"]):
        assert model.generate(prompts, **options).texts[0] == text["text"]
    assert model.generate("one two", raw=True, **options).sequences[0, :3].tolist() == [1, 9, 10]
    with pytest.raises(UsageError, match="attention_mask"):
        model.generate("one", torch.ones(1, 1), **options)


def test_where_the_base_is(trained: Path, run: Path, here: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """The folder where it was in training, or the one of that name, or ``--base_model``; ``~`` is the home folder."""
    words = ["--prompt", "one", "--max_new_tokens", 5, "--num_masks", 2, "--json"]
    assert mtp("generate", LAST, *words) == 0
    expected = without_times(json_lines(capsys))
    settings = torch.load(LAST, weights_only=True)["mtp_settings"]
    assert (settings["base_model"], settings["base_folder"]) == ("base", str(trained / "base"))
    assert named_base(settings) == str(trained / "base")  # not the one of that name in the current folder
    as_if_trained_here()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(here))
    for options in ([here / LAST], ["~/" + LAST], [here / LAST, "--base_model=~/base"]):
        assert mtp("generate", *options, *words) == 0
        assert without_times(json_lines(capsys)) == expected
    assert base_of(str(here / LAST)) == (str(here / "base"), None)
    assert named_base({"base_model": "~/base", "base_folder": "elsewhere"}) == "~/base"
    assert mtp("export", "--ckpt_path", here / LAST, "--output", "saved") == 0
    assert MTPModel.from_pretrained("saved").base_model == str(here / "base")
    (here / "base").rename(here / "moved")
    capsys.readouterr()
    assert str(here / "base") in error_of(capsys, 1, "generate", here / LAST, *words)
    assert mtp("generate", here / LAST, *words, "--base_model", here / "moved") == 0
    assert without_times(json_lines(capsys)) == expected
    del settings["base_folder"]  # as in a checkpoint of an earlier version
    assert named_base(settings) == "base"


@pytest.mark.parametrize("words", [["--exact", "M"], ["M", "--exact", "--json"], ["M", "--exact", "true"]])
def test_a_switch_needs_no_value(words: list[str]) -> None:
    from mtp_lightning.commands.parser import CommandParser

    parser = CommandParser()
    parser.add_argument("model", type=str)
    parser.add_argument("--exact", type=bool, default=False)
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args(words)
    assert found.model == "M" and found.exact is True and found.json is ("--json" in words)


def test_steps_are_shown_and_written_as_a_page(run: Path, capsys) -> None:
    words = ["generate", LAST, "--prompts", "prompts.jsonl", "--max_new_tokens", 9, "--dtype", "float64", "--num_masks", 3]
    assert mtp(*words) == 0
    expected = capsys.readouterr().out
    assert mtp(*words, "--show_steps", "--html", "out/page.html") == 0
    out = capsys.readouterr().out
    assert out.replace(OPEN, "").replace(CLOSE, "") == expected and out.count(OPEN) == out.count(CLOSE)
    assert mtp(*words, "--batch_size", 2, "--show_steps") == 0
    assert OPEN in capsys.readouterr().out or OPEN not in out
    page = Path("out/page.html").read_text()
    assert "2 of 2" in page and page.count("<pre>") == 2
    assert "--batch_size" in error_of(capsys, 2, *words, "--html", "p.html", "--batch_size", 2)
    assert "--show_steps" in error_of(capsys, 2, *words, "--json", "--show_steps")
    assert "out" in error_of(capsys, 1, *words, "--html", "out")
