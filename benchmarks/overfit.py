# SPDX-License-Identifier: Apache-2.0
"""Overfit proof: one text of the demo's base, trained alone until drafts of it are nearly always right.

    python benchmarks/overfit.py

With labels off by one the acceptance length would stay near 1. The text is the base's greedy continuation of an
opening, at least 256 tokens without a repeated 8-gram, so repetition does not inflate the figure.
"""

from __future__ import annotations

import argparse
import random

import pyarrow.parquet
import torch

from mtp_lightning import MTPModel
from mtp_lightning.losses import AnchorDistillation, LatentConsistency, SamplerCrossEntropy, term_value
from mtp_lightning.metrics.functional import repeated_ngrams
from mtp_lightning.modeling.base import load_base, load_tokenizer
from mtp_lightning.modeling.gated_lora import LoRA
from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.paths import resolve
from mtp_lightning.sampler_heads import GRUSamplerHead
from mtp_lightning.types import TokenRow

NO_END: list[int] = []
"""Decode through the end token: texts of this base are rarely that long, and the continuation is its greedy text too."""


def find_text(
    model: MTPModel, rows: list[list[int]], size: int, length: int, skip: int, tries: int, most: float
) -> list[int]:
    """An opening and the first greedy text of ``length`` tokens after it, a share of at most ``most`` 8-grams repeated."""
    draw, batch = random.Random(0), 96
    for begin in range(0, tries, batch):
        openings = []
        for _ in range(batch):
            opening: list[int] = []
            while len(opening) < size:
                opening += draw.choice(rows)
            openings.append(opening[:size])
        if begin < skip:
            continue
        ids = torch.tensor(openings)
        options = {"max_new_tokens": length, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.base.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
        shares = [repeated_ngrams(row[size:]) for row in out]
        print(f"{begin + batch} openings tried, lowest share of repeated 8-grams {min(shares):.3f}", flush=True)
        if min(shares) <= most:
            # Rounding may differ in a batch, so the text is decoded again alone.
            prompt = torch.tensor([openings[shares.index(min(shares))]])
            alone = model.generate(prompt, max_new_tokens=length, decoding="autoregressive", eos_token_id=NO_END)
            text: list[int] = alone.sequences[0].tolist()
            if repeated_ngrams(text[size:]) <= most:
                return text
    raise SystemExit("no opening has such a text: raise --tries or --repeated, or lower --length")


def main() -> None:
    """Train and decode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="package://demo/base")
    parser.add_argument("--texts", default="package://demo/train.parquet", help="rows that openings are taken from")
    parser.add_argument("--domain", default="prose")
    parser.add_argument("--opening", type=int, default=120, help="tokens of the opening")
    parser.add_argument("--skip", type=int, default=0, help="openings to skip, a multiple of 96")
    parser.add_argument("--tries", type=int, default=5000)
    parser.add_argument("--repeated", type=float, default=0.0, help="highest share of repeated 8-grams in the text")
    parser.add_argument("--length", type=int, default=256, help="tokens that the base writes")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--aim", type=float, default=8.5)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(args.base)
    model = MTPModel(load_base(args.base, dtype="float32"), 8, LoRA(rank=64), GRUSamplerHead(512, True), tokenizer)
    table = pyarrow.parquet.read_table(resolve(args.texts)).to_pylist()
    rows = [row["input_ids"] for row in table if row["domain"] == args.domain]
    text = find_text(model, rows, args.opening, args.length, args.skip, args.tries, args.repeated)
    opening = text[: args.opening]
    print(
        f"text: {len(text)} tokens, {len(opening)} of them the opening, repeated 8-grams in the rest"
        f" {repeated_ngrams(text[len(opening) :]):.3f}:\n{tokenizer.decode(text)}\n",
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
            out = model.generate(torch.tensor([opening]), max_new_tokens=args.length, eos_token_id=NO_END)
            same = out.sequences[0].tolist() == text
            length = out.acceptance_length.item()
            # The prompt's step has no draft, so it always yields one token.
            accepted = out.accepted_per_step[0][1:-1]
            full_drafts = 1 + sum(accepted) / len(accepted) if accepted else float("nan")
            print(
                f"step {step}: loss {loss.item():.4f}, acceptance length {length:.2f}, over steps with a full draft"
                f" {full_drafts:.2f}, text {'equal' if same else 'DIFFERENT'}",
                flush=True,
            )
            if length >= args.aim and same:
                print(f"reached {length:.2f} of 9")
                return
    raise SystemExit(f"not reached: acceptance length stayed below {args.aim}")


if __name__ == "__main__":
    main()
