# SPDX-License-Identifier: Apache-2.0
"""Trains the demo's base model from scratch: a byte-level BPE tokenizer and a small Llama, in plain PyTorch.

    python scripts/demo_base/train.py --prose TALES.jsonl STORIES.txt --minutes 55 --output base

The learning rate follows the share of ``--minutes`` that has passed, so the run ends on time on any machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import DOCUMENT_END, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MIX = {"code": 0.44, "maths": 0.16, "prose": 0.40}


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[DOCUMENT_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=DOCUMENT_END, clean_up_tokenization_spaces=False)


def rows(docs: list[list[int]], rng: random.Random):
    """Generator that is sent a length and yields a row of that many tokens, which starts with a document."""
    order: list[int] = []
    row: list[int] = []
    while True:
        length = yield row
        row = []
        while len(row) < length:
            if not order:
                order = rng.sample(range(len(docs)), len(docs))
            row += docs[order.pop()]
        row = row[:length]


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, docs: list[list[int]], length: int) -> float:
    """exp of the mean next-token loss per token over the documents, each truncated to ``length``."""
    total, count = 0.0, 0
    for doc in docs:
        ids = torch.tensor([doc[:length]])
        logits = model(ids, use_cache=False).logits.float()
        total += F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
        count += ids.shape[1] - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", nargs="+", required=True, help="JSONL or text files, or hub ids")
    parser.add_argument("--code", help="folder of Python files (default: this Python's standard library)")
    parser.add_argument("--maths", type=int, default=40000, help="number of arithmetic word problems")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="longest row: the model's context")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of full length; twice as many of half length")
    parser.add_argument("--short", type=float, default=0.75, help="share of steps with rows of half the length")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="folder of an earlier run to continue, tokenizer included")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)

    train_text = documents(args.prose, args.code, args.maths, held_out=False)
    held_text = documents(args.prose, args.code, 300, held_out=True)
    sample = [t for name, ts in train_text.items() for t in rng.sample(ts, min(len(ts), 4000 if name != "maths" else 500))]
    tokenizer = AutoTokenizer.from_pretrained(args.resume) if args.resume else train_tokenizer(sample, args.vocab_size)
    eos = tokenizer.eos_token_id

    def encode(texts: list[str]) -> list[list[int]]:
        return [ids + [eos] for ids in tokenizer(texts)["input_ids"]]

    train = {name: encode(texts) for name, texts in train_text.items()}
    held = {name: encode(rng.sample(texts, min(len(texts), 100))) for name, texts in held_text.items()}
    for name, docs in train.items():
        print(f"{name}: {len(docs)} documents, {sum(map(len, docs))} tokens", flush=True)
    streams = {name: rows(docs, rng) for name, docs in train.items()}
    for stream in streams.values():
        next(stream)

    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 5 // 2,
        num_hidden_layers=args.num_layers,
        num_attention_heads=args.hidden_size // 64,
        num_key_value_heads=max(1, args.hidden_size // 128),
        head_dim=64,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    if args.resume:
        model = LlamaForCausalLM.from_pretrained(args.resume, dtype=torch.float32).train()
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]

    @torch.compile(dynamic=False)
    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    def save() -> None:
        args.output.mkdir(parents=True, exist_ok=True)
        weights = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
        rounded = LlamaForCausalLM(config).to(torch.bfloat16)
        rounded.load_state_dict(weights)
        rounded.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        rounded.float().eval()
        report = {name: perplexity(rounded, docs, args.length) for name, docs in held.items()}
        report |= {"tokens": tokens, "minutes": (time.time() - begin) / 60}
        (args.output / "perplexity.json").write_text(json.dumps(report, indent=1) + "\n")
        print("held-out perplexity", json.dumps(report), flush=True)

    begin, tokens, step, last_save = time.time(), 0, 0, time.time()
    while (progress := (time.time() - begin) / (60 * args.minutes)) < 1:
        halves = 2 if rng.random() < args.short else 1
        names = rng.choices(list(MIX), list(MIX.values()), k=args.batch_size * halves)
        batch = torch.tensor([streams[name].send(args.length // halves + 1) for name in names])
        factor = min(1.0, (step + 1) / 50) * (1 - progress) ** 0.8
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * factor
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        tokens += batch.numel() - len(batch)
        step += 1
        if step % 20 == 0:
            speed = tokens / (time.time() - begin)
            print(f"step {step} loss {loss.item():.3f} {speed:.0f} tokens/s {100 * progress:.1f} %", flush=True)
        if time.time() - last_save > 600:
            save()
            last_save = time.time()
    save()


if __name__ == "__main__":
    main()
