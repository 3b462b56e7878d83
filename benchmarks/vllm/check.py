# SPDX-License-Identifier: Apache-2.0
"""Is our plugin's text plain vLLM's, with our own decoder's steps? Prints a line for each check; exit code 1 if one fails.

    python benchmarks/vllm/check.py SAVED_FOLDER --dtype float32 --parts texts features memory

Equal texts alone would prove little: verification repairs whatever is drafted. Equal steps show that drafts are right too.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from engines import (
    base_of,
    demo_prompts,
    greedy,
    greedy_ids,
    metrics,
    our_steps,
    read_prompts,
    set_blocks,
    start,
    stop,
    take_steps,
)
from vllm import LLM, SamplingParams
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from mtp_lightning import MTPModel
from mtp_lightning.integrations.vllm.load_table import KINDS

FAILED: list[str] = []
TIES = {"float32": 0.0, "bfloat16": 0.5}
"""How far apart the two best tokens may be where a text differs from plain vLLM's."""


def report(name: str, ok: bool, detail: str) -> None:
    """Print a check's outcome."""
    print(f"{'ok  ' if ok else 'FAIL'} {name}: {detail}", flush=True)
    if not ok:
        FAILED.append(name)


def equal(texts: list[Any], others: list[Any]) -> int:
    return sum(a == b for a, b in zip(texts, others, strict=True))


def differences(found: list[list[int]], plain: list[CompletionOutput]) -> list[tuple[int, float]]:
    """Of each text that is not plain vLLM's: where it first differs, and how many nats its two best tokens are apart."""
    result = []
    for ids, answer in zip(found, plain, strict=True):
        pairs = enumerate(zip_longest(ids, answer.token_ids))
        if (at := next((at for at, (a, b) in pairs if a != b), None)) is not None:
            # Without log-probabilities there, plain vLLM's text ends: no tie.
            scores = answer.logprobs[at].values() if at < len(answer.logprobs) else ()
            best = sorted((entry.logprob for entry in scores), reverse=True)
            result.append((at, best[0] - best[1] if best else math.inf))
    return result


def compare_texts(
    name: str, dtype: str, found: list[list[int]], plain: list[CompletionOutput], more: str = "", ok: bool = True
) -> None:
    """Texts must be plain vLLM's; in bfloat16 one may differ from where the two best tokens are a near tie."""
    different = differences(found, plain)
    words = f"{len(plain) - len(different)}/{len(plain)} texts equal"
    if different:
        words += f", others until tokens {', '.join(f'{at} (best two {gap:.2f} apart)' for at, gap in different)}"
    report(name, max((gap for _, gap in different), default=0.0) <= TIES[dtype] and ok, words + more)


def texts(args: argparse.Namespace, prompts: list[str]) -> None:
    """All kinds of drafting, one prompt at a time and all together."""
    model = MTPModel.from_pretrained(args.folder, dtype=args.dtype)
    tokens = read_prompts(args.file, args.prompts, model.tokenizer)
    ours = {kind: our_steps(model, tokens, args.tokens, kind, args.num_masks) for kind in KINDS}
    del model
    # vLLM may load the base's tokenizer by another class, so it gets ids.
    inputs = [{"prompt_token_ids": ids} for ids in tokens]
    engine = start(args.folder, False, args.dtype)
    plain = {together: greedy(engine, inputs, together, max_tokens=args.tokens, logprobs=2) for together in (True, False)}
    stop(engine)
    alone = [list(answer.token_ids) for answer in plain[False]]
    compare_texts("plain vLLM, one at a time against together", args.dtype, alone, plain[True])
    engine = start(args.folder, True, args.dtype, args.num_masks)
    for kind, (our_texts, expected) in ours.items():
        set_blocks(engine, kind, args.num_masks)
        for together in (True, False):
            take_steps(engine)
            found = greedy_ids(engine, inputs, together, max_tokens=args.tokens)
            steps = take_steps(engine)
            # In bfloat16 rounding of other shapes decides between drafts that are equally good, and between such texts.
            close = steps == expected if args.dtype == "float32" else abs(steps / expected - 1) < 0.1
            name = f"{kind}, {'together' if together else 'one at a time'}"
            more = f"; {steps} steps, {sum(map(len, found)) / steps:.2f} tokens a step; our decoder {expected} steps,"
            more += f" {len(our_texts) - len(differences(our_texts, plain[together]))}/{len(prompts)} of its texts equal"
            compare_texts(name, args.dtype, found, plain[together], more, close)
    stop(engine)


FEATURES: dict[str, dict[str, Any]] = {
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "grammar (regex)": {"structured_outputs": StructuredOutputsParams(regex=r"[a-z ]{5,20}\.")},
    "grammar (choice)": {"structured_outputs": StructuredOutputsParams(choice=["yes", "no", "perhaps"])},
    "min_tokens": {"min_tokens": 40},
    "stop string": {"stop": ["\n", "the"]},
    "bad_words": {"bad_words": [" the", " self"]},
    "logprobs": {"logprobs": 2, "prompt_logprobs": 1},
    "to the end of the context": {"max_tokens": 500},
    "the same again (prefix cache)": {},
}


