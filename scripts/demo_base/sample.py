# SPDX-License-Identifier: Apache-2.0
"""Samples the demo's data from its base model: training and validation text, and held-out prompts.

    python scripts/demo_base/sample.py --base base --prose TALES.jsonl --output src/mtp_lightning/demo

Training rows continue the openings of training documents, validation rows and prompts those of held-out documents, all
at temperature 1. A few excerpts of the corpus itself are added to the training rows.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import torch
from corpus import documents
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = {"code": 0.55, "maths": 0.15, "prose": 0.3}


@torch.inference_mode()
def continuations(model, eos: int, openings: list[list[int]], length: int, batch_size: int, name: str) -> list[list[int]]:
    """Rows of at most ``length`` tokens: each opening and its continuation at temperature 1."""
    rows: list[list[int]] = []
    by_length: dict[int, list[list[int]]] = {}
    for opening in openings:
        by_length.setdefault(len(opening), []).append(opening)
    begin, total = time.time(), 0
    for size, group in sorted(by_length.items()):
        for index in range(0, len(group), batch_size):
            ids = torch.tensor(group[index : index + batch_size])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_length=length,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                pad_token_id=eos,
                eos_token_id=eos,
            )
            for row in out.tolist():
                end = row.index(eos, size) + 1 if eos in row[size:] else len(row)
                rows.append(row[:end])
                total += end - size
            print(f"{name}: {len(rows)} rows, {total / (time.time() - begin):.0f} tokens/s", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or hub id")
    parser.add_argument("--prose", nargs="+", required=True, help="prose that may be shipped")
    parser.add_argument("--code", help="folder of Python files (default: this Python's standard library)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train_rows", type=int, default=6600)
    parser.add_argument("--validation_rows", type=int, default=300)
    parser.add_argument("--prompts", type=int, default=40, help="per domain")
    parser.add_argument("--opening", type=int, default=64, help="maximum tokens of a prompt; at most half of its document")
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--excerpts", type=int, default=150_000, help="bytes of corpus text among the training rows")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    eos = tokenizer.eos_token_id
    train = documents(args.prose, args.code, 20000, held_out=False)
    held = documents(args.prose, args.code, 2000, held_out=True)

    def openings(texts: list[str], count: int, sizes: tuple[int, ...]) -> list[list[int]]:
        texts = [texts[i % len(texts)] for i in rng.sample(range(max(len(texts), count)), count)]
        ids = tokenizer([t[:600] for t in texts])["input_ids"]
        return [row[: rng.choice(sizes)] for row in ids if len(row) >= max(sizes)]

    def write(name: str, rows: list[dict]) -> None:
        features = Features({"input_ids": List(Value("int32")), "domain": Value("string"), "source": Value("string")})
        rng.shuffle(rows)
        Dataset.from_list(rows, features=features).to_parquet(args.output / name)
        print(f"{name}: {len(rows)} rows, {sum(len(r['input_ids']) for r in rows)} tokens", flush=True)

    args.output.mkdir(parents=True, exist_ok=True)
    prompts = []
    for domain, texts in held.items():
        chosen = [t for t in texts if len(t) > 300] if domain != "maths" else texts
        for text in rng.sample(chosen, min(args.prompts, len(chosen))):
            if domain == "maths":
                opening = text[: text.index("\nAnswer:") + len("\nAnswer:")]
            else:
                ids = tokenizer(text)["input_ids"]
                opening = tokenizer.decode(ids[: min(args.opening, len(ids) // 2)])
            ids = tokenizer(opening)["input_ids"]
            (row,) = continuations(model, eos, [ids], len(ids) + args.length // 2, 1, "prompt")
            # The completion, the base's own continuation, makes it a test row too.
            prompts.append({"prompt": opening, "domain": domain, "completion_ids": row[len(ids) :]})
    (args.output / "prompts.jsonl").write_text("".join(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts), "utf-8")

    for name, texts, count in (("validation", held, args.validation_rows), ("train", train, args.train_rows)):
        rows = []
        for domain, share in ROWS.items():
            starts = openings(texts[domain], round(count * share), (4, 8, 12))
            for row in continuations(model, eos, starts, args.length, args.batch_size, f"{name} {domain}"):
                rows.append({"input_ids": row, "domain": domain, "source": "sampled"})
        if name == "train":
            for domain in ROWS:
                left = args.excerpts // len(ROWS)
                for text in rng.sample(texts[domain], len(texts[domain])):
                    ids = tokenizer(text)["input_ids"] + [eos]
                    left -= len(text.encode())
                    if left < 0:
                        break
                    rows.append({"input_ids": ids[: args.length], "domain": domain, "source": "corpus"})
        write(f"{name}.parquet", rows)


if __name__ == "__main__":
    main()
