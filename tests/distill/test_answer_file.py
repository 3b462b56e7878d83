# SPDX-License-Identifier: Apache-2.0
"""The answer file: whole lines whatever ends the process, one writer, one set of settings, a full disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from mtp_lightning.distill.answer_file import AnswerFile, prompt_checksum
from mtp_lightning.errors import RunError, UsageError


def row(name: str | int, text: str = "x") -> dict:
    return {"id": name, "prompt": f"p{name}", "completion": text}


def test_rows_are_appended_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    with AnswerFile(path, {"seed": 0}) as file:
        assert file.done == {}
        file.append([row("a", "é\u2028\n"), row(2)])
        assert file.done == {name: prompt_checksum(row(name)) for name in ("a", 2)}
    with AnswerFile(path, {"seed": 0}) as file:
        assert set(file.done) == {"a", 2}
        file.append([row("2")])
    assert [json.loads(line)["id"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == ["a", 2, "2"]


@pytest.mark.parametrize("kept", [5, 39])
def test_a_torn_line_is_cut_off(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {}) as file:
        file.append([row(1)])
        whole = path.read_bytes()
        file.append([row(2, "é")])
    torn = path.read_bytes()[len(whole) :][:kept]
    path.write_bytes(whole + torn)
    complete = torn.endswith(b"\n")
    with AnswerFile(path, {}) as file:
        assert set(file.done) == ({1, 2} if complete else {1})
        if not complete:
            assert path.read_bytes() == whole
            file.append([row(2)])
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_other_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {"seed": 0, "temperature": 1.0}) as file:
        file.append([row(1)])
    with pytest.raises(UsageError, match="temperature 1.0, the command 0.5"):
        AnswerFile(path, {"seed": 0, "temperature": 0.5})


def test_a_start_that_answers_nothing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="the base is damaged"), AnswerFile(path, {"temperature": 1.0}):
        raise ValueError("the base is damaged")
    assert not list(tmp_path.iterdir())
    with AnswerFile(path, {"temperature": 0.5}) as file:  # other settings are fine
        file.append([row(1)])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {}):
        with pytest.raises(RunError, match="another process writes to it"):
            AnswerFile(path, {})
    with AnswerFile(path, {}):
        pass


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"id": 1, "prompt": "p"}\nnot json\n', 2),
        (b"[1]\n", 1),
        (b'{"id": 1, "prompt": "p"}\n' * 2, 2),
    ],
)
def test_damaged_files_are_refused_and_left_alone(tmp_path: Path, content: bytes, line: int) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {}) as file:
        file.append([row(1)])
    path.write_bytes(content)
    with pytest.raises(RunError, match=f"line {line}: expected a row of mtp distill"):
        AnswerFile(path, {})
    assert path.read_bytes() == content


@pytest.mark.parametrize("settings", [None, "nothing"])
def test_a_file_of_another_program_is_left_alone(tmp_path: Path, settings: str | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "prompt": "p"}\n')
    if settings is not None:
        (tmp_path / "a.jsonl.settings").write_text(settings)
    with pytest.raises(RunError, match="a.jsonl was not written by mtp distill"):
        AnswerFile(path, {})
    assert path.read_text() == '{"id": 1, "prompt": "p"}\n'


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.jsonl", tmp_path):
        with pytest.raises(RunError, match="can't write"):
            AnswerFile(path, {})


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    path = tmp_path / "a.jsonl"
    with AnswerFile(path, {}) as file:
        file.append([row(1)])
        before, real = path.read_bytes(), os.write

        def half(descriptor: int, data: memoryview) -> int:
            if len(data) > 20:
                return real(descriptor, data[:20])
            raise error

        monkeypatch.setattr(os, "write", half)
        with pytest.raises((RunError, KeyboardInterrupt), match="a.jsonl could not be written: No space left|^$"):
            file.append([row(2), row(3)])
        assert path.read_bytes() == before and set(file.done) == {1}
        monkeypatch.undo()
        file.append([row(2)])  # room was made
        assert set(file.done) == {1, 2}
