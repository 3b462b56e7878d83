# SPDX-License-Identifier: Apache-2.0
"""Preparing: a source, list or weighted mix of sources -> token rows, and a report of what became of the rows read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtp_lightning.data.cutting import LOSS_CUT, NO_LOSS, NULL, REFUSED, SHORT, SPLIT, TRUNCATED
from mtp_lightning.data.documents import Documents, Encoder, encode_part
from mtp_lightning.data.encoding import is_plain_text
from mtp_lightning.data.formats import Part
from mtp_lightning.data.packing import pack
from mtp_lightning.data.reading import open_sources
from mtp_lightning.data.rows import TokenRows, weighted_mix
from mtp_lightning.errors import RunError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sources = str | list[str] | dict[str, float]
"""One source, several one after another, or a mix: source -> share of the rows drawn in an epoch, before cutting."""

USABLE_ROWS = (
    "Expected rows of two tokens or more with loss after the first; check the fields, max_length and the chat template."
)
"""Advice where no row can be used."""

PLAIN_TEXT = (
    "warning: {} has rows of plain text, and the base has a chat template, which prompts of its users go through: better"
    " train on rows of messages (mtp distill writes them)"
)
"""The line on rows that are unlike what an instruct base reads when it is used."""
_SKIP_REASONS = {
    SHORT: "shorter than two tokens",
    NO_LOSS: "no token with loss after the first",
    LOSS_CUT: "with a prompt that alone fills data.max_length: raise it",
    NULL: "null instead of text",
    REFUSED: "refused by the chat template",
}
_EXAMPLES = 3  # of refused rows that are shown
_HOLD_OUT_SEED = 20250716  # fixed: another data.seed must not move rows between training and validation


@dataclass
class Report:
    """What became of the rows that were read."""

    rows_read: int = 0  # rows of fields
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> rows skipped
    cut: int = 0  # rows of plain text that became several documents
    truncated: int = 0  # other rows that lost their end
    tokens_lost: int = 0  # tokens past ``max_length``, and tails of one token
    documents: int = 0  # distinct documents in the rows
    rows: int = 0  # rows of an epoch; a mix repeats documents, packing puts several in a row
    tokens: int = 0  # tokens of an epoch
    loss_tokens: int = 0  # those that carry loss
    eligible_starts: int = 0  # positions whose next token carries loss
    padding_share: float = 0.0  # share of a batch's positions that is padding; filled in where batches are formed
    empty_files: int = 0  # files without a row
    examples: list[str] = field(default_factory=list)  # why the first rows were refused by the chat template
    plain_source: str | None = None  # a source of plain text, where the base has a chat template

    def __str__(self) -> str:
        changes = [f"{self.empty_files:,} empty file{'s' * (self.empty_files > 1)}"] if self.empty_files else []
        changes += [f"{number:,} left out ({reason})" for reason, number in self.skipped.items()]
        changes += [f"{self.cut:,} cut into pieces"] if self.cut else []
        changes += [f"{self.truncated:,} truncated"] if self.truncated else []
        changes += [f"{self.tokens_lost:,} tokens lost"] if self.tokens_lost else []
        return (
            f"{self.rows_read:,} rows read{''.join(f', {change}' for change in changes)};"
            f" {self.documents:,} documents in {self.rows:,} rows an epoch, {self.tokens:,} tokens,"
            f" {self.eligible_starts:,} eligible starts, {self.padding_share:.1%} padding"
            f"{''.join(chr(10) + example for example in self.examples)}"
            f"{chr(10) + PLAIN_TEXT.format(self.plain_source) if self.plain_source else ''}"
        )


class Prepared(NamedTuple):
    """Rows to draw from, and what became of the rows read for them."""

    rows: TokenRows
    report: Report


def prepare(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    name: str = "data.train",
    chat_template: str | None = None,
    vocab_size: int | None = None,
    packing: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
    held_out: float = 0.0,
    max_held_out: int | None = None,
    workers: int = 0,
) -> tuple[Prepared, Prepared | None]:
    """Rows to draw from, and those held out of them or None; RunError if a source cannot be read or no row is left.

    Of more than ``max_rows`` rows that many are read, evenly spaced over the sources. The share ``held_out`` of the rows
    read is the same for every ``seed`` (of the mix), and a mix does not repeat it; at most ``max_held_out`` of its documents
    are kept, evenly spaced. ``name`` is the config key, for messages; ``chat_template`` a template's source, None for the
    base's own; ``vocab_size`` the number of token ids that the base has, None for the tokenizer's; ``workers`` processes
    encode a large file.
    """
    weights = weights_of(sources, name)
    opened = open_sources(sources_of(sources), name)
    wanted = None if max_rows is None else _evenly_spaced(opened, weights if isinstance(sources, dict) else None, max_rows)
    encoder = Encoder(tokenizer, max_length, chat_template, vocab_size)
    documents, owners, rows, empty_files = _encode(opened, encoder, wanted, workers)
    num_read = int(rows[-1]) + 1
    usable = _usable(documents, name, num_read)

    num_held_out = max(1, round(num_read * held_out)) if held_out else 0
    apart = np.isin(rows, np.random.default_rng(_HOLD_OUT_SEED).permutation(num_read)[:num_held_out])
    if held_out and not ((usable & apart).any() and (usable & ~apart).any()):
        raise RunError(f"{name}: data.validation_fraction {held_out:g} leaves no usable row of {num_read} on one side.")

    def prepared(chosen: np.ndarray, side: np.ndarray, rows_read: int) -> Prepared:
        order, offsets = arrange(documents, chosen, packing, max_length)
        made = report_on(TokenRows(documents, order, offsets), documents, side, rows_read)
        made.report.empty_files = empty_files
        return made

    chosen = np.flatnonzero(usable & ~apart)
    if isinstance(sources, dict):
        chosen = _mixed(chosen, owners, rows, weights, seed, name)
    main = prepared(chosen, ~apart, num_read - num_held_out)
    main.report.plain_source = _plain_source(opened) if name == "data.train" and tokenizer.chat_template else None
    if not held_out:
        return main, None
    chosen = np.flatnonzero(usable & apart)
    if max_held_out is not None and len(chosen) > max_held_out:
        chosen = chosen[np.arange(max_held_out) * len(chosen) // max_held_out]
    return main, prepared(chosen, apart, num_held_out)


def _plain_source(opened: dict[str, list[Part]]) -> str | None:
    """The first source whose first row is plain text, or None."""
    firsts = ((source, next(row for part in parts for row in part.rows())) for source, parts in opened.items())
    return next((source for source, row in firsts if is_plain_text(row.fields)), None)


def weights_of(sources: Sources, name: str) -> dict[str, float]:
    """Source -> weight, 1 by default; a UsageError if there is no source or a weight is not above 0."""
    if not sources:
        raise UsageError(f"{name} must name at least one source, got {sources!r}.")
    weights = sources if isinstance(sources, dict) else dict.fromkeys(sources_of(sources), 1.0)
    for source, weight in weights.items():
        if not weight > 0:
            raise UsageError(f"{name}: the weight of {source} must be above 0, got {weight}.")
    return weights


def sources_of(sources: Sources) -> list[str]:
    """The sources one by one."""
    return [sources] if isinstance(sources, str) else list(sources)


def arrange(
    documents: Documents, chosen: np.ndarray, packing: bool, max_length: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The chosen documents in the order of their rows, and where rows begin (None: one document per row)."""
    if not packing:
        return chosen, None
    order, offsets = pack(documents.column("length")[chosen], max_length)
    return chosen[order], offsets


