# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the distillation tests."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that begin with the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill_process", "mtp_lightning.commands.distill", "transformers.models.llama"])
    return context
