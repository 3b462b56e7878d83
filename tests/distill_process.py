# SPDX-License-Identifier: Apache-2.0
"""``mtp distill`` in a process that can be killed. A file of its own: such a process must be able to import it."""

from __future__ import annotations

import os
import sys


def distill(words: list[str]) -> None:
    """Run the command, quietly."""
    import torch

    from mtp_lightning.cli import main

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")
    main(["distill", *words])
