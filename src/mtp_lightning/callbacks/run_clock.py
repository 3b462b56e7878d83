# SPDX-License-Identifier: Apache-2.0
"""RunClock: how long a run has left, evaluations included."""

from __future__ import annotations

import time


class RunClock:
    """How long a run has left, from the pace of its steps and what its evaluations took. Seconds of ``time.perf_counter``.

    Args:
        first_step: the optimizer step that the run begins or resumes at.
    """

    def __init__(self, first_step: int) -> None:
        self.first_step, self.began = first_step, time.perf_counter()
        self.evaluations: dict[int, float] = {}  # seconds of all pauses after an optimizer step
        self.pause_began: float | None = None  # None: the clock runs

    def pause(self) -> None:
        """Stop, if it runs: an evaluation begins."""
        self.pause_began = time.perf_counter() if self.pause_began is None else self.pause_began

    def resume(self, step: int) -> float:
        """Run again after an evaluation that came after this step; returns its seconds, 0 if the clock was not stopped."""
        if self.pause_began is None:
            return 0.0
        seconds, self.pause_began = time.perf_counter() - self.pause_began, None
        self.evaluations[step] = self.evaluations.get(step, 0.0) + seconds
        return seconds

    def seconds_left(self, step: int, total: float) -> float | None:
        """Seconds until step ``total`` once ``step`` is done; None where no step has been done or there is no limit."""
        done, left = step - self.first_step, max(0.0, total - step)
        if done <= 0 or total == float("inf"):
            return None
        now = time.perf_counter() if self.pause_began is None else self.pause_began
        pace = (now - self.began - sum(self.evaluations.values())) / done
        return left * pace + evaluation_seconds(self.evaluations, left, self.first_step)


def evaluation_seconds(evaluations: dict[int, float], steps_left: float, first_step: int = 0) -> float:
    """Seconds for the evaluations to come, if they take as long as those so far and are as far apart.

    ``evaluations`` are the seconds of those so far, by the optimizer step that they came after. A single one is as far from
    the next as it is from ``first_step``, at which the run began or resumed.
    """
    if not evaluations:
        return 0.0
    first, last = min(evaluations), max(evaluations)
    apart = (last - first) / (len(evaluations) - 1) if len(evaluations) > 1 else first - first_step
    return steps_left // max(1.0, apart) * sum(evaluations.values()) / len(evaluations)
