# SPDX-License-Identifier: Apache-2.0
"""The data pipeline: memory and time of reading and preparing many rows, and its throughput against that of training.

    python benchmarks/data.py --mixed 300000 --rows 200000

Reads and prepares rows of mixed fields; then generated conversations (chat template, spans, cutting, packing); both from a
temporary folder, with an empty cache, with the peak of this process's memory. Then it times one worker that makes the demo's
training batches and, alternately, the demo's training step on the same batches.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

CHATML = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = "the a of and to in is that it for was on are as with they be at one have this from or had by but some what".split()


def write_rows(path: Path, number: int) -> None:
    """Conversations of 1 to 3 turns, of 5 to 60 words each."""
    chance = random.Random(0)
    with path.open("w") as file:
        for _ in range(number):
            messages = []
            for _ in range(chance.randint(1, 3)):
                for role in ("user", "assistant"):
                    words = chance.choices(WORDS, k=chance.randint(5, 60))
                    messages.append({"role": role, "content": " ".join(words)})
            file.write(json.dumps({"messages": messages}) + "\n")


def write_mixed_rows(path: Path, number: int) -> None:
    """Texts, questions with answers and conversations in turn, with unused fields whose type changes from row to row."""
    chance = random.Random(0)

    def words() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(5, 60)))

    with path.open("w") as file:
        for row in range(number):
            messages = [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]
            fields = ({"text": words()}, {"prompt": words(), "completion": words()}, {"messages": messages})[row % 3]
            unused = (row, str(row), None, [row, {"n": row}], {"n": {"text": words()}}, 0.5, True)[row % 7]
            file.write(json.dumps({**fields, "id": unused, "domain": "d" if row % 5 else None}) + "\n")


class Memory:
    """Tracks the process's peak memory, without pages of mapped files, which the system may drop at any time."""

    def __init__(self) -> None:
        self.peak = self.now()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    def _watch(self) -> None:
        while not self._end.wait(0.02):
            self.peak = max(self.peak, self.now())

    def stop(self) -> int:
        self._end.set()
        self._thread.join()
        return self.peak


def read_mixed(number: int, folder: Path) -> None:
    import datasets

    from mtp_lightning.data.preparing import prepare
    from mtp_lightning.data.reading import open_source
    from mtp_lightning.modeling.base import load_tokenizer

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tokenizer = load_tokenizer("package://demo/base")
    source = folder / "mixed.jsonl"
    write_mixed_rows(source, number)
    memory = Memory()
    before, begin = memory.peak, time.perf_counter()
    rows = sum(1 for part in open_source(str(source)) for _ in part.rows())
    read = time.perf_counter() - begin
    begin = time.perf_counter()
    prepared, _ = prepare(str(source), tokenizer, max_length=2048, chat_template=CHATML)
    seconds, peak = time.perf_counter() - begin, memory.stop()
    size = source.stat().st_size / 2**20
    print(f"{size:,.0f} MiB of mixed rows: read {rows / read:,.0f} rows/s, prepared {rows / seconds:,.0f} rows/s")
    print(f"memory before {before / 2**20:,.0f} MiB, peak {peak / 2**20:,.0f} MiB; {prepared.report}")


def prepare_many(number: int, folder: Path) -> None:
    import datasets

    from mtp_lightning.data.preparing import prepare
    from mtp_lightning.modeling.base import load_tokenizer

    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    tokenizer = load_tokenizer("package://demo/base")
    source = folder / "chats.jsonl"
    write_rows(source, number)
    memory = Memory()
    before, begin = memory.peak, time.perf_counter()
    prepared, _ = prepare(str(source), tokenizer, max_length=2048, chat_template=CHATML, packing=True)
    seconds, peak = time.perf_counter() - begin, memory.stop()
    print(f"{source.stat().st_size / 2**20:,.0f} MiB of chats: {prepared.report}")
    print(
        f"memory before {before / 2**20:,.0f} MiB, peak {peak / 2**20:,.0f} MiB, grown by {(peak - before) / 2**20:,.0f} MiB"
    )
    mapped = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"with the pages of mapped files {mapped:,.0f} MiB; {prepared.report.tokens / seconds:,.0f} tokens/s to prepare")
    begin = time.perf_counter()
    prepare(str(source), tokenizer, max_length=2048, chat_template=CHATML, packing=True)
    print(f"from the cache {seconds / (time.perf_counter() - begin):,.0f} times as fast")


