# SPDX-License-Identifier: Apache-2.0
"""Tokens per second, and time of a decoding step, of our plugin over stock vLLM's, in one process and interleaved.

    python benchmarks/vllm/speed.py SAVED_FOLDER --prompts prompts.jsonl --dtype bfloat16 --batches 1 4 16

``auto`` is the load table that the plugin made when it started; ``plain``, ``quadratic:2``, ``alternating:4`` are fixed.
Times are CPU seconds of this process, so that others on the machine matter less; ratios are medians over groups of prompts,
with the quartiles. The pass over the prompts is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time

from engines import read_prompts, set_blocks, start, take_steps
from vllm import LLM, SamplingParams


def measure(engine: LLM, prompts: list[list[int]], tokens: int) -> tuple[float, int, list[list[int]]]:
    """CPU seconds and number of decoding passes, and the texts."""
    core = engine.llm_engine
    for i, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        core.add_request(str(i), {"prompt_token_ids": prompt}, params)
    core.step()
    begin, steps, texts = time.process_time(), 0, {}
    while core.has_unfinished_requests():
        texts |= {output.request_id: list(output.outputs[0].token_ids) for output in core.step()}
        steps += 1
    return time.process_time() - begin, steps, [texts[str(i)] for i in range(len(prompts))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--prompts", help=".jsonl file of messages. Default: the demo's texts")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num_masks", type=int, default=4)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", default=["auto", "plain", "quadratic:2"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--groups", type=int, default=6, help="groups of prompts for each batch size")
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default")
    args = parser.parse_args()
    options = {"max_num_seqs": 16, "enable_prefix_caching": False, "enforce_eager": not args.compile, "max_model_len": 1024}
    stock = start(args.folder, False, args.dtype, **options)
    ours = start(args.folder, True, args.dtype, args.num_masks, **options)
    automatic = set_blocks(ours, "auto", args.num_masks)
    print(f"{args.dtype}, load table at start: {automatic}", flush=True)
    for batch in args.batches:
        prompts = read_prompts(args.prompts, batch * args.groups, stock.get_tokenizer())
        groups = [prompts[:batch], *(prompts[i * batch : (i + 1) * batch] for i in range(args.groups))]
        results: dict[str, list[tuple[float, ...]]] = {kind: [] for kind in args.kinds}
        for number, group in enumerate(groups):  # the first warms up
            seconds, steps, texts = measure(stock, group, args.tokens)
            for kind in args.kinds:
                decoding, _, masks = kind.partition(":")
                set_blocks(ours, decoding, int(masks or args.num_masks))
                take_steps(ours)
                own_seconds, own_steps, own_texts = measure(ours, group, args.tokens)
                same = sum(a == b for a, b in zip(texts, own_texts, strict=True))
                if number:
                    ratio = own_seconds / own_steps / (seconds / steps)
                    results[kind].append((seconds / own_seconds, ratio, same, batch * args.tokens / take_steps(ours)))
        for kind, rows in results.items():
            speed, step = (statistics.quantiles([row[i] for row in rows], n=4) for i in (0, 1))
            print(
                f"batch {batch:2}, {kind:12} speed {speed[1]:.2f} ({speed[0]:.2f} to {speed[2]:.2f}),"
                f" step {step[1]:.2f} ({step[0]:.2f} to {step[2]:.2f}),"
                f" {statistics.mean(row[3] for row in rows):.2f} tokens a step,"
                f" {sum(row[2] for row in rows):.0f}/{batch * args.groups} texts equal",
                flush=True,
            )


if __name__ == "__main__":
    main()