def report_on(rows: TokenRows, documents: Documents, side: np.ndarray, rows_read: int) -> Prepared:
    """Rows with their report; ``side`` [n] bool are the documents that the counts of what became of rows are about."""
    outcomes = documents.column("outcome")[side]
    refused = np.flatnonzero((documents.column("outcome") == REFUSED) & side)
    report = Report(
        rows_read=rows_read,
        skipped=_skipped(outcomes),
        cut=int((outcomes == SPLIT).sum()),
        truncated=int((outcomes == TRUNCATED).sum()),
        tokens_lost=int(documents.column("tokens_lost")[side].sum()),
        documents=len(np.unique(rows.order)),
        rows=len(rows),
        tokens=int(documents.column("length")[rows.order].sum()),
        loss_tokens=int(documents.column("loss_tokens")[rows.order].sum()),
        eligible_starts=int(documents.column("eligible_starts")[rows.order].sum()),
        examples=documents.notes(refused, _EXAMPLES),
    )
    return Prepared(rows, report)


def _skipped(outcomes: np.ndarray) -> dict[str, int]:
    counts = {reason: int((outcomes == outcome).sum()) for outcome, reason in _SKIP_REASONS.items()}
    return {reason: count for reason, count in counts.items() if count}


def _evenly_spaced(opened: dict[str, list[Part]], weights: dict[str, float] | None, max_rows: int) -> dict[Part, np.ndarray]:
    """Part -> indices of its rows of at most ``max_rows``, evenly spaced (files are often sorted by domain).

    Each source of a mix gives its share.
    """
    if weights is not None:
        total = sum(weights.values())
        quotas = {source: max(1, round(max_rows * weight / total)) for source, weight in weights.items()}
        shares = [_evenly_spaced({source: opened[source]}, None, quota) for source, quota in quotas.items()]
        return {part: wanted for share in shares for part, wanted in share.items()}
    parts = [part for members in opened.values() for part in members]
    counts = [part.count() for part in parts]
    number = min(max_rows, sum(counts))
    chosen = np.arange(number) * sum(counts) // max(1, number)
    firsts = np.cumsum([0, *counts])
    return {
        part: chosen[(chosen >= first) & (chosen < end)] - first
        for part, first, end in zip(parts, firsts, firsts[1:], strict=False)
    }