def answers(engine: LLM, prompts: list[str], options: dict[str, Any]) -> list[Any]:
    """Ids, texts and log-probabilities (three decimals)."""
    params = SamplingParams(temperature=0, **({"max_tokens": 48} | options))
    result = []
    for output in engine.generate(prompts, params, use_tqdm=False):
        answer = output.outputs[0]
        scores = [round(entry[t].logprob, 3) for t, entry in zip(answer.token_ids, answer.logprobs or [], strict=False)]
        result.append((list(answer.token_ids), answer.text, scores))
    return result


def streamed(engine: LLM, prompts: list[str], abort: set[int]) -> list[str]:
    """Texts put together from what each step added; some requests are aborted after 10 steps and left out."""
    params = SamplingParams(temperature=0, max_tokens=48, output_kind=RequestOutputKind.DELTA)
    pieces: dict[str, list[str]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.llm_engine.add_request(str(i), prompt, params)
    steps = 0
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            pieces[output.request_id].append(output.outputs[0].text)
        steps += 1
        if steps == 10:
            engine.llm_engine.abort_request([str(i) for i in abort])
    return ["".join(pieces[str(i)]) for i in range(len(prompts)) if i not in abort]


def features(args: argparse.Namespace, prompts: list[str]) -> None:
    """What requests may ask for, streaming, and aborts."""
    shared = ["x = 1\n" * 40 + prompt for prompt in prompts]
    aborted = {1, 4}
    found: dict[bool, dict[str, Any]] = {}
    for ours in (False, True):
        engine = start(args.folder, ours, args.dtype, args.num_masks)
        if ours:
            set_blocks(engine, args.decoding, args.num_masks)
        one = found[ours] = {name: answers(engine, prompts, options) for name, options in FEATURES.items()}
        one["shared beginning (prefix cache)"] = answers(engine, shared, {"max_tokens": 24})
        one["streaming"] = streamed(engine, prompts, set())
        one["abort in the middle, the others"] = streamed(engine, prompts, aborted)
        stop(engine)
    for name in found[True]:
        number = equal(found[True][name], found[False][name])
        report(f"{args.decoding}, {name}", number == len(found[True][name]), f"{number}/{len(found[True][name])} equal")


def memory(args: argparse.Namespace, prompts: list[str]) -> None:
    """Prompts in chunks, one at a time; and so few pages that requests are preempted."""
    model = MTPModel.from_pretrained(args.folder, dtype=args.dtype)
    cut = [model.tokenizer((prompt + "\n") * 30).input_ids[:300] for prompt in prompts]
    expected = our_steps(model, cut[:2], args.tokens, args.decoding, args.num_masks)[1]
    del model
    # A prompt takes 10 pages: half of the requests get in, and then there is no page for their answers. Page 0 is vLLM's.
    pages = 10 * (len(prompts) // 2) + 1
    inputs, found, steps, counters = [{"prompt_token_ids": ids} for ids in cut], {}, 0, {}
    for ours in (False, True):
        options = {"num_gpu_blocks_override": pages, "max_num_batched_tokens": 288, "block_size": 32}
        engine = start(args.folder, ours, args.dtype, args.num_masks, disable_log_stats=False, **options)
        if ours:
            set_blocks(engine, args.decoding, args.num_masks)
        chunked = greedy_ids(engine, inputs[:2], together=False, max_tokens=args.tokens)
        steps = take_steps(engine) if ours else 0
        found[ours] = chunked, greedy_ids(engine, inputs, max_tokens=args.tokens * 2)
        counters = metrics(engine)
        stop(engine)
    numbers, preempted = [equal(*both) for both in zip(*found.values(), strict=True)], counters["vllm:num_preemptions"]
    report(
        f"{args.decoding}, chunked prompts",
        numbers[0] == 2 and steps == expected,
        f"{numbers[0]}/2 texts equal, {steps} steps, our decoder {expected}",
    )
    report(
        f"{args.decoding}, preemption",
        numbers[1] == len(prompts) and preempted > 0,
        f"{numbers[1]}/{len(prompts)} texts equal, {preempted:.0f} preemptions,"
        f" {counters['vllm:spec_decode_num_accepted_tokens']:.0f} draft tokens accepted",
    )


def refusal(args: argparse.Namespace, prompts: list[str]) -> None:
    """The engine refuses at start what the plugin can't serve (tests/integrations/vllm has all of it)."""
    try:
        stop(start(args.folder, True, args.dtype, args.num_masks, enable_lora=True))
    except Exception as error:  # vLLM wraps ours
        report("refused: enable_lora", "enable_lora" in str(error), str(error)[:200])
    else:
        report("refused: enable_lora", False, "the engine started")


PARTS: dict[str, Callable[[argparse.Namespace, list[str]], None]] = {
    "texts": texts,
    "features": features,
    "memory": memory,
    "refusal": refusal,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--dtype", choices=TIES, default="float32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--decoding", choices=KINDS, default="quadratic", help="of the parts features and memory")
    parser.add_argument("--num_masks", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--file", help="of the part texts: .jsonl file of messages. Default: the demo's texts")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    print(f"# {args.folder}, base {base_of(args.folder)}, {args.dtype}, {args.num_masks} masks", flush=True)
    for part in args.parts:
        PARTS[part](args, demo_prompts(args.prompts))
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
