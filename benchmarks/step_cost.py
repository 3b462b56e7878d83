# SPDX-License-Identifier: Apache-2.0
"""Time of a decoding step over one transformers forward pass of the same number of positions, in interleaved pairs.

``python benchmarks/step_cost.py MODEL`` prints a Markdown table. A step is everything between two yields of
``decode``: layout, masks, the forward pass with adapters, verification, the chain of the sampler head and reading the
tokens. The other side of a pair is the plain base, loaded separately: one forward pass over the same number of
embedded positions with a cache of the same length, the unembedding of the positions that the step verifies, argmax,
reading them, and a crop of the cache. The two sides of a pair alternate; median and quartiles of the ratio are over
all pairs of a text.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from transformers import DynamicCache

from mtp_lightning import MTPModel
from mtp_lightning.decoding.execution.step import StepInput
from mtp_lightning.decoding.loop import decode
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.modeling.base import load_base
from mtp_lightning.modeling.transformers_private import cache_keyword


@torch.inference_mode()
def pairs(
    model: MTPModel, base: Any, options: DecodingOptions, prompt: torch.Tensor, warm_up: int = 8
) -> tuple[int, list[Any]]:
    """Positions of a full step, and (seconds of a step, seconds of the forward pass) for each full step of a text."""
    fed: list[StepInput] = []
    handle = model.register_forward_pre_hook(lambda _, args: fed.append(args[0]))
    found, cache = [], DynamicCache()
    named = {cache_keyword(type(base.get_decoder())): cache}
    base(prompt[None], logits_to_keep=1, **named)
    steps, full = decode(model, prompt, options), 0
    while True:
        begin = time.perf_counter()
        if next(steps, None) is None:
            break
        ours = time.perf_counter() - begin
        step = fed[-1]
        size, length = step.layouts[0].size, step.lengths[0] - 1
        if len(fed) == 1:
            continue
        full = max(full, size)
        # The same length of cache, whatever it holds.
        while cache.get_seq_length() < length:
            base(step.tokens[:, :1], logits_to_keep=1, **named)
        inputs = base.get_input_embeddings()(step.tokens[:, :1]).expand(-1, size, -1)
        mask = torch.ones(1, 1, size, length + size, dtype=torch.bool, device=inputs.device)
        begin = time.perf_counter()
        out = base(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=step.position_ids,
            logits_to_keep=step.num_drafts + 1,
            **named,
        )
        out.logits.argmax(-1).tolist()
        cache.crop(-size)
        found.append((size, ours, time.perf_counter() - begin))
    handle.remove()
    return full, [(a, b) for size, a, b in found[warm_up:] if size == full]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--masks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args()
    model = MTPModel.from_pretrained(args.model, dtype=args.dtype)
    base = load_base(model.base.name_or_path, dtype=args.dtype)
    prompt = model.tokenizer(args.prompt, return_tensors="pt").input_ids[0]
    print("| decoding | positions | pairs | step, ms | forward, ms | ratio | quartiles |\n|---|---|---|---|---|---|---|")
    rows: list[tuple[str, DecodingOptions]] = [("autoregressive", DecodingOptions("autoregressive", eos_token_id=[]))]
    for masks in args.masks:
        for head in (True, False):
            name = f"quadratic, {masks} masks, {'sampler head' if head else 'base head'}"
            rows.append((name, DecodingOptions(num_masks=masks, sampler_head=head, eos_token_id=[])))
    for name, options in rows:
        options.max_new_tokens = args.tokens
        positions, found = pairs(model, base, options, prompt)
        times = torch.tensor(found, dtype=torch.float64)
        low, ratio, high = (times[:, 0] / times[:, 1]).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        ours, theirs = (1e3 * times.median(0).values).tolist()
        print(
            f"| {name} | {positions} | {len(found)} | {ours:.2f} | {theirs:.2f} | {ratio:.2f} | {low:.2f} to {high:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
