# SPDX-License-Identifier: Apache-2.0
"""Preparing: a source, list or weighted mix of sources -> token rows, and a report of what became of what was read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mtp_lightning.data.cutting import CUT, NO_LOSS, SHORT, TRUNCATED
from mtp_lightning.data.documents import encode_rows
from mtp_lightning.data.packing import pack
from mtp_lightning.data.reading import read_source
from mtp_lightning.data.rows import TokenRows, column, mix
from mtp_lightning.errors import RunError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Sources = str | list[str] | dict[str, float]
"""One source, several one after another, or a mix: source -> share of the rows drawn in an epoch, before cutting."""

_REASONS = {SHORT: "shorter than two tokens", NO_LOSS: "no token with loss after the first"}
_HOLD_OUT_SEED = 20250716  # of its own: another data.seed must not move rows between training and validation


@dataclass
class Report:
    """What became of the rows that were read.

    Attributes:
        rows_read: rows of fields.
        skipped: reason -> rows left out.
        cut: rows of plain text that became several documents.
        truncated: other rows that lost their end.
        tokens_lost: tokens that lay past ``max_length``, and tails of one token.
        documents: different documents in the rows.
        rows: rows of an epoch; a mix repeats documents, packing puts several in a row.
        tokens: tokens of an epoch.
        loss_tokens: those that carry loss.
        eligible_starts: positions whose next token carries loss.
        padding_share: share of a batch's positions that is padding; filled in by whoever forms batches.
    """

    rows_read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    cut: int = 0
    truncated: int = 0
    tokens_lost: int = 0
    documents: int = 0
    rows: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    eligible_starts: int = 0
    padding_share: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        changes = [f"{number:,} left out ({reason})" for reason, number in self.skipped.items()]
        changes += [f"{self.cut:,} cut into pieces"] if self.cut else []
        changes += [f"{self.truncated:,} truncated"] if self.truncated else []
        changes += [f"{self.tokens_lost:,} tokens lost"] if self.tokens_lost else []
        return (
            f"{self.rows_read:,} rows read{''.join(f', {change}' for change in changes)};"
            f" {self.documents:,} documents in {self.rows:,} rows an epoch, {self.tokens:,} tokens,"
            f" {self.eligible_starts:,} eligible starts, {self.padding_share:.1%} padding"
        )


class Prepared(NamedTuple):
    """Rows to draw from, and what became of what was read for them."""

    rows: TokenRows
    report: Report


def prepare(
    sources: Sources,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    name: str = "data.train",
    chat_template: str | None = None,
    packing: bool = False,
    max_rows: int | None = None,
    seed: int = 0,
    held_out: float = 0.0,
    max_held_out: int | None = None,
    workers: int = 0,
) -> tuple[Prepared, Prepared | None]:
    """Token rows of the sources, and those held out of them.

    Args:
        sources: one source, several, or a weighted mix.
        tokenizer: the base's tokenizer.
        max_length: most tokens in a row.
        name: the config key, for messages.
        chat_template: text of a chat template, or None for the base's own.
        packing: put several documents in a row.
        max_rows: read at most so many rows, evenly spaced over the sources.
        seed: seed of the mix.
        held_out: share of the rows read that is set apart, the same rows for every seed; a mix does not repeat them.
        max_held_out: keep at most so many of their documents, evenly spaced.
        workers: processes that encode a large data set.

    Returns:
        Rows to draw from, and the held-out rows, or None without any.

    Raises:
        RunError: the sources cannot be read, or no row is left.
    """
    weights = weights_of(sources, name)
    mixed = isinstance(sources, dict)
    parts = [(source, part) for source in weights for part in read_source(source)]
    if max_rows is not None:
        parts = _thin(parts, weights if mixed else None, max_rows)
    documents, owners, rows = _encode(parts, tokenizer, max_length, chat_template, workers)
    read = sum(len(part) for _, part in parts)
    outcomes = column(documents, "outcome")
    usable = outcomes < SHORT
    if not usable.any():
        reasons = ", ".join(f"{number} {reason}" for reason, number in _skipped(outcomes).items())
        raise RunError(
            f"{name}: none of the {read} rows can be used: {reasons}. Expected rows of two tokens or more with loss after"
            " the first; check the fields, max_length and the chat template."
        )
    number_apart = max(1, round(read * held_out)) if held_out else 0
    apart = np.isin(rows, np.random.default_rng(_HOLD_OUT_SEED).permutation(read)[:number_apart])
    if held_out and not ((usable & apart).any() and (usable & ~apart).any()):
        raise RunError(
            f"{name}: holding out {held_out:g} of {read} rows leaves no usable row on one side."
            " Give more rows, another data.validation_fraction, or a data.validation source."
        )

    def prepared(order: np.ndarray, side: np.ndarray, rows_read: int) -> Prepared:
        token_rows = _rows(documents, order, packing, max_length)
        return Prepared(token_rows, report_of(documents, outcomes, side, rows_read, order, len(token_rows)))

    order = _mixed(usable & ~apart, owners, rows, weights, seed, name) if mixed else np.flatnonzero(usable & ~apart)
    for_use = prepared(order, ~apart, read - number_apart)
    if not held_out:
        return for_use, None
    order = np.flatnonzero(usable & apart)
    if max_held_out is not None and len(order) > max_held_out:
        order = order[np.arange(max_held_out) * len(order) // max_held_out]
    return for_use, prepared(order, apart, number_apart)


def weights_of(sources: Sources, name: str) -> dict[str, float]:
    """Source -> its weight, 1 where none is given.

    Args:
        sources: one source, several, or a weighted mix.
        name: the config key, for messages.

    Returns:
        At least one source.

    Raises:
        UsageError: there is none, or a weight is not above 0.
    """
    weights = {sources: 1.0} if isinstance(sources, str) else sources
    if not weights:
        raise UsageError(f"{name} must name at least one source, got {sources!r}.")
    if not isinstance(weights, dict):
        return dict.fromkeys(weights, 1.0)
    for source, weight in weights.items():
        if not weight > 0:
            raise UsageError(f"{name}: the weight of {source} must be above 0, got {weight}. Leave the source out instead.")
    return weights


def _thin(parts: list[tuple[str, Dataset]], weights: dict[str, float] | None, max_rows: int) -> list[tuple[str, Dataset]]:
    """At most ``max_rows`` rows, evenly spaced, each source of a mix by its share. First rows only would favour a domain."""
    if weights is not None:
        total = sum(weights.values())
        quotas = {source: max(1, round(max_rows * weight / total)) for source, weight in weights.items()}
        return [part for source in weights for part in _thin([p for p in parts if p[0] == source], None, quotas[source])]
    lengths = [len(part) for _, part in parts]
    everything = sum(lengths)
    if everything <= max_rows:
        return parts
    wanted = np.arange(max_rows) * everything // max_rows
    thinned, begin = [], 0
    for (source, part), length in zip(parts, lengths, strict=True):
        chosen = wanted[(wanted >= begin) & (wanted < begin + length)] - begin
        begin += length
        if len(chosen):
            thinned.append((source, part.select(chosen)))
    return thinned


def _encode(
    parts: list[tuple[str, Dataset]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template: str | None,
    workers: int,
) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """All documents, and for each the number of its source and of its row among all rows read."""
    from datasets import concatenate_datasets

    encoded = [encode_rows(part, source, tokenizer, max_length, chat_template, workers) for source, part in parts]
    numbers = {source: number for number, source in enumerate(dict.fromkeys(source for source, _ in parts))}
    owners = np.repeat([numbers[source] for source, _ in parts], [len(part) for part in encoded])
    begins = np.cumsum([0] + [len(part) for _, part in parts])[:-1]
    rows = np.concatenate([begin + column(part, "row") for begin, part in zip(begins, encoded, strict=True)])
    return concatenate_datasets(encoded), owners, rows


def _skipped(outcomes: np.ndarray) -> dict[str, int]:
    numbers = {reason: int((outcomes == outcome).sum()) for outcome, reason in _REASONS.items()}
    return {reason: number for reason, number in numbers.items() if number}


def report_of(
    documents: Dataset, outcomes: np.ndarray, side: np.ndarray, rows_read: int, order: np.ndarray, num_rows: int
) -> Report:
    """What became of rows.

    Args:
        documents: their documents.
        outcomes: what became of each document's row, [n].
        side: which of the documents the report is about, [n] bool.
        rows_read: rows of fields.
        order: documents of an epoch, [m] int64.
        num_rows: token rows of an epoch.

    Returns:
        The report, without padding.
    """
    return Report(
        rows_read=rows_read,
        skipped=_skipped(outcomes[side]),
        cut=int((outcomes[side] == CUT).sum()),
        truncated=int((outcomes[side] == TRUNCATED).sum()),
        tokens_lost=int(column(documents, "lost")[side].sum()),
        documents=len(np.unique(order)),
        rows=num_rows,
        tokens=int(column(documents, "length")[order].sum()),
        loss_tokens=int(column(documents, "carried")[order].sum()),
        eligible_starts=int(column(documents, "starts")[order].sum()),
    )


def _mixed(
    usable: np.ndarray, owners: np.ndarray, rows: np.ndarray, weights: dict[str, float], seed: int, name: str
) -> np.ndarray:
    """The documents of a mix: rows are drawn by the sources' shares, and a row brings all its documents."""
    documents = np.flatnonzero(usable)
    _, begins, sizes = np.unique(rows[documents], return_index=True, return_counts=True)
    of_source = np.bincount(owners[documents[begins]], minlength=len(weights))
    for source, number in zip(weights, of_source, strict=True):
        if not number:
            raise RunError(
                f"{name}: none of the rows of {source} can be used. Leave the source out of the mix, or check its rows."
            )
    drawn = mix(of_source.tolist(), list(weights.values()), seed)
    sizes, begins = sizes[drawn], begins[drawn]
    return documents[np.arange(sizes.sum()) + np.repeat(begins - (np.cumsum(sizes) - sizes), sizes)]


def _rows(documents: Dataset, order: np.ndarray, packing: bool, max_length: int) -> TokenRows:
    if not packing:
        return TokenRows(documents, order)
    places, offsets = pack(column(documents, "length")[order], max_length)
    return TokenRows(documents, order[places], offsets)
