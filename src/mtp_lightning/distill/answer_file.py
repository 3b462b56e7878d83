# SPDX-License-Identifier: Apache-2.0
"""AnswerFile: a JSONL file of answers that is intact after a kill at any moment and can be resumed."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from mtp_lightning.errors import RunError, UsageError, os_reason
from mtp_lightning.files import atomic_file
from mtp_lightning.paths import why_unwritable

SETTINGS_SUFFIX = ".settings"
"""The settings of ``G.jsonl`` are in ``G.jsonl.settings``, a suffix that the data layer does not read."""
EMPTY_SUFFIX = ".empty"
"""Prompts whose answer is empty are in ``G.jsonl.empty``, one a line: id and checksum of the prompt."""


class AnswerFile:
    """The rows answered so far (``done``: id -> checksum of the prompt), and how to add to them. A context manager.

    ``empty`` are in the same way the prompts whose answer was empty: they have no row, and are not asked again.

    Every ``append`` writes complete lines and waits until they are on the disk. A line that a kill left incomplete is cut
    off at the next start. A second process on the same file is refused (RunError), and so are other ``settings``, plain
    values that the answers depend on, than it was started with (UsageError).
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str | int, int] = {}
        self.empty: dict[str | int, int] = {}
        self._empty_path = path.with_name(path.name + EMPTY_SUFFIX)
        self._settings_path = path.with_name(path.name + SETTINGS_SUFFIX)
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except Timeout as error:
            raise RunError(f"{path}: another process writes to it. Wait for it, or change --output.") from error
        except OSError as error:
            self._unlock()
            raise RunError(f"can't write {path}: {why_unwritable(path.parent) or os_reason(error)}.") from error
        try:
            self._check_settings(dict(settings))
            self._read_rows()
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        """Close the file; without an answer delete it, so that the next start may have other settings."""
        is_empty = not os.fstat(self._file).st_size
        os.close(self._file)
        for path in (self._settings_path, self._empty_path, self.path) if is_empty else ():
            path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        """Release the lock, and delete its file where the system allows it."""
        if self._lock.is_locked:
            with suppress(OSError):
                Path(self._lock.lock_file).unlink()
            self._lock.release()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows with ``id`` and ``prompt``, none of them in the file yet, and return when they are on the disk.

        RunError if the disk is full or fails; the file then ends with its last complete row.
        """
        rows = list(rows)
        # Fields that the chat template does not write may hold an unpaired surrogate; what training reads are the ids.
        data = memoryview("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace"))
        end = os.fstat(self._file).st_size
        try:
            os.lseek(self._file, end, os.SEEK_SET)
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except BaseException as error:  # Ctrl-C too
            os.ftruncate(self._file, end)
            if not isinstance(error, OSError):
                raise
            intact = f"Its {len(self.done)} rows are intact: run the command again to resume"
            raise RunError(f"{self.path} could not be written: {os_reason(error)}. {intact}.") from error
        self.done.update((row["id"], prompt_checksum(row)) for row in rows)

    def leave_out(self, prompts: Mapping[str | int, int]) -> None:
        """Remember prompts whose answer is empty, id -> checksum; RunError if the file can't be written."""
        self.empty.update(prompts)
        if prompts:
            with atomic_file(self._empty_path) as file:
                file.writelines(f"{json.dumps(pair)}\n".encode() for pair in self.empty.items())

    def _check_settings(self, settings: dict[str, Any]) -> None:
        """Compare the settings with those of the file, or write them if it is new."""
        if not os.fstat(self._file).st_size:
            with atomic_file(self._settings_path) as file:
                file.write((json.dumps(settings, indent=1) + "\n").encode())
            return
        try:
            found = dict(json.loads(self._settings_path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"{self.path} was not written by mtp distill: no {self._settings_path.name}.") from error
        names = [name for name in sorted({*settings, *found}) if settings.get(name) != found.get(name)]
        if names:
            differing = "; ".join(f"{name} {found.get(name)!r}, the command {settings.get(name)!r}" for name in names)
            raise UsageError(f"{self.path} has {differing}. Change --output.")

    def _read_rows(self) -> None:
        """Read the ids of the rows, and cut off an incomplete last line."""
        with suppress(OSError, ValueError, TypeError):  # what can't be read is asked again
            self.empty = dict(map(json.loads, self._empty_path.read_text(encoding="utf-8").splitlines()))
        length = 0
        with os.fdopen(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    name, found = row["id"], prompt_checksum(row)
                    if name in self.done:
                        raise ValueError(f"row {name!r} is in it twice")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise RunError(f"{self.path}, line {number}: expected a row of mtp distill. Change --output.") from error
                self.done[name] = found
                length += len(line)
        if length != os.fstat(self._file).st_size:
            os.ftruncate(self._file, length)
            os.fsync(self._file)


def prompt_checksum(row: Mapping[str, Any]) -> int:
    """A checksum of the prompt of a row, to notice that a prompts file was changed between two runs.

    Of messages it is not that of their rendering, which may hold today's date; the last one is the answer.
    """
    messages = row.get("messages")
    prompt = row["prompt"] if messages is None else [messages[:-1], row.get("tools")]
    return zlib.crc32(json.dumps(prompt, sort_keys=True).encode())
