# SPDX-License-Identifier: Apache-2.0
"""The cache on disk: where it is, and its failures (no permission, disk full) as one-line errors."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from mtp_lightning.errors import RunError, one_line
from mtp_lightning.files import shared_file

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def cache_folder() -> Path:
    """The ``datasets`` cache, which the environment variable ``HF_DATASETS_CACHE`` moves; it may not exist yet."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Raise a RunError that names the cache where an unwritable cache or a full disk caused the failure."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
                reason = f"{one_line(cause, 200)}. Free space, or set HF_DATASETS_CACHE to a writable folder"
                raise RunError(f"the data cache {cache_folder()} can't be written: {reason}.") from error
            cause = cause.__cause__ or cause.__context__
        raise


@contextlib.contextmanager
def cached_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the name ``path`` once it is complete; several processes may write the same one."""
    with cache_errors(), shared_file(path) as file:
        yield file
