# SPDX-License-Identifier: Apache-2.0
"""The options of ``mtp export``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # documented, not in its __all__

from mtp_lightning.errors import RunError, UsageError


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Args:
        base_model: where the base model is now, if it moved; the folder names this.
        base_name: hub id that the folder names as its base, wherever that was loaded from.
        revision: hub revision of the base model.
        acceptance: acceptance.json with the card's figures, such as RUN/validate/acceptance.json. Default: the run's own.
        benchmark: benchmark.json with the card's figures, instead of acceptance.json.
        license: licence on the card, as apache-2.0. Default: the one that the base's card names.
        push: hub repository to upload the folder to.
        private: create that repository as a private one.
        format: sglang: check that SGLang's UNO drafter takes the folder, and print the command that serves it.
    """

    base_model: str | None = None
    base_name: str | None = None
    revision: str | None = None
    acceptance: str | None = None
    benchmark: str | None = None
    license: str | None = None
    push: str | None = None
    private: bool = False
    format: Literal["mtp", "sglang"] = "mtp"

    def __post_init__(self) -> None:
        if self.base_name is not None:
            try:
                validate_repo_id(self.base_name)
            except HFValidationError as error:
                raise UsageError(f"base_name must be a hub id, owner/name, got {self.base_name!r}.") from error
        if self.acceptance is not None and self.benchmark is not None:
            raise UsageError("give acceptance or benchmark, not both.")
        for file in (self.acceptance, self.benchmark):
            if file is not None and not Path(file).is_file():
                raise RunError(f"{file}: no such file. Give an acceptance.json or a benchmark.json.")
