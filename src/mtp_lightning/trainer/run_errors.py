# SPDX-License-Identifier: Apache-2.0
"""One-line messages for what fails in a run and is not a bug: memory, workers, other processes, the disk."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

from mtp_lightning.errors import RunError, one_line
from mtp_lightning.paths import why_unwritable

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
"""What the operating system reports when nothing can be written any more."""
LOST_PROCESS = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was abort")
RESUME_HINT = " Resume with --ckpt_path auto."


def run_error(error: BaseException, resumes: bool = True) -> RunError | None:
    """The error to raise instead of one from outside of this program, or None if it is not known.

    ``resumes``: the command that failed can resume a run.
    """
    text, hint = one_line(error, 200), RESUME_HINT if resumes else ""
    if isinstance(error, RuntimeError) and "DataLoader worker" in text:
        return RunError(f"a data loader worker died ({text}): lower data.num_workers; 0 shows its error.{hint}")
    if any(words in text for words in LOST_PROCESS):
        return RunError(f"another process of this run has ended ({text}); its own message is above.{hint}")
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        name = "a file" if error.filename is None else repr(str(error.filename))
        return RunError(f"{name} could not be written: {error.strerror}. Make room or give another folder.{hint}")
    return None


def quiet_full_disks() -> None:
    """Print no traceback of TensorBoard's writer if its disk is full: the main thread meets the same error."""
    threading.excepthook = _show_thread_error


def _show_thread_error(args: threading.ExceptHookArgs) -> None:
    is_full = isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK_ERRORS
    if not (is_full and type(args.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(args)


def memory_message(reason: str, step: int | None = None, remedy: str | None = None) -> str:
    """The message for a run whose memory ran out, in an optimizer step or, for None, before training began."""
    if step is None:
        return (
            f"memory ran out before training began ({reason}). Take a smaller base, model.dtype: bfloat16,"
            " model.quantization: 4bit, or more processes with --config configs/strategies/fsdp2.yaml."
        )
    remedy = remedy or " Lower data.batch_size, data.block_fraction or data.max_length."
    return f"memory ran out in step {step} ({reason}).{remedy}{RESUME_HINT}"


def unwritable_message(folder: Path) -> str | None:
    """The message for a run's folder that can't be written, or None if it can."""
    reason = why_unwritable(folder)
    return reason and f"the run's folder {str(folder)!r} can't be written: {reason}. Change the loggers' save_dir."
