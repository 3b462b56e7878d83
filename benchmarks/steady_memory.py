# SPDX-License-Identifier: Apache-2.0
"""Does a long run keep its memory constant? Resident size over 500 steps with an evaluation every 50, on the demo's base.

    python benchmarks/steady_memory.py [--steps 500] [--every 50]

Validation, real decoding, checkpoints and all guards run, as in ``mtp fit``. Each size is followed by what is left
after the C library has returned freed memory (``malloc_trim``): what is in use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lightning import Callback

from mtp_lightning.commands.cli import main

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"


def resident() -> float:
    """Resident size of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def in_use() -> float:
    """The same after freed memory was returned, in MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


class Resident(Callback):
    """Prints the resident size every ``every`` steps."""

    every = 50
    seen: dict[int, tuple[float, float]] = {}

    def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
        """Record and print."""
        step = trainer.global_step
        if step % self.every == 0 and step not in self.seen:
            self.seen[step] = resident(), in_use()
            print("step {}: {:.0f} MB, {:.0f} MB in use".format(step, *self.seen[step]), flush=True)


def run() -> None:
    """Train and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--every", type=int, default=50)
    arguments = parser.parse_args()
    Resident.every = arguments.every
    config = CONFIG.resolve()
    sys.modules["steady_memory"] = sys.modules["__main__"]  # a class of the script can be named in the configuration
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        words = ["fit", "--config", str(config), f"--trainer.max_steps={arguments.steps}"]
        words += [f"--trainer.val_check_interval={arguments.every}", "--trainer.enable_progress_bar=false"]
        words += ["--trainer.callbacks.num_prompts=3", "--trainer.callbacks.max_new_tokens=24"]
        words += ["--trainer.callbacks.num_speed_pairs=0", "--data.eval_max_rows=32"]
        main([*words, "--trainer.callbacks+=steady_memory.Resident"])
    first, last = min(100, arguments.steps), max(Resident.seen)
    for name, early, late in zip(("resident size", "in use"), Resident.seen[first], Resident.seen[last], strict=True):
        print(f"{name}: {early:.0f} MB after {first} steps, {late:.0f} MB after {last} ({late / early - 1:+.1%})")


if __name__ == "__main__":
    run()
