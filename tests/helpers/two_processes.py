# SPDX-License-Identifier: Apache-2.0
"""Runs a function in two processes joined by gloo. A file of its own: a spawned process must be able to import it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def run(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)``, a function of an importable module, gives on ranks 0 and 1."""
    torch.multiprocessing.spawn(work, (function, str(folder), arguments), nprocs=2)
    return results(folder)


def results(folder: Path) -> list[Any]:
    """What ``work`` has saved on ranks 0 and 1."""
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(2)]


def work(rank: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...] = ()) -> None:
    """Run a function on one of two ranks and save what it gives."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"result_{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()
