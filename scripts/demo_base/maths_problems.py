# SPDX-License-Identifier: Apache-2.0
"""Arithmetic word problems with worked solutions, made by rule. No model, no third-party text.

A problem is a chain of one to four operations on one running quantity, told as a short story; its solution repeats
the chain as sums. ``problem_key`` names a problem by its numbers and operations, so that a held-out set can be kept
apart from the training set by hashing the key.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator

NAMES = (
    "Ada Ben Carla Dan Ella Finn Grace Hugo Iris Jack Kira Leo Maya Nora Omar Pia Quinn Rosa Sam Tara Uma Victor Wendy "
    "Yusuf Zoe Anna Bruno Clara David Emma Felix Greta Hannah Ivan Julia Karl Lena Marco Nina Oscar Paula Ravi"
).split()
ITEMS = (
    "apples pears marbles stickers books pencils shells coins cookies stamps cards balloons eggs buttons beads candles "
    "oranges flowers tickets bottles plates chairs lemons muffins ribbons stones toys bricks cups plums"
).split()
CONTAINERS = "boxes bags baskets jars shelves crates trays drawers".split()
PLACES = ["the market", "the shop", "the fair", "school", "the library", "the garden", "the kitchen", "the station"]


class Story:
    """One running quantity; every method appends a sentence to the problem and a line to the solution."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.name, self.friend = rng.sample(NAMES, 2)
        self.item = rng.choice(ITEMS)
        self.problem: list[str] = []
        self.solution: list[str] = []
        self.key: list[str] = []
        self.value = 0

    def record(self, key: str, sentence: str, line: str, value: int) -> None:
        self.key.append(key)
        self.problem.append(sentence)
        self.solution.append(line)
        self.value = value

    def start(self) -> None:
        r = self.rng
        if r.random() < 0.5:
            n = r.randint(4, 60)
            self.record(
                f"={n}",
                r.choice([f"{self.name} has {n} {self.item}.", f"{self.name} starts the day with {n} {self.item}."]),
                f"{self.name} starts with {n} {self.item}.",
                n,
            )
            return
        a, b, box = r.randint(2, 12), r.randint(2, 12), r.choice(CONTAINERS)
        self.record(
            f"={a}*{b}",
            r.choice(
                [
                    f"{self.name} has {a} {box} with {b} {self.item} in each.",
                    f"At {r.choice(PLACES)}, {self.name} fills {a} {box} with {b} {self.item} each.",
                ]
            ),
            f"{a} {box} with {b} {self.item} each make {a} * {b} = {a * b} {self.item}.",
            a * b,
        )

    def add(self) -> None:
        r, v = self.rng, self.value
        n = r.randint(2, 50)
        self.record(
            f"+{n}",
            r.choice(
                [
                    f"Then {self.name} buys {n} more {self.item}.",
                    f"{self.friend} gives {self.name} {n} {self.item}.",
                    f"Later {self.name} finds {n} {self.item} at {r.choice(PLACES)}.",
                ]
            ),
            f"After getting {n} more, {self.name} has {v} + {n} = {v + n} {self.item}.",
            v + n,
        )

    def take(self) -> None:
        r, v = self.rng, self.value
        n = r.randint(1, v - 1)
        self.record(
            f"-{n}",
            r.choice(
                [
                    f"{self.name} gives {n} {self.item} to {self.friend}.",
                    f"Then {self.name} loses {n} {self.item}.",
                    f"{self.name} sells {n} {self.item} at {r.choice(PLACES)}.",
                ]
            ),
            f"Taking away {n} leaves {v} - {n} = {v - n} {self.item}.",
            v - n,
        )

    def times(self) -> None:
        r, v = self.rng, self.value
        n = r.randint(2, 4)
        word = {2: "twice", 3: "three times", 4: "four times"}[n]
        self.record(
            f"*{n}",
            f"The next day {self.name} has {word} as many {self.item}.",
            f"Now {self.name} has {v} * {n} = {v * n} {self.item}.",
            v * n,
        )

    def share(self) -> None:
        r, v = self.rng, self.value
        n = r.choice([d for d in range(2, 13) if v % d == 0])
        self.record(
            f"/{n}",
            f"{self.name} shares the {self.item} equally among {n} friends, and looks at the share of one friend.",
            f"Each of the {n} friends gets {v} / {n} = {v // n} {self.item}.",
            v // n,
        )

    def price(self) -> None:
        r, v = self.rng, self.value
        n = r.randint(2, 9)
        self.record(
            f"${n}",
            f"Each of the {self.item} costs {n} dollars.",
            f"At {n} dollars each they cost {v} * {n} = {v * n} dollars.",
            v * n,
        )


def make_problem(rng: random.Random) -> tuple[str, str, str]:
    """Draw one problem.

    Args:
        rng: the source of every choice.

    Returns:
        ``(question, answer, key)``: the problem's text, its worked solution, and its operations and numbers.
    """
    story = Story(rng)
    story.start()
    for _ in range(rng.randint(1, 3)):
        choices = [story.add]
        if story.value > 2:
            choices.append(story.take)
        if story.value <= 60:
            choices.append(story.times)
        if story.value > 3 and any(story.value % d == 0 for d in range(2, 13)):
            choices.append(story.share)
        rng.choice(choices)()
    question = f"How many {story.item} are there now?"
    unit = story.item
    if story.value <= 60 and rng.random() < 0.25:
        story.price()
        question, unit = f"How much do the {story.item} cost together?", "dollars"
    else:
        question = rng.choice([question, f"How many {story.item} does that make?", f"What is the number of {story.item}?"])
    text = "Question: " + " ".join(story.problem) + " " + question
    return text, "\nAnswer: " + "\n".join(story.solution) + f"\nThe answer is {story.value} {unit}.", "".join(story.key)


def is_held_out(key: str) -> bool:
    """One problem in twenty, by hash of its numbers and operations."""
    return zlib.crc32(key.encode()) % 20 == 0


def problems(seed: int, held_out: bool) -> Iterator[tuple[str, str]]:
    """Endless ``(question, answer)`` pairs of one side of the split."""
    rng = random.Random(seed)
    while True:
        question, answer, key = make_problem(rng)
        if is_held_out(key) == held_out:
            yield question, answer
