# SPDX-License-Identifier: Apache-2.0
"""Wall-clock speed-up over autoregressive decoding, transformers' generate and its prompt-lookup decoding.

``python benchmarks/speed.py MODEL --prompts F.jsonl`` decodes batches of prompts of one domain with every number of masks
and ``auto``, and with the three others, one after another; then the next batch, beginning with another one. The ratio of two
ways is taken within a batch, so a busy moment hits neighbours alike. All write as many tokens (no end token).
``blocks`` is ``auto`` without the drafts that the text itself offers. Prints medians of the ratios with quartiles, by
domain; writes ``speed.json`` and ``speed.png`` into ``--output``.

Prompt-lookup decoding takes one row, so it has no figure for larger batches. With ``--temperature T`` texts are sampled, by
our ways alone, from one seed. With ``--compile true`` our steps are graphs, those of our autoregressive loop too; every text
is decoded once beforehand, for shapes are compiled as they come up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch

from mtp_lightning import MTPModel
from mtp_lightning.modeling.base import load_base
from mtp_lightning.text.prompts import Prompt, read_prompts

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

OTHERS = {
    "autoregressive": "our loop",
    "plain": "our loop, not compiled",
    "generate": "transformers generate",
    "lookup": "prompt lookup",
}


def ways(
    model: MTPModel,
    base: Any,
    rows: list[torch.Tensor],
    tokens: int,
    masks: list[str],
    compiled: bool = False,
    temperature: float = 0.0,
) -> dict[str, Callable[[], Any]]:
    """The ways to decode a batch; each gives the new tokens of each row and its acceptance length."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")

    def ours(**options: Any) -> tuple[list[list[int]], float]:
        options = {"compile": compiled, "temperature": temperature, "seed": 0, **options}
        out = model.generate(ids, mask, max_new_tokens=tokens, eos_token_id=[], **options)
        texts = [out.sequences[r, len(row) : len(row) + tokens].tolist() for r, row in enumerate(rows)]
        return texts, float(out.acceptance_length.mean())

    def theirs(**options: Any) -> tuple[list[list[int]], float]:
        out = base.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return out[:, ids.shape[1] :].tolist(), 1.0

    found: dict[str, Callable[[], Any]] = {"autoregressive": lambda: ours(decoding="autoregressive")}
    if not temperature:
        found["generate"] = theirs
    if compiled:
        found["plain"] = lambda: ours(decoding="autoregressive", compile=False)
    if len(rows) == 1 and not temperature:
        found["lookup"] = lambda: theirs(prompt_lookup_num_tokens=5)
    for each in masks:
        value: dict[str, Any] = {"num_masks": int(each) if each.isdigit() else "auto", "prompt_lookup": each != "blocks"}
        found[each] = lambda value=value: ours(**value)
    return found


def spread(values: list[float]) -> dict[str, Any] | None:
    """Median and quartiles."""
    if not values:
        return None
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return {"median": median, "quartiles": [low, high], "pairs": len(values)}


def measure(
    model: MTPModel,
    base: Any,
    prompts: list[Prompt],
    batch: int,
    tokens: int,
    masks: list[str],
    rounds: int,
    compiled: bool,
    temperature: float,
) -> dict[str, Any]:
    """Ratios by domain, way and what it is compared with."""
    domains: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain or "all", []).append(prompt)
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    lengths: dict[str, dict[str, list[float]]] = {}
    different, texts, turn = 0, 0, 0
    for domain, members in domains.items():
        # A domain with few prompts fills its batch by taking them again.
        batches = [members[i : i + batch] for i in range(0, len(members), batch)]
        batches[-1] = (batches[-1] + members * batch)[:batch]
        for number, rows in enumerate((batches if compiled else batches[:1]) + batches * rounds):
            calls = ways(model, base, [torch.tensor(p.input_ids) for p in rows], tokens, masks, compiled, temperature)
            names = list(calls)
            if number < (len(batches) if compiled else 1):
                for name in names:
                    calls[name]()  # the first time allocates, measures costs and compiles
                continue
            seconds, found = {}, {}
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                begin = time.perf_counter()
                found[name], length = calls[name]()
                seconds[name] = time.perf_counter() - begin
                lengths.setdefault(domain, {}).setdefault(name, []).append(length)
            turn += 1
            for name in [*masks, *OTHERS]:
                if name not in seconds:
                    continue
                for other in OTHERS:
                    if other in seconds and other != name:
                        place = ratios.setdefault(domain, {}).setdefault(name, {}).setdefault(other, [])
                        place.append(seconds[other] / seconds[name])
            for name in masks:
                texts += len(rows)
                different += sum(a != b for a, b in zip(found[name], found["autoregressive"], strict=True))
    overall: dict[str, dict[str, list[float]]] = {}
    for ways_of in ratios.values():
        for name, others in ways_of.items():
            for other, values in others.items():
                overall.setdefault(name, {}).setdefault(other, []).extend(values)
    table = {**ratios, "overall": overall}
    return {
        "speed_up": {d: {n: {o: spread(v) for o, v in os.items()} for n, os in ns.items()} for d, ns in table.items()},
        "acceptance_length": {d: {n: sum(v) / len(v) for n, v in ns.items()} for d, ns in lengths.items()},
        "texts": texts,
        "texts_that_differ_from_autoregressive": different,
    }


