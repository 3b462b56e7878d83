# SPDX-License-Identifier: Apache-2.0
"""Are texts sampled with our plugin distributed as plain vLLM's? Two-sample chi-square over the first tokens of many texts.

    python benchmarks/vllm/sampling.py SAVED_FOLDER --temperatures 0.7 1 --texts 600

``z`` of a chi-square value is about normal where the distributions are the same: 1 in 1,000 is above 3.1. ``--unrepaired``
also shows vLLM's CPU build as it is (its issue 55005).
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter

from engines import demo_prompts, set_blocks, start, stop
from vllm import SamplingParams

FIRST_TOKENS = 4
LIMIT = 4.0


def samples(
    folder: str, ours: bool, prompts: list[str], args: argparse.Namespace, repair: bool = True, seed: int = 0
) -> list[list[tuple]]:
    """For each temperature and prompt: the first tokens of many texts."""
    import vllm.v1.sample.rejection_sampler as sampler

    before = sampler.expand_batch_to_tokens
    engine = start(folder, ours, "float32", args.num_masks, max_num_seqs=16, seed=seed)
    if ours:
        set_blocks(engine, args.decoding, args.num_masks)
    if not repair:
        sampler.expand_batch_to_tokens = before
    found = []
    for temperature in args.temperatures:
        params = SamplingParams(temperature=temperature, max_tokens=FIRST_TOKENS, n=args.texts, ignore_eos=True)
        for output in engine.generate(prompts, params, use_tqdm=False):
            found.append([tuple(answer.token_ids) for answer in output.outputs])
    stop(engine)
    sampler.expand_batch_to_tokens = before
    return found


def z_value(one: list[tuple], other: list[tuple]) -> tuple[float, int]:
    """Wilson and Hilferty's z of the chi-square value, and its degrees of freedom; rare outcomes are taken together."""
    counts, others = Counter(one), Counter(other)
    cells = [(counts[key], others[key]) for key in counts | others if counts[key] + others[key] >= 10]
    rest = (len(one) - sum(a for a, _ in cells), len(other) - sum(b for _, b in cells))
    cells += [rest] if sum(rest) else []
    share = len(one) / (len(one) + len(other))
    chi2 = sum((a - (a + b) * share) ** 2 / ((a + b) * share * (1 - share)) for a, b in cells)
    freedom = len(cells) - 1
    if not freedom:
        return 0.0, 0
    return ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom)), freedom


def compare(name: str, one: list[list[tuple]], other: list[list[tuple]]) -> float:
    """Print the values of each temperature, prompt and number of tokens; returns the largest."""
    values = []
    for a, b in zip(one, other, strict=True):
        for tokens in range(1, FIRST_TOKENS + 1):
            values.append(z_value([text[:tokens] for text in a], [text[:tokens] for text in b]))
    print(name, ", ".join(f"{z:.1f} ({freedom})" for z, freedom in values), flush=True)
    return max(z for z, _ in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.7, 1.0])
    parser.add_argument("--texts", type=int, default=600)
    parser.add_argument("--num_masks", type=int, default=8)
    parser.add_argument("--decoding", default="quadratic")
    parser.add_argument("--unrepaired", action="store_true")
    args = parser.parse_args()
    prompts = demo_prompts(100)
    prompts = [prompts[0], prompts[-1]]
    print(f"z (degrees of freedom) of the first 1 to {FIRST_TOKENS} tokens; by temperature, then prompt")
    plain = samples(args.folder, False, prompts, args)
    compare("plain against plain:  ", samples(args.folder, False, prompts, args, seed=1), plain)
    if args.unrepaired:
        compare("ours, vLLM as it is:  ", samples(args.folder, True, prompts, args, repair=False, seed=2), plain)
    largest = compare("ours against plain:   ", samples(args.folder, True, prompts, args, seed=2), plain)
    print(f"{'ok  ' if largest < LIMIT else 'FAIL'} sampling: largest z {largest:.1f}")
    sys.exit(largest >= LIMIT)


if __name__ == "__main__":
    main()
