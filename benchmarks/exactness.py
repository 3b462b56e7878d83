# SPDX-License-Identifier: Apache-2.0
"""How often a text decoded in low precision differs from transformers' greedy text, and how near the tie was.

``python benchmarks/exactness.py`` prints a Markdown table. It uses wider versions of the tests' random models and
injects drafts (the true continuation with errors), so that every number of accepted tokens occurs. The reference is
transformers' greedy ``generate`` of the same model in the same dtype. Kernels round differently for one token than
for many, so two tokens with nearly equal logits can swap, and the texts diverge from there. Every first difference
must be at a near tie. Its gap, from a forward pass over the text before it, is how far the lower of the two tokens is
below the largest logit. It is also given in roundings, the spacing of the dtype's numbers at that size. A gap of 0 is
an exact tie in that pass. With a mixture of experts the near tie may be the router's, between the last selected
expert and the next one: then the gap can be large.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decoding.execution import step as decoding_step
from mtp_lightning.decoding.execution.step import Drafts
from mtp_lightning.model import MTPModel

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))
from tiny import ARCHITECTURES, VOCAB, greedy_text, tiny_base, tiny_model, token_row  # noqa: E402


class Difference(NamedTuple):
    """Where a text first differs: the token's index, the gap of the logits there, and that gap in roundings."""

    place: int
    gap: float
    roundings: float


@contextmanager
def injected_drafts(sequence: Tensor, num_masks: int) -> Iterator[None]:
    """Drafts that follow ``sequence`` for a varying number of tokens and then err."""

    def draft(model: MTPModel, hidden: Tensor, verified: Tensor, positions: Tensor, *others: Any) -> Drafts:
        at, J = int(positions[0]), hidden.shape[1]
        out = torch.cat([sequence[at + 1 : at + 1 + J], sequence.new_zeros(J)])[:J]
        run = at * 7 % (num_masks + 2)
        if run < J:
            out[run] = (out[run] + 1) % VOCAB
        return Drafts(out[None], None)

    original, decoding_step.draft_block = decoding_step.draft_block, draft
    try:
        yield
    finally:
        decoding_step.draft_block = original


@torch.no_grad()
def first_difference(base: Any, prompt: Tensor, expected: list[int], found: list[int]) -> Difference | None:
    """Where two texts first differ, or None."""
    place = next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), None)
    if place is None:
        return None
    prefix = torch.cat([prompt, torch.tensor(expected[:place], dtype=torch.int64)])
    logits = base(prefix[None]).logits[0, -1].double()
    greatest = logits.max().item()
    gap = greatest - min(logits[expected[place]].item(), logits[found[place]].item())
    rounding = torch.finfo(base.dtype).eps * 2 ** math.floor(math.log2(abs(greatest)))
    return Difference(place, gap, gap / rounding)


def measure(
    architecture: str, dtype: torch.dtype, prompts: int, tokens: int, masks: list[int], width: int
) -> tuple[int, list[Difference], float]:
    """Texts decoded, first differences, and the mean acceptance length, over both decodings."""
    # Scaled with the width, so that a layer's gain does not grow.
    spread = 0.3 * (32 / width) ** 0.5
    size: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": width // 4}
    base = tiny_base(architecture, dtype, initializer_range=spread, **size)
    references = []
    for seed in range(prompts):
        prompt = token_row([7], seed=seed).input_ids
        references.append((prompt, greedy_text(base, prompt, tokens)))
    model, plain = tiny_model(architecture, 8, dtype=dtype, initializer_range=spread, **size), base
    texts, steps, differences = 0, 0, []
    for prompt, expected in references:
        for kind in ("quadratic", "linear"):
            for J in masks:
                with injected_drafts(torch.tensor([*prompt.tolist(), *expected]), J):
                    out = model.generate(prompt[None], decoding=kind, num_masks=J, max_new_tokens=tokens)
                found = out.sequences[0, len(prompt) :].tolist()
                texts, steps = texts + 1, steps + int(out.num_steps[0])
                if (difference := first_difference(plain, prompt, expected, found)) is not None:
                    differences.append(difference)
    return texts, differences, texts * tokens / steps


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--masks", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--width", type=int, default=256, help="hidden size of the models")
    parser.add_argument("--dtypes", nargs="+", default=["float64", "float32", "bfloat16"])
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| model | dtype | texts | tokens per step | texts that differ | first at token | largest gap | roundings | ties |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for architecture in options.architectures:
        for name in options.dtypes:
            texts, found, length = measure(
                architecture, getattr(torch, name), options.prompts, options.tokens, options.masks, options.width
            )
            row = f"| {architecture} | {name} | {texts} | {length:.2f} | {len(found)} |"
            if found:
                row += f" {min(d.place for d in found)} | {max(d.gap for d in found):.2g} |"
                row += f" {max(d.roundings for d in found):.1f} | {sum(d.gap == 0 for d in found)} |"
            print(row if found else row + " - | - | - | - |", flush=True)


if __name__ == "__main__":
    main()
