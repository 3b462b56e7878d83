# SPDX-License-Identifier: Apache-2.0
"""Many requests at once with random lengths, stop strings and aborts: texts are right and no page of the KV cache is lost.

python benchmarks/vllm/stress.py SAVED_FOLDER --requests 500
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import Any

from engines import demo_prompts, start, stop
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from mtp_lightning.integrations.vllm.settings import KEY

LOADS = [[1, "quadratic", 4], [4, "alternating", 4], [8, "linear", 4]]
"""More requests than 8 are plain: a run has all kinds."""


def requests(number: int) -> list[tuple[str, SamplingParams, int]]:
    """Prompt, parameters, and the step at which the request is aborted (-1: it is not)."""
    generator, prompts = random.Random(0), demo_prompts(50)
    chosen = []
    for _ in range(number):
        prompt = generator.choice(prompts)
        words = prompt[: generator.randint(1, len(prompt))] * generator.randint(1, 3)
        params = SamplingParams(
            temperature=0,
            max_tokens=generator.randint(1, 60),
            stop=generator.choice([None, None, ["\n"], ["e", "q"]]),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        chosen.append((words, params, generator.randint(1, 300) if generator.random() < 0.2 else -1))
    return chosen


def run(engine: LLM, chosen: list[tuple[str, SamplingParams, int]]) -> dict[str, str]:
    """Texts by request; of aborted ones none, as they end wherever the abort meets them."""
    core, texts = engine.llm_engine, {}
    for i, (prompt, params, _) in enumerate(chosen):
        core.add_request(str(i), prompt, params)
    steps = 0
    while core.has_unfinished_requests():
        for output in core.step():
            texts[output.request_id] = output.outputs[0].text
        steps += 1
        if now := [str(i) for i, (*_, at) in enumerate(chosen) if at == steps]:
            core.abort_request(now)
    return {name: text for name, text in texts.items() if chosen[int(name)][2] < 0}


def free_pages(engine: LLM) -> int:
    """Pages that no request holds; cached ones count as free."""
    return int(engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--num_masks", type=int, default=8)
    args = parser.parse_args()
    chosen, found, lost = requests(args.requests), {}, 0
    for ours in (False, True):
        options: dict[str, Any] = {
            "num_gpu_blocks_override": 48,
            "block_size": 32,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 640,
        }
        if ours:
            options["additional_config"] = {KEY: {"folder": args.folder, "load_table": LOADS}}
        engine = start(args.folder, ours, "float32", args.num_masks, **options)
        before = free_pages(engine)
        found[ours] = run(engine, chosen)
        lost = before - free_pages(engine)
        stop(engine)
    names = [str(i) for i, (*_, at) in enumerate(chosen) if at < 0]
    number = sum(found[True].get(name) == found[False].get(name) is not None for name in names)
    ok = number == len(names) and lost == 0
    print(
        f"{'ok  ' if ok else 'FAIL'} {args.requests} requests, {args.requests - len(names)} of them to be aborted:"
        f" {number}/{len(names)} texts of the others equal plain vLLM's, {lost} pages lost"
    )
    sys.exit(not ok)


if __name__ == "__main__":
    main()
