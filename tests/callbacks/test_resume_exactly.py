# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at any moment and resumed are the uninterrupted run, bit for bit."""

from __future__ import annotations

import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from interrupted_runs import FIT, KILL, MOST, fresh
from tiny_run import assert_same_run
from zygote import Zygote


def killed_runs(zygote: Zygote, whole: Path, parent: Path, kills: int, seed: int) -> Counter[str]:
    """Kill runs at random moments and resume them until they end; counts how often each moment was met."""
    draw, met, number = random.Random(seed), Counter[str](), 0
    order = [*MOST, "time"]
    draw.shuffle(order)
    folder = fresh(whole, parent / "0")
    for _ in range(4 * kills):
        done = sum(met.values())
        event = order[done % len(order)] if done < kills else ""
        choice = {"EVENT": event, "NUMBER": draw.randint(1, MOST.get(event, 1)), "SECONDS": draw.uniform(0, 1.5)}
        prelude = KILL
        for name, value in choice.items():
            prelude = prelude.replace(f"@{name}", repr(value))
        ended = zygote.run(folder, *FIT, prelude=prelude)
        assert ended.code in (0, -signal.SIGKILL), ended.err
        if ended.code:
            met[event] += 1
            continue
        assert_same_run(folder, whole)
        if done == kills:
            break
        number += 1
        folder = fresh(whole, parent / str(number))
    return met


def test_two_kills_and_the_run_is_the_uninterrupted_one(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    assert sum(killed_runs(zygote, whole, tmp_path, 2, seed=1).values()) == 2


@pytest.mark.slow
def test_twenty_kills(zygote: Zygote, whole: Path, tmp_path: Path) -> None:
    met = killed_runs(zygote, whole, tmp_path, 20, seed=0)
    assert sum(met.values()) == 20 and len(met) == len(MOST) + 1, met
