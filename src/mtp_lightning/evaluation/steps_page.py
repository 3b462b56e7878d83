# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page: the steps of generated texts, acceptance by position, plain against speculative time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from mtp_lightning.decoding.state import StepTokens
from mtp_lightning.metrics.functional import survival_counts


class ShownText(NamedTuple):
    """A generated text and how it came about."""

    prompt: str
    steps: Sequence[StepTokens]  # what each step gained
    pieces: Sequence[str]  # the text that each step gave
    rejected: Sequence[Sequence[str]]  # the text of each step's rejected drafts
    seconds: float  # speculative decoding
    plain_seconds: float  # plain decoding of as many tokens
    is_same: bool  # True if plain decoding gives the same tokens

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return sum(len(step.tokens) for step in self.steps)


def steps_page(title: str, description: str, texts: Sequence[ShownText]) -> str:
    """The page as HTML; it loads nothing."""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>
<h1>{escape(title)}</h1><p class="note">{escape(description)}</p>
{_overview(texts)}
<h2>Time</h2>
{_times(texts)}
<h2>Acceptance by position</h2>
<p class="note">How many of the verified drafts at each position were accepted, together with all before them.</p>
{_positions([step for text in texts for step in text.steps])}
<h2>Steps</h2>
<p class="note">The tokens of one step share a colour. An underlined step had drafts that were rejected: point at it.</p>
{"".join(map(_text, texts))}
</main></body></html>
"""


def _overview(texts: Sequence[ShownText]) -> str:
    tokens, steps = sum(text.num_tokens for text in texts), sum(len(text.steps) for text in texts)
    same = sum(text.is_same for text in texts)
    figures = {
        "tokens": str(tokens),
        "steps": str(steps),
        "tokens per step": f"{tokens / steps:.2f}",
        "speed over plain": f"{sum(t.plain_seconds for t in texts) / sum(t.seconds for t in texts):.2f}x",
        "same text as plain": f"{same} of {len(texts)}",
    }
    return f'<dl class="figures">{"".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in figures.items())}</dl>'


def _times(texts: Sequence[ShownText]) -> str:
    ways = {"plain": sum(text.plain_seconds for text in texts), "speculative": sum(text.seconds for text in texts)}
    longest = max(ways.values())
    return _bars((name, seconds / longest, f"{seconds:.2f} s") for name, seconds in ways.items())


def _positions(steps: Sequence[StepTokens]) -> str:
    longest = max((len(step.drafts) for step in steps), default=0)
    if not longest:
        return '<p class="note">No draft was verified.</p>'
    verified = survival_counts([len(step.drafts) for step in steps], longest).tolist()
    kept = survival_counts([len(step.drafts) - len(step.rejected) for step in steps], longest).tolist()
    rows = enumerate(zip(kept, verified, strict=True), 1)
    return _bars((f"draft {n}", count / of, f"{count / of:.0%} ({count} of {of})") for n, (count, of) in rows)


def _bars(rows: Iterable[tuple[str, float, str]]) -> str:
    """Horizontal bars: label, share of the full width, value."""
    cells = (
        f'<span>{escape(label)}</span><span class="bar"><i style="width:{100 * share:.1f}%"></i></span><span>{value}</span>'
        for label, share, value in rows
    )
    return f'<div class="bars">{"".join(cells)}</div>'


def _text(text: ShownText) -> str:
    spans = "".join(
        _step(number, *parts) for number, parts in enumerate(zip(text.steps, text.pieces, text.rejected, strict=True))
    )
    return f'<pre><span class="prompt">{escape(text.prompt)}</span>{spans}</pre>'


def _step(number: int, step: StepTokens, piece: str, rejected: Sequence[str]) -> str:
    gained = len(step.tokens)
    words = [f"step {number + 1}: {gained} token{'s' * (gained != 1)}"]
    if step.drafts:
        words.append(f"{len(step.drafts) - len(rejected)} of {len(step.drafts)} drafts accepted")
    drafts = "".join(f"<del>{escape(draft) or '&nbsp;'}</del>" for draft in rejected)
    tip = f'<span class="tip">{"; ".join(words)}{"<br>rejected: " + drafts if drafts else ""}</span>'
    return f'<span class="step c{number % 6}{" rejected" if rejected else ""}" tabindex="0">{escape(piece)}{tip}</span>'


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--ground:#fff;--line:#e4e7ec;--bar:#1f4e79}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#98a2b3;--ground:#12161c;--line:#2b3440;--bar:#7fb2e5}}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem}
h1{font-size:1.5rem;margin:0 0 .25rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.note{color:var(--soft);margin:.25rem 0 .75rem;font-size:.9rem}
.figures{display:flex;flex-wrap:wrap;gap:1rem 2.5rem;margin:1.25rem 0}
.figures dt{color:var(--soft);font-size:.8rem}.figures dd{margin:0;font-size:1.5rem;font-weight:600}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:.4rem .9rem;align-items:center;font-size:.9rem}
.bar{background:var(--line);border-radius:4px;overflow:hidden;height:1rem}
.bar i{display:block;height:100%;background:var(--bar)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:14px/1.9 ui-monospace,monospace;border:1px solid var(--line);
border-radius:8px;padding:1rem;margin:0 0 1rem}
.prompt{color:var(--soft)}
.step{border-radius:3px;padding:2px 0;background:hsl(var(--hue) 75% 55%/.25)}
.step:hover,.step:focus{background:hsl(var(--hue) 75% 55%/.5);outline:none}
.rejected{text-decoration:underline dotted 2px;text-underline-offset:5px}
.c0{--hue:210}.c1{--hue:45}.c2{--hue:140}.c3{--hue:300}.c4{--hue:20}.c5{--hue:180}
.tip{display:none;position:fixed;z-index:1;left:50%;bottom:1rem;transform:translateX(-50%);width:max-content;
max-width:90vw;padding:.6rem .9rem;border-radius:6px;background:var(--ink);color:var(--ground);
font:14px/1.7 system-ui,sans-serif}
.step:hover .tip,.step:focus .tip{display:block}
del{margin-right:.4em;padding:0 .3em;border:1px solid;border-radius:3px;text-decoration:none;opacity:.85;
font-family:ui-monospace,monospace;white-space:pre}
main{padding-bottom:5rem}
"""
