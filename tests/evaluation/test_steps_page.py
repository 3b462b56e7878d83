# SPDX-License-Identifier: Apache-2.0
"""The page of ``mtp generate --html``: its figures, what is escaped, and that a browser shows rejected drafts."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mtp_lightning.decoding.state import StepTokens
from mtp_lightning.evaluation.steps_page import ShownText, steps_page

STEPS = [StepTokens([5], []), StepTokens([6, 7, 8], [6, 7, 9]), StepTokens([1, 2, 3], [1, 2]), StepTokens([4, 5], [4, 5, 6])]
TEXT = ShownText("<p> & go", STEPS, ["a<b", " c", "d", "\n"], [[], ["<x>"], [], []], 2.0, 5.0, True)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """Collects the text of a page, its classes, and tags that are left open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.classes: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes += (dict(attrs).get("class") or "").split()
        assert not {"src", "href"} & dict(attrs).keys()
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_rejected_drafts() -> None:
    assert [step.rejected for step in STEPS] == [[], [9], [], []]  # the last text ended within its drafts


def test_the_page() -> None:
    page = steps_page("T & t", "how", [TEXT])
    reader = Reader(page)
    assert not reader.open and "http" not in page and "url(" not in page
    assert reader.classes.count("step") == 4 and reader.classes.count("rejected") == 1
    assert "<p> & go" in reader.text and "a<b" in reader.text and "<x>" in reader.text
    for shown in ("2.25", "2.50x", "1 of 1", "5.00 s", "2.00 s", "100% (3 of 3)", "50% (1 of 2)", "2 of 3 drafts accepted"):
        assert shown in reader.text, shown


def test_a_text_without_drafts() -> None:
    plain = ShownText("p", [StepTokens([5], [])], ["x"], [[]], 1.0, 1.0, True)
    assert "No draft was verified" in steps_page("t", "d", [plain])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_rejected_drafts_of_the_step_that_is_pointed_at(tmp_path: Path) -> None:
    # A browser that has just started may take a while until its window has the focus.
    script = """<script>const step = document.querySelector(".rejected"), tip = step.querySelector(".tip");
    const shown = () => getComputedStyle(tip).display, before = shown();
    setInterval(() => { step.blur(); step.focus();
      document.title = [before, shown(), document.documentElement.scrollWidth <= innerWidth].join(); }, 50);</script>"""
    (tmp_path / "page.html").write_text(steps_page("t", "d", [TEXT]).replace("</body>", f"{script}</body>"))
    assert BROWSER is not None
    words = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    page = (tmp_path / "page.html").as_uri()
    ended = subprocess.run([*words, "--dump-dom", page], capture_output=True, text=True, timeout=120, check=True)
    title = re.search("<title>(.*)</title>", ended.stdout)
    assert title is not None and title[1] == "none,block,true"
