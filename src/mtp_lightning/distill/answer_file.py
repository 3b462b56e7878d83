# SPDX-License-Identifier: Apache-2.0
"""AnswerFile: a JSONL file of answers that is whole after a kill at any moment, and goes on where it ended."""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mtp_lightning.errors import RunError, UsageError, os_reason
from mtp_lightning.files import atomic_file
from mtp_lightning.paths import why_unwritable

SETTINGS_SUFFIX = ".settings"
"""The settings of ``G.jsonl`` stand in ``G.jsonl.settings``; no suffix that the data layer reads."""


class AnswerFile:
    """The rows answered so far, and how to add to them. Use it as a context manager.

    Every ``append`` writes whole lines and waits until the disk has them. What a kill left of a line is cut off at the next
    start. A second process on the same file is refused, and so are other settings than those it was begun with.

    Args:
        path: the file; it is made where there is none, and so is its folder.
        settings: what the answers depend on, plain values.

    Attributes:
        path: the file.
        done: id of each row in the file -> checksum of its prompt.

    Raises:
        UsageError: the settings differ from those of the file.
        RunError: the file can't be written, is in use, damaged, or not of ``mtp distill``.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.done: dict[str | int, int] = {}
        self._begun = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # An empty file of the user's stays; one with settings beside it was left by a process that was killed.
            self._made = not path.exists() or self._beside.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            reason = why_unwritable(path.parent) or os_reason(error)
            raise RunError(f"{path}: expected a file that can be written: {reason}. Change --output.") from error
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(self._file).st_ino != path.stat().st_ino:
                    raise OSError("it was deleted by the process that had begun it")
            except OSError as error:
                raise RunError(f"{path}: another process writes to it. Wait for it, end it, or change --output.") from error
            self._settle(dict(settings))
            self._recover()
        except BaseException:
            self._leave_nothing_empty()
            os.close(self._file)
            raise

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave_nothing_empty()
        os.close(self._file)

    def _leave_nothing_empty(self) -> None:
        """Where nothing was answered, delete what was begun: a start with other settings is not to be refused."""
        if not self._begun or os.fstat(self._file).st_size:
            return
        for path in (self._beside, *([self.path] if self._made else [])):
            path.unlink(missing_ok=True)

    @property
    def _beside(self) -> Path:
        return self.path.with_name(self.path.name + SETTINGS_SUFFIX)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows, and return when the disk has them.

        Args:
            rows: rows with ``id`` and ``prompt``, none of them in the file yet.

        Raises:
            RunError: the disk is full or fails; the file then ends with its last whole row.
        """
        rows = list(rows)
        # A server may send half a character; what counts in training are the ids.
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
            raise RunError(
                f"{self.path}: writing failed: {os_reason(error)}. Its {len(self.done)} rows are whole; make room and run"
                " the same command again to go on."
            ) from error
        self.done.update((row["id"], checksum(row["prompt"])) for row in rows)

    def _settle(self, settings: dict[str, Any]) -> None:
        """Compare the settings with those of the file, or write them where it is new."""
        beside = self._beside
        empty = not os.fstat(self._file).st_size
        try:
            found = None if empty else json.loads(beside.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(
                f"{self.path}: it has rows, and {beside.name} is not beside it: mtp distill did not write it."
                " Change --output."
            ) from None
        except (OSError, ValueError) as error:
            raise RunError(
                f"{beside}: expected the settings of {self.path.name}, they can't be read. Change --output."
            ) from error
        if empty:
            self._begun = True
            with atomic_file(beside) as file:
                file.write((json.dumps(settings, indent=1) + "\n").encode())
            return
        if not isinstance(found, dict):
            raise RunError(f"{beside}: expected the settings of {self.path.name}, got something else. Change --output.")
        for name in sorted(set(settings) | set(found)):
            if settings.get(name) != found.get(name):
                raise UsageError(
                    f"{self.path} was begun with {name} {found.get(name)!r}, and this command has {settings.get(name)!r}:"
                    " change it back, or give another --output."
                )

    def _recover(self) -> None:
        """Read the ids of the rows, and cut off what follows the last whole line."""
        whole = 0
        with os.fdopen(os.dup(self._file), "rb") as lines:
            lines.seek(0)
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    name, prompt = row["id"], row["prompt"]
                    if not isinstance(name, str | int) or not isinstance(prompt, str):
                        raise TypeError("an id or prompt of another kind")
                except (ValueError, KeyError, TypeError) as error:
                    raise RunError(
                        f"{self.path}, line {number}: expected a row of mtp distill. Delete the line, or change --output."
                    ) from error
                if name in self.done:
                    raise RunError(
                        f"{self.path}, line {number}: row {name!r} stands in it twice. Delete the line, or change --output."
                    )
                self.done[name] = checksum(prompt)
                whole += len(line)
        if whole != os.fstat(self._file).st_size:
            os.ftruncate(self._file, whole)
            os.fsync(self._file)


def checksum(prompt: str) -> int:
    """A number that tells prompts apart, to notice that a prompts file was changed between two runs."""
    return zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
