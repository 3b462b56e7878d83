# SPDX-License-Identifier: Apache-2.0
"""Overfit proof: one text of the demo's base, trained alone until drafts of it are nearly always right.

    python benchmarks/overfit.py

A label that is off by one can't get there: the acceptance length stays near 1. The text is what the base writes greedily
after an opening, at least 256 tokens without a repeated 8-gram, so no loop flatters the figure.
"""

from __future__ import annotations

import argparse

import pyarrow.parquet
import torch

from mtp_lightning import MTPModel
from mtp_lightning.base import load_base, load_tokenizer
from mtp_lightning.gated_lora import LoRA
from mtp_lightning.losses import AnchorDistillation, LatentConsistency, SamplerCrossEntropy, term_value
from mtp_lightning.masking import build_masked_input
from mtp_lightning.metrics.functional import repeated_ngrams
from mtp_lightning.paths import resolve
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.types import TokenRow


def find_text(model: MTPModel, openings: list[list[int]], length: int) -> tuple[list[int], list[int]]:
    """The first greedy text of ``length`` tokens without a repeated 8-gram, and its opening."""
    end = model.tokenizer.eos_token_id
    for size in sorted({len(opening) for opening in openings}, reverse=True):
        group = [opening for opening in openings if len(opening) == size]
        for begin in range(0, len(group), 256):
            ids = torch.tensor(group[begin : begin + 256])
            options = {"max_new_tokens": length, "do_sample": False, "pad_token_id": end}
            for row in model.base.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist():
                if end in row or repeated_ngrams(row[size:]):
                    continue
                # Found in a batch, whose rounding may differ: what counts is the text that is decoded alone.
                out = model.generate(torch.tensor([row[:size]]), max_new_tokens=length, decoding="autoregressive")
                text = out.sequences[0].tolist()
                if end not in text and repeated_ngrams(text[size:]) == 0:
                    return row[:size], text
        print(f"no such text after {len(group)} openings of {size} tokens", flush=True)
    raise SystemExit("no opening gives a text without a repeated 8-gram: give more --texts or a smaller --length")


def main() -> None:
    """Train and decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="package://demo/base")
    parser.add_argument("--texts", default="package://demo/train.parquet", help="rows whose openings are tried")
    parser.add_argument("--length", type=int, default=256, help="tokens that the base writes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--aim", type=float, default=8.5)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.base)
    model = MTPModel(load_base(args.base, dtype="float32"), 8, LoRA(rank=64), GRUSamplerHead(512, True), tokenizer)
    rows = [row.tolist() for row in pyarrow.parquet.read_table(resolve(args.texts))["input_ids"].to_numpy()]
    openings = [row[:size] for size in (96, 64, 48, 32) for row in rows if len(row) > size]
    opening, text = find_text(model, openings, args.length)
    print(
        f"text: {len(text)} tokens, {len(opening)} of them the opening, no 8-gram twice:\n{tokenizer.decode(text)}\n",
        flush=True,
    )

    tokens = torch.tensor(text)
    labels = tokens.clone()
    labels[: len(opening)] = -100
    batch = build_masked_input([TokenRow(tokens, labels, torch.zeros_like(tokens), 0)], 8)
    losses = {"base": AnchorDistillation(head="base"), "sampler": SamplerCrossEntropy(), "lcm": LatentConsistency()}
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=2e-3, weight_decay=0.0)
    model.train()
    for step in range(1, args.steps + 1):
        output = model(batch, losses)
        loss = torch.stack([term_value(sums, batch.counts) for sums in output.sums.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_((p for _, p in model.trained_parameters()), 1.0)
        optimizer.step()
        if step % 25 == 0:
            out = model.generate(torch.tensor([opening]), max_new_tokens=len(text) - len(opening))
            same = out.sequences[0].tolist() == text
            length = out.acceptance_length.item()
            # The prompt's own step has no draft to verify, so it yields one token whatever the training.
            kept = out.accepted_per_step[0][1:-1]
            drafted = 1 + sum(kept) / len(kept) if kept else float("nan")
            print(
                f"step {step}: loss {loss.item():.4f}, acceptance length {length:.2f}, over steps with a full draft"
                f" {drafted:.2f}, text {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
            if length >= args.aim and same:
                print(f"reached {length:.2f} of 9")
                return
    raise SystemExit(f"not reached: acceptance length stayed below {args.aim}")


if __name__ == "__main__":
    main()
