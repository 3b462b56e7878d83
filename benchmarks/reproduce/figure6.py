# SPDX-License-Identifier: Apache-2.0
"""The paper's figure 6: gated against standard LoRA: total loss, next-token loss, and accuracy on multiple-choice questions.

    python benchmarks/reproduce/figure6.py --seeds 0 1 2

The questions are held-out prompts with four continuations each, their own and three of other prompts of the domain; one is
answered right if its own continuation has the highest mean log-likelihood of a token.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from common import MLP, OUTPUT, arguments, curves, save
from recipe_runs import Run, mean_and_spread, run_all, train

from mtp_lightning.modeling.masking import build_masked_input
from mtp_lightning.paths import resolve
from mtp_lightning.types import IGNORE_INDEX, TokenRow

# The paper's losses: the base's cross-entropy counts NTP positions too, so that a standard LoRA is trained to preserve them.
LOSSES = """--model.losses={
  base: {class_path: mtp_lightning.losses.BaseCrossEntropy, init_args: {positions: all}},
  sampler: {class_path: mtp_lightning.losses.SamplerCrossEntropy},
  lcm: {class_path: mtp_lightning.losses.LatentConsistency}}"""
QUESTIONS = "package://demo/prompts.jsonl"
LENGTH = 24
"""Tokens of a continuation."""


def questions(tokenizer: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Prompts, each with its own continuation first and three others."""
    with open(resolve(QUESTIONS), encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if len(row["completion_ids"]) >= LENGTH]
    found = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        group = [row for row in rows if row["domain"] == domain]
        for place, row in enumerate(group):
            others = [group[(place + step) % len(group)] for step in range(4)]
            found.append((tokenizer(row["prompt"])["input_ids"], [each["completion_ids"][:LENGTH] for each in others]))
    return found


@torch.no_grad()
def accuracy(module: Any) -> float:
    """Share of the questions that are answered right, with the adapter as it acts at NTP positions."""
    model, right = module.model.eval(), []
    for prompt, continuations in questions(module.tokenizer):
        rows = []
        for continuation in continuations:
            tokens = torch.tensor(prompt + continuation)
            labels = tokens.clone()
            labels[: len(prompt)] = IGNORE_INDEX
            rows.append(TokenRow(tokens, labels, torch.zeros_like(tokens), 0))
        batch = build_masked_input(rows, module.num_masks, max_blocks_per_row=1)
        logits = model(batch).states.ntp[:, len(prompt) - 1 : -1]
        log_p = model.unembed(logits).log_softmax(-1)
        labels = batch.ntp_labels[:, len(prompt) - 1 : -1]
        right.append(log_p.gather(2, labels[:, :, None]).mean((1, 2)).argmax().item() == 0)
    return sum(right) / len(right)


def measure(config: str, run: Run) -> dict[str, Any]:
    """The row of a run."""
    module, row = train(config, run)
    return row | {"accuracy": round(accuracy(module), 4)}


def main() -> None:
    """Run what is missing, print and draw."""
    args = arguments(__doc__, steps=120)
    runs = [
        Run(
            f"{name} LoRA",
            seed,
            args.steps,
            (MLP, LOSSES, f"--model.lora.gated={str(name == 'gated').lower()}", *args.options),
            6,
        )
        for name in ("gated", "standard")
        for seed in args.seeds
    ]
    rows = run_all(OUTPUT / "figure6.jsonl", runs, lambda run: measure(args.config, run))
    for name in dict.fromkeys(row["name"] for row in rows):
        group = [row for row in rows if row["name"] == name]
        flat = all(len({each["ntp_loss"] for each in row["history"]}) == 1 for row in group)
        mean, spread = mean_and_spread([row["accuracy"] for row in group])
        last = mean_and_spread([row["history"][-1]["ntp_loss"] for row in group])
        print(
            f"{name}: NTP loss at the end {last[0]:.4f} ± {last[1]:.4f}, the same at every validation: {flat};"
            f" accuracy {mean:.3f} ± {spread:.3f}; CPU s {mean_and_spread([row['cpu_seconds'] for row in group])[0]:.0f}"
        )
    panels = {"loss": "total loss on held-out text", "ntp_loss": "next-token loss (nats)"}
    save(curves(rows, panels), "figure6.png")


if __name__ == "__main__":
    main()
