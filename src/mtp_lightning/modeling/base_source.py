# SPDX-License-Identifier: Apache-2.0
"""Where a base model is found, on disk or on the hub, and the errors that say why it could not be read."""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from mtp_lightning.errors import RunError
from mtp_lightning.paths import check_exists, is_gguf, resolve

ADVICE = (
    " Set model.base_model (--base_model) to a folder with config.json and weights, a GGUF file, or a hub id that this"
    " machine can reach."
)


def find_source(base_model: str) -> tuple[str, dict[str, str]]:
    """Folder or hub id that transformers loads from, and for a GGUF file the option that names it there."""
    if not is_gguf(base_model):
        check_exists(base_model, ADVICE)
        return resolve(base_model), {}
    path = Path(resolve(base_model))
    if not path.is_file():
        raise RunError(f"base model {base_model!r} could not be loaded: no such file is there.")
    return str(path.parent), {"gguf_file": path.name}


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a hub id, in the cache or downloaded; None if it is not there. RunError for a path of nothing here."""
    if "://" in name:
        return None
    check_exists(name, ADVICE)  # a missing folder of ours: the hub would be asked for it, again and again
    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
        return Path(cached if isinstance(cached, str) else hf_hub_download(name, file, revision=revision))
    except (HFValidationError, EntryNotFoundError, OSError):  # or out of reach: what loads the base reports it
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error says that memory ran out, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def load_error(base_model: str, error: Exception) -> RunError:
    """The error for a base that a library could not load."""
    return RunError(f"base model {base_model!r} could not be loaded: {reason_of(error)}{ADVICE}")


def reason_of(error: Exception) -> str:
    """One sentence of a library's error, which may run over pages."""
    lines = str(error).strip().splitlines()
    text = textwrap.shorten(lines[0].rstrip(" .:!"), 300, placeholder=" ...") if lines else ""
    if "ignore_mismatched_sizes" in text:
        return "the shapes of its weights are not those that its config.json says."
    # An expected error explains itself; the message of a KeyError is a single word, so its class is named as well.
    is_expected = text and isinstance(error, OSError | ValueError | ImportError)
    return f"{text}." if is_expected else f"{type(error).__name__}{': ' if text else ''}{text}."
