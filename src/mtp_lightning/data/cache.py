# SPDX-License-Identifier: Apache-2.0
"""The cache of ``datasets``: where it lies, and its failures (no permission, a full disk) in one line."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from mtp_lightning.errors import RunError, one_line

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def cache_folder() -> Path:
    """The folder of the data cache, which the environment variable ``HF_DATASETS_CACHE`` moves.

    Returns:
        The folder; it may not exist yet.
    """
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE)


@contextlib.contextmanager
def cache_errors() -> Iterator[None]:
    """Tell what is wrong with the cache where that is why reading or encoding failed.

    Yields:
        Nothing.

    Raises:
        RunError: the cache can't be written, or its disk is full.
    """
    try:
        yield
    except Exception as error:
        seen: BaseException | None = error
        while seen is not None:
            if isinstance(seen, OSError) and seen.errno in _FULL | _CLOSED:
                folder, reason = cache_folder(), one_line(seen, 200)
                advice = "Make room there" if seen.errno in _FULL else "Make it a folder that can be written"
                raise RunError(
                    f"the data cache {folder} can't be written: {reason}. {advice}, or set HF_DATASETS_CACHE to another one."
                ) from error
            seen = seen.__cause__ or seen.__context__
        raise


def check_cache() -> None:
    """Make the cache folder, if it is not there.

    Raises:
        RunError: it can't be made or written.
    """
    with cache_errors():
        folder = cache_folder() / "mtp_lightning"
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
