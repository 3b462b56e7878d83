# SPDX-License-Identifier: Apache-2.0
"""The settings of a run as loggers take them: one level of names, plain values."""

from __future__ import annotations

from typing import Any

from mtp_lightning.evaluation.run_comparison import flat_settings

LOGGED = ("seed_everything", "model", "data", "trainer")
"""The parts of a configuration that are logged, without loggers and callbacks."""


def logged_settings(config: Any) -> dict[str, Any]:
    """``model.lora.rank: 32, ...`` of a parsed configuration; other values are written as text."""
    parts = {name: value for name, value in config.as_dict().items() if name in LOGGED}
    settings = flat_settings(parts, without=("trainer.logger", "trainer.callbacks"))
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()}
