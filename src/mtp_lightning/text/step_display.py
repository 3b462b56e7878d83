# SPDX-License-Identifier: Apache-2.0
"""Generated text with the tokens of each step in one colour, or between brackets where there is no colour."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

COLOURS = ("cyan", "yellow", "green", "magenta", "bright_blue", "bright_red")
"""Colours of successive steps."""
OPEN, CLOSE = "\u27e6", "\u27e7"
"""Around the text of a step of several tokens."""


def has_colour(console: Console) -> bool:
    """True on a terminal, unless the environment says ``NO_COLOR``."""
    return console.is_terminal and not console.no_color


def step_text(number: int, text: str, num_tokens: int, colour: bool) -> Text:
    """The text of step ``number``, which gained ``num_tokens``."""
    if colour:
        return Text(text, COLOURS[number % len(COLOURS)])
    return Text(f"{OPEN}{text}{CLOSE}" if text and num_tokens > 1 else text)