def throughput(rounds: int, steps: int) -> None:
    import torch
    import yaml

    from mtp_lightning.data.collator import MaskedInputCollator
    from mtp_lightning.data.loader import WindowedLoader, build_dataloader
    from mtp_lightning.data.preparing import prepare
    from mtp_lightning.losses import AnchorDistillation, LatentConsistency, term_value
    from mtp_lightning.model import MTPModel
    from mtp_lightning.modeling.base import load_base, load_tokenizer
    from mtp_lightning.modeling.gated_lora import LoRA
    from mtp_lightning.sampler_heads import GRUSamplerHead

    settings = yaml.safe_load(Path("configs/demo.yaml").read_text())
    data, shape = settings["data"], settings["model"]
    tokenizer = load_tokenizer(shape["base_model"])
    rows = prepare(data["train"], tokenizer, max_length=data["max_length"])[0].rows
    collator = MaskedInputCollator(shape["num_masks"], max_blocks_per_row=data["max_blocks_per_row"])
    base = load_base(shape["base_model"], dtype="float32")
    head = GRUSamplerHead(**shape["sampler_head"]["init_args"])
    model = MTPModel(base, shape["num_masks"], LoRA(**shape["lora"]), head, tokenizer).train()
    terms = {
        "base": AnchorDistillation(head="base"),
        "sampler": AnchorDistillation(head="sampler"),
        "lcm": LatentConsistency(),
    }
    optimizer = torch.optim.AdamW([p for _, p in model.trained_parameters()], lr=0.003)

    def tokens(batch) -> int:
        return int((batch.document_ids >= 0).sum())

    def load() -> float:
        loader = iter(WindowedLoader(build_dataloader(rows, collator, data["batch_size"], num_workers=1)))
        for _ in islice(loader, 8):  # the worker's start
            pass
        begin = time.perf_counter()
        total = sum(tokens(batch) for batch in islice(loader, 40 * steps))
        return total / (time.perf_counter() - begin)

    def train() -> float:
        batches = list(islice(WindowedLoader(build_dataloader(rows, collator, data["batch_size"])), steps + 1))
        for number, batch in enumerate(batches):
            if number == 1:  # after a warm-up
                begin = time.perf_counter()
            values = [term_value(sums, batch.counts) for sums in model(batch, terms).sums.values()]
            optimizer.zero_grad()
            torch.stack(values).sum().backward()
            torch.nn.utils.clip_grad_norm_([p for _, p in model.trained_parameters()], 1.0)
            optimizer.step()
        return sum(tokens(batch) for batch in batches[1:]) / (time.perf_counter() - begin)

    loaded, trained = [], []
    for _ in range(rounds):
        loaded.append(load())
        trained.append(train())
    ratios = [a / b for a, b in zip(loaded, trained, strict=True)]
    print(f"one worker makes {statistics.median(loaded):,.0f} tokens/s ({min(loaded):,.0f} to {max(loaded):,.0f})")
    print(f"the demo's training step takes {statistics.median(trained):,.0f} ({min(trained):,.0f} to {max(trained):,.0f})")
    spread = f"{min(ratios):.0f} to {max(ratios):.0f} in {rounds} rounds, {os.cpu_count()} cores"
    print(f"ratio {statistics.median(ratios):.0f} ({spread})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixed", type=int, default=300_000, help="mixed rows to read and prepare; 0: skip this part")
    parser.add_argument("--rows", type=int, default=200_000, help="conversations to prepare; 0: skip this part")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of both timings; 0: skip this part")
    parser.add_argument("--steps", type=int, default=20, help="training steps in a round")
    args = parser.parse_args()
    if args.mixed:
        with tempfile.TemporaryDirectory() as folder:
            read_mixed(args.mixed, Path(folder))
    if args.rows:
        with tempfile.TemporaryDirectory() as folder:
            prepare_many(args.rows, Path(folder))
    if args.rounds:
        throughput(args.rounds, args.steps)


if __name__ == "__main__":
    main()
