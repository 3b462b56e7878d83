# SPDX-License-Identifier: Apache-2.0
"""Wall-clock speed-up over autoregressive decoding, transformers' generate and its prompt-lookup decoding.

``python benchmarks/speed.py MODEL --prompts F.jsonl`` decodes batches of prompts of one domain with every number of
masks, with ``auto`` and with the baselines, one system after another; each batch starts with another system. Ratios
are taken within a batch, so a change of the machine's load affects both sides. All systems write the same number of
tokens (no end token). ``blocks`` is ``auto`` without drafts from the text itself. Prints medians of the ratios with
quartiles, by domain; writes ``speed.json`` and ``speed.png`` into ``--output``.

Prompt-lookup decoding takes one row, so it has no figure for larger batches. With ``--temperature T`` our systems
sample with one seed. With ``--compile true`` our steps are graphs, those of autoregressive decoding too; every text
is decoded once beforehand, because each shape is compiled when it first occurs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtp_lightning import MTPModel
from mtp_lightning.evaluation.acceptance import spread
from mtp_lightning.evaluation.reporting import markdown_table, new_figure, save_figure
from mtp_lightning.modeling.base import load_base
from mtp_lightning.text.prompts import Prompt, read_prompts

BASELINES = {
    "autoregressive": "our loop",
    "plain": "our loop, not compiled",
    "generate": "transformers generate",
    "lookup": "prompt lookup",
}

Ratios = dict[str, dict[str, dict[str, list[float]]]]
"""Speed-ups by domain, system and baseline."""


def systems(
    model: MTPModel, base: Any, rows: list[torch.Tensor], args: argparse.Namespace
) -> dict[str, Callable[[], tuple[list[list[int]], float]]]:
    """The systems by name; each decodes the batch and returns the new tokens of each row and the acceptance length."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    compiled = args.compile == "true"

    def ours(**options: Any) -> tuple[list[list[int]], float]:
        options = {"compile": compiled, "temperature": args.temperature, "seed": 0, **options}
        out = model.generate(ids, mask, max_new_tokens=args.tokens, eos_token_id=[], **options)
        texts = [out.sequences[r, len(row) : len(row) + args.tokens].tolist() for r, row in enumerate(rows)]
        return texts, float(out.acceptance_length.mean())

    def theirs(**options: Any) -> tuple[list[list[int]], float]:
        limits = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
        out = base.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **limits, **options)
        return out[:, ids.shape[1] :].tolist(), 1.0

    by_name: dict[str, Callable[[], Any]] = {"autoregressive": lambda: ours(decoding="autoregressive")}
    if not args.temperature:
        by_name["generate"] = theirs
    if compiled:
        by_name["plain"] = lambda: ours(decoding="autoregressive", compile=False)
    if len(rows) == 1 and not args.temperature:
        by_name["lookup"] = lambda: theirs(prompt_lookup_num_tokens=5)
    for name in args.masks:
        options = {"num_masks": int(name) if name.isdigit() else "auto", "prompt_lookup": name != "blocks"}
        by_name[name] = lambda options=options: ours(**options)
    return by_name


