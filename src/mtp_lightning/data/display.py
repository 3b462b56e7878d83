# SPDX-License-Identifier: Apache-2.0
"""Display: batches of masked input as text that shows the role of every token, and what an optimizer step holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mtp_lightning.types import IGNORE_INDEX, MaskedInput

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BLOCK = "▮"
"""Written after a token that a block of masks follows."""

NO_LOSS, LOSS, START = "no loss", "loss", "start of a block"
STYLES = {NO_LOSS: "dim", LOSS: "green", START: "bold black on yellow"}


class Piece(NamedTuple):
    """Neighbouring tokens of one role."""

    document: int  # index of their document in the row
    loss: bool  # the tokens carry loss: the token before each in the document predicts it, and that counts
    start: bool  # a block follows the (only) token
    token_ids: list[int]  # the tokens


class StepCounts(NamedTuple):
    """What one optimizer step holds on one device."""

    rows: int  # rows
    tokens: int  # tokens, without padding
    loss_tokens: int  # tokens that carry loss
    blocks: int  # blocks of masks
    positions: int  # positions that are computed, NTP and MTP, padding included


def row_pieces(batch: MaskedInput, row: int) -> list[Piece]:
    """A row of the batch in pieces of one role, in order; a start of a block is a piece by itself."""
    documents = batch.document_ids[row].tolist()
    labels = [IGNORE_INDEX, *batch.ntp_labels[row].tolist()]  # a token's label is at the token before it
    starts = set(batch.starts[row].tolist())
    pieces: list[Piece] = []
    for position, (token, document) in enumerate(zip(batch.input_ids[row].tolist(), documents, strict=True)):
        if document < 0:
            break  # padding
        piece = Piece(document, labels[position] != IGNORE_INDEX, position in starts, [token])
        if pieces and not piece.start and pieces[-1][:3] == piece[:3]:
            pieces[-1].token_ids.append(token)
        else:
            pieces.append(piece)
    return pieces


def row_text(batch: MaskedInput, row: int, tokenizer: Any) -> Text:
    """A row as styled text, one line per document and role; ``BLOCK`` after each start of a block."""
    from rich.text import Text

    text, line = Text(), None
    for piece in row_pieces(batch, row):
        if line != (piece.document, piece.loss):
            text.append("\n" if line else "")
            text.append("loss    " if piece.loss else "no loss ", "bold" if piece.loss else "dim")
            line = (piece.document, piece.loss)
        words = tokenizer.decode(piece.token_ids).replace("\n", "⏎").replace("\t", "⇥")
        text.append(words, STYLES[START if piece.start else LOSS if piece.loss else NO_LOSS])
        text.append(BLOCK if piece.start else "", STYLES[START])
    return text


def step_counts(batches: Sequence[MaskedInput]) -> StepCounts:
    """Sums over the batches that one device accumulates."""
    return StepCounts(
        rows=sum(len(batch.row_ids) for batch in batches),
        tokens=sum(int((batch.document_ids >= 0).sum()) for batch in batches),
        loss_tokens=sum(int((batch.ntp_labels != IGNORE_INDEX).sum()) for batch in batches),
        blocks=sum(int((batch.starts >= 0).sum()) for batch in batches),
        positions=sum(batch.input_ids.numel() + batch.mtp_labels.numel() for batch in batches),
    )


def show_rows(batches: Sequence[MaskedInput], tokenizer: Any, console: Console, limit: int) -> None:
    """Print the first ``limit`` rows of some batches."""
    from rich.text import Text

    legend = Text("roles: ")
    for role, style in STYLES.items():
        legend.append(role + (f" ({BLOCK} follows)" if role == START else ""), style).append("  ")
    console.print(legend)
    rows = [(batch, row) for batch in batches for row in range(len(batch.row_ids))]
    for batch, row in rows[:limit]:
        size = step_counts([MaskedInput(*(field[row : row + 1] if field.ndim else field for field in batch))])
        documents = int(batch.document_ids[row].max()) + 1
        console.print(
            f"\nrow {int(batch.row_ids[row])}: {size.tokens} tokens in {documents} document{'s' * (documents > 1)},"
            f" {_share(size.loss_tokens, size.tokens)} carry loss, {_share(size.blocks, size.tokens)} start a block",
            style="bold",
            soft_wrap=not console.is_terminal,
        )
        console.print(row_text(batch, row, tokenizer), soft_wrap=not console.is_terminal)


def show_steps(steps: Sequence[Sequence[MaskedInput]], devices: int, steps_in_epoch: int, console: Console) -> None:
    """Print what optimizer steps hold, given the batches of some steps on one device."""
    sizes = [step_counts(batches) for batches in steps]
    total = StepCounts(*(sum(values) for values in zip(*sizes, strict=True)))
    console.print(
        f"\n{_share(total.loss_tokens, total.tokens)} of the tokens carry loss,"
        f" {_share(total.blocks, total.tokens)} start a block of {steps[0][0].mtp_labels.shape[2]} masks",
        soft_wrap=not console.is_terminal,
    )
    names = {"rows": "rows", "tokens": "tokens", "blocks": "blocks", "positions": "positions (masks and padding included)"}
    per_step = ", ".join(
        f"{_range([getattr(size, field) * devices for size in sizes])} {name}" for field, name in names.items()
    )
    where = f"{devices} devices" if devices > 1 else "one device"
    console.print(f"a step on {where}: {per_step}; {steps_in_epoch:,} steps an epoch", soft_wrap=not console.is_terminal)


def _share(part: int, total: int) -> str:
    """``3, 12 -> 3 (25 %)``."""
    return f"{part:,} ({part / max(1, total):.0%})".replace("%", " %")


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
