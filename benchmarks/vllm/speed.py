# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step, and tokens per second, of our plugin over plain vLLM's, in one process and interleaved.

    python benchmarks/vllm/speed.py SAVED_FOLDER --dtype bfloat16 --num_masks 4 --batches 1 4 16

Both are the same engine: plain steps are those of a load table without rows, which add no mask. Times are CPU seconds of
this process, so that others on the machine matter less; the ratios are medians over pairs, with the quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time

from check import demo_prompts
from engines import set_blocks, start, take_steps
from vllm import LLM, SamplingParams

from mtp_lightning.integrations.vllm.load_table import blocks_of


def measure(engine: LLM, prompts: list[str], tokens: int) -> tuple[float, float, float]:
    """CPU seconds and tokens of decoding steps, the first left out, and their number."""
    core = engine.llm_engine
    for i, prompt in enumerate(prompts):
        core.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    core.step()
    take_steps(engine)
    begin, steps, last = time.process_time(), 0, 0
    while core.has_unfinished_requests() and not last:
        outputs = core.step()
        steps += 1
        last = sum(output.finished for output in outputs)  # until the first one ends: the batch has its full size
    seconds = time.process_time() - begin
    rows = take_steps(engine)
    core.abort_request([str(i) for i in range(len(prompts))])
    while core.has_unfinished_requests():
        core.step()
    return seconds, steps, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num_masks", type=int, default=4)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--kinds", nargs="+", default=["quadratic", "linear"])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile, vLLM's default")
    args = parser.parse_args()
    options = {"max_num_seqs": 16, "enable_prefix_caching": False, "enforce_eager": not args.compile}
    engine = start(args.folder, True, args.dtype, args.num_masks, **options)
    for batch in args.batches:
        prompts = demo_prompts(batch)
        # More masks than this never pay on a CPU, and take minutes to measure.
        kinds = [kind for kind in args.kinds if batch * blocks_of(kind, args.num_masks).rows <= 128]
        results: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for pair in range(args.pairs + 1):  # the first warms up
            set_blocks(engine, "plain", args.num_masks)
            plain_seconds, plain_steps, _ = measure(engine, prompts, args.tokens)
            for kind in kinds:
                set_blocks(engine, kind, args.num_masks)
                seconds, steps, _ = measure(engine, prompts, args.tokens)
                if pair:
                    step = (seconds / steps) / (plain_seconds / plain_steps)
                    # Until the first request ends all have gained about as many tokens.
                    results[kind].append((step, plain_seconds / seconds))
        for kind, pairs in results.items():
            step, speed = (statistics.quantiles([pair[i] for pair in pairs], n=4) for i in (0, 1))
            print(
                f"batch {batch:2}, {kind:9}: step / plain {step[1]:.2f} ({step[0]:.2f} to {step[2]:.2f});"
                f" speed / plain until the first text ends {speed[1]:.2f} ({speed[0]:.2f} to {speed[2]:.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