def measure(model: MTPModel, base: Any, prompts: list[Prompt], batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Speed-ups by domain, system and baseline, acceptance lengths, and how many texts differ from our loop's."""
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_domain.setdefault(prompt.domain or "all", []).append(prompt)
    ratios: Ratios = {}
    lengths: dict[str, dict[str, list[float]]] = {}
    num_different, num_texts, turn = 0, 0, 0
    for domain, members in by_domain.items():
        batches = [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
        batches[-1] = (batches[-1] + members * batch_size)[:batch_size]  # a small domain repeats its prompts
        # The first time allocates, measures costs and compiles.
        warm_up = batches if args.compile == "true" else batches[:1]
        for number, rows in enumerate(warm_up + batches * args.rounds):
            by_name = systems(model, base, [torch.tensor(prompt.input_ids) for prompt in rows], args)
            names = list(by_name)
            if number < len(warm_up):
                for system in by_name.values():
                    system()
                continue
            seconds, texts = {}, {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                texts[name], length = by_name[name]()
                seconds[name] = time.perf_counter() - begin
                lengths.setdefault(domain, {}).setdefault(name, []).append(length)
            turn += 1
            for name in sorted(names, key=[*args.masks, *BASELINES].index):
                for baseline in BASELINES:
                    if baseline in seconds and baseline != name:
                        by_baseline = ratios.setdefault(domain, {}).setdefault(name, {})
                        by_baseline.setdefault(baseline, []).append(seconds[baseline] / seconds[name])
            for name in args.masks:
                num_texts += len(rows)
                num_different += sum(a != b for a, b in zip(texts[name], texts["autoregressive"], strict=True))
    ratios["overall"] = merged(ratios)
    return {
        "speed_up": {d: {n: {o: spread(v) for o, v in os.items()} for n, os in ns.items()} for d, ns in ratios.items()},
        "acceptance_length": {d: {n: sum(v) / len(v) for n, v in ns.items()} for d, ns in lengths.items()},
        "texts": num_texts,
        "texts_that_differ_from_autoregressive": num_different,
    }


def merged(ratios: Ratios) -> dict[str, dict[str, list[float]]]:
    """The ratios of all domains together."""
    overall: dict[str, dict[str, list[float]]] = {}
    for by_system in ratios.values():
        for name, by_baseline in by_system.items():
            for baseline, values in by_baseline.items():
                overall.setdefault(name, {}).setdefault(baseline, []).extend(values)
    return overall


def report(name: str, figures: dict[str, Any]) -> None:
    """Print the table of one dtype and batch size."""
    different = figures["texts_that_differ_from_autoregressive"]
    print(f"\n{name}: {different} of {figures['texts']} texts differ from our loop's\n")
    by_domain = figures["speed_up"]
    shown = [
        each for each in BASELINES if any(each in spreads for group in by_domain.values() for spreads in group.values())
    ]

    def cell(spread: dict[str, Any] | None) -> str:
        return "-" if spread is None else "{:.2f} ({:.2f} to {:.2f})".format(spread["median"], *spread["quartiles"])

    rows = [
        [domain, system, *(cell(spreads.get(baseline)) for baseline in shown)]
        for domain, by_system in by_domain.items()
        for system, spreads in by_system.items()
    ]
    header = ["domain", "system", *(f"over {BASELINES[baseline]}" for baseline in shown)]
    print("\n".join(markdown_table(header, rows)), flush=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Median speed-up over our own loop by domain and number of masks, one panel for each dtype and batch size."""
    columns = min(3, len(results))
    num_rows = -(-len(results) // columns)
    figure = new_figure(4.2 * columns, 3.4 * num_rows)
    axes = figure.subplots(num_rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (name, figures) in zip(axes.flat, results.items(), strict=False):
        for domain, by_system in figures["speed_up"].items():
            ours = [system for system in by_system if system not in BASELINES]
            medians = [by_system[system]["autoregressive"]["median"] for system in ours]
            fixed, width = sum(system.isdigit() for system in ours), 2 if domain == "overall" else 1
            (line,) = axis.plot(ours[:fixed], medians[:fixed], marker="o", linewidth=width, label=domain)
            axis.plot(ours[fixed:], medians[fixed:], marker="s", linestyle="none", color=line.get_color())
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("masks")
        axis.tick_params(axis="x", labelsize=8)
    for row in axes:
        row[0].set_ylabel("speed-up over autoregressive")
    axes[0][0].legend()
    save_figure(figure, path, dpi=120)


def main() -> None:
    """Measure, print, save."""
    masks = [*map(str, range(1, 9)), "blocks", "auto"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", default="package://demo/prompts.jsonl")
    parser.add_argument("--num_prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--masks", nargs="+", default=masks, help="numbers of masks, blocks, auto")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--compile", choices=["true", "false"], default="false")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        model = MTPModel.from_pretrained(args.model, dtype=dtype)
        base = load_base(model.base.name_or_path, dtype=dtype)
        base.generation_config.eos_token_id = None
        prompts = read_prompts(args.prompts, model.tokenizer, args.num_prompts)
        for batch_size in args.batch_sizes:
            name = f"{dtype}, batch {batch_size}"
            results[name] = measure(model, base, prompts, batch_size, args)
            report(name, results[name])
            arguments = {**vars(args), "output": str(args.output)}
            text = json.dumps({"arguments": arguments, "threads": torch.get_num_threads(), "results": results}, indent=1)
            (args.output / "speed.json").write_text(text, encoding="utf-8")
    plot(results, args.output / "speed.png")


if __name__ == "__main__":
    main()