def report(name: str, figures: dict[str, Any]) -> None:
    """Print one setting's table."""
    print(
        f"\n{name}: {figures['texts_that_differ_from_autoregressive']} of {figures['texts']} texts differ from our loop's\n"
    )
    others = [other for other in OTHERS if any(other in o for d in figures["speed_up"].values() for o in d.values())]
    print(
        "| domain | way | "
        + " | ".join(f"over {OTHERS[other]}" for other in others)
        + " |\n|---|---|"
        + "---|" * len(others)
    )
    for domain, ways_of in figures["speed_up"].items():
        for way, values in ways_of.items():
            cells = []
            for other in others:
                each = values.get(other)
                cells.append(
                    f"{each['median']:.2f} ({each['quartiles'][0]:.2f} to {each['quartiles'][1]:.2f})" if each else "-"
                )
            print(f"| {domain} | {way} | " + " | ".join(cells) + " |", flush=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Median speed-up over our own loop by domain and number of masks, one panel a setting."""
    columns = min(3, len(results))
    lines = -(-len(results) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), sharey=True, squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.set_visible(False)
    for axis, (name, figures) in zip(axes.flat, results.items(), strict=False):
        for domain, ways_of in figures["speed_up"].items():
            own = [way for way in ways_of if way not in OTHERS]
            medians = [ways_of[way]["autoregressive"]["median"] for way in own]
            fixed, width = sum(way.isdigit() for way in own), 2 if domain == "overall" else 1
            (line,) = axis.plot(own[:fixed], medians[:fixed], marker="o", linewidth=width, label=domain)
            axis.plot(own[fixed:], medians[fixed:], marker="s", linestyle="none", color=line.get_color())
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set_title(name)
        axis.set_xlabel("masks")
        axis.tick_params(axis="x", labelsize=8)
    for line in axes:
        line[0].set_ylabel("speed-up over autoregressive")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--prompts", default="package://demo/prompts.jsonl")
    parser.add_argument("--num_prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--masks",
        nargs="+",
        choices=[*map(str, range(1, 65)), "blocks", "auto"],
        default=[*map(str, range(1, 9)), "blocks", "auto"],
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--compile", choices=["true", "false"], default="false")
    parser.add_argument("--output", default="runs/speed")
    args = parser.parse_args()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        model = MTPModel.from_pretrained(args.model, dtype=dtype)
        base = load_base(model.base.name_or_path, dtype=dtype)
        base.generation_config.eos_token_id = None
        prompts = read_prompts(args.prompts, model.tokenizer, args.num_prompts)
        for batch in args.batch_sizes:
            name = f"{dtype}, batch {batch}"
            results[name] = measure(
                model,
                base,
                prompts,
                batch,
                args.tokens,
                args.masks,
                args.rounds,
                args.compile == "true",
                args.temperature,
            )
            report(name, results[name])
            text = json.dumps({"arguments": vars(args), "threads": torch.get_num_threads(), "results": results}, indent=1)
            (folder / "speed.json").write_text(text, encoding="utf-8")
    plot(results, folder / "speed.png")


if __name__ == "__main__":
    main()
