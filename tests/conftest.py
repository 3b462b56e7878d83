# SPDX-License-Identifier: Apache-2.0
"""Settings that every test runs under. Tiny models are made by ``tiny.py``."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may need the network

import pytest  # noqa: E402
import torch  # noqa: E402

# Tiny tensors: a second thread costs more than it brings, and one makes the order of sums repeatable.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Starts processes that run the program; see ``zygote.py``."""
    from zygote import Zygote

    started = Zygote(tmp_path_factory.mktemp("cache"))
    yield started
    started.close()
