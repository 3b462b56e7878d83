# SPDX-License-Identifier: Apache-2.0
"""Draws mask_layout.svg: what each position sees and predicts, in training and in a decoding step, from the real masks."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from mtp_lightning.decoding.step_masks import StepLayout, step_pattern
from mtp_lightning.modeling.masking import dense_mask

TEXT, MASK, UNSEEN, GREY = "#35608f", "#e08214", "#eef0f2", "#777777"

TRAINING = {
    "title": "Training: learn to fill in the masks",
    "tokens": ["The", "sky", "is", "blue", "today"],
    "layout": StepLayout(5, 0, ((0, 2), (1, 2))),
    "outputs": ["sky", "is", "blue", "is", "blue", "today", "blue", "today", ""],
}
DECODING = {
    "title": "Decoding: one step checks the drafts “blue today” and drafts again",
    "tokens": ["is", "blue", "today"],
    "layout": StepLayout(3, 0, ((0, 2), (1, 2), (2, 2))),
    "outputs": [
        "blue ✓ draft accepted",
        "",
        "",
        "and ✗ replaces “today”",
        "next draft, 1st token",
        "next draft, 2nd token",
        "(discarded)",
        "",
        "",
    ],
}


def draw(axes: Axes, title: str, tokens: list[str], layout: StepLayout, outputs: list[str]) -> None:
    """A grid of queries (rows) and keys (columns), each block of masks next to the token it follows."""
    sees = dense_mask(step_pattern(layout, torch.device("cpu")), layout.num_tokens)[0, 0]
    starts = [start for start, masks in layout.blocks for _ in range(masks)]
    offsets = [j + 1 for _, masks in layout.blocks for j in range(masks)]
    places = [(t, 0) for t in range(layout.num_tokens)] + list(zip(starts, offsets, strict=True))
    order = sorted(range(layout.size), key=places.__getitem__)  # in memory all tokens come first
    names = [tokens[places[i][0]] if i < layout.num_tokens else f"m$_{places[i][1]}$" for i in order]
    colours = [TEXT if i < layout.num_tokens else MASK for i in order]
    for row, query in enumerate(order):
        for column, key in enumerate(order):
            colour = colours[row] if sees[query, key] else UNSEEN
            axes.add_patch(plt.Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, color=colour, linewidth=0))
        axes.text(-0.2, row + 0.5, names[row], ha="right", va="center", color=colours[row])
        axes.text(row + 0.5, -0.2, names[row], ha="center", va="bottom", color=colours[row], rotation=45)
        if outputs[row]:
            axes.text(layout.size + 0.2, row + 0.5, f"→ {outputs[row]}", va="center", color=colours[row])
    axes.set_title(title, fontsize=11, loc="left", pad=34)
    axes.set_xlim(-1.2, layout.size)
    axes.set_ylim(layout.size, -0.2)
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    """Draw both grids."""
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "mask_layout", "font.family": "DejaVu Sans"})
    figure, grids = plt.subplots(1, 2, figsize=(10.4, 4.4))
    figure.subplots_adjust(left=0.01, right=0.82, top=0.79, bottom=0.11, wspace=0.42)
    for axes, panel in zip(grids, (TRAINING, DECODING), strict=True):
        draw(axes, **panel)
    figure.text(0.02, 0.06, "■ text: the base model, unchanged", color=TEXT)
    figure.text(0.27, 0.06, "■ mask tokens: the only positions where the LoRA acts", color=MASK)
    note = (
        "A row is a position, coloured where it sees a column; → its prediction. Earlier text, in the cache, is not shown."
    )
    figure.text(0.02, 0.015, note, color=GREY)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
