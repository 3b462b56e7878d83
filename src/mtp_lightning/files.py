# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are written under a temporary name and then renamed, so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from mtp_lightning.errors import RunError, os_reason

PART = ".part"
"""Suffix of what is being written. A killed process may leave one behind; the next write replaces it unless it is shared."""


@contextmanager
def shared_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that takes the name ``path`` once it is complete; its folder is created.

    Several processes may write the same one; the last one's stays. Errors stay as they are.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a binary file for writing that replaces ``path`` once it is complete and on the disk; its folder is created.

    RunError if the operating system could not write it; the previous file, if any, is intact.
    """
    path = Path(path)
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        # torch.save raises a RuntimeError of its own while it handles the operating system's error.
        reason = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(reason, OSError):
            raise _not_written(path, reason) from error
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a folder, next to ``path``, that replaces it with all that is in it once it is complete.

    RunError if the operating system could not write it; the previous folder, if any, is intact.
    """
    path = path.absolute()
    part, previous = (path.with_name(f".{path.name}.{suffix}{PART}") for suffix in ("new", "old"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        if path.exists():
            shutil.rmtree(previous, ignore_errors=True)  # left by a process that was killed here
            path.replace(previous)
        try:
            part.replace(path)
        except OSError:
            if previous.exists():
                previous.replace(path)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _not_written(path: Path, error: OSError) -> RunError:
    intact = " Its previous content is intact." if path.exists() else ""
    return RunError(f"{str(path)!r} could not be written: {os_reason(error)}.{intact}")


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a power cut, where the file system can."""
    with suppress(OSError):  # not every system opens folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