def _encode(
    opened: dict[str, list[Part]], encoder: Encoder, wanted: dict[Part, np.ndarray] | None, workers: int
) -> tuple[Documents, np.ndarray, np.ndarray, int]:
    """All documents, for each the index of its source and of its row among all rows read, and the number of empty files."""
    digest = encoder.digest()
    files, owners, rows = [], [], []
    num_read = empty_files = 0
    for number, (source, parts) in enumerate(opened.items()):
        before = num_read
        for part in parts:
            files.append(encode_part(part, encoder, digest, None if wanted is None else wanted[part], workers))
            part_rows = Documents(files[-1:]).column("row")
            owners.append(np.full(len(part_rows), number))
            rows.append(num_read + part_rows)
            num_read += int(part_rows[-1]) + 1 if len(part_rows) else 0
            empty_files += (wanted is None) & (not len(part_rows))
        if num_read == before:
            raise RunError(f"{source}: expected at least one row, it is empty.")
    return Documents(files), np.concatenate(owners), np.concatenate(rows), empty_files


def _usable(documents: Documents, name: str, num_read: int) -> np.ndarray:
    """Which documents can be trained on, [n] bool; a RunError if none can."""
    outcomes = documents.column("outcome")
    if not (usable := outcomes < SHORT).any():
        reasons = ", ".join(f"{number} {reason}" for reason, number in _skipped(outcomes).items())
        examples = "".join(f" {example}." for example in documents.notes(np.flatnonzero(outcomes == REFUSED), 1))
        raise RunError(f"{name}: none of the {num_read} rows can be used: {reasons}.{examples} {USABLE_ROWS}")
    return usable


def _mixed(
    documents: np.ndarray, owners: np.ndarray, rows: np.ndarray, weights: dict[str, float], seed: int, name: str
) -> np.ndarray:
    """The documents of a mix: rows are drawn by the sources' shares, and a row brings all its documents."""
    _, firsts, sizes = np.unique(rows[documents], return_index=True, return_counts=True)
    rows_per_source = np.bincount(owners[documents[firsts]], minlength=len(weights))
    for source, count in zip(weights, rows_per_source, strict=True):
        if not count:
            raise RunError(f"{name}: none of the rows of {source} can be used.")
    drawn = weighted_mix(rows_per_source.tolist(), list(weights.values()), seed)
    sizes, firsts = sizes[drawn], firsts[drawn]
    return documents[np.arange(sizes.sum()) + np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes)]
