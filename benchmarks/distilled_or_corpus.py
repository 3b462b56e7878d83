# SPDX-License-Identifier: Apache-2.0
"""Training on the base model's own answers against training on its corpus, with the same budget: acceptance.

    python benchmarks/distilled_or_corpus.py --prose TALES.jsonl

Both runs are ``configs/demo.yaml`` with the same numbers of rows, tokens and optimizer steps: one on the rows sampled
from the base (``source`` is ``sampled`` in the demo's training data), one on documents of the corpus from
``scripts/demo_base/corpus.py`` with the same domains and lengths (``--prose`` names its prose). Validation text and
prompts are the demo's. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections import Counter
from pathlib import Path

import yaml
from datasets import Dataset, load_dataset

from mtp_lightning.commands.cli import main as mtp
from mtp_lightning.modeling.base import load_tokenizer
from mtp_lightning.paths import resolve

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "demo_base"))

BASE = "package://demo/base"
OVERRIDE = """\
data: {{train: {train}}}
trainer:
  default_root_dir: {folder}
  max_steps: {steps}
  val_check_interval: {every}
  logger:
    class_path: lightning.pytorch.loggers.CSVLogger
    init_args: {{save_dir: {folder}, name: "", version: ""}}
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {folder}/checkpoints, filename: last, enable_version_counter: false}}
    - class_path: mtp_lightning.callbacks.AcceptanceEvaluation
      init_args: {{prompts: "package://demo/prompts.jsonl", num_prompts: {prompts}, max_new_tokens: 96, num_speed_pairs: 0}}
"""


def corpus_rows(sampled: list[dict], prose: list[str], code: str | None, length: int) -> list[dict]:
    """For each sampled row a piece of the corpus of the same domain and, if possible, length."""
    from corpus import documents

    tokenizer, chance = load_tokenizer(BASE), random.Random(0)
    texts = documents(prose, code, 20_000, held_out=False)
    wanted = {domain: [len(row["input_ids"]) for row in sampled if row["domain"] == domain] for domain in texts}
    rows = []
    for domain, lengths in wanted.items():
        order = chance.sample(texts[domain], len(texts[domain]))
        pieces: list[list[int]] = []
        number = 0
        while len(pieces) < len(lengths):
            if number == len(order):
                raise SystemExit(f"{domain}: {len(order)} documents give {len(pieces)} rows, {len(lengths)} are needed")
            ids = tokenizer(order[number])["input_ids"] + [tokenizer.eos_token_id]
            # A document may give several pieces.
            pieces += [ids[begin : begin + length] for begin in range(0, len(ids) - 8, length)]
            number += 1
        pieces = sorted(chance.sample(pieces, len(lengths)), key=len)
        for size, piece in zip(sorted(lengths), pieces, strict=True):
            rows.append({"input_ids": piece[:size], "domain": domain})
    return rows


def same_tokens(rows: list[dict], other: list[dict]) -> tuple[list[dict], list[dict]]:
    """Both lists, shuffled and cut to the same number of tokens, up to a row."""
    for each in (rows, other):
        random.Random(1).shuffle(each)
    budget = min(sum(len(row["input_ids"]) for row in each) for each in (rows, other))

    def cut(each: list[dict]) -> list[dict]:
        total, kept = 0, []
        for row in each:
            total += len(row["input_ids"])
            if total > budget:
                break
            kept.append(row)
        return kept

    return cut(rows), cut(other)


def last_validation(path: Path, names: list[str]) -> dict[str, float]:
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(names[0])]
    return {name: float(rows[-1][name]) for name in names}


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", nargs="+", required=True, help="the prose that the base was trained on: see corpus.py")
    parser.add_argument("--code", help="folder of Python files (default: this Python's standard library)")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--output", type=Path, default=Path("runs/distilled_or_corpus"))
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: the config's)")
    parser.add_argument("--prompts", type=int, default=24)
    args = parser.parse_args()
    settings = yaml.safe_load(Path(args.config).read_text())
    steps = args.steps or settings["trainer"]["max_steps"]
    table = load_dataset("parquet", data_files=resolve(settings["data"]["train"]), split="train")
    sampled = [{"input_ids": row["input_ids"], "domain": row["domain"]} for row in table if row["source"] == "sampled"]
    corpus = corpus_rows(sampled, args.prose, args.code, settings["data"]["max_length"])
    sampled, corpus = same_tokens(sampled, corpus)
    names = ["val/forced_acceptance_length", "val/forced_reference", "val/share_of_reference"]
    lines = []
    for name, rows in (("its own answers", sampled), ("the corpus", corpus)):
        folder = args.output / name.split()[-1]
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(folder / "train.parquet")
        tokens = sum(len(row["input_ids"]) for row in rows)
        print(f"{name}: {len(rows)} rows, {tokens} tokens, {dict(Counter(row['domain'] for row in rows))}", file=sys.stderr)
        override = folder / "override.yaml"
        override.write_text(
            OVERRIDE.format(
                train=folder / "train.parquet", steps=steps, every=max(1, steps // 2), folder=folder, prompts=args.prompts
            )
        )
        mtp(["fit", "--config", args.config, "--config", str(override)])
        found = last_validation(folder / "metrics.csv", names)
        result = json.loads((folder / "acceptance.json").read_text())["latest"]
        domains = {domain: figures["acceptance_length"] for domain, figures in result["domains"].items()}
        lines.append((name, f"{tokens:,}", result["overall"], domains, found))
    domains = sorted(lines[0][3])
    print(f"\n{steps} optimizer steps each, {args.prompts} held-out prompts:\n")
    head = ["trained on", "tokens", "acceptance length", "not repeating (texts)", *domains, "forced", "reference", "share"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, tokens, overall, by_domain, found in lines:
        steady = overall["non_repeating"]
        cells = [name, tokens, figure(overall["acceptance_length"])]
        cells += [f"{figure(steady['acceptance_length'])} ({steady['num_prompts']})"]
        cells += [figure(by_domain[domain]) for domain in domains] + [figure(found[key]) for key in names]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
